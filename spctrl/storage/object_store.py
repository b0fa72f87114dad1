"""Storage in an object store, reached through fsspec: any of its URLs will do, such as ``s3://bucket/prefix``."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from spctrl.extras import missing_package
from spctrl.output.secrets import has_unquoted_password, masked, masked_url, remember
from spctrl.storage.base import Files, Info, checked_name
from spctrl.storage.files import (
    StoreError,
    cannot_write,
    file_digest,
    is_temporary,
    temporary_name,
    too_large,
)

PATTERN_LETTERS = frozenset("*?[")
"""In names of several files fsspec takes them for patterns."""


class ObjectStore(Files):
    """Files in an object store, where each is written in one request and a listing gives a thousand.

    There are no locks: writers of one name write the same bytes, or take turns by other means. ``root``, which messages
    name, has no password; ``address`` has.
    """

    def __init__(self, url: str) -> None:
        remember(url)
        self._url = url
        self.root = masked_url(url)

    @property
    def address(self) -> str:
        return self._url

    @property
    def _system(self) -> Any:
        """The file system, which fsspec keeps for each process: one taken over a fork would hang."""
        try:
            import fsspec

            remember(fsspec.config.conf)
            # Other machines write there too, so listings are not kept.
            return fsspec.core.url_to_fs(self._url, use_listings_cache=False)[0]
        except ImportError as error:
            reason = missing_package("s3fs") if self._url.startswith("s3:") else masked(str(error))
            raise StoreError(f"cannot reach {self.root}: {reason}") from error
        except ValueError as error:
            if has_unquoted_password(self._url):
                # Not from the error, which quotes a part of the password.
                raise StoreError(
                    f"cannot reach {self.root}: expected a password in which / is written %2F, ? %3F and # %23, found "
                    "one with such letters ([paths] in luigi.cfg, where each % is doubled)"
                ) from None
            raise StoreError(
                f"cannot reach {self.root}: {masked(str(error))}. Expected a folder or a URL that fsspec knows "
                "([paths] in luigi.cfg)"
            ) from error

    @functools.cached_property
    def _top(self) -> str:
        return str(self._system._strip_protocol(self._url)).rstrip("/")

    def _key(self, name: str) -> str:
        return f"{self._top}/{checked_name(name, self.root)}"

    def _name(self, key: str) -> str:
        return key.removeprefix("/").removeprefix(f"{self._top.removeprefix('/')}/")

    def read(self, name: str, *, max_bytes: int | None = None) -> bytes:
        if max_bytes is not None and (size := self._size(name) or 0) > max_bytes:
            raise too_large(self.place(name), size, max_bytes)
        with self._faults("read", name):
            return bytes(self._system.cat_file(self._key(name)))

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        with self._faults("read", name), self._system.open(self._key(name), "rb") as file:
            yield file

    def read_many(self, names: Sequence[str]) -> dict[str, bytes]:
        if not names:
            return {}
        keys = [self._key(name) for name in names]
        with self._faults("read", names[0]):
            # Not cat(), to which names with brackets are patterns.
            found = self._system.cat_ranges(keys, None, None, on_error="return")
            for each in found:
                if isinstance(each, Exception) and not isinstance(each, FileNotFoundError):
                    raise each
        return {
            name: bytes(data)
            for name, data in zip(names, found, strict=True)
            if not isinstance(data, Exception)
        }

    def write(self, name: str, data: bytes) -> None:
        with self._faults("write", name):
            self._system.pipe_file(self._key(name), data)

    @contextmanager
    def create(self, name: str) -> Iterator[Path]:
        import tempfile

        key = self._key(name)
        with tempfile.TemporaryDirectory(prefix="spctrl-") as folder:
            temporary = Path(folder, PurePosixPath(name).name)
            try:
                yield temporary
            except OSError as error:
                raise cannot_write(temporary, error) from error
            with self._faults("write", name):
                self._system.put_file(str(temporary), key)

    def fetch(self, name: str, folder: Path, *, digest: str | None = None) -> Path:
        path = folder / checked_name(name, self.root)
        if path.is_file():
            return path
        temporary = path.with_name(temporary_name(path.name))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._faults("read", name):
                self._system.get_file(self._key(name), str(temporary))
                expected = digest or f"{self._system.size(self._key(name)):,} bytes"
            found = file_digest(temporary) if digest else f"{temporary.stat().st_size:,} bytes"
            if expected != found:
                raise StoreError(
                    f"cannot read {self.place(name)}: expected {expected}, found {found}. Run again; if it stays so, "
                    "`spctrl verify` drops what is damaged"
                )
            temporary.replace(path)
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise cannot_write(path, error) from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        return path

    def listing(self, prefix: str) -> dict[str, Info]:
        with self._faults("list", prefix):
            try:
                found = self._system.find(self._key(prefix).rstrip("/"), detail=True)
            except FileNotFoundError:
                return {}
        return {
            self._name(key): Info(int(info["size"]), _modified_at_s(info))
            for key, info in found.items()
            # A folder that another process began after the listing comes as one; browsers of buckets leave empty
            # objects for folders.
            if info["type"] == "file" and not key.endswith("/")
        }

    def folders(self) -> list[str]:
        return sorted(name for name, each in self._at_top().items() if each["type"] == "directory")

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """By a listing of each folder, as asking for one file costs as much as a list of a thousand.

        Files at the top are asked for one by one: a listing there would be one of all that there is.
        """
        wanted = set(names)
        at_top = {name for name in wanted if "/" not in name}
        folders = {PurePosixPath(name).parent.as_posix() for name in wanted - at_top}
        tops = [
            each
            for each in folders
            if not any(str(parent) in folders for parent in PurePosixPath(each).parents)
        ]
        found = {name: info.size for folder in tops for name, info in self.listing(folder).items()}
        found |= {name: size for name in at_top if (size := self._size(name)) is not None}
        return {name: found[name] for name in wanted & found.keys()}

    def _size(self, name: str) -> int | None:
        try:
            with self._faults("read", name):
                found = self._system.info(self._key(name))
        except FileNotFoundError:
            return None
        return int(found["size"]) if found["type"] == "file" else None

    def remove(self, names: Iterable[str]) -> None:
        keys = [self._key(name) for name in names]
        patterns = [key for key in keys if not PATTERN_LETTERS.isdisjoint(key)]
        together = [key for key in keys if PATTERN_LETTERS.isdisjoint(key)]
        if not keys:
            return
        with self._faults("remove", self._name(keys[0])):
            try:
                if together:
                    self._system.rm(together)
            except FileNotFoundError:  # some file systems stop at the first that is not there
                patterns = keys
            for key in patterns:
                with suppress(FileNotFoundError):
                    self._system.rm_file(key)

    def leftovers(self, older_than_s: float) -> dict[str, Info]:
        """Those at the top; parts of an upload that was cut off are the bucket's, whose rules remove them."""
        infos = {
            name: Info(int(each["size"]), _modified_at_s(each))
            for name, each in self._at_top().items()
            if each["type"] == "file" and is_temporary(name)
        }
        now = time.time()
        return {name: info for name, info in infos.items() if now - info.modified_at_s > older_than_s}

    def _at_top(self) -> dict[str, dict[str, Any]]:
        """What the file system says of the files and folders at the top, by name."""
        with self._faults("list", ""):
            try:
                return {self._name(each["name"]): each for each in self._system.ls(self._top, detail=True)}
            except FileNotFoundError:
                return {}

    def exclusive(
        self, name: str, activity: str, notify: Callable[[str], object]
    ) -> AbstractContextManager[None]:
        return nullcontext()

    def digest(self, name: str) -> str:
        with self._faults("read", name), self._system.open(self._key(name), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def version(self, name: str) -> str:
        """Short name of a file's present contents: of its ETag, which object stores have instead of a reliable time."""
        with self._faults("read", name):
            info = self._system.info(self._key(name))
        tag = info.get("ETag") or info.get("etag") or info.get("md5Hash") or _modified_at_s(info)
        return hashlib.blake2b(f"{tag} {info['size']}".encode(), digest_size=8).hexdigest()

    @contextmanager
    def _faults(self, doing: str, name: str) -> Iterator[None]:
        """What is not understood of an answer is an error of the store, whatever the library calls it."""
        try:
            yield
        except StoreError:
            raise
        except FileNotFoundError as error:
            if doing == "read":
                raise
            raise self._cannot(doing, name, error) from error
        except Exception as error:
            raise self._cannot(doing, name, error) from error

    def _cannot(self, doing: str, name: str, error: Exception) -> StoreError:
        reason = masked(f"{type(error).__name__}: {error}").rstrip(": .")
        return StoreError(
            f"cannot {doing} {self.place(name)}: {reason}. What was finished before stays; see to the network and "
            "the credentials ([paths] in luigi.cfg says where things go), then run again"
        )


def _modified_at_s(info: dict[str, Any]) -> float:
    """File systems name it differently; what says nothing of its age counts as new."""
    names = ("LastModified", "mtime", "updated", "last_modified", "created")
    found = next((info[name] for name in names if info.get(name) is not None), None)
    if isinstance(found, datetime):
        return found.timestamp()
    return float(found) if isinstance(found, int | float) else time.time()

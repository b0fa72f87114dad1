"""Files below one place: a folder, or a prefix in an object store.

Names are posix paths below that place. A file is written whole or not at all, so whoever reads it sees all of one
version. Object stores are reached through fsspec, so any of its URLs will do: ``s3://bucket/prefix``.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import os
import stat
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from spctrl.errors import ExpectedError
from spctrl.extras import missing_package
from spctrl.io import locks
from spctrl.io.documents import MAX_DOCUMENT_BYTES, parse_document
from spctrl.io.real_size import is_sparse
from spctrl.output.secrets import has_unquoted_password, masked, masked_url, remember
from spctrl.paths import is_safe_relative_path

TEMPORARY = ".tmp-"
PATTERN_LETTERS = frozenset("*?[")
"""In names of several files fsspec takes them for patterns."""
NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})
"""What systems answer of a file that is not there. Any other answer leaves open whether it is."""


class StoreError(ExpectedError):
    """The store or an export cannot be read or written; the message names the place."""


class FileTooLargeError(StoreError):
    """A file is larger than one that this project wrote can be, or mostly holes: it is damaged."""


class Info(NamedTuple):
    """What a listing says of a file: size in bytes, and when it was written, in seconds since 1970."""

    size: int
    modified_at_s: float


def is_url(place: str | Path) -> bool:
    """Whether a place is elsewhere than on this machine's disks."""
    return "://" in str(place)


class Files(ABC):
    """The files below ``root``; every name is a posix path below it.

    Raises:
        StoreError: a file or the place itself cannot be read or written.
        FileNotFoundError: a file to be read is not there.
    """

    root: str

    @property
    @abstractmethod
    def address(self) -> str:
        """``root``, wherever a process works: an absolute path or the URL."""

    def place(self, name: str) -> str:
        """A file's place in full, for people."""
        return f"{self.root}/{name}"

    @abstractmethod
    def read(self, name: str, *, max_bytes: int | None = None) -> bytes:
        """A file's contents.

        Raises:
            FileTooLargeError: it has more than ``max_bytes``, or is mostly a hole; nothing was read.
        """

    def read_json(self, name: str) -> Any:
        """The content of a small JSON file.

        Raises:
            FileNotFoundError: it is not there.
            StoreError: it cannot be read, or is too large.
            ValueError: it is not JSON, nested too deep, or has texts that cannot be encoded.
        """
        return parse_document(self.read(name, max_bytes=MAX_DOCUMENT_BYTES))

    @abstractmethod
    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A file to read piece by piece."""

    @abstractmethod
    def read_many(self, names: Sequence[str]) -> dict[str, bytes]:
        """The contents of those that are there, read at once where that is faster."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Put a small file there, or another in its place."""

    @abstractmethod
    def create(self, name: str) -> AbstractContextManager[Path]:
        """A path on this machine to write a large file to, which becomes the file at the end."""

    @abstractmethod
    def fetch(self, name: str, folder: Path, *, digest: str | None = None) -> Path:
        """A path on this machine that holds the file: its own, or that of a copy below ``folder``.

        Args:
            name: of the file.
            folder: for copies of this version of it: one that is there already is taken as it is.
            digest: SHA-256 of the file in hex, which a new copy must have.
        """

    @abstractmethod
    def listing(self, prefix: str) -> dict[str, Info]:
        """All files below a folder, and whole ones only; none where there is no such folder."""

    @abstractmethod
    def folders(self) -> list[str]:
        """Names of the folders at the top, sorted."""

    @abstractmethod
    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Sizes in bytes of those that are there."""

    @abstractmethod
    def remove(self, names: Iterable[str]) -> None:
        """Files that are not there are none to remove; folders that this empties go too."""

    @abstractmethod
    def leftovers(self, older_than_s: float) -> dict[str, Info]:
        """Files that a killed writer left half written."""

    @abstractmethod
    def exclusive(
        self, name: str, activity: str, notify: Callable[[str], object]
    ) -> AbstractContextManager[None]:
        """A context that only one process at a time is in, where the place has locks; see ``exclusive`` below."""

    def exists(self, name: str) -> bool:
        return name in self.sizes([name])

    @abstractmethod
    def digest(self, name: str) -> str:
        """SHA-256 of a file in hex, read again."""

    @abstractmethod
    def version(self, name: str) -> str:
        """A short name that changes with the file."""


def files_at(place: str | Path, *, temporaries: str | None = None) -> Files:
    """The files at a folder or a URL.

    Args:
        place: the folder or URL.
        temporaries: folder below it for half written files; by default they lie beside the files that they become.
    """
    if is_url(place):
        return ObjectStore(str(place).rstrip("/"))
    return Folder(Path(place), temporaries)


class Folder(Files):
    """Files on a disk of this machine, or on one that it shares.

    The folder itself may be a symbolic link. Links to folders below it are refused: who made the store or export may
    have them lead anywhere.
    """

    def __init__(self, path: Path, temporaries: str | None = None) -> None:
        self.path = path
        self.root = str(path)
        self._temporaries = temporaries
        self._checked_folders: set[Path] = {path}

    @property
    def address(self) -> str:
        return str(self.path.absolute())

    def read(self, name: str, *, max_bytes: int | None = None) -> bytes:
        with self.open(name) as file:
            return file.read() if max_bytes is None else read_bounded(file, self.place(name), max_bytes)

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        try:
            with open_regular(self.local(name)) as file:
                yield file
        except FileNotFoundError:
            raise
        except OSError as error:
            raise cannot_read(self.place(name), error) from error

    def read_many(self, names: Sequence[str]) -> dict[str, bytes]:
        found = {}
        for name in names:
            with suppress(FileNotFoundError):
                found[name] = self.read(name)
        return found

    def write(self, name: str, data: bytes) -> None:
        write_atomic(self.local(name), data, temporary=self.temporary(name))

    @contextmanager
    def create(self, name: str) -> Iterator[Path]:
        path, temporary = self.local(name), self.temporary(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.replace(path)
        except OSError as error:
            raise cannot_write(path, error) from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def fetch(self, name: str, folder: Path, *, digest: str | None = None) -> Path:
        return self.local(name)

    def listing(self, prefix: str) -> dict[str, Info]:
        # Whoever takes a folder that cannot be read for an empty one remakes, or removes, what is needed.
        return {name: info for name, info in self._walk(prefix, _must_be_gone) if not _is_temporary(name)}

    def folders(self) -> list[str]:
        try:
            return sorted(each.name for each in self.path.iterdir() if each.is_dir())
        except OSError as error:
            _must_be_gone(error)
            return []

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        return {name: found.st_size for name in names if (found := _stat(self.local(name))) is not None}

    def remove(self, names: Iterable[str]) -> None:
        folders = set()
        for name in names:
            path = self.local(name)
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise cannot_write(path, error) from error
            folders |= {parent for parent in path.parents if self.path in parent.parents}
        for folder in sorted(folders, key=lambda each: len(each.parts), reverse=True):
            with suppress(OSError):  # not empty
                folder.rmdir()

    def leftovers(self, older_than_s: float) -> dict[str, Info]:
        return {
            name: info
            for name, info in self._walk(self._temporaries or "")
            if _is_temporary(name) and time.time() - info.modified_at_s > older_than_s
        }

    def exclusive(
        self, name: str, activity: str, notify: Callable[[str], object]
    ) -> AbstractContextManager[None]:
        return exclusive(self.local(name), activity, notify)

    def digest(self, name: str) -> str:
        return file_digest(self.local(name))

    def version(self, name: str) -> str:
        found = self.local(name).stat()
        return f"{found.st_size:x}-{found.st_mtime_ns:x}-{found.st_ino:x}"

    def local(self, name: str) -> Path:
        """The path of a file, which may itself be a link: whoever writes there has to replace it.

        Raises:
            StoreError: the name, or a link in it, leads out of the folder.
        """
        path = self.path / _checked(name, self.root)
        self._refuse_links(path.parent)
        return path

    def temporary(self, name: str) -> Path:
        """A free path on the same disk, for a file that is to become the named one."""
        folder, _, last = name.rpartition("/")
        folder = folder if self._temporaries is None else self._temporaries
        return self.local(f"{folder}/{temporary_name(last)}".lstrip("/"))

    def _refuse_links(self, folder: Path) -> None:
        if folder in self._checked_folders or self.path not in folder.parents:
            return
        for each in (folder, *folder.parents):
            if each == self.path:
                break
            with suppress(OSError):  # of a folder that cannot be looked at, what is done there says so
                if each.is_symlink():
                    raise self._linked(each)
        self._checked_folders.add(folder)

    def _linked(self, folder: Path) -> StoreError:
        return StoreError(
            f"expected no symbolic links to folders below {self.root}, found {folder}. Move the folder there, or make "
            f"{self.root} itself the link"
        )

    def _walk(
        self, prefix: str, on_error: Callable[[OSError], None] | None = None
    ) -> Iterator[tuple[str, Info]]:
        """Files below a folder. Linked folders are passed over; with ``on_error`` they are refused."""
        if prefix:
            self._refuse_links(self.local(prefix))
        for folder, folders, files in os.walk(self.path / prefix, onerror=on_error):
            for each in folders if on_error else ():
                if (linked := Path(folder, each)).is_symlink():
                    raise self._linked(linked)
            for file in files:
                path = Path(folder, file)
                if (found := _stat(path)) is not None:
                    yield path.relative_to(self.path).as_posix(), Info(found.st_size, found.st_mtime)


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
        return f"{self._top}/{_checked(name, self.root)}"

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
        path = folder / _checked(name, self.root)
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
            if each["type"] == "file" and _is_temporary(name)
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


def _checked(name: str, root: str) -> str:
    if not is_safe_relative_path(name):
        raise StoreError(f"expected a name below {root}, found {name!r}")
    return name


def write_atomic(path: Path, data: bytes, *, temporary: Path | None = None) -> None:
    """Write a file whole or not at all.

    Args:
        path: of the file; its folder is made.
        data: its content.
        temporary: a free name on the same disk to write to first; by default one beside the file.

    Raises:
        StoreError: it cannot be written (full or read-only disk, no permission).
    """
    temporary = temporary or path.with_name(temporary_name(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> StoreError:
    """The error for a file that cannot be written."""
    return StoreError(
        f"cannot write {path}: {error.strerror or error}. What was finished before stays; make room or fix the "
        "permissions ([paths] in luigi.cfg says where things go), then run again"
    )


def cannot_read(place: str | Path, error: OSError) -> StoreError:
    """The error for a file of the store that cannot be read."""
    return StoreError(
        f"cannot read {place}: {error.strerror or error}. See to its permissions and the disk; `spctrl verify` drops "
        "what is damaged"
    )


def read_bounded(file: BinaryIO, place: str, max_bytes: int) -> bytes:
    """The contents of an open file on this machine.

    Raises:
        FileTooLargeError: it has more than ``max_bytes``, or is mostly a hole; nothing was read.
    """
    found = os.fstat(file.fileno())
    if found.st_size > max_bytes or is_sparse(file.fileno()):
        raise too_large(place, found.st_size, max_bytes)
    return file.read(found.st_size)


def too_large(place: str, size: int, max_bytes: int) -> FileTooLargeError:
    """The error for a file that is not read because of its size."""
    return FileTooLargeError(
        f"cannot read {place}: expected at most {max_bytes:,} bytes, and no hole, found a file of {size:,}. "
        "`spctrl verify` drops what is damaged"
    )


@contextmanager
def exclusive(path: Path, activity: str, notify: Callable[[str], object]) -> Iterator[None]:
    """Hold a lock file, as ``spctrl.io.locks.exclusive`` does.

    Args:
        path: of the lock file.
        activity: what a process that holds the lock is doing, such as "exporting to exports/AP-10K_triplet".
        notify: called once with a message when this process waits for another one.

    Raises:
        StoreError: the file cannot be made.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locks.exclusive(path, activity, notify))
        except OSError as error:
            raise cannot_write(path, error) from error
        yield


def file_digest(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file to read, and nothing else: a pipe would wait, a device may never end.

    Raises:
        OSError: it cannot be opened, or is none.
    """
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "expected a file, found something else", str(path))
    return file


def temporary_name(name: str) -> str:
    """A free name for a file that is not yet whole; ids of processes are not free on a disk that machines share."""
    return f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{name}"


def _is_temporary(name: str) -> bool:
    return name.rpartition("/")[2].startswith(TEMPORARY)


def _stat(path: Path) -> os.stat_result | None:
    try:
        found = path.stat()
    except OSError as error:
        _must_be_gone(error)
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def _must_be_gone(error: OSError) -> None:
    if error.errno not in NOT_THERE:
        raise cannot_read(error.filename, error) from error


def _modified_at_s(info: dict[str, Any]) -> float:
    """File systems name it differently; what says nothing of its age counts as new."""
    names = ("LastModified", "mtime", "updated", "last_modified", "created")
    found = next((info[name] for name in names if info.get(name) is not None), None)
    if isinstance(found, datetime):
        return found.timestamp()
    return float(found) if isinstance(found, int | float) else time.time()

"""Storage on a disk of this machine, or on one that it shares."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from spctrl.storage.base import Files, Info, checked_name
from spctrl.storage.files import (
    StoreError,
    cannot_read,
    cannot_write,
    exclusive,
    file_digest,
    is_temporary,
    open_regular,
    raise_unless_missing,
    read_bounded,
    stat_of_file,
    temporary_name,
    write_atomic,
)


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
        return {
            name: info for name, info in self._walk(prefix, raise_unless_missing) if not is_temporary(name)
        }

    def folders(self) -> list[str]:
        try:
            return sorted(each.name for each in self.path.iterdir() if each.is_dir())
        except OSError as error:
            raise_unless_missing(error)
            return []

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        return {
            name: found.st_size for name in names if (found := stat_of_file(self.local(name))) is not None
        }

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
            if is_temporary(name) and time.time() - info.modified_at_s > older_than_s
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
        path = self.path / checked_name(name, self.root)
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
                if (found := stat_of_file(path)) is not None:
                    yield path.relative_to(self.path).as_posix(), Info(found.st_size, found.st_mtime)

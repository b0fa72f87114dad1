"""The interface of storage: files below a folder, or below a prefix in an object store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from spctrl.io.documents import MAX_DOCUMENT_BYTES, parse_document
from spctrl.paths import is_safe_relative_path
from spctrl.storage.files import StoreError


def is_url(place: str | Path) -> bool:
    """Whether a place is elsewhere than on this machine's disks."""
    return "://" in str(place)


class Info(NamedTuple):
    """What a listing says of a file: size in bytes, and when it was written, in seconds since 1970."""

    size: int
    modified_at_s: float


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
        """Hold a lock where the storage has locks, as ``spctrl.storage.files.exclusive`` does."""

    def exists(self, name: str) -> bool:
        return name in self.sizes([name])

    @abstractmethod
    def digest(self, name: str) -> str:
        """SHA-256 of a file in hex, read again."""

    @abstractmethod
    def version(self, name: str) -> str:
        """A short name that changes with the file."""


def checked_name(name: str, root: str) -> str:
    if not is_safe_relative_path(name):
        raise StoreError(f"expected a name below {root}, found {name!r}")
    return name

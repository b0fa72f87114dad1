"""Storage: files below one folder, or below a prefix in an object store.

Names are posix paths below that folder or prefix. A file is written whole or not at all, so a reader sees all of one
version.
"""

from __future__ import annotations

from pathlib import Path

from spctrl.storage.base import Files, Info, is_url
from spctrl.storage.files import FileTooLargeError, StoreError
from spctrl.storage.local import Folder
from spctrl.storage.object_store import ObjectStore

__all__ = [
    "FileTooLargeError",
    "Files",
    "Folder",
    "Info",
    "ObjectStore",
    "StoreError",
    "files_at",
    "is_url",
]


def files_at(place: str | Path, *, temporaries: str | None = None) -> Files:
    """The files at a folder or a URL.

    Args:
        place: the folder or URL.
        temporaries: folder below it for half written files; by default they lie beside the files that they become.
    """
    if is_url(place):
        return ObjectStore(str(place).rstrip("/"))
    return Folder(Path(place), temporaries)

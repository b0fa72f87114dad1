"""Source images in an export: hard links, symbolic links or copies."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from spctrl.errors import ExpectedError


def _copy(source: Path, target: Path) -> None:
    """Into a new file only: through a link that is left at the target, the source would be overwritten."""
    with source.open("rb") as read, target.open("xb") as written:
        shutil.copyfileobj(read, written, COPY_BYTES)


COPY_BYTES = 2**20
LINK_WAYS: Mapping[str, Callable[[Path, Path], object]] = {
    "hard": lambda source, target: os.link(source.resolve(), target),
    "symbolic": lambda source, target: target.symlink_to(source.resolve()),
    "copy": _copy,
}
"""What puts a source at a target, in the order in which ``auto`` tries them."""


class UnreadableLinkError(ExpectedError):
    """A link that was made without an error, through which the source cannot be read."""


class Linker:
    """Links source images into an export.

    Some file systems, sshfs among them, make links that lead nowhere once they are read. So the first link of each kind
    to each source file system is read and compared, and only then trusted for the others.
    """

    def __init__(self, way: str, notify: Callable[[str], None]) -> None:
        """
        Args:
            way: ``hard``, ``symbolic``, ``copy``, or ``auto`` for the first of these that works.
            notify: called with one line for each kind of link that ``auto`` gives up.
        """
        self._way = way
        self._notify = notify
        self._is_readable: dict[tuple[int, str], bool] = {}

    def link(self, source: Path, target: Path, *, temporary: Path) -> None:
        """Put a source image at ``target``, replacing what is there.

        Args:
            source: an existing file.
            target: where; its folder exists.
            temporary: a free name on the same disk, from which the link or copy is renamed.

        Raises:
            OSError: the way does not work here (such as a hard link to another disk).
            UnreadableLinkError: it seems to, but the source cannot be read through the link.
        """
        # Under another name first: at no time is there no file, or a file that is being written, and builds side by
        # side may link the same image. Renaming one of two links to the same file does nothing, hence the unlink.
        temporary.unlink(missing_ok=True)
        try:
            self._make(source, temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def _make(self, source: Path, target: Path) -> None:
        if self._way != "auto":
            LINK_WAYS[self._way](source, target)
            if (fault := self._fault(self._way, source, target)) is not None:
                raise UnreadableLinkError(f"{fault}; set [export] link = copy")
            return
        device = source.stat().st_dev
        *links, last = LINK_WAYS
        for way in links:
            if not self._is_readable.get((device, way), True):
                continue
            try:
                LINK_WAYS[way](source, target)
            except OSError:
                target.unlink(missing_ok=True)  # sshfs reports errors of links that it has made
                continue
            if (fault := self._fault(way, source, target)) is None:
                return
            self._notify(f"[export] link = auto: {fault}; making no more of them")
            target.unlink()
        LINK_WAYS[last](source, target)

    def _fault(self, way: str, source: Path, target: Path) -> str | None:
        """Why a link is not trusted, or None. Links are read until one has shown that its kind works."""
        key = source.stat().st_dev, way
        if way == "copy" or self._is_readable.get(key):
            return None
        content = source.read_bytes()
        found = _difference(content, target)
        if content:  # an empty file looks the same through many broken links
            self._is_readable[key] = found is None
        if found is None:
            return None
        return f"expected a {way} link in {target.parent} that reads as {source}, found one that {found}"


def _difference(content: bytes, link: Path) -> str | None:
    try:
        with link.open("rb") as file:
            same = file.read(len(content) + 1) == content
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if same else "reads as something else"

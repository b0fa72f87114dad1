"""Lock files that one process at a time holds; the system releases those of a process that dies."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

POLL_S, TELL_AFTER_S = 0.1, 1.0
NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK})
"""What file systems without locks answer."""


@contextmanager
def exclusive(
    path: Path, activity: str, notify: Callable[[str], object], *, owner: str = ""
) -> Iterator[None]:
    """Hold a lock file, which is removed at the end; wait for the process that holds it.

    On a file system without locks this waits for nobody.

    Args:
        path: of the lock file; its folder is made.
        activity: what a process that holds the lock is doing, such as "training ap10k"; for the message.
        notify: told once that this process waits, and for what, when it has waited for a second.
        owner: text for the lock file, for ``is_held_by_another``.

    Raises:
        OSError: the file cannot be made.
    """
    with _acquire(path, lambda: notify(f"another process is {activity}; waiting for it")) as file:
        try:
            file.truncate(0)
            file.write(owner.encode())
            file.flush()
            yield
        finally:
            with suppress(OSError):
                if _is_at(path, file):
                    path.unlink()


def is_held_by_another(path: Path, owner: str) -> bool:
    """Whether a process holds a lock file for another owner than this one."""
    try:
        with path.open("rb") as file:
            if _is_free(file, fcntl.LOCK_SH):
                return False
            return file.read() != owner.encode()
    except FileNotFoundError:
        return False


def _acquire(path: Path, on_wait: Callable[[], object]) -> BinaryIO:
    """The open lock file; it is tried again and again, since the one that was opened first may be removed."""
    started, is_told = time.monotonic(), False
    while (file := _try_to_acquire(path)) is None:
        if not is_told and time.monotonic() - started >= TELL_AFTER_S:
            on_wait()
            is_told = True
        time.sleep(POLL_S)
    return file


def _try_to_acquire(path: Path) -> BinaryIO | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):  # the folder was removed just now
        file = os.fdopen(_open_unlinked(path), "ab")
        try:
            if _is_free(file, fcntl.LOCK_EX) and _is_at(path, file):
                return file
        except BaseException:
            file.close()
            raise
        file.close()
    return None


def _open_unlinked(path: Path) -> int:
    """Open a file that has no other name: a lock file is written to, and may come with a folder from anywhere."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    found = os.fstat(descriptor)
    if found.st_nlink > 1 or not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise OSError(errno.EMLINK, "the lock file is a link, or no file", str(path))
    return descriptor


def _is_free(file: BinaryIO, kind: int) -> bool:
    """Lock an open file if no other process holds it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Whether an open file is the one at a path: a lock on a removed file keeps nobody out."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False

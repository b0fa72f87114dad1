"""Errors of disks in one sentence, also where a library's writer hides what the system said."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spctrl.errors import ExpectedError

REMEDY = "What was finished before stays; make room or fix the permissions, then run again"
DISK_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}
)
"""What the system answers where a disk is full, cannot be written, or is broken."""
NOT_OF_FILES = (
    ConnectionError,
    TimeoutError,
    ChildProcessError,
    ProcessLookupError,
    BlockingIOError,
    InterruptedError,
)
STATED = re.compile(r"\bos error (\d+)|\[Errno (\d+)\]|: [A-Z][\w ]+ \((\d+)\)")
"""How Rust, Python and torch write the system's answer."""
CUT_SHORT = re.compile(r"iostream error|PytorchStreamWriter failed|unexpected pos \d+ vs \d+")
"""How torch's writer fails where it has lost the system's answer."""
NO_TEMPORARY = "No usable temporary directory"
SHARED_MEMORY = re.compile(r"shared memory|file </torch_|Bus error")


class DiskError(ExpectedError):
    """A file that cannot be written: full or read-only disk, quota, no permission, or a broken disk."""


def disk_fault(error: BaseException) -> str | None:
    """What is wrong with a disk, as the system says it; None where an error has another cause."""
    if not (isinstance(error, OSError | RuntimeError) or type(error).__name__ == "SafetensorError"):
        return None
    chain = list(_chain(error))
    for each in chain:
        if isinstance(each, OSError) and each.errno in DISK_ERRORS:
            return os.strerror(each.errno)
    return next((fault for each in chain if (fault := fault_in(str(each)))), None)


def fault_in(text: str) -> str | None:
    """The same of an error's text, or of a log; None where it mentions none."""
    stated = (int(number) for groups in STATED.findall(text) for number in groups if number)
    if (found := next((number for number in stated if number in DISK_ERRORS), None)) is not None:
        return os.strerror(found)
    if NO_TEMPORARY in text:
        return f"{NO_TEMPORARY.lower()} (TMPDIR names one)"
    return "the file was cut short, as by a full disk" if CUT_SHORT.search(text) else None


def is_shared_memory(error: BaseException) -> bool:
    """Whether an error of a loader and its processes, which write nothing else, says that shared memory is full."""
    has_no_room = (
        isinstance(error, OSError) and error.errno == errno.ENOSPC
    )  # for the semaphores of a new process
    return has_no_room or (isinstance(error, RuntimeError) and SHARED_MEMORY.search(str(error)) is not None)


def disk_error(error: BaseException, path: Path | None, remedy: str = REMEDY) -> DiskError | None:
    """An error of a file in words; None for other errors.

    Args:
        error: caught.
        path: file or folder that was being written, for errors that name no file; None where that is not known.
        remedy: what stays, and what to do.
    """
    fault = disk_fault(error)
    if fault is None and path and isinstance(error, OSError) and not isinstance(error, NOT_OF_FILES):
        fault = error.strerror  # None in errors that libraries word themselves
    if fault is None:
        return None
    named = next(
        (each.filename for each in _chain(error) if isinstance(each, OSError) and each.filename), None
    )
    found = Path(os.fsdecode(named)) if isinstance(named, str | bytes) else None
    at = f" at {found}" if path and found and found != path else ""
    return DiskError(f"cannot write {path or found or 'a file'}: {fault}{at}. {remedy}")


@contextmanager
def writing(path: Path, remedy: str = REMEDY) -> Iterator[None]:
    """Explain errors of disks while a file, or files below a folder, are written.

    Raises:
        DiskError: names the file, what the system says of it, and the remedy.
    """
    try:
        yield
    except Exception as error:
        explained = disk_error(error, path, remedy)
        if explained is None:
            raise
        # What was raised first explains more than what failed while it was being handled.
        raise next((each for each in _chain(error) if isinstance(each, ExpectedError)), explained) from error


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that led to it, the last one first."""
    waiting, seen = [error], set[int]()
    while waiting:
        each = waiting.pop(0)
        if id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += [other for other in (each.__cause__, each.__context__) if other is not None]

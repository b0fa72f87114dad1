"""Errors of disks in one sentence, also where a library's writer hides what the system said."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from spctrl.errors import ExpectedError

REMEDY = "What was finished before stays; make room or fix the permissions, then run again"
CHECK = (
    "Check that the file exists, its permissions and its disk, then run again; what was finished before stays"
)
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
WRITE_FAULTS = frozenset(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)))
"""What the system says of files that are written only."""
STATED = {
    number: re.compile(
        rf"\[Errno {number}\] {text}|\bos error {number}\)|\b(?:file|object) <[^<>\n]*>[^\n]*: {text} \({number}\)"
    )
    for number in sorted(DISK_ERRORS)
    for text in [re.escape(os.strerror(number))]
}
"""How Python, Rust and torch write the system's answer. Errors of GPUs and networks have small numbers too, so a number
counts only beside its own text, and in torch's form only after the name of a file."""
CUT_SHORT = re.compile(r"iostream error|PytorchStreamWriter failed|unexpected pos \d+ vs \d+")
"""How torch's writer fails where it has lost the system's answer."""
IS_CUT_SHORT = "the file was cut short, as by a full disk"
NO_TEMPORARY = "No usable temporary directory"
SHARED_MEMORY = re.compile(r"shared memory|file </torch_|Bus error")


class DiskError(ExpectedError):
    """A file that cannot be read or written: full or read-only disk, quota, no permission, or a broken disk."""


def disk_fault(error: BaseException) -> str | None:
    """What is wrong with a disk, as the system says it; None where an error has another cause."""
    found = _fault_and_file(error)
    return found and found[0]


def fault_in(text: str) -> str | None:
    """The same of an error's text, or of a log; None where it mentions none."""
    if (found := next((number for number, form in STATED.items() if form.search(text)), None)) is not None:
        return os.strerror(found)
    if NO_TEMPORARY in text:
        return f"{NO_TEMPORARY.lower()} (TMPDIR names one)"
    return IS_CUT_SHORT if CUT_SHORT.search(text) else None


def is_shared_memory(error: BaseException) -> bool:
    """Whether an error of a loader and its processes, which write nothing else, says that shared memory is full."""
    has_no_room = (
        isinstance(error, OSError) and error.errno == errno.ENOSPC
    )  # for the semaphores of a new process
    return has_no_room or (isinstance(error, RuntimeError) and SHARED_MEMORY.search(str(error)) is not None)


def disk_error(error: BaseException, path: Path, remedy: str = REMEDY) -> DiskError | None:
    """An error of writing in words; None for other errors.

    Args:
        error: caught while nothing but ``path`` was written.
        path: file or folder.
        remedy: what stays, and what to do.
    """
    fault, file = _fault_and_file(error) or (None, None)
    if fault is None:
        fault, file = _system_fault(error), _file(error)
    return None if fault is None else _cannot_write(path, file, fault, remedy)


def access_error(
    error: BaseException, output: Path | None, remedy: str = REMEDY, *, any_code: bool = False
) -> DiskError | None:
    """An error of a disk in words, of work that both reads and writes; None for other errors.

    The error's file decides between reading and writing. Without one, only some errors tell.

    Args:
        error: caught.
        output: file or folder that is written; None where that is not known.
        remedy: what stays, and what to do, where something cannot be written.
        any_code: whether every system error that names a file counts, such as that of a missing one.
    """
    fault, file = _fault_and_file(error) or (None, None)
    if fault is None and any_code and (file := _file(error)) is not None:
        fault = _system_fault(error)
    if fault is None:
        return None
    if fault in WRITE_FAULTS or fault == IS_CUT_SHORT or (file and output and _belongs_to(file, output)):
        return _cannot_write(output or file, file, fault, remedy)
    what = f"cannot read {file}" if file and output else file or "a file"
    return DiskError(f"{what}: {fault}. {CHECK}")


def _cannot_write(path: Path | None, file: Path | None, fault: str, remedy: str) -> DiskError:
    at = f" at {file}" if file and file != path else ""
    return DiskError(f"cannot write {path or 'a file'}: {fault}{at}. {remedy}")


def _fault_and_file(error: BaseException) -> tuple[str, Path | None] | None:
    """What is wrong with a disk, and the file that the same error names."""
    if not (isinstance(error, OSError | RuntimeError) or type(error).__name__ == "SafetensorError"):
        return None
    chain = list(_chain(error))
    for each in chain:
        if isinstance(each, OSError) and each.errno in DISK_ERRORS:
            return os.strerror(each.errno), _file(each)
    return next(((fault, _file(each)) for each in chain if (fault := fault_in(str(each)))), None)


def _system_fault(error: BaseException) -> str | None:
    """What the system says of a file, whatever it is; None also in errors that libraries word themselves."""
    return error.strerror if isinstance(error, OSError) and not isinstance(error, NOT_OF_FILES) else None


def _file(error: BaseException) -> Path | None:
    named = error.filename if isinstance(error, OSError) else None
    return Path(os.fsdecode(named)) if isinstance(named, str | bytes) and named else None


def _belongs_to(file: Path, output: Path) -> bool:
    """Whether a file is the output, in or above it, or a temporary file beside it."""
    file, output = (Path(os.path.realpath(each)) for each in (file, output))
    is_temporary = file.parent == output.parent and output.name in file.name
    return file.is_relative_to(output) or output.is_relative_to(file) or is_temporary


@contextmanager
def writing(path: Path, remedy: str = REMEDY) -> Iterator[None]:
    """Explain errors of disks while a file, or files below a folder, are written, and no others read.

    Raises:
        DiskError: names the file, what the system says of it, and the remedy.
    """
    with _explaining(lambda error: disk_error(error, path, remedy)):
        yield


@contextmanager
def working(output: Path | None, remedy: str = REMEDY) -> Iterator[None]:
    """Explain errors of disks while files are read too; ``output`` is what is written, if anything.

    Raises:
        DiskError: names the file that cannot be read or written, what the system says of it, and what to do.
    """
    with _explaining(lambda error: access_error(error, output, remedy, any_code=True)):
        yield


@contextmanager
def _explaining(explain: Callable[[Exception], DiskError | None]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        explained = explain(error)
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

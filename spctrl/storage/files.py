"""Single files of this machine: written whole or not at all, read with bounds; the errors of storage."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from spctrl.errors import ExpectedError
from spctrl.io import locks
from spctrl.io.real_size import is_sparse

TEMPORARY = ".tmp-"
NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})
"""What systems answer of a file that is not there. Any other answer leaves open whether it is."""


class StoreError(ExpectedError):
    """The store or an export cannot be read or written; the message names the place."""


class FileTooLargeError(StoreError):
    """A file is larger than one that this project wrote can be, or mostly holes: it is damaged."""


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


def is_temporary(name: str) -> bool:
    return name.rpartition("/")[2].startswith(TEMPORARY)


def stat_of_file(path: Path) -> os.stat_result | None:
    try:
        found = path.stat()
    except OSError as error:
        raise_unless_missing(error)
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def raise_unless_missing(error: OSError) -> None:
    if error.errno not in NOT_THERE:
        raise cannot_read(error.filename, error) from error

"""How many bytes of a file are really there: a hole of any length takes no room on a disk."""

from __future__ import annotations

import errno
import os

MAX_STRETCHES = 4096
"""Of data between holes, that are counted; programs write files in one."""


def real_size(descriptor: int) -> int:
    """Size of an open file in bytes, without holes where the file system knows them.

    Not by ``st_blocks``, which counts what a disk has compressed, or not written yet.
    """
    size = os.fstat(descriptor).st_size
    counted = at = 0
    try:
        for _ in range(MAX_STRETCHES):
            start = os.lseek(descriptor, at, os.SEEK_DATA)
            at = os.lseek(descriptor, start, os.SEEK_HOLE)
            counted += at - start
            if at >= size:
                break
    except OSError as error:
        if error.errno != errno.ENXIO:  # there is no more data
            return size
    finally:
        os.lseek(descriptor, 0, os.SEEK_SET)
    return counted


def is_sparse(descriptor: int) -> bool:
    """Whether most of an open file is holes."""
    return 2 * real_size(descriptor) < os.fstat(descriptor).st_size

"""How many bytes of a file are really there: a hole of any length takes no room on a disk."""

from __future__ import annotations

import os

BLOCK_BYTES = 512
"""Unit of ``st_blocks`` on every system that has it."""
COMPRESSION = 8
"""Disks that compress files need fewer blocks than the files have bytes; what this project writes is compressed."""
INLINE_BYTES = 2**16
"""Disks may keep small files without blocks of their own."""


def real_size(found: os.stat_result) -> int:
    """Size in bytes without holes; never less than what is there, and the stated size where no blocks are counted."""
    if not found.st_blocks:
        return found.st_size
    return min(found.st_size, INLINE_BYTES + COMPRESSION * BLOCK_BYTES * found.st_blocks)


def is_sparse(found: os.stat_result) -> bool:
    """Whether most of a file is holes."""
    return real_size(found) < found.st_size

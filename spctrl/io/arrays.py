"""Arrays in ``.npz`` files of unknown origin, read into memory that is bounded by the files' size."""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from spctrl.errors import ExpectedError
from spctrl.io.real_size import real_size

BYTES_PER_BYTE, FREE_BYTES = 64, 2**20
"""Bytes of memory that arrays may take for each byte of their file, and besides."""
MAX_ARRAYS = 256
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


class ArraysError(ExpectedError, ValueError):
    """A file of arrays that is damaged, holds other things, or expands to more than a genuine one of its size can."""


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an ``.npz`` file, by name. Nothing in it is run.

    Raises:
        OSError: the file cannot be read.
        ArraysError: names the file and what is wrong with it.
    """
    try:
        with path.open("rb") as file:
            size = real_size(file.fileno())
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                _check_sizes(members, size)
                return {each.filename.removesuffix(".npy"): _read(archive, each) for each in members}
    except (
        ValueError, TypeError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error
    ) as error:  # fmt: skip
        raise ArraysError(f"{path}: expected arrays as numpy's savez writes them: {error}") from None


def _check_sizes(members: list[zipfile.ZipInfo], size: int) -> None:
    """Sizes are what is read at most: ``zipfile`` stops there, whatever the compressed data expand to."""
    most = BYTES_PER_BYTE * size + FREE_BYTES
    total = sum(each.file_size for each in members)
    if total > most or len(members) > MAX_ARRAYS:
        raise ValueError(
            f"expected at most {MAX_ARRAYS} arrays of {most:,} bytes in a file of {size:,}, found {len(members):,} of "
            f"{total:,}"
        )


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(member) as file:
        shape, dtype = _header(file)
        if dtype.hasobject:
            raise ValueError(
                f"{member.filename}: expected numbers or texts, found objects, which are not read"
            )
        if (stated := math.prod(shape) * dtype.itemsize) > member.file_size:
            raise ValueError(
                f"{member.filename}: expected an array of at most {member.file_size:,} bytes, found shape {shape} of "
                f"{dtype}, {stated:,} bytes"
            )
    with archive.open(member) as file:
        array: NDArray[Any] = npy.read_array(file, allow_pickle=False)
    return array


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an ``.npy`` file; numpy bounds the header's length."""
    version = npy.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"expected version 1.0 or 2.0 of the .npy format, found {version}")
    shape, _, dtype = HEADERS[version](file)
    return shape, dtype

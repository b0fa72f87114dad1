"""Sizes of files without their holes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from spctrl.io.real_size import is_sparse, real_size

HOLE, DATA = 2**30, 2**16


def holed(path: Path, *starts: int) -> None:
    with path.open("wb") as file:
        for start in starts:
            file.seek(start)
            file.write(bytes(range(256)) * (DATA // 256))


@pytest.mark.parametrize(
    ("starts", "data_bytes", "sparse"),
    [((), 0, False), ((0,), DATA, False), ((HOLE,), DATA, True), ((0, HOLE, 3 * HOLE), 3 * DATA, True)],
)
def test_holes_do_not_count(tmp_path: Path, starts: tuple[int, ...], data_bytes: int, sparse: bool) -> None:
    holed(tmp_path / "file", *starts)
    with (tmp_path / "file").open("rb") as file:
        assert real_size(file.fileno()) == data_bytes
        assert is_sparse(file.fileno()) == sparse
        assert file.tell() == 0


def test_a_file_system_that_knows_no_holes_counts_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holed(tmp_path / "file", HOLE)
    seek = os.lseek

    def without_holes(descriptor: int, at: int, how: int) -> int:
        if how in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, "")
        return seek(descriptor, at, how)

    monkeypatch.setattr(os, "lseek", without_holes)
    with (tmp_path / "file").open("rb") as file:
        assert real_size(file.fileno()) == HOLE + DATA

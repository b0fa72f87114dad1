"""Checkpoints are whole or absent, and no more than asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from spctrl.errors import ExpectedError
from spctrl.training.checkpoints import (
    STATE,
    DamagedCheckpointError,
    checkpoints,
    read_state,
    remove_checkpoints,
    remove_partial,
    write_checkpoint,
)


def write_files(folder: Path) -> None:
    (folder / "controlnet").mkdir()
    (folder / "controlnet" / "config.json").write_text("{}")
    (folder / STATE).write_bytes(b"state")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_latest_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        write_checkpoint(tmp_path, step, write_files, keep=2)
    assert names(tmp_path) == ["checkpoint-00000004", "checkpoint-00000010"]
    assert [path.name for path in checkpoints(tmp_path)] == names(tmp_path)
    assert names(checkpoints(tmp_path)[-1]) == ["SHA256SUMS", "controlnet", STATE]


def test_all_are_kept_without_a_limit(tmp_path: Path) -> None:
    for step in range(5):
        write_checkpoint(tmp_path, step, write_files, keep=None)
    assert len(checkpoints(tmp_path)) == 5


def test_those_of_a_longer_run_are_not_counted(tmp_path: Path) -> None:
    for step in (10, 2, 4, 6):
        write_checkpoint(tmp_path, step, write_files, keep=1)
    assert names(tmp_path) == ["checkpoint-00000006", "checkpoint-00000010"]


def test_one_that_cannot_be_written_leaves_the_earlier_ones(tmp_path: Path) -> None:
    def write_half(folder: Path) -> None:
        write_files(folder)
        raise OSError(28, "No space left on device")

    write_checkpoint(tmp_path, 1, write_files, keep=1)
    with pytest.raises(ExpectedError, match=r"checkpoint-00000002: No space left.*make room"):
        write_checkpoint(tmp_path, 2, write_half, keep=1)
    assert names(tmp_path) == ["checkpoint-00000001"]


def test_what_a_killed_run_was_writing_is_no_checkpoint(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def write_half(folder: Path) -> None:
        write_files(folder)
        raise Killed

    write_checkpoint(tmp_path, 1, write_files, keep=1)
    with pytest.raises(Killed):
        write_checkpoint(tmp_path, 2, write_half, keep=1)
    assert len(names(tmp_path)) == 2
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-00000001"]
    remove_partial(tmp_path)
    assert names(tmp_path) == ["checkpoint-00000001"]


def test_one_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path, 1, write_files, keep=1)
    assert write_checkpoint(tmp_path, 1, lambda folder: pytest.fail("written again"), keep=1) == first


def test_all_can_be_removed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, write_files, keep=None)
    remove_checkpoints(tmp_path)
    assert names(tmp_path) == []


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path = write_checkpoint(tmp_path, 1, write_files, keep=None)
    with pytest.raises(DamagedCheckpointError, match=r"state.pt: the state of training cannot be read"):
        read_state(path)

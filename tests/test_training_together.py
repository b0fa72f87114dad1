"""Trainings beside each other: in one folder they take turns, and one that continues another keeps what it needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from processes import HANG_S

torch = pytest.importorskip("torch", reason="the train extra is not installed")

from spctrl.errors import ExpectedError  # noqa: E402
from spctrl.io import locks  # noqa: E402
from spctrl.training import __main__ as command  # noqa: E402
from spctrl.training import checkpoints as stored  # noqa: E402
from spctrl.training import resumption  # noqa: E402
from spctrl.training.config import TrainingConfig  # noqa: E402
from spctrl.training.schedule import make_schedule  # noqa: E402

CONFIG = {
    "dataset_name": "ap10k",
    "conditioning_mode": "spatext",
    "learning_rate": 1e-3,
    "max_train_steps": 8,
    "resume_from_checkpoint": "latest",
}


def hold(tmp_path: Path) -> Any:
    return locks.exclusive(tmp_path / "run" / stored.LOCK, "", pytest.fail)


def test_a_second_run_into_a_folder_waits_and_then_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    is_told, is_started = threading.Event(), threading.Event()

    def tell(line: str) -> None:
        lines.append(line)
        is_told.set()

    def start() -> None:
        with command._alone(tmp_path / "run"):
            is_started.set()

    monkeypatch.setattr(command.LOG, "info", tell)
    second = threading.Thread(target=start)
    with hold(tmp_path):
        second.start()
        assert is_told.wait(HANG_S)
        assert not is_started.is_set()
    second.join(HANG_S)
    assert is_started.is_set()
    assert lines == [f"another process is training in {tmp_path / 'run'}; waiting for it"]


@pytest.mark.slow
def test_a_training_ends_with_the_build_that_reads_its_progress(tmp_path: Path) -> None:
    """At once, also where it has nothing to report: it would train beside the next build."""
    (tmp_path / "train.yaml").write_text(json.dumps(CONFIG))
    given = (str(tmp_path / "train.yaml"), f"--manifest={tmp_path / 'none'}", f"--output={tmp_path / 'run'}")
    training = subprocess.Popen(
        [sys.executable, "-m", "spctrl.training", *given, "--json-progress"],
        env={**os.environ, "PYTHONPATH": str(Path(locks.__file__).parents[2])},
        stdout=subprocess.PIPE,
        text=True,
    )
    with hold(tmp_path), training:
        assert training.stdout is not None
        assert json.loads(training.stdout.readline()) == {
            "message": f"another process is training in {tmp_path / 'run'}; waiting for it"
        }
        training.stdout.close()
        assert training.wait(HANG_S) == 1


def test_all_processes_of_a_run_wait_with_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or they would give up on it after some minutes."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    lock = tmp_path / stored.LOCK
    other = locks.exclusive(lock, "", pytest.fail, owner=command._run_id().replace("29500", "29501"))
    own = locks.exclusive(lock, "", pytest.fail, owner=command._run_id())
    other.__enter__()
    sleeps: list[float] = []

    def sleep(duration_s: float) -> None:
        sleeps.append(duration_s)
        other.__exit__(None, None, None)
        own.__enter__()

    monkeypatch.setattr(command.time, "sleep", sleep)
    with command._alone(tmp_path):
        assert len(sleeps) == 1
    with command._alone(tmp_path):
        assert len(sleeps) == 1
    own.__exit__(None, None, None)


# One continues another that removes old checkpoints


def write(folder: Path, step: int, *, keep: int | None = None) -> Path:
    """A checkpoint of a run of eight steps."""
    config = msgspec.convert(CONFIG, TrainingConfig)
    facts = resumption.run_facts(config, make_schedule(config, images=8, processes=1))

    def write_files(partial: Path) -> None:
        torch.save({"optimizer": {"state": {}, "param_groups": []}, "step": step}, partial / stored.STATE)
        (partial / stored.RUN).write_text(json.dumps({"step": step, **facts}))
        (partial / "controlnet").mkdir()
        (partial / "controlnet" / "config.json").write_text("{}")

    return stored.write_checkpoint(folder, step, write_files, keep=keep)


def take_start(output: Path, *earlier_runs: Path) -> resumption.Start:
    config = msgspec.convert({**CONFIG, "max_train_steps": 20}, TrainingConfig)
    return resumption.take_start(config, make_schedule(config, images=8, processes=1), output, earlier_runs)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_a_run_keeps_the_checkpoint_that_it_continues(tmp_path: Path) -> None:
    source = write(tmp_path / "shorter", 4)
    before = contents(source)
    (tmp_path / "longer").mkdir()
    start = take_start(tmp_path / "longer", tmp_path / "shorter")
    assert start.checkpoint == tmp_path / "longer" / source.name
    assert (start.checkpoint / stored.STATE).samefile(source / stored.STATE), "no second copy of gigabytes"
    assert contents(source) == before
    stored.remove_checkpoint(source)
    assert contents(start.checkpoint) == before
    stored.check_digests(start.checkpoint)
    assert take_start(tmp_path / "longer", tmp_path / "shorter").step == 4


@pytest.mark.parametrize(
    "before", ["read_run", "check_digests", "read_state", "carry_over", "adopt_checkpoint"]
)
def test_a_checkpoint_that_another_run_removes_meanwhile_makes_way_for_its_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    write(tmp_path / "shorter", 4)
    (tmp_path / "longer").mkdir()
    original = getattr(resumption, before)
    told: list[int] = []

    def after_the_other_run(*arguments: Any) -> Any:
        if not told:
            told.append(6)
            write(tmp_path / "shorter", 6, keep=1)
        return original(*arguments)

    monkeypatch.setattr(resumption, before, after_the_other_run)
    start = take_start(tmp_path / "longer", tmp_path / "shorter")
    assert start.checkpoint == tmp_path / "longer" / "checkpoint-00000006"
    assert [path.name for path in (tmp_path / "longer").iterdir()] == ["checkpoint-00000006"]
    stored.check_digests(start.checkpoint)


def test_a_checkpoint_that_is_removed_while_it_is_copied_is_not_adopted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where every single copy succeeded: some files may have been gone before they were listed."""
    source = write(tmp_path / "shorter", 4)
    (tmp_path / "longer").mkdir()
    copytree = stored.shutil.copytree

    def copy_and_remove(*arguments: Any, **chosen: Any) -> None:
        copytree(*arguments, **chosen)
        stored.remove_checkpoint(source)

    monkeypatch.setattr(stored.shutil, "copytree", copy_and_remove)
    with pytest.raises(ExpectedError, match="No such file"):
        stored.adopt_checkpoint(source, tmp_path / "longer")
    assert list((tmp_path / "longer").iterdir()) == []


def test_a_disk_without_room_for_the_copy_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: str, target: str) -> None:
        raise OSError(28, "No space left on device")

    write(tmp_path / "shorter", 4)
    (tmp_path / "longer").mkdir()
    monkeypatch.setattr(stored.os, "link", full)
    monkeypatch.setattr(stored.shutil, "copyfile", full)
    with pytest.raises(ExpectedError, match="No space left on device"):
        take_start(tmp_path / "longer", tmp_path / "shorter")

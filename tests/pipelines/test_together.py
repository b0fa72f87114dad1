"""Processes that build the same thing beside each other: one does the work, the others say that they wait for it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from processes import HANG_S
from stores import commit

from spctrl.io import locks
from spctrl.storage import StoreError
from tasks.stage.fingerprints import Ingredients

if TYPE_CHECKING:
    from conftest import Workspace

    from tasks.experiment.train import Train

MADE_FROM = Ingredients(code={}, libraries={}, code_version="code", parameters={}, inputs={"manifest": "m"})


@contextlib.contextmanager
def group_of(build: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Leaves nothing of a build behind."""
    try:
        yield build
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(build.pid, signal.SIGKILL)
        build.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_a_build_that_waits(workspace: Workspace, workers: int) -> None:
    folder = workspace.export_folder("ap10k")
    with (
        locks.exclusive(folder / ".spctrl/lock", "", pytest.fail),
        group_of(workspace.start("--workers", str(workers))) as build,
    ):
        assert build.stdout is not None
        assert f"another process is exporting to {folder}; waiting for it\n" in iter(
            build.stdout.readline, ""
        )
        os.killpg(build.pid, signal.SIGINT)
        output, _ = build.communicate(timeout=HANG_S)
        assert build.returncode == -signal.SIGINT, output


# Training


@pytest.fixture
def trainable(workspace: Workspace, tmp_path: Path) -> Workspace:
    """A workspace with tiny weights and ``train.yaml``: the smoke run, on latents that are not cached."""
    import msgspec

    pytest.importorskip("torch", reason="the train extra is not installed")
    pytest.importorskip("accelerate", reason="the train extra is not installed")
    from spctrl.models import tiny
    from spctrl.weights import known_weights

    tiny.build_stable_diffusion(tmp_path / "weights" / known_weights()["stable_diffusion"].file)
    workspace.configure("paths", weights=tmp_path / "weights")
    workspace.configure("executor", device="cpu")
    workspace.configure("build", conditions=["spatext"])
    smoke = Path(__file__).parents[2] / "configs" / "train" / "smoke.yaml"
    settings = {**msgspec.yaml.decode(smoke.read_bytes()), "use_cached_latents": False, "max_train_steps": 2}
    (workspace.folder / "train.yaml").write_bytes(msgspec.yaml.encode(settings))
    return workspace


@pytest.mark.slow
def test_two_trainings_of_one_configuration_at_once_are_one(trainable: Workspace) -> None:
    arguments = ("--config", str(trainable.folder / "train.yaml"))
    builds = [trainable.start(*arguments, family="Train") for _ in range(2)]
    outputs = [build.communicate(timeout=HANG_S)[0] for build in builds]
    assert [build.returncode for build in builds] == [0, 0], "\n".join(outputs)
    both = "".join(outputs)
    assert both.count("another process is training train; waiting for it\n") == 1
    assert "continues after" not in both, "the second found the result, and started nothing"
    (run,) = trainable.store.glob("runs/train/train/*/provenance.json")
    losses = (run.parent / "losses.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in losses] == [1, 2]
    assert [path.name for path in trainable.store.glob("training/*/*/*")].count("checkpoint-00000002") == 1
    assert not [*trainable.store.glob("training/*/*/lock"), *trainable.store.glob("training/*/*.lock")]
    assert trainable.faults() == []


@contextlib.contextmanager
def planned_training(workspace: Workspace) -> Iterator[Train]:
    """A training whose inputs are known, and whose run is over: a checkpoint is there."""
    from conftest import _luigi_settings

    from tasks.experiment.train import Train

    with _luigi_settings(workspace.settings_file()):
        task = Train(config=str(workspace.folder / "train.yaml"))
        task._ingredients = replace(MADE_FROM, parameters=task.parameters())  # type: ignore[attr-defined]
        network = task.folder / "checkpoint-00000002" / "controlnet"
        network.mkdir(parents=True)
        (network / "config.json").write_text("own")
        (task.folder / "checkpoint-00000001").mkdir()
        (task.folder / "losses.jsonl").write_text("own")
        yield task


COUNTS = {"records": 8, "made": 2, "rejected": 0}


def test_a_result_that_another_machine_committed_meanwhile_stays(trainable: Workspace) -> None:
    """Machines that share an object store have no locks; on GPUs they make different bytes."""
    with planned_training(trainable) as task:
        run = task.current_run()
        assert run is not None
        run.write("controlnet/config.json", b"of the other machine")
        commit(run, counts=COUNTS)
        before = {name: run.path(name).read_bytes() for name in run.files()}
        task.commit(run, COUNTS, 0.0)
        assert {name: run.path(name).read_bytes() for name in run.files()} == before
        assert [path.name for path in task.folder.glob("checkpoint-*")] == ["checkpoint-00000002"]


def test_a_training_removes_nothing_of_its_run_before_it_has_a_result(
    trainable: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine may be putting its result there, and would commit what is left of it."""
    from spctrl.data.records import rejects_table

    with planned_training(trainable) as task:
        run = task.current_run()
        assert run is not None
        run.write("controlnet/config.json", b"of the other machine")
        run.write("stale", b"of a killed build")
        at_training: list[set[str]] = []
        monkeypatch.setattr(type(task), "_images_and_rejects", lambda self: (8, rejects_table([])))
        monkeypatch.setattr(type(task), "_train", lambda self: at_training.append(set(run.files())))
        counts = task.make(run)
        assert counts == COUNTS
        assert at_training == [{"controlnet/config.json", "stale", "rejects.parquet"}]
        task.commit(run, counts, 0.0)
        assert set(run.files()) == {
            *("controlnet/config.json", "losses.jsonl", "rejects.parquet", "provenance.json")
        }
        assert run.path("controlnet/config.json").read_text() == "own"


# A folder of checkpoints that comes from elsewhere


@pytest.mark.parametrize("name", ["train.log", "losses.jsonl", "validation", "checkpoint-00000003", ""])
def test_no_training_writes_through_a_link(trainable: Workspace, tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    with planned_training(trainable) as task:
        link = task.folder / name
        if link.is_dir():
            victim.mkdir()
            shutil.rmtree(link)
        elif link.exists():
            link.unlink()
        link.symlink_to(victim)
        with pytest.raises(StoreError, match=f"expected no .*links .*, found {link}"):
            task._train()
        if name == "train.log":
            link.unlink()
            victim.write_text("content")
            link.hardlink_to(victim)
            task._own_files()
            assert (link.read_text(), victim.stat().st_nlink) == ("content", 1)
    assert not victim.exists() or victim.is_dir() or victim.read_text() == "content"
    assert not victim.is_dir() or [*victim.iterdir()] == []


@pytest.mark.parametrize("name", ["training", "training/train"])
def test_no_training_locks_through_a_link(trainable: Workspace, tmp_path: Path, name: str) -> None:
    with planned_training(trainable) as task:
        elsewhere = tmp_path / "elsewhere"
        shutil.move(trainable.store / name, elsewhere)
        (trainable.store / name).symlink_to(elsewhere)
        for folder in (elsewhere, elsewhere / "train"):
            (folder / f"{task.folder.name}.lock").write_text("content") if folder.is_dir() else None
        before = sorted(elsewhere.rglob("*"))
        for step in (task.run, lambda: task.commit(task.current_run(), COUNTS, 0.0)):
            with pytest.raises(
                StoreError, match=f"expected no symbolic links .*, found {trainable.store / name}"
            ):
                step()
        assert sorted(elsewhere.rglob("*")) == before
        assert {path.read_text() for path in elsewhere.rglob("*.lock")} == {"content"}


def test_no_training_continues_one_whose_folder_has_links(trainable: Workspace, tmp_path: Path) -> None:
    with planned_training(trainable) as task:
        others = [task.folder.with_name(name) for name in ("plain", "linked", "endless", "tracked")]
        for folder in others:
            (folder / "wandb").mkdir(parents=True)
            (folder / "computation").write_text(task.computation())
        (others[1] / "logs").symlink_to(tmp_path)
        (others[2] / "computation").unlink()
        (others[2] / "computation").symlink_to("/dev/zero")
        (others[3] / "wandb" / "latest-run").symlink_to(tmp_path)
        assert task.earlier_runs() == [others[0], others[3]]

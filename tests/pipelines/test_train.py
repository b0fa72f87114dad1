"""Training through Luigi, with tiny models: from raw annotations to a committed checkpoint."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

pytest.importorskip("torch", reason="the train extra is not installed")
pytest.importorskip("accelerate", reason="the train extra is not installed")

if TYPE_CHECKING:
    from conftest import Workspace

    from tasks.train import Train

SMOKE = Path(__file__).parents[2] / "configs" / "train" / "smoke.yaml"
RESULT = {"controlnet/config.json", "controlnet/diffusion_pytorch_model.safetensors", "learned_embeds.bin"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from spctrl.models import tiny
    from spctrl.weights import known_weights

    folder = tmp_path_factory.mktemp("weights")
    tiny.build_stable_diffusion(folder / known_weights()["stable_diffusion"].file)
    return folder


@pytest.fixture
def trainable(workspace: Workspace, weights: Path) -> Workspace:
    """A workspace with tiny weights and ``train.yaml``: the smoke run."""
    workspace.configure("paths", weights=weights)
    workspace.configure("latents", resolution=64)
    workspace.configure("executor", device="cpu")
    shutil.copyfile(SMOKE, workspace.folder / "train.yaml")
    return workspace


def edit(workspace: Workspace, **settings: Any) -> None:
    path = workspace.folder / "train.yaml"
    path.write_bytes(msgspec.yaml.encode({**msgspec.yaml.decode(path.read_bytes()), **settings}))


@contextlib.contextmanager
def task(workspace: Workspace) -> Iterator[Train]:
    """The task as a build in this workspace has it."""
    from conftest import _luigi_settings

    from tasks.train import Train

    with _luigi_settings(workspace.settings_file()):
        yield Train(config=str(workspace.folder / "train.yaml"))


def result(workspace: Workspace) -> tuple[Path, dict[str, Any]]:
    """Folder and provenance of the one training run."""
    (path,) = workspace.store.glob("runs/train/train/*/provenance.json")
    return path.parent, json.loads(path.read_bytes())


@pytest.mark.slow
def test_a_run_is_trained_committed_and_not_trained_again(trainable: Workspace) -> None:
    trainable.configure("train", num_processes=2)
    config = str(trainable.folder / "train.yaml")
    built = trainable.build("Train", config=config)
    assert built.succeeded, built.errors
    assert {"index", "latents", "manifest", "train"} <= built.stages
    folder, provenance = result(trainable)
    assert RESULT | {"config.yaml", "losses.jsonl"} == set(provenance["files"])
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        *provenance["files"],
        "provenance.json",
    }
    assert provenance["weights"] == "random"
    assert provenance["counts"] == {"records": 8, "made": 6, "rejected": 0}
    assert provenance["parameters"]["num_processes"] == 2
    assert provenance["parameters"]["settings"]["learning_rate"] == 1e-4
    assert provenance["libraries"].keys() == {"torch", "diffusers", "transformers", "accelerate"}
    (manifest,) = trainable.store.glob("runs/manifest/ap10k-train/*/provenance.json")
    assert provenance["inputs"]["manifest"] == manifest.parent.name
    assert "git_commit" in provenance
    assert not list(trainable.store.glob("training/*/*"))
    losses = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    assert [line["step"] for line in losses] == list(range(1, 7))

    assert trainable.build("Train", config=config).committed == {}
    edit(trainable, checkpointing_steps=2, logging_steps=5)
    with task(trainable) as unchanged:
        assert unchanged.complete()
        assert unchanged.finished_run().path("controlnet").is_dir()
    edit(trainable, seed=1)
    with task(trainable) as changed:
        assert not changed.complete()
    assert trainable.faults() == []


@pytest.mark.slow
def test_a_run_that_failed_says_why_and_goes_on(trainable: Workspace) -> None:
    """The first try ends after a checkpoint; what is there then is what a failure leaves behind."""
    from spctrl.training.loop import StepReport, TrainingInputs, train

    class FailedError(Exception):
        pass

    def fail(report: StepReport) -> None:
        if report.step == 4:
            raise FailedError

    edit(trainable, use_cached_latents=False)
    trainable.configure("build", conditions=["spatext"])
    with task(trainable) as planned:
        manifest = planned.manifest_task()
        import luigi

        assert luigi.build([manifest], local_scheduler=True, log_level="ERROR")
        inputs = TrainingInputs(
            manifest=manifest.finished_run().path("manifest.parquet"),
            store=trainable.store,
            data_root=trainable.data / "AP-10K",
            weights=planned.stable_diffusion.parent,
        )
        work = planned.folder
        with pytest.raises(FailedError):
            train(planned.how, inputs, work, fail)
    assert [path.name for path in work.glob("checkpoint-*")] == ["checkpoint-00000003"]

    other = work / "checkpoint-00000003" / "state.pt"
    state = other.read_bytes()
    other.write_bytes(b"damaged")
    config = str(trainable.folder / "train.yaml")
    failed = trainable.build("Train", config=config)
    assert not failed.succeeded
    assert any("the state of training cannot be read" in error for error in failed.errors), failed.errors
    other.write_bytes(state)

    built = trainable.build("Train", config=config)
    assert built.succeeded, built.errors
    folder, _ = result(trainable)
    losses = [json.loads(line)["step"] for line in (folder / "losses.jsonl").read_text().splitlines()]
    assert losses == [4, 5, 6]


def test_missing_weights_and_wrong_settings_are_named(
    trainable: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainable.configure("paths", weights=tmp_path / "none")
    with task(trainable) as planned:
        missing = [each for each in planned.requires() if type(each).__name__ == "Weights"]
        assert [each.complete() for each in missing] == [False]
        assert not planned.complete()
    assert "stable-diffusion-v1-5" in caplog.text
    edit(trainable, learning_rat=1)
    with (
        task(trainable) as faulty,
        pytest.raises(Exception, match=r"no setting 'learning_rat'; did you mean"),
    ):
        faulty.requires()


@pytest.mark.parametrize(
    ("device", "processes", "arguments", "variables"),
    [
        ("cpu", 1, {"--cpu", "--num_processes=1"}, {"ACCELERATE_USE_CPU": "true"}),
        ("cpu", 2, {"--multi_gpu", "--num_processes=2"}, {"ACCELERATE_USE_CPU": "true"}),
        ("cuda:1", 1, {"--num_processes=1"}, {"CUDA_VISIBLE_DEVICES": "1"}),
        ("auto", 4, {"--multi_gpu", "--num_processes=4"}, {"ACCELERATE_USE_CPU": "false"}),
    ],
)
def test_what_starts_the_processes(
    trainable: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    processes: int,
    arguments: set[str],
    variables: dict[str, str],
) -> None:
    class Finished:
        def path(self, name: str) -> Path:
            return Path("runs") / name

    monkeypatch.setattr("tasks.manifest.Manifest.finished_run", lambda self: Finished())
    monkeypatch.setattr("tasks.train.Train.folder", Path("work"))
    trainable.configure("train", num_processes=processes)
    trainable.configure("executor", device=device)
    edit(trainable, mixed_precision="bf16", validation_steps=5)
    with task(trainable) as planned:
        command, environment = planned.command(), planned.environment()
        splits = {each.split for each in planned.requires() if type(each).__name__ == "Manifest"}
    chosen = {"--cpu", "--multi_gpu", *(each for each in command if each.startswith("--num_processes"))}
    assert set(command) & chosen == arguments
    assert {"--mixed_precision=bf16", "--validation-manifest=runs/manifest.parquet"} <= set(command)
    assert variables.items() <= environment.items()
    assert splits == {"train", "val"}

"""Training through Luigi, with tiny models: from raw annotations to a committed checkpoint."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import faults
import msgspec
import pytest

from spctrl.errors import ExpectedError
from tasks.experiment import train as train_stage

pytest.importorskip("torch", reason="the train extra is not installed")
pytest.importorskip("accelerate", reason="the train extra is not installed")

if TYPE_CHECKING:
    from conftest import Workspace

    from tasks.experiment.train import Train

pytestmark = pytest.mark.usefixtures("forked_models")
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

    from tasks.experiment.train import Train

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
    assert RESULT | {"config.yaml", "losses.jsonl", "rejects.parquet"} == set(provenance["files"])
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
    (work,) = trainable.store.glob("training/*/*")
    assert {path.name for path in work.iterdir()} == {
        *("checkpoint-00000006", "computation", "config.yaml", "losses.jsonl")
    }
    weights = "controlnet/diffusion_pytorch_model.safetensors"
    assert (work / "checkpoint-00000006" / weights).samefile(folder / weights), "no second copy of gigabytes"
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
def test_images_that_no_prompt_fits_are_left_out_within_the_limit(trainable: Workspace) -> None:
    template = "{category} {keypoints} in the {background}"
    templates = trainable.folder / "prompts.yaml"
    templates.write_text(json.dumps({"training": [template], "evaluation": [template]}))
    with trainable.edit_annotations("ap10k", "train") as content:
        for position, image in enumerate(content["images"]):
            image["background"] = 1 if position else None
    edit(trainable, prompt_templates=str(templates))
    config = str(trainable.folder / "train.yaml")
    refused = trainable.build("Train", config=config)
    assert not refused.succeeded
    (error,) = refused.errors
    assert "1 of 8 records cannot be used" in error and "template without background" in error
    assert not list(trainable.store.glob("training/*/*/train.log")), "nothing is trained before that"

    trainable.configure("build", max_reject_share=0.5)
    built = trainable.build("Train", config=config)
    assert built.succeeded, built.errors
    _, provenance = result(trainable)
    assert provenance["counts"] == {"records": 8, "made": 6, "rejected": 1}


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

    config = str(trainable.folder / "train.yaml")
    edit(trainable, learning_rate=1.0e30)
    failed = trainable.build("Train", config=config)
    assert not failed.succeeded
    assert any("expected a finite loss" in error for error in failed.errors), failed.errors
    edit(trainable, learning_rate=1.0e-4)

    built = trainable.build("Train", config=config)
    assert built.succeeded, built.errors
    assert steps_of(result(trainable)[0]) == [4, 5, 6]


def steps_of(folder: Path) -> list[int]:
    """Steps whose losses a run kept."""
    return [json.loads(line)["step"] for line in (folder / "losses.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_longer_run_continues_a_finished_one(
    trainable: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of another file, too; the results are those of uninterrupted runs, and the shorter one stays as it is."""

    def trained(part: str = "train", **settings: Any) -> dict[str, str]:
        """Builds; digests of the result's files."""
        edit(trainable, **settings)
        path = trainable.folder / f"{part}.yaml"
        if part != "train":
            path.write_bytes((trainable.folder / "train.yaml").read_bytes())
        before = set(trainable.store.glob("runs/train/*/*/provenance.json"))
        built = trainable.build("Train", config=str(path))
        assert built.succeeded, built.errors
        (run,) = set(trainable.store.glob("runs/train/*/*/provenance.json")) - before
        assert steps_of(run.parent) == list(range(1, settings["max_train_steps"] + 1))
        files = json.loads(run.read_bytes())["files"]
        return {name: entry["digest"] for name, entry in files.items() if name in RESULT}

    trainable.configure("build", conditions=["spatext"])
    edit(trainable, use_cached_latents=False)
    three = trained(max_train_steps=3)
    six = trained("longer", max_train_steps=6)
    assert "train longer: continues after step 3, from " in capfd.readouterr().err
    edit(trainable, max_train_steps=3)
    assert trainable.build("Train", config=str(trainable.folder / "train.yaml")).committed == {}
    trained(max_train_steps=5, lr_scheduler="linear", lr_warmup_steps=1)
    assert "starts from step 1: no checkpoint of 2 earlier runs fits: " in capfd.readouterr().err
    for name in ("training", "runs/train"):
        shutil.rmtree(trainable.store / name)
    again = {"lr_scheduler": "constant", "lr_warmup_steps": 500}
    assert trained(max_train_steps=6, **again) == six
    assert "continues" not in capfd.readouterr().err
    assert trained(max_train_steps=3, **again) == three


@pytest.mark.parametrize("is_told", [True, False], ids=["pipe", "log"])
def test_a_training_process_on_a_full_store_is_one_sentence(
    trainable: Workspace, monkeypatch: pytest.MonkeyPatch, is_told: bool
) -> None:
    """What it writes to its log is lost there. It tells through its standard output, or its launcher not at all."""
    report = json.dumps({"error": "cannot write x: No space left on device. Make room"}) if is_told else ""
    script = f"import os; print({report!r}, flush=True); os.write(2, bytes(10**6)); os._exit(1)"
    from tasks.stage.fingerprints import Ingredients

    ingredients = Ingredients(
        code={}, libraries={}, code_version="code", parameters={}, inputs={"manifest": "m", "unet": "u"}
    )
    with faults.disk(trainable.store, size="128k") as disk, task(trainable) as planned:
        planned._ingredients = replace(ingredients, parameters=planned.parameters())  # type: ignore[attr-defined]
        monkeypatch.setattr(planned, "command", lambda: [sys.executable, "-c", script])
        with pytest.raises(
            ExpectedError, match=r"cannot write .*: No space left on device.* make room|x: No space"
        ) as caught:
            planned._train()
        assert "\n" not in str(caught.value)
        assert disk.used()["size"] >= 120 * 1024, "the log filled it"


def test_only_trainings_of_the_same_computation_are_continued(trainable: Workspace, tmp_path: Path) -> None:
    """Other data, weights, code and settings give other folders; length and learning rates do not."""
    from tasks.stage.fingerprints import Ingredients

    ingredients = Ingredients(
        code={}, libraries={}, code_version="code", parameters={}, inputs={"manifest": "m", "unet": "u"}
    )

    def planned(changed: dict[str, Any] | None = None, **settings: Any) -> Train:
        edit(trainable, **settings)
        with task(trainable) as made:
            made._ingredients = replace(  # type: ignore[attr-defined]
                ingredients, parameters=made.parameters(), **(changed or {})
            )
            made.folder.mkdir(parents=True)
            (made.folder / "computation").write_text(made.computation())
            return made

    first = planned()
    longer = planned(max_train_steps=9, learning_rate=1e-5, lr_scheduler="cosine", checkpointing_steps=4)
    assert longer.folder != first.folder
    assert longer.earlier_runs() == [first.folder]
    others: list[dict[str, str]] = [{"manifest": "other", "unet": "u"}, {"manifest": "m", "unet": "other"}]
    for inputs in others:
        assert planned({"inputs": inputs}).earlier_runs() == []
    assert planned({"code_version": "other"}).earlier_runs() == []
    assert planned(seed=1).earlier_runs() == []


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
        ("cuda:1", 1, {"--num_processes=1"}, {"CUDA_VISIBLE_DEVICES": "7"}),
        ("cuda:2,0", 2, {"--multi_gpu", "--num_processes=2"}, {"CUDA_VISIBLE_DEVICES": "9,4"}),
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

    monkeypatch.setattr("tasks.dataset.manifest.Manifest.finished_run", lambda self: Finished())
    monkeypatch.setattr("tasks.experiment.train.Train.folder", Path("work"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7,9")
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


def test_only_a_checkout_has_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed copy may lie in another project's repository."""
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True)
    installed = tmp_path / "site-packages"
    installed.mkdir()
    monkeypatch.setattr(train_stage, "ROOT", tmp_path)
    assert train_stage.git_commit()
    monkeypatch.setattr(train_stage, "ROOT", installed)
    assert train_stage.git_commit() is None


def test_an_installed_copy_comes_after_pythons_own_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    monkeypatch.setattr(train_stage, "ROOT", tmp_path)
    assert train_stage.python_path() == f"{tmp_path}:/theirs"
    monkeypatch.setattr(train_stage, "ROOT", Path("/somewhere/lib/python3/site-packages"))
    assert train_stage.python_path() == "/theirs"

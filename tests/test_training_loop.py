"""The training loop with tiny models: it learns, changes only what it may, and goes on as if never interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from processes import HANG_S

torch = pytest.importorskip("torch", reason="the train extra is not installed")
pytest.importorskip("accelerate", reason="the train extra is not installed")

from spctrl.errors import ExpectedError  # noqa: E402
from spctrl.models import tiny  # noqa: E402
from spctrl.training.checkpoints import STATE, checkpoints  # noqa: E402
from spctrl.training.config import TrainingConfig  # noqa: E402
from spctrl.training.loop import (  # noqa: E402
    StepReport,
    TrainingInputs,
    clip_gradients,
    make_optimizer,
    prepare,
    show_overflow,
    train,
    training_dataset,
)
from spctrl.training.networks import Networks, load_networks  # noqa: E402
from spctrl.training.objective import draw, objective_of  # noqa: E402
from spctrl.training.resumption import carry_over, find_start  # noqa: E402
from spctrl.training.schedule import make_schedule  # noqa: E402
from spctrl.weights import known_weights  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

ROOT = Path(__file__).parents[1]
OLD_ROWS = 49_408

SPCTRL: dict[str, Any] = {
    "conditioning_mode": "spatext",
    "add_keypoint_prompt": 0.8,
    "proportion_empty_prompts": 0.2,
    "enable_learnable_kpttoken": True,
    "text_encoder_lr": 0.5,
    "text_encoder_lr_scheduler": 0.5,
    "add_cross_attn_loss": True,
    "attn_loss_weight": 0.1,
    "attn_loss_type": "mse",
    "attn_loss_select_layer_type": "down_blocks.2",
    "attn_loss_detach_query": True,
    "heatmap_type": "partition",
}
"""The recommended objective, without its timestep window, which a small batch might miss."""


@pytest.fixture(scope="module")
def inputs(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingInputs:
    """The sample's AP-10K training split, built, and tiny weights."""
    from conftest import Workspace

    folder = tmp_path_factory.mktemp("training")
    workspace = Workspace(folder / "built", sample)
    workspace.store.mkdir()
    workspace.configure("build", datasets=["ap10k"], splits=["train"], conditions=["mask"])
    assert workspace.build().succeeded
    tiny.build_stable_diffusion(folder / "weights" / known_weights()["stable_diffusion"].file)
    (manifest,) = workspace.store.glob("runs/manifest/ap10k-train/*/manifest.parquet")
    return TrainingInputs(
        manifest=manifest, store=workspace.store, data_root=sample / "AP-10K", weights=folder / "weights"
    )


def settings(**chosen: Any) -> dict[str, Any]:
    return {
        "dataset_name": "ap10k",
        "conditioning_mode": "spatext",
        "resolution": 64,
        "use_cached_latents": False,
        "train_batch_size": 2,
        "learning_rate": 1e-3,
        "max_train_steps": 6,
        "logging_steps": 1,
        "report_to": "none",
        **chosen,
    }


def config(**chosen: Any) -> TrainingConfig:
    return msgspec.convert(settings(**chosen), TrainingConfig)


def trained(folder: Path) -> dict[str, Tensor]:
    """All tensors of the latest checkpoint: network, tokens and optimizer."""
    return trained_at(checkpoints(folder)[-1])


def trained_at(latest: Path) -> dict[str, Tensor]:
    """The same of one checkpoint."""
    from safetensors.torch import load_file

    found = {}
    for path in sorted(latest.rglob("*.safetensors")):
        found |= load_file(path)
    if (latest / "learned_embeds.bin").is_file():
        found |= torch.load(latest / "learned_embeds.bin", weights_only=True)
    state = torch.load(latest / STATE, weights_only=True)
    for number, values in state["optimizer"]["state"].items():
        found |= {f"optimizer {number} {name}": value for name, value in values.items()}
    return found


def equal(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


# Going on


RESUMED = settings(
    **SPCTRL,
    gradient_accumulation_steps=2,
    max_train_steps=7,
    checkpointing_steps=2,
    checkpoints_total_limit=2,
)
"""Two steps an epoch, so that the run crosses epochs."""


@pytest.fixture(scope="module")
def uninterrupted(inputs: TrainingInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(msgspec.convert(RESUMED, TrainingConfig), inputs, folder)
    return folder


class StoppedError(Exception):
    pass


EPOCH_STEPS = 5
LONG_EPOCH = settings(
    **SPCTRL,
    train_batch_size=1,
    max_train_samples=EPOCH_STEPS,
    max_train_steps=EPOCH_STEPS + 1,
    checkpointing_steps=1,
)
"""Its checkpoints are at all steps of its epoch."""

Losses = dict[int, dict[str, float]]


def losses_of(chosen: dict[str, Any], inputs: TrainingInputs, folder: Path, stop_after: int = 0) -> Losses:
    """Trains, and stops after so many steps; the losses of each step that this process did."""
    found: Losses = {}

    def keep(report: StepReport) -> None:
        assert report.losses is not None
        found[report.step] = report.losses
        if report.step == report.resumed_at + stop_after:
            raise StoppedError

    with contextlib.suppress(StoppedError):
        train(msgspec.convert(chosen, TrainingConfig), inputs, folder, keep)
    return found


def resumed_at_every_step(chosen: dict[str, Any], inputs: TrainingInputs, folder: Path) -> Losses:
    """Trains as ``losses_of``, but each process is stopped in its second step, and the next one goes on."""
    steps = chosen["max_train_steps"]
    found: Losses = {}
    for step in range(steps):
        losses = losses_of(chosen, inputs, folder, stop_after=2)
        assert [*losses] == [step + 1, step + 2][: steps - step]
        assert all(found.setdefault(each, values) == values for each, values in losses.items()), step
    return found


@pytest.fixture(scope="module")
def long_epoch(inputs: TrainingInputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Losses]:
    """An uninterrupted run without loader workers: its folder and losses."""
    folder = tmp_path_factory.mktemp("long-epoch")
    return folder, losses_of(LONG_EPOCH, inputs, folder)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumed_at_every_step_ends_with_the_same_bits(
    inputs: TrainingInputs, long_epoch: tuple[Path, Losses], tmp_path: Path, workers: int
) -> None:
    """Within an epoch too, and whether or not workers load the samples."""
    folder, losses = long_epoch
    chosen = {**LONG_EPOCH, "dataloader_num_workers": workers}
    assert resumed_at_every_step(chosen, inputs, tmp_path / "resumed") == losses
    assert equal(trained(tmp_path / "resumed"), trained(folder))
    if workers:
        assert losses_of(chosen, inputs, tmp_path / "uninterrupted") == losses
        assert equal(trained(tmp_path / "uninterrupted"), trained(folder))


@pytest.mark.slow
def test_a_run_of_several_micro_batches_resumed_at_every_step_ends_with_the_same_bits(
    inputs: TrainingInputs, tmp_path: Path
) -> None:
    chosen = {
        **LONG_EPOCH,
        "gradient_accumulation_steps": 2,
        "max_train_samples": 6,
        "max_train_steps": 4,
        "dataloader_num_workers": 2,
    }
    losses = losses_of(chosen, inputs, tmp_path / "uninterrupted")
    assert resumed_at_every_step(chosen, inputs, tmp_path / "resumed") == losses
    assert equal(trained(tmp_path / "resumed"), trained(tmp_path / "uninterrupted"))


@pytest.mark.parametrize("stop_after", [1, 3, 6])
def test_a_stopped_run_goes_on_to_the_same_bits(
    inputs: TrainingInputs, uninterrupted: Path, tmp_path: Path, stop_after: int
) -> None:
    def stop(report: StepReport) -> None:
        if report.step == stop_after:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(msgspec.convert(RESUMED, TrainingConfig), inputs, tmp_path, stop)
    torch.rand(100)  # whatever else draws random numbers does not matter
    steps: list[int] = []
    train(
        msgspec.convert(RESUMED, TrainingConfig), inputs, tmp_path, lambda report: steps.append(report.step)
    )
    assert steps[0] == 2 * ((stop_after - 1) // 2) + 1
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-00000006", "checkpoint-00000007"]
    assert equal(trained(tmp_path), trained(uninterrupted))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills a process")
def test_a_killed_run_goes_on_to_the_same_bits(
    inputs: TrainingInputs, uninterrupted: Path, tmp_path: Path
) -> None:
    configuration = tmp_path / "run.yaml"
    configuration.write_bytes(msgspec.yaml.encode(RESUMED))
    command = [
        *(sys.executable, "-m", "spctrl.training", configuration, "--output", tmp_path / "out"),
        *("--manifest", inputs.manifest, "--store", inputs.store),
        *("--data-root", inputs.data_root, "--weights", inputs.weights),
    ]
    # As many threads as here, since sums depend on it.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + HANG_S
        while not checkpoints(tmp_path / "out") and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
    finally:
        process.kill()
        output = process.communicate()[0].decode()
    assert process.returncode == -signal.SIGKILL, output
    reached = [path.name for path in checkpoints(tmp_path / "out")]
    assert reached, output
    assert reached[-1] != "checkpoint-00000007"
    train(msgspec.convert(RESUMED, TrainingConfig), inputs, tmp_path / "out")
    assert equal(trained(tmp_path / "out"), trained(uninterrupted))


def test_nothing_is_done_where_all_is_done(inputs: TrainingInputs, uninterrupted: Path) -> None:
    last = train(
        msgspec.convert(RESUMED, TrainingConfig),
        inputs,
        uninterrupted,
        lambda report: pytest.fail("another step"),
    )
    assert last == uninterrupted / "checkpoint-00000007"


def test_checkpoints_of_other_settings_are_refused(inputs: TrainingInputs, uninterrupted: Path) -> None:
    other = msgspec.convert({**RESUMED, "learning_rate": 1e-4}, TrainingConfig)
    with pytest.raises(ExpectedError, match=r"learning_rate was 0\.001, is 0\.0001"):
        train(other, inputs, uninterrupted)


def test_a_run_can_start_anew(inputs: TrainingInputs, tmp_path: Path) -> None:
    train(config(max_train_steps=2, checkpointing_steps=1), inputs, tmp_path)
    steps: list[int] = []
    anew = config(max_train_steps=1, learning_rate=1e-4, resume_from_checkpoint=None)
    train(anew, inputs, tmp_path, lambda report: steps.append(report.step))
    assert steps == [1]
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-00000001"]


# Going on from a run of another length


@pytest.fixture(scope="module")
def shorter(inputs: TrainingInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first four steps of ``uninterrupted``, as a run of that length; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("shorter")
    train(msgspec.convert({**RESUMED, "max_train_steps": 4}, TrainingConfig), inputs, folder)
    assert names(folder) == ["checkpoint-00000002", "checkpoint-00000004"]
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*checkpoint-*"))


def steps_of(chosen: dict[str, Any], inputs: TrainingInputs, folder: Path, *earlier_runs: Path) -> list[int]:
    """Trains; the steps that this process did."""
    steps: list[int] = []
    train(
        msgspec.convert(chosen, TrainingConfig),
        inputs,
        folder,
        lambda report: steps.append(report.step),
        earlier_runs,
    )
    return steps


IN_EPOCHS = {"max_train_steps": None, "num_train_epochs": 3}
"""Six steps."""


@pytest.mark.parametrize(
    ("length", "into"),
    [({}, "the same folder"), ({}, "another folder"), (IN_EPOCHS, "another folder")],
    ids=["the same folder", "another folder", "epochs"],
)
def test_a_longer_run_continues_a_shorter_one_to_the_same_bits(
    inputs: TrainingInputs,
    uninterrupted: Path,
    shorter: Path,
    tmp_path: Path,
    length: dict[str, Any],
    into: str,
) -> None:
    folder = tmp_path / "longer"
    if into == "the same folder":
        shutil.copytree(shorter, folder)
    before = {path: path.read_bytes() for path in shorter.rglob("*") if path.is_file()}
    assert steps_of({**RESUMED, **length}, inputs, folder, shorter)[0] == 5
    whole = uninterrupted
    if length:
        whole = tmp_path / "uninterrupted"
        assert steps_of({**RESUMED, **length}, inputs, whole) == [1, 2, 3, 4, 5, 6]
    assert equal(trained(folder), trained(whole))
    assert {path: path.read_bytes() for path in shorter.rglob("*") if path.is_file()} == before


def test_a_longer_run_that_is_stopped_goes_on_from_its_own_latest_checkpoint(
    inputs: TrainingInputs, uninterrupted: Path, shorter: Path, tmp_path: Path
) -> None:
    def stop(report: StepReport) -> None:
        if report.step == 7:
            raise StoppedError

    longer = {**RESUMED, "checkpoints_total_limit": 1}
    with pytest.raises(StoppedError):
        train(msgspec.convert(longer, TrainingConfig), inputs, tmp_path, stop, [shorter])
    assert names(tmp_path) == ["checkpoint-00000006"]
    assert steps_of(longer, inputs, tmp_path, shorter) == [7]
    assert names(tmp_path) == ["checkpoint-00000007"]
    assert equal(trained(tmp_path), trained(uninterrupted))


def test_a_shorter_run_takes_a_checkpoint_of_its_length(
    inputs: TrainingInputs, shorter: Path, tmp_path: Path
) -> None:
    two_steps = {**RESUMED, "max_train_steps": 2}
    assert steps_of(two_steps, inputs, tmp_path, shorter) == []
    assert names(tmp_path) == ["checkpoint-00000002"]
    own, other = tmp_path / "checkpoint-00000002", shorter / "checkpoint-00000002"
    weights = "controlnet/diffusion_pytorch_model.safetensors"
    assert (own / weights).read_bytes() == (other / weights).read_bytes()
    assert equal(trained(tmp_path), trained_at(other))
    with pytest.raises(ExpectedError, match=r"at most 3 steps, found checkpoint-00000004 of a longer run"):
        steps_of({**RESUMED, "max_train_steps": 3}, inputs, shorter)
    last = train(msgspec.convert(two_steps, TrainingConfig), inputs, shorter)
    assert last == other


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (
            {"lr_scheduler": "cosine", "lr_warmup_steps": 3},
            "lr_scheduler was constant, is cosine.*from step 1 on",
        ),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"max_train_steps": 1}, "of a longer run, without a checkpoint within the first 1 steps"),
        ({"max_train_samples": 6}, "images was 8, is 6"),
        ({"text_encoder_lr": 0.25}, r"text_encoder_lr was 0\.5, is 0\.25.*from step 1 on"),
    ],
    ids=lambda changed: str([*changed]) if isinstance(changed, dict) else "",
)
def test_a_run_whose_steps_differ_starts_at_the_first_and_says_why(
    shorter: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    changed: dict[str, Any],
    reason: str,
) -> None:
    chosen = msgspec.convert({**RESUMED, **changed}, TrainingConfig)
    images = chosen.max_train_samples or 8
    with caplog.at_level("INFO", "spctrl.training"):
        start = find_start(
            chosen, make_schedule(chosen, images=images, processes=1), tmp_path / "none", [shorter]
        )
    assert start.checkpoint is None
    assert re.search(f"starts from step 1: .*{reason}", caplog.text)


DECAYING = {**RESUMED, "lr_scheduler": "linear", "lr_warmup_steps": 2, "gradient_accumulation_steps": 1}


def test_a_decaying_rate_lets_a_longer_run_continue_from_the_warm_up_alone(
    inputs: TrainingInputs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rates after it depend on the length: the third step's is half of the full one in a run of four."""
    four, five = {**DECAYING, "max_train_steps": 4}, {**DECAYING, "max_train_steps": 5}
    assert steps_of(four, inputs, tmp_path / "four") == [1, 2, 3, 4]
    with caplog.at_level("INFO", "spctrl.training"):
        assert steps_of(five, inputs, tmp_path / "five", tmp_path / "four") == [3, 4, 5]
    assert "continues after step 2" in caplog.text
    steps_of(five, inputs, tmp_path / "uninterrupted")
    assert equal(trained(tmp_path / "five"), trained(tmp_path / "uninterrupted"))


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    """Change one bit in the middle, which no reader of the format notices."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [shorten, flip, Path.unlink], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize(
    "file",
    [
        "state.pt",
        "run.json",
        "SHA256SUMS",
        "learned_embeds.bin",
        "controlnet/diffusion_pytorch_model.safetensors",
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    shorter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: Callable[[Path], None]
) -> None:
    if (file, damage) in {("SHA256SUMS", Path.unlink), ("run.json", Path.unlink)}:
        pytest.skip("checkpoints of earlier versions do not have it")
    folder = shutil.copytree(shorter, tmp_path / "run")
    damage(folder / "checkpoint-00000004" / file)
    chosen = msgspec.convert(RESUMED, TrainingConfig)
    start = find_start(chosen, make_schedule(chosen, images=8, processes=1), folder)
    assert start.checkpoint == folder / "checkpoint-00000002"
    assert start.state is not None
    assert "checkpoint-00000004" in caplog.text
    assert "An earlier checkpoint is tried" in caplog.text


def test_a_run_with_a_damaged_last_checkpoint_ends_with_the_same_bits(
    inputs: TrainingInputs, uninterrupted: Path, shorter: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(shorter, tmp_path / "run")
    flip(folder / "checkpoint-00000004" / "controlnet" / "diffusion_pytorch_model.safetensors")
    assert steps_of(RESUMED, inputs, folder) == [3, 4, 5, 6, 7]
    assert names(folder) == ["checkpoint-00000006", "checkpoint-00000007", "damaged-checkpoint-00000004"]
    assert equal(trained(folder), trained(uninterrupted))


def test_a_checkpoint_of_an_earlier_version_is_continued(shorter: Path, tmp_path: Path) -> None:
    """Those have no digests, and their settings in the state alone."""
    folder = shutil.copytree(shorter, tmp_path / "run")
    last = folder / "checkpoint-00000004"
    state = torch.load(last / STATE, weights_only=True) | json.loads((last / "run.json").read_text())
    torch.save(state, last / STATE)
    (last / "run.json").unlink()
    (last / "SHA256SUMS").unlink()
    chosen = msgspec.convert(RESUMED, TrainingConfig)
    assert find_start(chosen, make_schedule(chosen, images=8, processes=1), folder).checkpoint == last


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("controlnet/diffusion_pytorch_model.safetensors", b"\x08\0\0\0\0\0\0\0{}"),
        ("controlnet/diffusion_pytorch_model.safetensors", None),
        ("learned_embeds.bin", b"PK"),
        ("learned_embeds.bin", None),
        (STATE, [1, 2]),
        (STATE, {"optimizer": {}}),
        ("run.json", {"max_train_steps": "many"}),
    ],
)
def test_damage_is_found_without_digests(shorter: Path, tmp_path: Path, name: str, content: Any) -> None:
    folder = shutil.copytree(shorter, tmp_path / "run")
    *_, sound, last = checkpoints(folder)
    (last / "SHA256SUMS").unlink()
    run = json.loads((last / "run.json").read_bytes())
    (last / name).unlink()
    if isinstance(content, bytes):
        (last / name).write_bytes(content)
    elif name == "run.json":
        (last / name).write_text(json.dumps({**run, "settings": run["settings"] | content}))
    elif content is not None:
        torch.save(content, last / name)
    chosen = msgspec.convert(RESUMED, TrainingConfig)
    assert find_start(chosen, make_schedule(chosen, images=8, processes=1), folder).checkpoint == sound


def test_what_was_seen_of_the_earlier_steps_is_carried_over(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "output"
    output.mkdir()
    for step in (2, 4):
        (source / "validation" / f"step-{step:08d}").mkdir(parents=True)
        (source / "validation" / f"step-{step:08d}" / "1.jpg").write_bytes(b"image")
    (source / "logs" / "run").mkdir(parents=True)
    (source / "logs" / "run" / "events.out.tfevents.1").write_bytes(b"events")
    (source / "losses.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4)))
    carry_over(source, output, 3, "logs")
    assert (output / "losses.jsonl").read_text().splitlines() == [f'{{"step": {step}}}' for step in (1, 2, 3)]
    found = sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file())
    assert found == ["logs/run/events.out.tfevents.1", "losses.jsonl", "validation/step-00000002/1.jpg"]
    assert (source / "losses.jsonl").read_text().count("\n") == 4


# Learning


def test_two_images_can_be_learned_by_heart(
    inputs: TrainingInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same noise at the same timesteps in each step."""
    losses: list[float] = []

    def keep(report: StepReport) -> None:
        assert report.losses is not None
        losses.append(report.losses["denoising"])

    monkeypatch.setattr("spctrl.training.loop.step_seed", lambda *names: 0)
    by_heart = config(max_train_samples=2, max_train_steps=40, checkpointing_steps=40, learning_rate=6e-3)
    train(by_heart, inputs, tmp_path, keep)
    assert sum(losses[-5:]) / 5 < losses[0] / 2, (losses[0], losses[-5:])


VARIANTS: dict[str, dict[str, Any]] = {
    "spctrl": SPCTRL,
    "spctrl, all of the embedding, extra mask": {
        **SPCTRL,
        "spatext_skeleton_type": "rand",
        "spatext_enable_learn_kpt": True,
        "spatext_enable_learn_sks": True,
        "use_extra_mask": True,
    },
    "spctrl, clipped with the token table": {**SPCTRL, "clip_tokens": "table"},
    "spctrl, frozen embedding": {"spatext_freeze_embedding": True},
    "whole object": {
        "add_cross_attn_loss": True,
        "heatmap_type": "whole",
        "attn_loss_type": "bce",
        "add_keypoint_prompt": 0.5,
    },
    "controlnet on renders": {"conditioning_mode": "openpose", "heatmap_reweight_loss": "humansd"},
    "controlnet on masks": {"conditioning_mode": "sam_hq_mask"},
    "t2i_adapter": {"conditioning_mode": "keypoint", "model": "t2i_adapter", "use_extra_mask": True},
}


def parameters_of(networks: Networks) -> dict[str, Tensor]:
    parts = ("control", "text_encoder", "unet", "vae")
    return {
        f"{part}.{name}": parameter
        for part in parts
        for name, parameter in getattr(networks, part).named_parameters()
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_trained_parameter_changes_and_nothing_else(
    inputs: TrainingInputs, tmp_path: Path, variant: str
) -> None:
    chosen = config(
        **VARIANTS[variant],
        resolution=128,  # at 64 the innermost feature map is one cell, whose attention to itself has no gradient
        train_batch_size=1,
        max_train_steps=4,
        adam_weight_decay=0,  # so that only a gradient changes anything
    )
    found: list[Networks] = []
    train(chosen, inputs, tmp_path, lambda report: found.append(report.networks))
    before = load_networks(chosen, inputs.weights, with_vae=True)
    after = parameters_of(found[-1])
    old = parameters_of(before)
    changed = {name for name, value in after.items() if not torch.equal(value, old[name])}
    table = found[-1].token_table
    assert (table is not None) == (chosen.clip_tokens == "table")
    wanted = {name for name, value in after.items() if value.requires_grad and value is not table}
    assert changed == wanted
    assert {name.split(".")[0] for name in wanted} <= {"control", "text_encoder"}
    frozen = {name for name in after if "spatext_embedding" in name} - wanted
    is_frozen = variant == "spctrl, frozen embedding"
    assert (any("spatext_embedding.linear_in" in name for name in frozen)) == is_frozen
    embedding = found[-1].text_encoder.get_input_embeddings().weight
    assert torch.equal(embedding[:OLD_ROWS], before.text_encoder.get_input_embeddings().weight[:OLD_ROWS])
    assert ("text_encoder" in {name.split(".")[0] for name in wanted}) == bool(
        chosen.enable_learnable_kpttoken
    )


def test_all_old_token_rows_of_a_saved_run_are_those_of_the_start(
    inputs: TrainingInputs, uninterrupted: Path
) -> None:
    """Put into a fresh text encoder, the saved tokens leave its other rows as they are."""
    from spctrl.models import stable_diffusion, tokens

    folder = inputs.weights / known_weights()["stable_diffusion"].file
    fresh = stable_diffusion.load_text_encoder(folder).get_input_embeddings().weight.clone()
    tokenizer, encoder = stable_diffusion.load_tokenizer(folder), stable_diffusion.load_text_encoder(folder)
    embeds = tokens.load_learned_embeds(checkpoints(uninterrupted)[-1] / "learned_embeds.bin")
    ids = tokens.set_learned_embeds(tokenizer, encoder, embeds)
    assert len(fresh) == OLD_ROWS
    assert ids == list(range(OLD_ROWS, OLD_ROWS + 17))
    assert torch.equal(encoder.get_input_embeddings().weight[:OLD_ROWS], fresh)


def test_gradient_checkpointing_changes_nothing_but_memory(inputs: TrainingInputs) -> None:
    def gradients(**how: Any) -> dict[str, Tensor]:
        chosen = config(**{**SPCTRL, "proportion_empty_prompts": 0.0}, **how)
        networks = load_networks(chosen, inputs.weights, with_vae=True)
        if chosen.gradient_checkpointing:
            networks.unet.enable_gradient_checkpointing()
            networks.control.enable_gradient_checkpointing()
        batch = first_batch(chosen, inputs, networks)
        with objective_of(networks, chosen) as objective:
            torch.manual_seed(0)
            losses = objective(batch, draw(0, batch_size=2, resolution=64, num_timesteps=1000))
            losses["loss"].backward()
        assert losses["keypoint_concept"] > 0
        return {name: each.grad for name, each in parameters_of(networks).items() if each.grad is not None}

    plain, saving = gradients(), gradients(gradient_checkpointing=True)
    assert plain.keys() == saving.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(saving[name], gradient, rtol=1e-4, atol=1e-7)


def first_batch(chosen: TrainingConfig, inputs: TrainingInputs, networks: Networks) -> dict[str, Tensor]:
    dataset = training_dataset(chosen, inputs, networks.tokenizer)
    batch = torch.utils.data.default_collate([dataset[0], dataset[1]])
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


def test_cached_latents_are_those_of_the_image_encoder(inputs: TrainingInputs) -> None:
    chosen = config()
    networks = load_networks(chosen, inputs.weights, with_vae=True)
    batch = first_batch(chosen, inputs, networks)
    posterior = networks.vae.encode(batch["pixel_values"]).latent_dist
    cached = {"latents_mean": posterior.mean.half(), "latents_logvar": posterior.logvar.half()}
    draws = draw(0, batch_size=2, resolution=64, num_timesteps=1000)
    with objective_of(networks, chosen) as objective:
        encoded, stored = objective.latents(batch, draws.encoding), objective.latents(cached, draws.encoding)
    assert encoded.shape == draws.noise.shape
    torch.testing.assert_close(stored, encoded, rtol=2e-3, atol=2e-3)
    scaled = (posterior.mean + posterior.std * draws.encoding) * networks.vae.config.scaling_factor
    torch.testing.assert_close(encoded, scaled)


@pytest.mark.parametrize(("cached", "expected"), [(False, torch.bfloat16), (True, torch.float32)])
def test_images_are_encoded_in_the_precision_of_the_step(
    inputs: TrainingInputs, monkeypatch: pytest.MonkeyPatch, cached: bool, expected: torch.dtype
) -> None:
    class CpuAccelerator:
        device, num_processes = torch.device("cpu"), 1

    exact = load_networks(config(), inputs.weights, with_vae=True)
    chosen = config(mixed_precision="bf16")
    batch = first_batch(chosen, inputs, exact)
    if cached:
        monkeypatch.setattr("spctrl.training.loop.training_dataset", lambda *_: [None] * 2)
    run = prepare(
        msgspec.structs.replace(chosen, use_cached_latents=cached),
        dataclasses.replace(inputs, needs_vae=True),
        CpuAccelerator(),  # type: ignore[arg-type]
    )
    assert run.networks.vae.dtype == expected
    assert run.networks.unet.dtype == torch.bfloat16
    assert run.networks.control.dtype == torch.float32
    draws = draw(0, batch_size=2, resolution=64, num_timesteps=1000)
    found = []
    for networks in (run.networks, exact):
        with objective_of(networks, chosen) as objective, torch.autocast("cpu", torch.bfloat16):
            found.append(objective.latents(batch, draws.encoding))
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], found[1], rtol=0.05, atol=0.05)
    assert torch.equal(found[0], found[1]) == cached


def test_a_run_can_start_from_another_ones_result(
    inputs: TrainingInputs, uninterrupted: Path, tmp_path: Path
) -> None:
    start = checkpoints(uninterrupted)[-1]
    chosen = config(**SPCTRL, controlnet_model_name_or_path=str(start))
    networks = load_networks(chosen, inputs.weights, with_vae=False)
    networks.save(tmp_path)
    before = {
        name: value for name, value in trained(uninterrupted).items() if not name.startswith("optimizer")
    }
    from safetensors.torch import load_file

    after = load_file(tmp_path / "controlnet" / "diffusion_pytorch_model.safetensors")
    after |= torch.load(tmp_path / "learned_embeds.bin", weights_only=True)
    assert equal(after, before)
    other = config(**SPCTRL, controlnet_model_name_or_path=str(start), spatext_cond_channels=4)
    with pytest.raises(
        ExpectedError, match=r"expected conditioning_channels = 4.*found conditioning_channels = 3"
    ):
        load_networks(other, inputs.weights, with_vae=False)


# The optimizer's step for the keypoint tokens, compared with the released trainer's (REFERENCE section 10)


NO_CLIPPING = 1e9
KEYPOINT_IDS = [60, 61, 62]
"""The last rows of a small table; the others are other words'."""


def small_text_encoder() -> Any:
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=63,
                hidden_size=8,
                intermediate_size=8,
                num_attention_heads=2,
                num_hidden_layers=2,
                max_position_embeddings=12,
                bos_token_id=0,
                eos_token_id=59,
            )
        ).eval()


def prompts_of_steps(steps: int) -> list[list[Tensor]]:
    """Token ids of two micro-batches a step, in which keypoints are a quarter."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(50, (steps, 2, 4, 12), generator=generator)
    ids[..., 3:6] = torch.randint(60, 63, (steps, 2, 4, 3), generator=generator)
    ids[..., -1] = 59
    return [list(step) for step in ids]


def prompt_loss(encoder: Any, ids: Tensor) -> Tensor:
    """Of a size that varies from batch to batch."""
    weights = torch.linspace(-1, 1, 8) * (1 + ids[:, 0].float().mean())
    return ((encoder(ids)[0] @ weights) ** 2).mean()


def step_of_the_released_trainer(max_norm: float) -> Tensor:
    """The rows after five steps that train, clip and decay the whole table, then put other words' rows back."""
    encoder = small_text_encoder().requires_grad_(False)
    table = encoder.get_input_embeddings().weight.requires_grad_(True)
    old = table.detach().clone()
    others = torch.ones(len(table), dtype=torch.bool)
    others[KEYPOINT_IDS] = False
    optimizer = torch.optim.AdamW([table], lr=0.1, weight_decay=1e-2)
    for micro_batches in prompts_of_steps(5):
        for ids in micro_batches:
            (prompt_loss(encoder, ids) / 2).backward()
        torch.nn.utils.clip_grad_norm_([table], max_norm)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            table[others] = old[others]
    return table.detach()[KEYPOINT_IDS]


def step_of_ours(max_norm: float, clip_tokens: str, loss_scale: float | None = None) -> Tensor:
    """The rows after the same five steps, as the loop makes them."""
    from spctrl.models.tokens import trainable_token_rows

    encoder = small_text_encoder()
    rows = trainable_token_rows(encoder, KEYPOINT_IDS)
    weight = encoder.get_input_embeddings().weight
    table = weight.requires_grad_(True) if clip_tokens == "table" else None
    optimizer = make_optimizer(config(learning_rate=0.1), [[rows]])
    scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale or 1.0, enabled=loss_scale is not None)
    for micro_batches in prompts_of_steps(5):
        for ids in micro_batches:
            scaler.scale(prompt_loss(encoder, ids) / 2).backward()
        scale = scaler.get_scale()
        scaler.unscale_(optimizer)
        clip_gradients({"tokens": [rows]}, table, max_norm, table_scale=scale)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return rows.detach()


@pytest.mark.parametrize("loss_scale", [None, 1024.0])
def test_tokens_clipped_with_the_table_step_as_in_the_released_trainer(loss_scale: float | None) -> None:
    for max_norm in (0.3, 100, NO_CLIPPING):
        released = step_of_the_released_trainer(max_norm)
        torch.testing.assert_close(step_of_ours(max_norm, "table", loss_scale), released)
    torch.testing.assert_close(step_of_ours(NO_CLIPPING, "rows", loss_scale), released)
    assert not torch.allclose(step_of_ours(0.3, "rows", loss_scale), step_of_the_released_trainer(0.3))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 0.5])
def test_a_step_is_skipped_where_only_another_words_gradient_overflowed(value: float) -> None:
    rows, table = (torch.nn.Parameter(torch.ones(size, 4)) for size in (3, 20))
    optimizer = make_optimizer(config(learning_rate=0.1), [[rows]])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(rows.sum() + table.sum()).backward()
    assert table.grad is not None
    table.grad[7, 2] = value
    show_overflow(rows, table)
    scaler.unscale_(optimizer)
    clip_gradients({"tokens": [rows]}, table, 1.0, table_scale=scaler.get_scale())
    scaler.step(optimizer)
    scaler.update()
    is_finite = value == 0.5
    assert bool((rows != 1).all()) is is_finite and bool(rows.isfinite().all())
    assert (scaler.get_scale() == 8.0) is is_finite


def test_a_logging_folder_outside_the_run_is_not_copied(tmp_path: Path) -> None:
    source, logs = tmp_path / "a", tmp_path / "logs"
    for folder in (source / "inside", logs):
        folder.mkdir(parents=True)
        (folder / "events").touch()
    for name, logging_dir in (("b", str(logs)), ("c", "inside")):
        (tmp_path / name).mkdir()
        carry_over(source, tmp_path / name, 1, logging_dir)
    assert [*(tmp_path / "b").iterdir()] == []
    assert (tmp_path / "c" / "inside" / "events").is_file()


# What a user meets


def test_images_of_validation_do_not_disturb_training(inputs: TrainingInputs, tmp_path: Path) -> None:
    from PIL import Image

    from spctrl.training.resumption import HISTORY
    from spctrl.training.watch import Watcher

    shown: list[dict[str, Any]] = []
    plain = {**SPCTRL, "max_train_steps": 3}
    looking = config(**plain, validation_steps=2, num_validation_images=1, report_to="tensorboard")
    watcher = Watcher(looking, inputs, inputs.manifest, tmp_path / "looking", "run", shown.append)
    train(looking, inputs, tmp_path / "looking", watcher)
    watcher.close()
    train(config(**plain), inputs, tmp_path / "plain")
    assert equal(trained(tmp_path / "looking"), trained(tmp_path / "plain"))
    (picture,) = (tmp_path / "looking" / "validation").rglob("*.jpg")
    assert picture.parent.name == "step-00000002"
    assert Image.open(picture).size == (64, 64)
    lines = [json.loads(line) for line in (tmp_path / "looking" / HISTORY).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(
        {"loss/loss", "loss/keypoint_concept", "learning_rate/tokens"} <= line.keys() for line in lines
    )
    assert list((tmp_path / "looking" / "logs").rglob("events.out.tfevents*"))
    assert [(each["step"], each["total"]) for each in shown] == [(1, 3), (2, 3), (3, 3)]
    assert shown[0]["left_s"] is None
    assert shown[1]["left_s"] > 0


@pytest.mark.parametrize("chosen", ["first ones", "named"])
def test_images_of_validation_are_those_of_their_ids_where_others_have_no_prompt(
    inputs: TrainingInputs, tmp_path: Path, chosen: str
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from spctrl.training.loop import make_accelerator, prepare
    from spctrl.training.watch import Validation

    table = pq.read_table(inputs.manifest)
    ids = table.column("image_id").to_pylist()
    backgrounds = [None if row in (0, 2) else "dark" for row in range(len(ids))]
    changed = table.set_column(
        table.schema.get_field_index("background_name"), "background_name", pa.array(backgrounds, pa.string())
    )
    manifest = inputs.manifest.with_name("validation.parquet")
    pq.write_table(changed, manifest)
    template = "{category} {keypoints} in the {background}"
    templates = tmp_path / "prompts.yaml"
    templates.write_text(json.dumps({"training": [template], "evaluation": [template]}))
    common = {**SPCTRL, "prompt_templates": str(templates), "num_validation_images": 2}
    expected = [ids[4], ids[1]] if chosen == "named" else [ids[1], ids[3]]
    watched = config(**common, validation_image=expected if chosen == "named" else ())
    validation = Validation(watched, inputs, manifest)
    assert validation.image_ids == expected
    networks = prepare(watched, inputs, make_accelerator(watched)).networks
    assert list(validation.draw(networks)) == expected
    with pytest.raises(ExpectedError, match=f"that a prompt template fits, found {ids[2]}"):
        Validation(config(**common, validation_image=[ids[1], ids[2]]), inputs, manifest)


@pytest.mark.parametrize(
    "chosen",
    [
        {"conditioning_mode": "spatext"},
        {"conditioning_mode": "openpose"},
        {"conditioning_mode": "openpose", "model": "t2i_adapter"},
    ],
    ids=lambda chosen: chosen.get("model", chosen["conditioning_mode"]),
)
def test_images_of_validation_are_drawn_with_the_extra_mask(
    inputs: TrainingInputs, tmp_path: Path, chosen: dict[str, Any]
) -> None:
    from spctrl.training.watch import Watcher

    masked = config(
        **chosen, use_extra_mask=True, max_train_steps=1, validation_steps=1, num_validation_images=1
    )
    watcher = Watcher(masked, inputs, inputs.manifest, tmp_path, "run", lambda facts: None)
    train(masked, inputs, tmp_path, watcher)
    watcher.close()
    assert len(list((tmp_path / "validation").rglob("*.jpg"))) == 1


def command_line(tmp_path: Path, inputs: TrainingInputs, *arguments: str, **chosen: Any) -> tuple[int, str]:
    """Exit code and output of ``python -m spctrl.training``, in this process."""
    from typer.testing import CliRunner

    from spctrl.training.__main__ import app

    path = tmp_path / "run.yaml"
    path.write_bytes(msgspec.yaml.encode(settings(**chosen)))
    given = [
        *(str(path), "--manifest", str(inputs.manifest), "--store", str(inputs.store)),
        *("--data-root", str(inputs.data_root), "--weights", str(inputs.weights)),
    ]
    result = CliRunner().invoke(app, [*given, *arguments])
    return result.exit_code, result.output


def test_a_run_to_continue_that_is_not_there_is_refused(inputs: TrainingInputs, tmp_path: Path) -> None:
    arguments = ("--dry-run", "--output", str(tmp_path / "out"), f"--continue-from={tmp_path / 'typo'}")
    code, output = command_line(tmp_path, inputs, *arguments, **SPCTRL)
    assert code != 0
    assert f"expected the folder of a run, found none at {tmp_path / 'typo'}" in output.replace("\n", "")


def test_a_dry_run_says_what_would_be_done(inputs: TrainingInputs, tmp_path: Path) -> None:
    code, output = command_line(tmp_path, inputs, "--dry-run", "--output", str(tmp_path / "out"), **SPCTRL)
    assert code == 0, output
    assert "trains: SpCtrlControlNetModel" in output
    assert "17 token embeddings" in output
    assert "on: 8 images" in output
    assert "6 steps of 2 images (2 x 1 micro-batches x 1 processes), 4 an epoch" in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"pretrained_model_name_or_path": "nowhere"}, "expected the tokenizer of Stable Diffusion 1.5"),
        ({"mixed_precision": "fp16"}, "expected a GPU for fp16"),
        ({"use_cached_latents": True}, "expected latents of all 8 records"),
        ({"conditioning_mode": "zeo_depth_masked"}, "expected masked_depth of all 8 records"),
        ({"use_8bit_adam": True}, "expected the package bitsandbytes"),
        ({"controlnet_model_name_or_path": "nowhere"}, "nowhere is not a folder"),
        ({"learning_rate": 1e30}, "expected a finite loss"),
    ],
)
def test_a_fault_is_explained(
    inputs: TrainingInputs, tmp_path: Path, chosen: dict[str, Any], message: str
) -> None:
    code, output = command_line(tmp_path, inputs, "--output", str(tmp_path / "out"), **chosen)
    assert code == 1
    assert message in output
    assert message in (tmp_path / "out" / "error.txt").read_text()


def test_a_run_without_luigi_needs_a_place(inputs: TrainingInputs, tmp_path: Path) -> None:
    code, output = command_line(tmp_path, inputs)
    assert code == 1
    assert "expected output_dir, or --output FOLDER" in output


def test_the_optimizer_has_the_settings(inputs: TrainingInputs) -> None:
    chosen = config(adam_beta1=0.5, adam_epsilon=1e-3, adam_weight_decay=0.3)
    parameter: Callable[..., Any] = torch.nn.Parameter
    optimizer = make_optimizer(chosen, [[parameter(torch.zeros(2))], [parameter(torch.zeros(3))]])
    assert [group["betas"] for group in optimizer.param_groups] == [(0.5, 0.999)] * 2
    assert {(group["eps"], group["weight_decay"]) for group in optimizer.param_groups} == {(1e-3, 0.3)}

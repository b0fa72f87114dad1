"""A training run that is killed and started again, against uninterrupted ones: how far apart the weights end.

On the CPU there is no difference. On a GPU, sums come in another order from run to run, so two uninterrupted runs
differ too; that difference is measured beside it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import torch
from accelerate.state import AcceleratorState

from benchmarks.gpu.measure import Measurements
from benchmarks.loader import dataset_records, write_dataset
from benchmarks.train_step import Sizes, make_config
from spctrl.models.tiny import build_stable_diffusion
from spctrl.training.checkpoints import checkpoints
from spctrl.training.config import TrainingConfig
from spctrl.training.loop import StepReport, TrainingInputs, train
from spctrl.weights import known_weights

IMAGES, SMALL_IMAGES = 24, 4
STEPS, CHECKPOINT, KILLED_AFTER = 8, 4, 6
MOST_TIMES = 10.0
"""Target: how many times as far the resumed run may be as a second uninterrupted one."""


def run(measurements: Measurements) -> None:
    """In the recommended precision, and in float32."""
    small = measurements.small
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        records, root = dataset_records(folder, SMALL_IMAGES if small else IMAGES)
        manifest = write_dataset(folder, records, root)
        build_stable_diffusion(folder / "weights" / known_weights()["stable_diffusion"].file)
        inputs = TrainingInputs(
            manifest=manifest, store=folder / "store", data_root=folder, weights=folder / "weights"
        )
        for precision in ("no",) if small else ("fp16", "no"):
            _compare(measurements, precision, inputs, folder / precision)


def _compare(measurements: Measurements, precision: str, inputs: TrainingInputs, folder: Path) -> None:
    config = _config(precision, small=measurements.small)
    # Accelerate keeps one precision for each process.
    AcceleratorState._reset_state(reset_partial_state=True)
    for name in ("first", "second"):
        train(config, inputs, folder / name)
    killed = multiprocessing.get_context("spawn").Process(
        target=_train_and_die, args=(config, inputs, folder / "killed")
    )
    killed.start()
    killed.join()
    if killed.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"expected the run to be killed, found exit code {killed.exitcode}")
    started_at: list[int] = []
    train(config, inputs, folder / "killed", lambda report: started_at.append(report.resumed_at))
    if started_at[0] != CHECKPOINT:
        raise RuntimeError(f"expected the run to resume at step {CHECKPOINT}, found {started_at[0]}")
    first, second, resumed = (_weights(folder / name) for name in ("first", "second", "killed"))
    moved = _apart(_weights_at(folder / "first", 0), first)
    again, apart = _apart(first, second), _apart(first, resumed)
    measurements.add(
        f"{precision}: relative difference after {STEPS} steps",
        two_uninterrupted=again,
        uninterrupted_and_resumed=apart,
        first_to_last_checkpoint=moved,
    )
    if again == 0:
        measurements.target(f"{precision}: resumed / uninterrupted, difference", apart, at_most=0)
    else:
        measurements.target(
            f"{precision}: difference of the resumed run / of two runs", apart / again, at_most=MOST_TIMES
        )


def _train_and_die(config: TrainingConfig, inputs: TrainingInputs, output: Path) -> None:
    def kill(report: StepReport) -> None:
        if report.step == KILLED_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)

    train(config, inputs, output, kill)


def _config(precision: str, *, small: bool) -> TrainingConfig:
    """The recommended objective, in all timesteps, with learning rates at which a few steps move the weights."""
    sizes = Sizes(
        narrowed=1, resolution=64 if small else 512, batch_size=2 if small else 4, precision=precision
    )
    return msgspec.structs.replace(
        make_config(sizes),
        use_cached_latents=not small,
        attn_loss_start_timestep=None,
        attn_loss_end_timestep=None,
        learning_rate=1e-3,
        text_encoder_lr=0.5,
        lr_warmup_steps=0,
        max_train_steps=STEPS,
        checkpointing_steps=CHECKPOINT,
        checkpoints_total_limit=None,
        logging_steps=1,
        report_to="none",
    )


def _weights(folder: Path) -> torch.Tensor:
    """The control network's weights in the last checkpoint, as one vector."""
    return _weights_at(folder, -1)


def _weights_at(folder: Path, position: int) -> torch.Tensor:
    from safetensors.torch import load_file

    (path,) = checkpoints(folder)[position].rglob("*.safetensors")
    saved = load_file(path)
    return torch.cat([saved[name].flatten().double() for name in sorted(saved)])


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative difference in the Euclidean norm."""
    return float((one - other).norm() / one.norm())

"""The training loop: steps, checkpoints, and going on after an interruption as if there had been none."""

from __future__ import annotations

import importlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from spctrl.errors import ExpectedError
from spctrl.extras import missing_package
from spctrl.io.disk_errors import is_shared_memory
from spctrl.models.stable_diffusion import move
from spctrl.training.checkpoints import (
    RUN,
    STATE,
    checkpoint_path,
    read_state,
    remove_checkpoints,
    remove_partial,
    step_of,
    write_checkpoint,
)
from spctrl.training.config import TrainingConfig
from spctrl.training.dataset import SpCtrlDataset
from spctrl.training.networks import FROZEN_DTYPES, Networks, load_networks
from spctrl.training.objective import Batch, draw, objective_of, step_seed
from spctrl.training.resumption import Start, run_facts, take_start
from spctrl.training.schedule import Schedule, learning_rates, make_schedule
from spctrl.weights import save_torch_file

if TYPE_CHECKING:
    from accelerate import Accelerator

    from spctrl.training.objective import Objective


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """Where a run finds what it reads.

    Attributes:
        manifest: Parquet manifest of the images to train on.
        store: that has their conditions and latents.
        data_root: the raw dataset, with the images; not needed with cached latents.
        weights: folder of the entries of weights.yaml.
        keypoint_radius_px, link_half_width_px: sizes in index maps and renders that are drawn.
        files_digest: of the content of all files that the settings name. Runs are compared by it, or else by the paths.
        needs_vae: whether the image autoencoder is wanted for more than training, such as drawing images.
    """

    manifest: Path
    store: Path
    data_root: Path | None
    weights: Path
    keypoint_radius_px: int = 4
    link_half_width_px: int = 4
    needs_vae: bool = False
    files_digest: str | None = None


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What became of a step.

    Attributes:
        step: steps that are done.
        schedule: of the run.
        resumed_at: the step that this process started from.
        losses: means over micro-batches and processes; None in steps of which only the number is known.
        norms: of the gradients before clipping, by group; None likewise.
        rates: learning rates of the step, by group.
        networks: for drawing images.
    """

    step: int
    schedule: Schedule
    resumed_at: int
    losses: dict[str, float] | None
    norms: dict[str, float] | None
    rates: dict[str, float]
    networks: Networks


GROUPS = ("control", "tokens")
"""Names of the groups of trained parameters, in the optimizer's order."""


def train(
    config: TrainingConfig,
    inputs: TrainingInputs,
    output: Path,
    on_step: Callable[[StepReport], None] = lambda report: None,
    earlier_runs: Sequence[Path] = (),
) -> Path:
    """Train until the end, from the latest usable checkpoint where there is one (``resumption``).

    Run it in as many processes as ``accelerate launch`` starts. On the CPU, a run that is killed at any moment and
    started again, or that continues a shorter one, ends with the same weights, to the bit, as an uninterrupted one.

    Args:
        config: what to train.
        inputs: where to find what it reads.
        output: folder of the checkpoints.
        on_step: told of every step, in the main process.
        earlier_runs: folders of other runs on the same data, weights and code, whose checkpoints may be continued.

    Returns:
        The last checkpoint, below ``output``.

    Raises:
        ExpectedError: weights or data are missing or do not fit; the checkpoints are another configuration's; a
            checkpoint cannot be written; or the loss is not finite.
    """
    accelerator = make_accelerator(config)
    run = prepare(config, inputs, accelerator)
    with objective_of(run.networks, config) as objective:
        return _Loop(run, objective, accelerator, output, on_step, earlier_runs).run()


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """Everything that a run has loaded before its first step."""

    config: TrainingConfig
    dataset: SpCtrlDataset
    networks: Networks
    schedule: Schedule
    files_digest: str | None


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Accelerate's view of the processes and devices of this run.

    Raises:
        ExpectedError: float16 without a GPU.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import PartialState

    if config.mixed_precision == "fp16" and PartialState().device.type == "cpu":
        raise ExpectedError("mixed_precision: expected a GPU for fp16, found none. Set it to no or bf16")
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    return Accelerator(
        mixed_precision=config.mixed_precision,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def prepare(config: TrainingConfig, inputs: TrainingInputs, accelerator: Accelerator) -> PreparedRun:
    """Load data and networks and bring the networks onto the device.

    Raises:
        ExpectedError: weights or data are missing or do not fit.
    """
    with_vae = inputs.needs_vae or not config.use_cached_latents
    networks = load_networks(config, inputs.weights, with_vae=with_vae)
    dataset = training_dataset(config, inputs, networks.tokenizer)
    dtype = FROZEN_DTYPES[config.mixed_precision]
    # Trained rows stay in float32, and the networks around them in autocast's hands. An autoencoder that only decodes
    # validation images does so in float32.
    text_dtype = dtype if networks.token_rows is None else torch.float32
    vae_dtype = torch.float32 if config.use_cached_latents else dtype
    for network, precision in (
        (networks.unet, dtype), (networks.text_encoder, text_dtype), (networks.vae, vae_dtype),
        (networks.control, torch.float32),
    ):  # fmt: skip
        if network is not None:
            move(network, accelerator.device, precision)
    if config.gradient_checkpointing:
        networks.unet.enable_gradient_checkpointing()
        if config.model == "controlnet":
            networks.control.enable_gradient_checkpointing()
    if config.torch_compile:
        networks.unet.compile()
        networks.control.compile()
    schedule = make_schedule(config, images=len(dataset), processes=accelerator.num_processes)
    return PreparedRun(
        config=config,
        dataset=dataset,
        networks=networks,
        schedule=schedule,
        files_digest=inputs.files_digest,
    )


def training_dataset(config: TrainingConfig, inputs: TrainingInputs, tokenizer: Any) -> SpCtrlDataset:
    """The images of a run.

    Raises:
        ExpectedError: the manifest or something that it names is missing or does not fit.
    """
    needs_heatmaps = config.add_cross_attn_loss or config.heatmap_reweight_loss is not None
    return SpCtrlDataset(
        inputs.manifest,
        data_root=inputs.data_root,
        tokenizer=tokenizer,
        store=inputs.store,
        conditioning_mode=config.conditioning_mode,
        use_extra_mask=config.use_extra_mask,
        stored_conditions=config.stored_conditions,
        resolution=config.resolution,
        latents=config.use_cached_latents,
        templates=None if config.prompt_templates is None else Path(config.prompt_templates),
        enable_learnable_kpttoken=config.enable_learnable_kpttoken,
        add_keypoint_prompt=config.add_keypoint_prompt,
        proportion_empty_prompts=config.proportion_empty_prompts,
        heatmap_type=config.heatmap_type if needs_heatmaps else None,
        heatmap_target=config.heatmap_target,
        seed=config.seed,
        max_samples=config.max_train_samples,
        keypoint_radius_px=inputs.keypoint_radius_px,
        link_half_width_px=inputs.link_half_width_px,
    )


def make_optimizer(config: TrainingConfig, groups: list[list[torch.nn.Parameter]]) -> torch.optim.Optimizer:
    """AdamW over groups of parameters; their learning rates are set in each step.

    Raises:
        ExpectedError: 8-bit states are asked for and bitsandbytes is not installed.
    """
    adam = torch.optim.AdamW
    if config.use_8bit_adam:
        try:
            adam = importlib.import_module("bitsandbytes.optim").AdamW8bit
        except ModuleNotFoundError as error:
            raise ExpectedError(
                f"use_8bit_adam: {missing_package('bitsandbytes')}; or set use_8bit_adam to false"
            ) from error
    return adam(
        [{"params": group} for group in groups],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )


def clip_gradients(
    groups: Mapping[str, list[torch.nn.Parameter]],
    table: torch.nn.Parameter | None,
    max_norm: float,
    *,
    table_scale: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Clip the gradients of each group of parameters to a norm.

    Args:
        groups: by name; those of ``tokens`` are clipped together with the table's.
        table: (V, D) a frozen token embedding, whose gradient counts and is then dropped; None counts the rows alone.
        max_norm: of each group.
        table_scale: what the table's gradient still has to be divided by: scalers unscale what the optimizer has.

    Returns:
        The norms before clipping, by group.
    """
    counted: dict[str, list[torch.nn.Parameter]] = {}
    if table is not None and table.grad is not None:
        table.grad /= table_scale
        counted["tokens"] = [table]
    norms = {
        name: torch.nn.utils.clip_grad_norm_([*parameters, *counted.get(name, ())], max_norm)
        for name, parameters in groups.items()
    }
    if table is not None:
        table.grad = None
    return norms


def show_overflow(rows: torch.nn.Parameter, table: torch.nn.Parameter) -> None:
    """Make trained rows' gradients not finite where the frozen table's are: scalers skip steps by those alone."""
    if rows.grad is not None and table.grad is not None:
        rows.grad += 0 * table.grad.sum()


WORKER_ERROR = re.compile(
    r"Caught \w+ in DataLoader worker process.*\n(?:spctrl|eval)\.[\w.]+: (.+)", re.DOTALL
)


def _explaining_workers(loader: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The batches of a loader.

    Raises:
        ExpectedError: shared memory is full; or a worker's, without the traceback that torch makes part of its message.
    """
    try:
        yield from loader
    except ExpectedError as error:
        found = WORKER_ERROR.match(str(error))
        raise ExpectedError(found[1].strip() if found else str(error)) from error
    except (OSError, RuntimeError) as error:
        if not is_shared_memory(error):
            raise
        raise ExpectedError(
            "expected room in shared memory (/dev/shm), through which loader processes pass images, found it full. "
            "Lower dataloader_num_workers (0 needs none) or make it larger (docker run --shm-size), then run again"
        ) from error


class _Loop:
    """One process's part of a run."""

    def __init__(
        self,
        run: PreparedRun,
        objective: Objective,
        accelerator: Accelerator,
        output: Path,
        on_step: Callable[[StepReport], None],
        earlier_runs: Sequence[Path],
    ) -> None:
        self.config, self.schedule, self.networks = run.config, run.schedule, run.networks
        self.dataset, self.files_digest = run.dataset, run.files_digest
        self.accelerator = accelerator
        self.output = output
        self.on_step = on_step
        self.earlier_runs = earlier_runs
        self.groups = dict(zip(GROUPS, self.networks.trained_groups(), strict=False))
        optimizer = make_optimizer(self.config, list(self.groups.values()))
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        self.rates = learning_rates(self.config, self.schedule)
        self.start = 0

    def run(self) -> Path:
        self.start = self._restore()
        batches: Iterator[Batch] = iter(())
        for step in range(self.start, self.schedule.total_steps):
            if step == self.start or step % self.schedule.steps_per_epoch == 0:
                batches = self._batches(step)
            self._train_step(step, batches)
            if self._is_checkpoint(step + 1):
                self._save(step + 1)
        return self._save(self.schedule.total_steps)  # written by now, unless another run had done all steps

    def _is_checkpoint(self, done: int) -> bool:
        return done % self.config.checkpointing_steps == 0 or done == self.schedule.total_steps

    def _batches(self, first_step: int) -> Iterator[Batch]:
        """Micro-batches of this process on its device, from a step to the end of its epoch."""
        self.dataset.set_epoch(self.schedule.epoch(first_step))
        loader = DataLoader(
            self.dataset,
            batch_sampler=self.schedule.batches(first_step, self.accelerator.process_index),
            num_workers=self.config.dataloader_num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        for batch in _explaining_workers(loader):
            yield {
                name: value.to(self.accelerator.device, non_blocking=True)
                for name, value in batch.items()
                if isinstance(value, torch.Tensor)
            }

    def _train_step(self, step: int, batches: Iterator[Batch]) -> None:
        rates = self.rates(step)
        for name, group in zip(self.groups, self.optimizer.param_groups, strict=True):
            group["lr"] = rates[name]
        losses = self._backward(step, batches)
        norms = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._report(step, losses, norms, rates)

    def _clip(self) -> dict[str, torch.Tensor]:
        """Clip the gradients of each group; returns their norms before that."""
        scaler = self.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        if self.networks.token_rows is not None and self.networks.token_table is not None:
            show_overflow(self.networks.token_rows, self.networks.token_table)
        self.accelerator.unscale_gradients()
        return clip_gradients(
            self.groups, self.networks.token_table, self.config.max_grad_norm, table_scale=scale
        )

    def _backward(self, step: int, batches: Iterator[Batch]) -> dict[str, torch.Tensor]:
        """Add up the gradients of a step's micro-batches; returns the mean losses."""
        micro_batches = self.schedule.micro_batches
        total: dict[str, torch.Tensor] = {}
        for number in range(micro_batches):
            # Before the seed is set: starting a loader takes a number from the generator that dropout uses.
            batch = next(batches)
            seed = step_seed(self.config, step, number, self.accelerator.process_index)
            draws = draw(
                seed,
                batch_size=self.schedule.batch_size,
                resolution=self.config.resolution,
                num_timesteps=len(self.networks.noise.betas),
            )
            torch.manual_seed(seed)  # for dropout
            # Gradients are gathered from all processes once, with the last of a step's micro-batches.
            waits = number < micro_batches - 1
            with self.accelerator.no_sync(self.objective) if waits else nullcontext():
                losses = self.objective(batch, draws.to(self.accelerator.device))
                self.accelerator.backward(losses["loss"] / micro_batches)
            for name, value in losses.items():
                total[name] = total.get(name, 0.0) + value.detach() / micro_batches
        return total

    def _report(
        self,
        step: int,
        losses: dict[str, torch.Tensor],
        norms: dict[str, torch.Tensor],
        rates: dict[str, float],
    ) -> None:
        """Tell of a step. Reading a number from a GPU waits for it, so only some steps do."""
        done = step + 1
        is_logged = done % self.config.logging_steps == 0 or step == self.start or self._is_checkpoint(done)
        found = found_norms = None
        if is_logged:
            found = {name: float(self.accelerator.reduce(value, "mean")) for name, value in losses.items()}
            found_norms = {name: float(value) for name, value in norms.items()}
            self._check_finite(done, found)
        if self.accelerator.is_main_process:
            self.on_step(
                StepReport(
                    step=done,
                    schedule=self.schedule,
                    resumed_at=self.start,
                    losses=found,
                    norms=found_norms,
                    rates=rates,
                    networks=self.networks,
                )
            )

    def _check_finite(self, step: int, losses: dict[str, float]) -> None:
        wrong = [f"{name} = {value}" for name, value in losses.items() if not math.isfinite(value)]
        if wrong:
            raise ExpectedError(
                f"step {step}: expected a finite loss, found {', '.join(wrong)}. Lower learning_rate or "
                f"text_encoder_lr, or use another mixed_precision; the checkpoints in {self.output} are from before"
            )

    # Checkpoints

    def _save(self, step: int) -> Path:
        """Write a checkpoint after so many steps, unless it is there; the other processes wait."""
        run = {"step": step, **run_facts(self.config, self.schedule, self.files_digest)}
        scaler = self.accelerator.scaler
        loss_scale = None if scaler is None else scaler.state_dict()

        def write(folder: Path) -> None:
            self.networks.save(folder)
            state = {"optimizer": self.optimizer.state_dict(), "loss_scale": loss_scale}
            save_torch_file(state, folder / STATE)
            (folder / RUN).write_text(json.dumps(run))

        if self.accelerator.is_main_process:
            write_checkpoint(self.output, step, write, keep=self.config.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()
        return checkpoint_path(self.output, step)

    def _restore(self) -> int:
        """Restore everything from where the run starts; returns the number of the next step.

        Raises:
            ExpectedError: the folder's checkpoints are those of another run.
        """
        from accelerate.utils import broadcast_object_list

        start = self._find_start() if self.accelerator.is_main_process else Start()
        (checkpoint,) = broadcast_object_list([start.checkpoint])
        if checkpoint is None:
            return 0
        state = start.state or read_state(checkpoint)
        try:
            self.networks.restore(checkpoint)
        except OSError as error:
            raise ExpectedError(
                f"{checkpoint}: expected a checkpoint, found that it was removed or cannot be read meanwhile: {error}. "
                "Run again"
            ) from error
        self.optimizer.load_state_dict(state["optimizer"])
        if state["loss_scale"] is not None:
            self.accelerator.scaler.load_state_dict(state["loss_scale"])
        return step_of(checkpoint)

    def _find_start(self) -> Start:
        """Choose where the run starts, and clear its folder of what is not to stay."""
        self.output.mkdir(parents=True, exist_ok=True)
        remove_partial(self.output)
        if self.config.resume_from_checkpoint is None:
            remove_checkpoints(self.output)
        return take_start(self.config, self.schedule, self.output, self.earlier_runs, self.files_digest)

"""What is seen of a run while it trains: progress, losses in files and trackers, images of the validation split."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch

from spctrl.errors import ExpectedError
from spctrl.extras import missing_package
from spctrl.inference.generator import ImageGenerator, Request, jpeg_bytes
from spctrl.inference.methods import Sampler, image_seed
from spctrl.io.disk_errors import writing
from spctrl.io.parquet import read_table
from spctrl.prompts import load_templates, rows_without_prompt
from spctrl.training.checkpoints import CHECKPOINTS_STAY
from spctrl.training.loop import training_dataset
from spctrl.training.networks import FROZEN_DTYPES
from spctrl.training.resumption import HISTORY, VALIDATION, keep_history
from spctrl.weights import find_weights

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from spctrl.training.config import TrainingConfig
    from spctrl.training.loop import StepReport, TrainingInputs
    from spctrl.training.networks import Networks

Show = Callable[[dict[str, Any]], None]
"""Told of progress: step, total, epoch, losses (as far as they are known) and seconds that are left."""


class Watcher:
    """Keeps and shows what the training loop reports; to be called with each step's ``StepReport``.

    Args:
        config: of the run.
        inputs: of the run.
        validation_manifest: of the images to draw; None draws none.
        output: folder that files go to.
        name: of the run, for trackers.
        show: told of each step.
    """

    def __init__(
        self,
        config: TrainingConfig,
        inputs: TrainingInputs,
        validation_manifest: Path | None,
        output: Path,
        name: str,
        show: Show,
    ) -> None:
        self.config = config
        self.output = output
        self.show = show
        self.name = name
        self._tracker: Any = None
        self._first: tuple[int, float] | None = None
        self._losses: dict[str, float] = {}
        self._validation = (
            Validation(config, inputs, validation_manifest)
            if config.validation_steps and validation_manifest
            else None
        )

    def __call__(self, report: StepReport) -> None:
        if self._first is None:
            self._start(report)
        if report.losses is not None:
            self._losses = report.losses
            self._keep(report)
        self.show(self._progress(report))
        if self._validation and report.step % (self.config.validation_steps or 1) == 0:
            self._keep_images(report.step, self._validation.draw(report.networks))

    def close(self) -> None:
        """Finish what trackers still hold."""
        if self._tracker is not None:
            self._tracker.finish()

    def _start(self, report: StepReport) -> None:
        self._first = report.step, time.monotonic()
        keep_history(self.output / HISTORY, report.resumed_at)
        self._tracker = _tracker(self.config, self.output, self.name, report.resumed_at)

    def _progress(self, report: StepReport) -> dict[str, Any]:
        assert self._first is not None
        first_step, first_time = self._first
        steps, elapsed_s = report.step - first_step, time.monotonic() - first_time
        steps_per_s = steps / elapsed_s if steps else 0.0
        total = report.schedule.total_steps
        return {
            "step": report.step,
            "total": total,
            "epoch": report.schedule.epoch(report.step - 1),
            "losses": self._losses,
            "steps_per_s": steps_per_s,
            "left_s": (total - report.step) / steps_per_s if steps_per_s else None,
        }

    def _keep(self, report: StepReport) -> None:
        values = {
            **{f"loss/{name}": value for name, value in (report.losses or {}).items()},
            **{f"gradient_norm/{name}": value for name, value in (report.norms or {}).items()},
            **{f"learning_rate/{name}": value for name, value in report.rates.items()},
        }
        path = self.output / HISTORY
        with writing(path, CHECKPOINTS_STAY), path.open("a") as file:
            file.write(json.dumps({"step": report.step, **values}) + "\n")
        if self._tracker is not None:
            self._tracker.log(values, step=report.step)

    def _keep_images(self, step: int, images: dict[int, NDArray[np.float32]]) -> None:
        folder = self.output / VALIDATION / f"step-{step:08d}"
        with writing(folder, CHECKPOINTS_STAY):
            folder.mkdir(parents=True, exist_ok=True)
            for image_id, image in images.items():
                (folder / f"{image_id}.jpg").write_bytes(jpeg_bytes(image))
        if self._tracker is not None:
            levels = np.stack([np.rint(image * 255).astype(np.uint8) for image in images.values()])
            named = levels if self.config.report_to == "wandb" else np.moveaxis(levels, -1, 1)
            self._tracker.log_images({VALIDATION: named}, step=step)


def _tracker(config: TrainingConfig, output: Path, name: str, resumed_at: int) -> Any:
    """Accelerate's tracker of a run, or None.

    Raises:
        ExpectedError: its package is not installed.
    """
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    try:
        if config.report_to == "tensorboard":
            folder = output / config.logging_dir
            tracker = TensorBoardTracker(name, folder, purge_step=resumed_at + 1 if resumed_at else None)
        elif config.report_to == "wandb":
            tracker = WandBTracker(config.tracker_project_name, name=name, dir=output)
        else:
            return None
        tracker.start()
    except ImportError as error:
        raise ExpectedError(
            f"report_to = {config.report_to}: {missing_package(config.report_to)}; or set report_to to none"
        ) from error
    return tracker


class Validation:
    """Images of a few poses of the validation split, always from the same noise.

    Args:
        config: of the run.
        inputs: of the run.
        manifest: of the validation split.

    Raises:
        ExpectedError: the manifest does not have the images that the configuration names.
    """

    def __init__(self, config: TrainingConfig, inputs: TrainingInputs, manifest: Path) -> None:
        self.config = config
        self.inputs = inputs
        self.manifest = manifest
        self.image_ids = _validation_ids(config, manifest)
        self._requests: dict[int, Request] = {}

    def draw(self, networks: Networks) -> dict[int, NDArray[np.float32]]:
        """(R, R, 3) images in [0, 1] by image id. The networks' modes and random numbers of training stay."""
        if not self._requests:
            self._requests = self._read(networks)
        pipeline = _pipeline(
            networks,
            self.config,
            find_weights(self.config.pretrained_model_name_or_path, self.inputs.weights),
        )
        device = networks.control.device
        sampler = Sampler(resolution=self.config.resolution)
        generator = ImageGenerator(pipeline, self.config.kind, sampler, device)
        dtype = FROZEN_DTYPES[self.config.mixed_precision]
        networks.control.eval()
        try:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                images = [generator.infer([request])[0] for request in self._requests.values()]
        finally:
            networks.control.train()
        return dict(zip(self._requests, images, strict=True))

    def _read(self, networks: Networks) -> dict[int, Request]:
        shown = msgspec.structs.replace(
            self.config,
            use_cached_latents=False,
            proportion_empty_prompts=0.0,
            add_keypoint_prompt=float(self.config.add_keypoint_prompt > 0),
            max_train_samples=None,
        )
        inputs = dataclasses.replace(self.inputs, manifest=self.manifest)
        dataset = training_dataset(shown, inputs, networks.tokenizer)
        position_of = {image_id: position for position, image_id in enumerate(dataset.image_ids)}
        samples = [dataset[position_of[image_id]] for image_id in self.image_ids]
        return {
            sample["image_id"]: Request(
                sample["conditioning_image"].numpy(),
                self.config.validation_prompt or sample["prompt"],
                image_seed(self.config.seed, sample["image_id"], 0),
            )
            for sample in samples
        }


def _validation_ids(config: TrainingConfig, manifest: Path) -> list[int]:
    """Images of the manifest to generate, among those that the dataset has: the ones that a prompt template fits."""
    table = read_table(manifest)
    path = None if config.prompt_templates is None else Path(config.prompt_templates)
    without_prompt = rows_without_prompt(load_templates(path, config.dataset_name).training, table)
    ids = [
        image_id
        for row, image_id in enumerate(table.column("image_id").to_pylist())
        if row not in without_prompt
    ]
    wanted = list(config.validation_image or ids[: config.num_validation_images])
    if missing := sorted(set(wanted) - set(ids)):
        raise ExpectedError(
            f"validation_image: expected ids of images in {manifest} that a prompt template fits, found "
            f"{', '.join(map(str, missing[:5]))}"
        )
    return wanted


def _pipeline(networks: Networks, config: TrainingConfig, folder: Path) -> Any:
    """A pipeline around the networks as they are."""
    from diffusers import StableDiffusionAdapterPipeline, StableDiffusionControlNetPipeline

    from spctrl.inference.pipeline import SpCtrlPipeline, unipc

    common = {
        "vae": networks.vae,
        "text_encoder": networks.text_encoder,
        "tokenizer": networks.tokenizer,
        "unet": networks.unet,
        "scheduler": unipc(folder),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    if config.kind == "t2i_adapter":
        pipeline = StableDiffusionAdapterPipeline(adapter=networks.control, **common)
    else:
        kind = SpCtrlPipeline if config.kind == "spctrl" else StableDiffusionControlNetPipeline
        pipeline = kind(controlnet=networks.control, **common)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

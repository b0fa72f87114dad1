"""The parts of a Stable Diffusion 1.5 folder in diffusers' format, each read strictly and in float32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spctrl.errors import ExpectedError
from spctrl.image_models.loading import WeightsFolder, load_strictly
from spctrl.io.documents import read_document_file
from spctrl.io.network_size import MAX_CONFIG_BYTES, check_tokenizer, read_config
from spctrl.io.reading_faults import faults_of

if TYPE_CHECKING:
    import torch

PARTS = ("unet", "text_encoder", "tokenizer", "scheduler", "vae")
"""Folders of a Stable Diffusion folder that are read; what else lies there is not."""


def _part(name: str, kind: tuple[str, str]) -> WeightsFolder:
    return WeightsFolder(
        what=f"Stable Diffusion 1.5's {name} in diffusers' format",
        source=f"the folder {name} of stable-diffusion-v1-5/stable-diffusion-v1-5 on the Hugging Face hub",
        files="config.json and the weights beside it",
        setting="the folder of Stable Diffusion 1.5",
        kind=kind,
    )


def move(network: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Bring a network's parameters and buffers onto a device, in a precision.

    The ``to`` of diffusers' models warns of modules to be kept in float32, also where there are none.
    """
    import torch

    torch.nn.Module.to(network, device, dtype)


def load_unet(folder: Path) -> Any:
    """The ``UNet2DConditionModel`` of a Stable Diffusion folder.

    Raises:
        ExpectedError: it is missing, broken, or another model.
    """
    from diffusers import UNet2DConditionModel

    return _load(
        UNet2DConditionModel, _part("unet", ("_class_name", "UNet2DConditionModel")), folder / "unet"
    )


def load_vae(folder: Path) -> Any:
    """The ``AutoencoderKL`` of a Stable Diffusion folder.

    Raises:
        ExpectedError: it is missing, broken, or another model.
    """
    from diffusers import AutoencoderKL

    vae = _load(AutoencoderKL, _part("vae", ("_class_name", "AutoencoderKL")), folder / "vae")
    latent_scale(folder)
    return vae


def load_text_encoder(folder: Path) -> Any:
    """The ``CLIPTextModel`` of a Stable Diffusion folder.

    Raises:
        ExpectedError: it is missing, broken, or another model.
    """
    import torch
    from transformers import CLIPTextModel

    def load(part: Path) -> tuple[Any, Mapping[str, Any]]:
        return CLIPTextModel.from_pretrained(  # type: ignore[no-any-return]
            part, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )

    return load_strictly(
        _part("text_encoder", ("model_type", "clip_text_model")), folder / "text_encoder", load
    )


def load_tokenizer(folder: Path) -> Any:
    """The ``CLIPTokenizer`` of a Stable Diffusion folder.

    Raises:
        ExpectedError: its files are missing or broken.
    """
    from transformers import CLIPTokenizer

    part = folder / "tokenizer"
    if not (part / "vocab.json").is_file() or not (part / "merges.txt").is_file():
        raise ExpectedError(
            f"expected the tokenizer of Stable Diffusion 1.5 (vocab.json, merges.txt) in {part}, found none. Get the "
            "folder tokenizer of stable-diffusion-v1-5/stable-diffusion-v1-5 on the Hugging Face hub"
        )
    with faults_of(f"{part}: the tokenizer cannot be read"):
        check_tokenizer(part)
        return CLIPTokenizer.from_pretrained(part, local_files_only=True)


def noise_schedule(folder: Path) -> Any:
    """A ``DDPMScheduler`` with the noise schedule of a Stable Diffusion folder, for training.

    Raises:
        ExpectedError: there is no schedule, or the model predicts something other than the noise.
    """
    from diffusers import DDPMScheduler

    scheduler = load_schedule(DDPMScheduler, folder)
    if scheduler.config.prediction_type != "epsilon":
        raise ExpectedError(
            f"{folder / 'scheduler'}: expected a model that predicts noise (prediction_type epsilon), as Stable "
            f"Diffusion 1.5, found {scheduler.config.prediction_type}"
        )
    return scheduler


def load_schedule(scheduler: Any, folder: Path, **settings: Any) -> Any:
    """A scheduler of diffusers with the noise schedule of a Stable Diffusion folder.

    Args:
        scheduler: its class.
        folder: of Stable Diffusion 1.5.
        settings: in place of the folder's own.

    Raises:
        ExpectedError: there is no schedule, or none that can be.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    with faults_of(f"expected the noise schedule of Stable Diffusion 1.5 in {path}, found a fault"):
        found = scheduler.from_config(read_config(path), **settings)
        _check_schedule(found)
        return found


def _check_schedule(scheduler: Any) -> None:
    alphas, steps = scheduler.alphas_cumprod, scheduler.config.num_train_timesteps
    if steps < 1 or alphas.shape != (steps,) or not ((alphas > 0) & (alphas <= 1)).all():  # NaN is neither
        raise ValueError(
            f"expected alphas_cumprod in (0, 1] for each of num_train_timesteps = {steps}, found {len(alphas)} values, "
            "or some outside"
        )


def latent_scale(folder: Path) -> float:
    """What latents are multiplied by before noise is added (0.18215), without loading the autoencoder.

    Raises:
        ExpectedError: there is no such number in the autoencoder's config.
    """
    path = folder / "vae" / "config.json"
    with faults_of(f"{path}: expected the autoencoder's config, found a fault"):
        scale = read_document_file(path, MAX_CONFIG_BYTES).get("scaling_factor", 0.18215)
        if not isinstance(scale, int | float) or not 0 < scale < math.inf:
            raise ValueError(f"expected scaling_factor as a finite number above 0, found {str(scale)[:20]!r}")
        return float(scale)


def _load(model: Any, expected: WeightsFolder, folder: Path) -> Any:
    import torch

    return load_strictly(
        expected,
        folder,
        lambda part: model.from_pretrained(
            part,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are listed then, and load_strictly names them
            low_cpu_mem_usage=False,
            torch_dtype=torch.float32,
        ),
    )

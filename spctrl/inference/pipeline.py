"""Diffusers' pipelines with this project's models: loading them whole, and index maps as conditions.

Legend: B images of a batch, H and W of an index map, h and w of the image to draw, all in pixels; E extra channels,
such as a mask, that a ControlNet was trained with (``spatext_extra_channels``), mostly 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    ControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    T2IAdapter,
    UniPCMultistepScheduler,
)
from diffusers.utils import logging as diffusers_logging
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers.utils import logging as transformers_logging

from spctrl.conditions.index_maps import index_map_of_image, value_fault
from spctrl.data.records import RecordError
from spctrl.errors import ExpectedError
from spctrl.image_models.loading import WeightsFolder, load_strictly
from spctrl.inference.checkpoints import learned_embeds_file, network_folder
from spctrl.inference.methods import LATENT_FACTOR, FinalSigmas, Kind, MapResize
from spctrl.models.controlnet import RELEASED_CLASS, SpCtrlControlNetModel
from spctrl.models.stable_diffusion import (
    load_schedule,
    load_text_encoder,
    load_tokenizer,
    load_unet,
    load_vae,
    move,
)
from spctrl.models.tokens import load_learned_embeds, set_learned_embeds

_INTERPOLATION: dict[MapResize, str] = {"centre": "nearest-exact", "floor": "nearest"}
"""Torch's names."""

_WEIGHTS = "diffusion_pytorch_model.safetensors"


def _network(what: str, class_name: str) -> WeightsFolder:
    return WeightsFolder(
        what=what,
        source="whoever trained it (configs/train/ trains one)",
        files=f"config.json and {_WEIGHTS}",
        setting="checkpoint",
        kind=("_class_name", class_name),
    )


NETWORKS: dict[Kind, tuple[type[Any], WeightsFolder]] = {
    "spctrl": (SpCtrlControlNetModel, _network("an SP-Ctrl ControlNet", RELEASED_CLASS)),
    "controlnet": (ControlNetModel, _network("a ControlNet in diffusers' format", "ControlNetModel")),
    "t2i_adapter": (T2IAdapter, _network("a T2I-Adapter in diffusers' format", "T2IAdapter")),
}


class IndexMapError(ExpectedError, ValueError):
    """Something that is not an index map."""


class SpCtrlPipeline(StableDiffusionControlNetPipeline):
    """Diffusers' ``StableDiffusionControlNetPipeline`` whose ``image`` is an index map.

    An index map is a PIL image whose colour channels are equal or a float or integer tensor or array of (H, W),
    (1, H, W) or (B, 1, H, W); or a list of any of these. It is resized as ``map_resize`` says, to the sides ``height``
    and ``width`` of the image to draw, by default its own, rounded down to multiples of 8. A ControlNet with extra
    channels takes tensors or arrays of (1 + E, H, W) or (B, 1 + E, H, W), the index map first; these are resized alike.
    All else is as in diffusers.

    Attributes:
        map_resize: see ``spctrl.inference.methods.Sampler``.
    """

    map_resize: MapResize = "centre"

    def check_image(self, image: Any, prompt: Any, prompt_embeds: Any) -> None:
        """As in diffusers, of the index maps as a batch.

        Raises:
            IndexMapError: not index maps.
            ValueError: neither one nor one for each prompt.
        """
        super().check_image(self._conditions(image), prompt, prompt_embeds)

    def prepare_image(
        self, image: Any, width: int | None, height: int | None, *args: Any, **kwargs: Any
    ) -> Any:
        """(B, 1 + E, h, w) in the ControlNet's precision, as diffusers repeats it for guidance."""
        maps = self._conditions(image)
        size_hw = tuple(
            asked or side - side % LATENT_FACTOR
            for asked, side in zip((height, width), maps.shape[-2:], strict=True)
        )
        if maps.shape[-2:] != size_hw:
            maps = F.interpolate(maps, size_hw, mode=_INTERPOLATION[self.map_resize])
        return super().prepare_image(maps, size_hw[1], size_hw[0], *args, **kwargs)

    def _conditions(self, image: Any) -> Tensor:
        """(B, 1 + E, H, W) float32."""
        return index_maps(image, getattr(self.controlnet.config, "spatext_extra_channels", 0))


def index_maps(image: Any, extra_channels: int = 0) -> Tensor:
    """(B, 1 + E, H, W) float32 of what ``SpCtrlPipeline`` accepts: index maps, followed by the extra channels.

    Raises:
        IndexMapError: it has another shape, or values that index maps do not have.
    """
    if isinstance(image, list | tuple):
        return torch.cat([index_maps(each, extra_channels) for each in image])
    if isinstance(image, Image.Image):
        try:
            image = index_map_of_image(image)
        except RecordError as error:
            raise IndexMapError(error.message) from error
    maps = torch.as_tensor(image).float()
    maps = maps.reshape((1,) * (4 - maps.ndim) + maps.shape)
    if maps.ndim != 4 or maps.shape[1] != 1 + extra_channels:
        raise IndexMapError(
            f"expected index maps of shape (B, {1 + extra_channels}, H, W)"
            f"{', with the extra channels' if extra_channels else ''}, found {tuple(maps.shape)}"
        )
    if fault := value_fault(maps[:, :1].unique().tolist()):
        raise IndexMapError(fault)
    return maps


def load_pipeline(
    *,
    kind: Kind,
    stable_diffusion: Path,
    checkpoint: Path,
    device: torch.device,
    dtype: torch.dtype,
    final_sigmas_type: FinalSigmas = "zero",
) -> Any:
    """A diffusers pipeline with UniPC, ready to draw: ``SpCtrlPipeline``, or diffusers' for ControlNet or T2I-Adapter.

    All weights must be the files' own. Keypoint tokens in or beside the checkpoint go into tokenizer and text encoder.

    Args:
        kind: of the checkpoint.
        stable_diffusion: folder of Stable Diffusion 1.5.
        checkpoint: folder of the ControlNet or adapter.
        device: to work on.
        dtype: of all networks but the image decoder, which works in float32.
        final_sigmas_type: see ``unipc``.

    Raises:
        ExpectedError: a folder is missing, broken or another model's.
    """
    for quiet in (diffusers_logging, transformers_logging):
        quiet.disable_progress_bar()
    network = load_network(kind, checkpoint)
    parts = {
        "unet": load_unet(stable_diffusion),
        "vae": load_vae(stable_diffusion),
        "text_encoder": load_text_encoder(stable_diffusion),
        "tokenizer": load_tokenizer(stable_diffusion),
        "scheduler": unipc(stable_diffusion, final_sigmas_type),
    }
    if (embeds := learned_embeds_file(checkpoint)) is not None:
        set_learned_embeds(parts["tokenizer"], parts["text_encoder"], load_learned_embeds(embeds))
    common = {**parts, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if kind == "t2i_adapter":
        pipeline = StableDiffusionAdapterPipeline(adapter=network, **common)
    else:
        pipeline_class = SpCtrlPipeline if kind == "spctrl" else StableDiffusionControlNetPipeline
        pipeline = pipeline_class(controlnet=network, **common)
    pipeline.set_progress_bar_config(disable=True)
    for part, precision in (
        (network, dtype), (parts["unet"], dtype), (parts["text_encoder"], dtype), (parts["vae"], torch.float32),
    ):  # fmt: skip
        move(part.eval().requires_grad_(False), device, precision)
    return pipeline


def unipc(folder: Path, final_sigmas_type: FinalSigmas = "zero") -> Any:
    """A UniPC multistep scheduler with the noise schedule of a Stable Diffusion folder.

    Args:
        folder: of Stable Diffusion 1.5.
        final_sigmas_type: noise level at which sampling ends; see ``spctrl.inference.methods.Sampler``.

    Raises:
        ExpectedError: there is no schedule.
    """
    return load_schedule(UniPCMultistepScheduler, folder, final_sigmas_type=final_sigmas_type)


def load_network(kind: Kind, folder: Path) -> Any:
    """The ControlNet or T2I-Adapter of a checkpoint, in float32.

    Raises:
        ExpectedError: it is missing, broken, or another model.
    """
    network, expected = NETWORKS[kind]
    return load_strictly(
        expected,
        network_folder(folder),
        lambda path: network.from_pretrained(
            path,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are listed then, and load_strictly names them
            low_cpu_mem_usage=False,  # the other way needs accelerate
            torch_dtype=torch.float32,
        ),
    )


def initial_noise(seeds: Sequence[int], resolution: int) -> Tensor:
    """(B, 4, R / 8, R / 8) float32 on the processor: each image's depends on its seed alone, on every machine."""
    side = resolution // LATENT_FACTOR
    return torch.stack(
        [torch.randn((4, side, side), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def decode_latents(vae: Any, latents: Tensor) -> NDArray[np.float32]:
    """(B, R, R, 3) float32 images in [0, 1] of the autoencoder's scaled latents, on the processor."""
    images = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
    pixels: NDArray[np.float32] = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
    return pixels

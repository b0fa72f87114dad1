"""Drawing images of conditions and prompts, many at a time.

Legend: B images of a batch, C channels of a condition, R resolution.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from spctrl.conditions.index_maps import read_index_map, resize_index_map
from spctrl.data.images import opened_image
from spctrl.data.records import RecordError
from spctrl.image_models.base import choose_device
from spctrl.inference.methods import Kind, MapResize, Sampler

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from spctrl.data.records import Record

JPEG_QUALITY = 95

OnStep = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


class Request(NamedTuple):
    """An image to draw.

    Attributes:
        condition: (C, R, R) float32: an index map (C = 1), or a picture within [0, 1] (C = 3).
        prompt: what it shows.
        seed: of its noise.
    """

    condition: NDArray[np.float32]
    prompt: str
    seed: int


class ImageGenerator:
    """Images of conditions by a ControlNet or T2I-Adapter; an ``ImageModel``.

    An image depends on its condition, prompt and seed, not on its place in a batch: up to rounding, since a GPU may
    add numbers up in another order for another batch size.
    """

    def __init__(self, pipeline: Any, kind: Kind, sampler: Sampler, device: torch.device) -> None:
        self.pipeline = pipeline
        self.kind = kind
        self.sampler = sampler
        self.device = device

    def decode(self, record: Record, condition: bytes, request: bytes) -> Request:
        """The condition at the image's size, with prompt and seed as ``request_bytes`` wrote them.

        Raises:
            RecordError: ``bad_image``: the condition is not an image, or not an index map where it should be.
        """
        prompt, seed = json.loads(request)
        tensor = read_condition(condition, self.kind, self.sampler.resolution, self.sampler.map_resize)
        return Request(tensor, prompt, seed)

    def batch_key(self, decoded: Request) -> Hashable:
        """All conditions have one shape."""
        return decoded.condition.shape

    def infer(self, batch: Sequence[Request], on_step: OnStep | None = None) -> list[NDArray[np.float32]]:
        """For each request (R, R, 3) float32 in [0, 1].

        Args:
            batch: what to draw.
            on_step: called after each step, as diffusers' ``callback_on_step_end``; not with a T2I-Adapter.
        """
        import torch

        from spctrl.inference.pipeline import decode_latents, initial_noise

        sampler = self.sampler
        dtype = self.pipeline.unet.dtype
        conditions = torch.from_numpy(np.stack([request.condition for request in batch]))
        noise = initial_noise([request.seed for request in batch], sampler.resolution)
        with torch.inference_mode():
            latents = self.pipeline(
                prompt=[request.prompt for request in batch],
                negative_prompt=[sampler.negative_prompt] * len(batch),
                image=conditions,
                height=sampler.resolution,
                width=sampler.resolution,
                num_inference_steps=sampler.steps,
                guidance_scale=sampler.guidance_scale,
                latents=noise.to(dtype),
                output_type="latent",
                **self._weights_of_condition(),
                **({"callback_on_step_end": on_step} if on_step else {}),
            ).images
            return list(decode_latents(self.pipeline.vae, latents))

    def _weights_of_condition(self) -> dict[str, float]:
        sampler = self.sampler
        if self.kind == "t2i_adapter":
            return {"adapter_conditioning_scale": sampler.conditioning_scale}
        return {
            "controlnet_conditioning_scale": sampler.conditioning_scale,
            "control_guidance_start": sampler.control_guidance_start,
            "control_guidance_end": sampler.control_guidance_end,
        }

    def encode(self, record: Record, decoded: Request, output: NDArray[np.float32]) -> bytes:
        """The image as a JPEG file.

        Raises:
            RecordError: ``not_finite``: the networks' numbers overflowed.
        """
        if not np.isfinite(output).all():
            raise RecordError(
                "not_finite", "the image has no finite pixels; sampler.precision = float32 may help"
            )
        return jpeg_bytes(output)


def load_generator(
    *, kind: Kind, stable_diffusion: Path, checkpoint: Path, sampler: Sampler, device: str = "auto"
) -> ImageGenerator:
    """The generator of a method.

    Args:
        kind: of the checkpoint.
        stable_diffusion: folder of Stable Diffusion 1.5.
        checkpoint: folder of the ControlNet or adapter.
        sampler: how images are drawn.
        device: ``auto``, ``cpu`` or ``cuda:N``.

    Raises:
        ExpectedError: a folder is missing, broken or another model's.
        ValueError: there is no such device.
    """
    import torch

    from spctrl.inference.pipeline import load_pipeline

    chosen = choose_device(device)
    dtype = torch.float16 if chosen.type == "cuda" else torch.float32
    if sampler.precision != "auto":
        dtype = getattr(torch, sampler.precision)
    pipeline = load_pipeline(
        kind=kind,
        stable_diffusion=stable_diffusion,
        checkpoint=checkpoint,
        device=chosen,
        dtype=dtype,
        final_sigmas_type=sampler.final_sigmas_type,
    )
    return ImageGenerator(pipeline, kind, sampler, chosen)


def request_bytes(prompt: str, seed: int) -> bytes:
    """What ``ImageGenerator.decode`` reads beside the condition."""
    return json.dumps([prompt, seed]).encode()


def read_condition(
    data: bytes, kind: Kind, resolution: int, map_resize: MapResize = "centre"
) -> NDArray[np.float32]:
    """(C, R, R) float32: a condition's file, stretched to a square.

    Index maps, of any mode whose channels are equal, stay whole numbers (``spctrl.conditions.index_maps``). Other
    conditions are resized bilinearly, as in training, and scaled to [0, 1].

    Raises:
        RecordError: ``bad_image``: not an image, or with ``spctrl`` not an index map.
    """
    if kind == "spctrl":
        return resize_index_map(read_index_map(data), resolution, map_resize).astype(np.float32)[None]
    with opened_image(data) as image:
        resized = image.convert("RGB").resize((resolution, resolution), Image.Resampling.BILINEAR)
    return np.asarray(resized, np.float32).transpose(2, 0, 1) / np.float32(255)


def jpeg_bytes(image: NDArray[np.float32]) -> bytes:
    """A (H, W, 3) image in [0, 1] as a JPEG file of high quality, colours at full resolution."""
    buffer = io.BytesIO()
    levels = np.rint(image * 255).astype(np.uint8)
    Image.fromarray(levels).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()

"""Latents of the training crop by Stable Diffusion's image autoencoder.

Legend: B images of a batch, R resolution of the crop, L latent channels (4), h = w = R / 8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spctrl.data.crops import training_crop
from spctrl.data.images import open_rgb
from spctrl.data.records import RecordError
from spctrl.errors import ExpectedError
from spctrl.image_models.base import choose_device
from spctrl.image_models.loading import WeightsFolder, load_strictly, mark_random

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from spctrl.data.records import Record

VAE = WeightsFolder(
    what="the image autoencoder of Stable Diffusion 1.5 in diffusers' format",
    source="the folder vae of stable-diffusion-v1-5/stable-diffusion-v1-5 on the Hugging Face hub",
    files="config.json and diffusion_pytorch_model.safetensors",
    setting="[latents] weights",
    kind=("_class_name", "AutoencoderKL"),
)


class LatentEncoder:
    """Mean and log-variance of the autoencoder's posterior for the crop that training would take of an image.

    An ``ImageModel``. The latents are not scaled: training samples ``mean + exp(logvar / 2) * noise`` and multiplies
    that by the ``scaling_factor`` of the autoencoder's config (0.18215 for Stable Diffusion 1.5).

    Everything is computed in float32, on a GPU too: this autoencoder's activations overflow in float16, and
    bfloat16 has 8 bits of precision where the artifact has 11. Its convolutions use the GPU's matrix units all the
    same, as TF32 (11 bits), which PyTorch allows by default.
    """

    def __init__(self, vae: Any, *, resolution: int, device: torch.device) -> None:
        self.vae = vae.to(device).eval()
        self.resolution = resolution
        self.device = device
        self.shape = latent_shape(resolution, vae.config)

    def decode(self, record: Record, data: bytes) -> NDArray[np.uint8]:
        """(R, R, 3) uint8: the training crop.

        Raises:
            RecordError: ``bad_image`` or ``image_size``.
        """
        return training_crop(open_rgb(record, data), self.resolution)

    def batch_key(self, decoded: NDArray[np.uint8]) -> tuple[int, ...]:
        """All crops have one shape."""
        return decoded.shape

    def infer(self, batch: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
        """For each crop (2L, h, w) float32: the mean, then the log-variance (within -30 and 20)."""
        import torch

        with torch.inference_mode():
            levels = torch.from_numpy(np.stack(batch)).to(self.device)
            images = levels.permute(0, 3, 1, 2).contiguous().float() / 255  # (B, 3, R, R)
            posterior = self.vae.encode((images - 0.5) / 0.5).latent_dist
            moments = torch.cat([posterior.mean, posterior.logvar], dim=1)
            return list(moments.float().cpu().numpy())

    def encode(self, record: Record, decoded: NDArray[np.uint8], output: NDArray[np.float32]) -> bytes:
        """(2L, h, w) float16, little-endian, C order, without a header.

        Raises:
            RecordError: ``not_finite``: NaN, infinite or too large for float16.
        """
        with np.errstate(over="ignore"):
            latents = output.astype("<f2")
        if not np.isfinite(latents).all():
            raise RecordError("not_finite", "the autoencoder's latents are not finite or exceed float16")
        return latents.tobytes()


def load_latent_encoder(*, weights: Path, resolution: int = 512, device: str = "auto") -> LatentEncoder:
    """The encoder of a diffusers ``AutoencoderKL`` folder.

    Weights in a ``.bin`` file, which is a pickle, are read by diffusers with ``weights_only=True``.

    Args:
        weights: the folder.
        resolution: side of the training crop in pixels.
        device: ``auto``, ``cpu`` or ``cuda:N``.

    Raises:
        ExpectedError: the folder is not there, not that of such a model, broken, or has missing or unexpected keys;
            or the resolution does not fit the model.
        ValueError: there is no such device.
    """
    import torch
    from diffusers import AutoencoderKL

    chosen = choose_device(device)
    vae = load_strictly(
        VAE,
        weights,
        lambda folder: AutoencoderKL.from_pretrained(
            folder,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are listed then, and load_strictly names them
            low_cpu_mem_usage=False,  # the other way needs accelerate
            torch_dtype=torch.float32,
        ),
    )
    return LatentEncoder(vae, resolution=resolution, device=chosen)


def latent_shape(resolution: int, config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Shape (2L, h, w) of the artifact for an autoencoder's config.

    Raises:
        ExpectedError: the resolution is not a multiple of what the autoencoder divides it by.
    """
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    if resolution < factor or resolution % factor:
        raise ExpectedError(
            f"[latents] resolution: expected a multiple of {factor}, as the autoencoder needs it, found {resolution}"
        )
    return 2 * int(config["latent_channels"]), resolution // factor, resolution // factor


def build_tiny(folder: Path) -> None:
    """Write a very small autoencoder with random weights, the same ones each time, in diffusers' format."""
    import torch
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4, 4, 4, 4),
            norm_num_groups=2,
            latent_channels=4,
            sample_size=64,
        )
    vae.save_pretrained(folder)
    mark_random(folder)

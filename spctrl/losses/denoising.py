"""The noise-prediction error, with optional weights on the keypoints' surroundings."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Reweight = Literal["humansd", "geodiffusion"]


def denoising_loss(
    noise_pred: Tensor, noise: Tensor, heatmaps: Tensor | None = None, reweight: Reweight | None = None
) -> Tensor:
    """Mean squared error of the predicted noise, a scalar.

    Args:
        noise_pred, noise: (B, 4, h, w).
        heatmaps: (B, K, any, any) in [0, 1]; needed for ``reweight``.
        reweight: weights per latent cell.
    """
    raise NotImplementedError

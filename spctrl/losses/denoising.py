"""The noise-prediction error, with optional weights on the keypoints' surroundings (REFERENCE section 10).

Legend: B images of a batch, L latent channels (4), h and w of the latents, K channels of heatmaps.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Reweight = Literal["humansd", "geodiffusion"]

HUMANSD_WEIGHT = 1.0
"""w in ``humansd_weights``: the error in a keypoint's centre counts 1 + w times as much."""

GEODIFFUSION_WEIGHT, GEODIFFUSION_POWER = 2.0, 0.2
"""w and p in ``geodiffusion_weights``, as GeoDiffusion recommends them."""


def denoising_loss(
    noise_pred: Tensor, noise: Tensor, heatmaps: Tensor | None = None, reweight: Reweight | None = None
) -> Tensor:
    """Mean of (epsilon - epsilon_theta)^2, in float32: a scalar.

    Args:
        noise_pred: (B, L, h, w), the UNet's output.
        noise: (B, L, h, w), what was added to the latents (or what else the scheduler has the UNet predict).
        heatmaps: (B, K, any height, any width) in [0, 1]; only for ``reweight``.
        reweight: weights by cell; None for none.

    Raises:
        ValueError: ``reweight`` without heatmaps.
    """
    error = noise_pred.float() - noise.float()
    if reweight is None:
        return error.square().mean()
    if heatmaps is None:
        raise ValueError(f"expected heatmaps for the weights of {reweight}, found None")
    heatmap = nearest_keypoint(heatmaps, (int(error.shape[-2]), int(error.shape[-1])))
    if reweight == "humansd":
        return (humansd_weights(heatmap) * error).square().mean()
    return (geodiffusion_weights(heatmap) * error.square()).mean()


def nearest_keypoint(heatmaps: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """(B, K, any, any) to (B, 1, h, w) float32 in [0, 1]: in each cell the largest of all keypoints' values."""
    heatmap = heatmaps.float().amax(dim=1, keepdim=True)
    return F.interpolate(heatmap, size_hw, mode="bilinear", align_corners=True).clamp(0, 1)


def humansd_weights(heatmap: Tensor) -> Tensor:
    """W_a = 1 + w H, (B, 1, h, w), a factor of the error before it is squared.

    After HumanSD's heatmap-guided denoising loss (arXiv 2304.04269, section 3), with the labelled keypoints' heatmap
    in place of the one that its pose estimator finds in the decoded error.
    """
    return 1 + HUMANSD_WEIGHT * heatmap


def geodiffusion_weights(heatmap: Tensor) -> Tensor:
    """Weights (B, 1, h, w) of the squared error, of mean 1.

    GeoDiffusion's foreground re-weighting (arXiv 2306.04607, section 3.3): w / c^p in the foreground, 1 / (h w)^p
    elsewhere, normalised; c is the foreground's area in cells, here that of all the image's keypoints together. An
    image without keypoints has weights of 1.
    """
    foreground = heatmap > 0
    area = foreground.sum(dim=(2, 3), keepdim=True).clamp(min=1)
    cells = heatmap.shape[2] * heatmap.shape[3]
    inside = GEODIFFUSION_WEIGHT / area**GEODIFFUSION_POWER
    weights = inside * foreground + cells**-GEODIFFUSION_POWER * ~foreground
    return weights / weights.mean(dim=(2, 3), keepdim=True)

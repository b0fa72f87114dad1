"""The keypoint-concept loss: the attention of a keypoint's token belongs on that keypoint (REFERENCE section 10).

Legend: B images of a batch, L layers, M heads, T = 77 tokens, K keypoints (17, or 1 whole object), h and w of a
layer's feature map, G = 64 the side of the grid on which maps and heatmaps meet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spctrl.errors import ExpectedError

Kind = Literal["partition", "whole"]
Measure = Literal["mse", "bce"]
Target = Literal["soft", "released"]

GRID = 64
LEVELS = 255
"""Of the 8-bit heatmaps that the released loader makes."""


def keypoint_concept_loss(
    attention_maps: Mapping[str, Tensor],
    heatmaps: Tensor,
    token_mask: Tensor,
    keypoint_mask: Tensor | None,
    timesteps: Tensor,
    *,
    kind: Kind = "partition",
    loss: Measure = "mse",
    start: int | None = None,
    end: int | None = None,
    layers: str | None = None,
    target: Target = "soft",
) -> Tensor:
    """How far the attention maps of the placeholder tokens are from their keypoints' heatmaps: a float32 scalar.

    An image's marked tokens and its marked keypoints are paired in order. Where there are fewer tokens, as in a
    prompt that was cut off or left empty, the last keypoints have no part in the loss. The mean is over all pairs of
    the batch; images outside the timestep window add zeros to it. Without pairs the loss is zero.

    Args:
        attention_maps: probabilities by layer name, (B, M, T, h, w); heads that are averaged already are M = 1.
        heatmaps: (B, K, any height, any width); values above 1 count as 1.
        token_mask: (B, T), nonzero for placeholder tokens, or for the class token with ``whole``.
        keypoint_mask: (B, K), nonzero for the keypoints that the placeholders name; not used with ``whole``.
        timesteps: (B,).
        kind: ``partition`` for one heatmap per keypoint; ``whole`` for channel 0 of ``heatmaps`` as the heatmap of
            the whole object.
        loss: squared error or binary cross entropy.
        start, end: images count whose timestep lies strictly between; None is no bound.
        layers: the layers whose name contains this count; None for all.
        target: ``soft`` for heatmaps as they are; ``released`` for their 8-bit levels, so that a keypoint is a
            disc of ones, which is what the paper trained on. Levels themselves (whole numbers up to 255) are
            taken as they are.

    Raises:
        ExpectedError: no layer's name contains ``layers``.
        ValueError: ``partition`` without ``keypoint_mask``.
    """
    if kind == "whole":
        heatmaps, keypoint_mask = heatmaps[:, :1], torch.ones_like(token_mask[:, :1])
    if keypoint_mask is None:
        raise ValueError("expected a keypoint_mask (B, K) for the kind partition, found None")
    # Autocast refuses binary cross entropy, and the maps' range is too large for half precision.
    with torch.autocast(heatmaps.device.type, enabled=False):
        maps = normalise(mean_map(attention_maps, layers))
        targets = target_heatmaps(heatmaps, target)
        tokens, keypoints, paired = pair_in_order(token_mask, keypoint_mask)
        maps = maps.gather(1, _as_index(tokens))
        targets = targets.gather(1, _as_index(keypoints))
        measure = F.mse_loss if loss == "mse" else F.binary_cross_entropy
        errors = measure(maps, targets, reduction="none").mean(dim=(2, 3))
        inside = in_window(timesteps, start, end)[:, None]
        return (errors * (paired & inside)).sum() / paired.sum().clamp(min=1)


def mean_map(attention_maps: Mapping[str, Tensor], layers: str | None = None) -> Tensor:
    """(B, T, G, G) float32: the mean over heads, resized, then over the chosen layers.

    Raises:
        ExpectedError: no layer's name contains ``layers``.
    """
    chosen = [maps for name, maps in attention_maps.items() if layers is None or layers in name]
    if not chosen:
        raise ExpectedError(
            f"expected a part of a layer's name, found {layers!r}; there are {', '.join(attention_maps)}"
        )
    return torch.stack([resize(maps.float().mean(dim=1)) for maps in chosen]).mean(dim=0)


def normalise(maps: Tensor) -> Tensor:
    """(B, T, G, G) into [0, 1]: each image by the extremes of all its tokens and cells, differentiably.

    An image of one value becomes zeros.
    """
    low, high = maps.amin(dim=(1, 2, 3), keepdim=True), maps.amax(dim=(1, 2, 3), keepdim=True)
    normalised = (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)
    # The extremes are 0 and 1 whatever the maps are, so they have no gradient; computed, it would be the difference
    # of two numbers, which for cross entropy at 0 and 1 are of the order of 1e12.
    return torch.where((normalised == 0) | (normalised == 1), normalised.detach(), normalised)


def target_heatmaps(heatmaps: Tensor, target: Target) -> Tensor:
    """(B, K, any, any) to (B, K, G, G) float32 in [0, 1]."""
    heatmaps = heatmaps.float()
    if target == "released":
        levels = (heatmaps.clamp(0, 1) * LEVELS).floor()
        # As a tensor, so that a GPU need not wait.
        are_levels = (heatmaps > 1).any() & (heatmaps == heatmaps.floor()).all()
        heatmaps = heatmaps.where(are_levels, levels)
    return resize(heatmaps).clamp(0, 1)


def pair_in_order(token_mask: Tensor, keypoint_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The j-th marked token of an image belongs to its j-th marked keypoint.

    Args:
        token_mask: (B, T).
        keypoint_mask: (B, K).

    Returns:
        Positions of tokens (B, K) int64, of keypoints (B, K) int64, and which of those pairs there are (B, K) bool.
    """
    token_mask, keypoint_mask = token_mask != 0, keypoint_mask != 0
    slots = keypoint_mask.shape[1]
    # Stable, so that the marked ones come first and stay in order; of a fixed size, so that a GPU need not wait.
    tokens = token_mask.byte().argsort(dim=1, descending=True, stable=True)[:, :slots]
    keypoints = keypoint_mask.byte().argsort(dim=1, descending=True, stable=True)
    pairs = torch.minimum(token_mask.sum(dim=1), keypoint_mask.sum(dim=1))
    return tokens, keypoints, torch.arange(slots, device=pairs.device) < pairs[:, None]


def in_window(timesteps: Tensor, start: int | None, end: int | None) -> Tensor:
    """(B,) bool: which timesteps lie strictly between ``start`` and ``end``."""
    inside = torch.ones_like(timesteps, dtype=torch.bool)
    if start is not None:
        inside &= timesteps > start
    if end is not None:
        inside &= timesteps < end
    return inside


def resize(maps: Tensor) -> Tensor:
    """(B, channels, any, any) to (B, channels, G, G)."""
    return F.interpolate(maps, (GRID, GRID), mode="bilinear", align_corners=True)


def _as_index(positions: Tensor) -> Tensor:
    return positions[:, :, None, None].expand(-1, -1, GRID, GRID)

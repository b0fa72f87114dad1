"""The keypoint-concept loss: attention of a keypoint's token belongs on that keypoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor


def keypoint_concept_loss(
    attention_maps: Mapping[str, Tensor],
    heatmaps: Tensor,
    token_mask: Tensor,
    keypoint_mask: Tensor | None,
    timesteps: Tensor,
    *,
    kind: Literal["partition", "whole"] = "partition",
    loss: Literal["mse", "bce"] = "mse",
    start: int | None = None,
    end: int | None = None,
    layers: str | None = None,
    target: Literal["soft", "released"] = "soft",
) -> Tensor:
    """How far the attention maps of the placeholder tokens are from the keypoints' heatmaps, a scalar.

    Args:
        attention_maps: by layer name (B, heads, 77, h, w) probabilities; heads may be averaged already (1).
        heatmaps: (B, K, any, any).
        token_mask: (B, 77), 1 for placeholder tokens (``partition``) or the class token (``whole``).
        keypoint_mask: (B, K), 1 for the keypoints that the placeholders name; not needed for ``whole``.
        timesteps: (B,).
        kind: ``partition``: one heatmap per keypoint; ``whole``: channel 0 of ``heatmaps`` for the whole object.
        loss: the measure.
        start, end: only samples whose timestep lies strictly between count; None is no bound.
        layers: layers whose name contains this; None for all.
        target: ``soft`` for the heatmaps as they are, clamped to [0, 1]; ``released`` for the binary discs that
            the released loader makes of them.
    """
    raise NotImplementedError

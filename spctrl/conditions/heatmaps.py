"""Keypoint heatmaps, the target of the keypoint-concept loss, as mmpose's MSRA codec
draws them.

Legend: N instances, K keypoints, C cells along each side (64).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

CELLS = 64
SIGMA_CELLS = 2.0
RADIUS_CELLS = 6


def keypoint_heatmaps(keypoints: NDArray[np.float64], size_wh: tuple[int, int]) -> NDArray[np.float64]:
    """One heatmap per keypoint: Gaussians of peak 1 at the cells of its labelled instances, summed over
    instances.

    Args:
        keypoints: (N, K, 3): x, y in pixels and visibility.
        size_wh: the image's width and height in pixels.

    Returns:
        (K, C, C) float64, 0 and above; sums of overlapping instances may exceed 1.
    """
    width, height = size_wh
    heatmaps = np.zeros((keypoints.shape[1], CELLS, CELLS))
    stamp = _gaussian()
    for instance in keypoints.tolist():
        for heatmap, (x, y, v) in zip(heatmaps, instance, strict=True):
            if v <= 0:
                continue
            column, row = int(x / (width / CELLS) + 0.5), int(y / (height / CELLS) + 0.5)
            left, top = column - RADIUS_CELLS, row - RADIUS_CELLS
            right, bottom = column + RADIUS_CELLS + 1, row + RADIUS_CELLS + 1
            if left >= CELLS or top >= CELLS or right < 0 or bottom < 0:
                continue
            inside = np.s_[max(top, 0) : min(bottom, CELLS), max(left, 0) : min(right, CELLS)]
            of_stamp = np.s_[
                max(-top, 0) : min(CELLS, bottom) - top, max(-left, 0) : min(CELLS, right) - left
            ]
            heatmap[inside] += stamp[of_stamp]
    return heatmaps


@functools.cache
def _gaussian() -> NDArray[np.float64]:
    """(2 R + 1, 2 R + 1) float64, 1 in the middle."""
    offsets = np.arange(-RADIUS_CELLS, RADIUS_CELLS + 1)
    return np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * SIGMA_CELLS**2))

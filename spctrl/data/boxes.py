"""Boxes of instances: the part inside the image, and the extent of keypoints.

Legend: N boxes, K keypoints; boxes as x, y, width, height in pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def clip_boxes(
    bboxes_xywh: ArrayLike, sizes_wh: ArrayLike, *, smallest_px: float = 0.0
) -> NDArray[np.float64]:
    """(N, 4) boxes cut off at the image's border, as mmpose's datasets do: corners lie in [0, side - 1].

    Args:
        bboxes_xywh: (N, 4), pixels.
        sizes_wh: (N, 2) of their images, or (2,) of all; boxes of images of unknown size (NaN) stay as they are.
        smallest_px: width and height that stay of boxes beyond the border.
    """
    boxes, sizes_wh = np.asarray(bboxes_xywh, np.float64).reshape(-1, 4), np.asarray(sizes_wh, np.float64)
    corners = np.stack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])
    first, last = np.where(np.isnan(sizes_wh), corners, np.clip(corners, 0, sizes_wh - 1))
    return np.concatenate([first, np.maximum(last - first, smallest_px)], axis=1)


def keypoint_boxes(keypoints: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, 4) extents of the labelled ones (v > 0) of (N, K, 3) keypoints x, y, v; NaN where none is labelled.

    Sides are at least 1 px: of one keypoint or of keypoints in a line, a box without an area would be skipped.
    """
    xy, is_labelled = keypoints[..., :2], keypoints[..., 2:] > 0
    first = np.where(is_labelled, xy, np.inf).min(axis=1)
    last = np.where(is_labelled, xy, -np.inf).max(axis=1)
    boxes = np.concatenate([first, np.maximum(last - first, 1)], axis=1)
    return np.where(is_labelled.any(axis=1), boxes, np.nan)

"""Spatial-text index maps, SP-Ctrl's conditioning image, with the values of the released demo maps.

Legend: N instances, K keypoints, H and W the image's size in pixels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import cv2
import numpy as np

from spctrl.conditions.png import Canvas

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from spctrl.data.records import Record

BACKGROUND = 0
FIRST_KEYPOINT = 1
FIRST_LINK = 51


def render_spatext(
    record: Record, *, links: Sequence[Sequence[int]], keypoint_radius_px: int, link_half_width_px: int
) -> bytes:
    """The record's index map as an 8-bit single-channel PNG of the image's own size."""
    canvas = Canvas(record.size_wh)
    draw_index_map(
        canvas.pixels,
        record.keypoints,
        links=links,
        keypoint_radius_px=keypoint_radius_px,
        link_half_width_px=link_half_width_px,
    )
    return canvas.to_png()


def draw_index_map(
    pixels: NDArray[np.uint8],
    keypoints: NDArray[np.float64],
    *,
    links: Sequence[Sequence[int]],
    keypoint_radius_px: int = 4,
    link_half_width_px: int = 4,
) -> None:
    """Draw instances in order onto ``pixels``: links first, then keypoints, so later ones cover earlier ones.

    Args:
        pixels: (H, W) uint8, changed in place. Link s becomes ``FIRST_LINK + s``, keypoint k ``FIRST_KEYPOINT
            + k``.
        keypoints: (N, K, 3) float; x, y in pixels and visibility; drawn where visibility > 0.
        links: pairs of 0-based keypoint indices; drawn where both ends are.
        keypoint_radius_px: radius of a keypoint's disc.
        link_half_width_px: half the width of a link's ellipse.
    """
    for instance in keypoints.tolist():
        for value, (start, end) in enumerate(links, FIRST_LINK):
            x1, y1, v1 = instance[start]
            x2, y2, v2 = instance[end]
            if v1 > 0 and v2 > 0:
                cv2.fillConvexPoly(pixels, link_polygon(x1, y1, x2, y2, link_half_width_px), value)
        for value, (x, y, v) in enumerate(instance, FIRST_KEYPOINT):
            if v > 0:
                cv2.circle(pixels, (int(x), int(y)), keypoint_radius_px, value, cv2.FILLED)


def link_polygon(x1: float, y1: float, x2: float, y2: float, half_width_px: int) -> NDArray[np.int32]:
    """The ellipse along a link, as OpenPose draws limbs: (P, 2) int32 polygon.

    Centre, half length and angle are truncated to integers only here, as in the released maps.
    """
    centre = (int((x1 + x2) / 2), int((y1 + y2) / 2))
    half_length_px = int(math.hypot(x1 - x2, y1 - y2) / 2)
    angle_deg = int(math.degrees(math.atan2(y1 - y2, x1 - x2)))
    polygon = cv2.ellipse2Poly(centre, (half_length_px, half_width_px), angle_deg, 0, 360, 1)
    return np.asarray(polygon, np.int32)

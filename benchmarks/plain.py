"""The plain way to draw a record: what REFERENCE sections 3 and 4 say, one image at a time, saved by PIL.

This is the baseline. It is written as one would write it first, without tricks and without handicaps: cv2 draws,
numpy holds the pixels, PIL writes the files with its defaults. It shares no code with ``spctrl``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

LINKS = [
    (1, 2), (1, 3), (2, 3), (3, 4), (4, 5), (4, 6), (6, 7), (7, 8), (4, 9), (9, 10), (10, 11),
    (5, 12), (12, 13), (13, 14), (5, 15), (15, 16), (16, 17),
]  # fmt: skip
COLOURS = [
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85),
    (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255),
    (255, 0, 255), (255, 0, 170), (255, 0, 85),
]  # fmt: skip
LINK_COLOURS = [tuple(int(channel * 0.6) for channel in colour) for colour in COLOURS]

Json = dict[str, Any]
Colours = list[Any]
"""One value or RGB triple for each keypoint or link."""


def draw(
    pixels: NDArray[np.uint8], annotations: list[Json], keypoint_colours: Colours, link_colours: Colours
) -> None:
    """Draw all instances of an image, links under keypoints."""
    for annotation in annotations:
        keypoints = np.array(annotation["keypoints"], dtype=float).reshape(-1, 3)
        for (start, end), colour in zip(LINKS, link_colours, strict=False):
            x1, y1, v1 = keypoints[start - 1]
            x2, y2, v2 = keypoints[end - 1]
            if v1 > 0 and v2 > 0:
                length = math.hypot(x1 - x2, y1 - y2)
                angle = math.degrees(math.atan2(y1 - y2, x1 - x2))
                centre = (int((x1 + x2) / 2), int((y1 + y2) / 2))
                polygon = cv2.ellipse2Poly(centre, (int(length / 2), 4), int(angle), 0, 360, 1)
                cv2.fillConvexPoly(pixels, polygon, colour)
        for (x, y, v), colour in zip(keypoints, keypoint_colours, strict=False):
            if v > 0:
                cv2.circle(pixels, (int(x), int(y)), 4, colour, -1)


def save_map(image: Json, annotations: list[Json], file: Path | BinaryIO) -> None:
    """The index map, one channel."""
    pixels = np.zeros((image["height"], image["width"]), np.uint8)
    draw(pixels, annotations, list(range(1, 18)), list(range(51, 68)))
    Image.fromarray(pixels).save(file, format="PNG")


def save_rgb_map(image: Json, annotations: list[Json], file: Path | BinaryIO) -> None:
    """The index map in three equal channels, as a script gets it that draws everything in RGB."""
    pixels = np.zeros((image["height"], image["width"], 3), np.uint8)
    draw(pixels, annotations, [(k, k, k) for k in range(1, 18)], [(s, s, s) for s in range(51, 68)])
    Image.fromarray(pixels).save(file, format="PNG")


def save_render(image: Json, annotations: list[Json], file: Path | BinaryIO) -> None:
    """The OpenPose-style render, RGB."""
    pixels = np.zeros((image["height"], image["width"], 3), np.uint8)
    draw(pixels, annotations, COLOURS, LINK_COLOURS)
    Image.fromarray(pixels).save(file, format="PNG")


def open_image(path: Path) -> NDArray[np.uint8]:
    """Decode the record's image, as a script does that takes the size from it."""
    return np.array(Image.open(path).convert("RGB"))

"""Images with boxes, as records and JPEG files; no dataset is needed on the machine that is measured."""

from __future__ import annotations

import numpy as np

from benchmarks.inputs import jpeg_of_size
from spctrl.data.records import Record

SIZES_WH = ((1024, 768), (1024, 683), (768, 1024), (1024, 1024))
"""Usual sizes of AP-10K's images."""

Work = list[tuple[Record, bytes]]


def images_with_boxes(counts: list[int], *, one_size: bool = False) -> Work:
    """An image for each count, with so many boxes."""
    rng = np.random.default_rng(0)
    work = []
    for number, count in enumerate(counts):
        width, height = SIZES_WH[0] if one_size else SIZES_WH[number % len(SIZES_WH)]
        corners = rng.uniform(0, 0.5, (count, 2))
        sides = rng.uniform(0.2, 0.5, (count, 2))
        boxes = np.concatenate([corners, sides], axis=1) * (width, height, width, height)
        record = Record(number, f"{number}.jpg", (width, height), np.zeros((count, 17, 3)), boxes)
        work.append((record, jpeg_of_size((width, height)).read_bytes()))
    return work

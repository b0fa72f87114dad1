"""Areas of annotated instances for which a file states none; the scale of the object keypoint similarity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spctrl.data.boxes import clip_boxes

AREA_PER_BOX = 0.53
"""mmpose's estimate of an instance's share of its box."""
SMALLEST_AREA_PX = 1.0
"""mmpose's lower bound. An area of 0 would count every prediction as wrong."""
_MAX_PIXELS = 2**40
_MAX_DIGITS_PER_COUNT = 12
"""Of a compressed run length, 5 bits each."""


def box_areas(bboxes_xywh: NDArray[np.float64], sizes_wh: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,) estimated areas in square pixels of the instances in (N, 4) boxes, at least 1.

    As in mmpose, of the part of the box inside its image, whose size is a row of (N, 2) ``sizes_wh``; NaN is unknown.
    """
    sides = clip_boxes(bboxes_xywh, sizes_wh)[:, 2:]
    return np.asarray(np.fmax(AREA_PER_BOX * sides[:, 0] * sides[:, 1], SMALLEST_AREA_PX))


def segmentation_area(segmentation: Any, size_wh: tuple[float, float]) -> float | None:
    """Area of a COCO segmentation in square pixels.

    Args:
        segmentation: a decoded JSON value: polygons (lists of x, y, x, y, ..., or a single one) or run lengths
            (``size``, ``counts``), plain or compressed. Polygons are parts of one object, whose areas are added;
            overlaps count twice.
        size_wh: of the image, which run lengths must have; NaN is unknown.

    Returns:
        None where it is nothing of these, or its area is below a pixel or not finite.
    """
    try:
        if isinstance(segmentation, dict):
            area = _run_length_area(segmentation, size_wh)
        elif isinstance(segmentation[0], int | float):
            area = _polygon_area(segmentation)
        else:
            area = sum(_polygon_area(polygon) for polygon in segmentation)
    except (TypeError, ValueError, LookupError, OverflowError):
        return None
    return float(area) if math.isfinite(area) and area >= SMALLEST_AREA_PX else None


def check_run_lengths(segmentation: dict[str, Any], size_wh: tuple[int, int]) -> None:
    """See that decoding run lengths takes the memory of an image of that size.

    Raises:
        ValueError: they are of another size, do not cover it (pycocotools would merge them forever), or are none.
    """
    try:
        _run_length_area(segmentation, size_wh)
        if sum(_decompressed(segmentation["counts"].encode("ascii"))) != size_wh[0] * size_wh[1]:
            raise ValueError("run lengths that do not cover the image")
    except (TypeError, AttributeError, LookupError, OverflowError) as error:
        raise ValueError(f"no run lengths: {error}") from error


def _polygon_area(polygon: Sequence[float]) -> float:
    x, y = np.array(polygon, np.float64).reshape(-1, 2).T
    with np.errstate(over="ignore", invalid="ignore"):
        x, y = x - x[0], y - y[0]  # products of large coordinates would lose digits
        return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def _run_length_area(segmentation: dict[str, Any], size_wh: tuple[float, float]) -> float:
    """Runs of background and foreground take turns, beginning with background."""
    size, counts = segmentation["size"], segmentation["counts"]
    if isinstance(counts, str):
        counts = _decompressed(counts.encode("ascii"))
    if len(size) != 2 or not all(
        type(number) is int and 0 <= number < _MAX_PIXELS for number in (*size, *counts)
    ):
        raise ValueError("run lengths that are no whole numbers")
    if any(
        side != known for side, known in zip(size, reversed(size_wh), strict=True) if not math.isnan(known)
    ):
        raise ValueError("run lengths of an image of another size")
    if sum(counts) > size[0] * size[1]:
        raise ValueError("run lengths that do not fit the image")
    return float(sum(counts[1::2]))


def _decompressed(text: bytes) -> list[int]:
    """Run lengths of COCO's compressed form: digits of 5 bits from 48 on, lowest first, 32 marks that more follow.

    From the fourth on, each is the difference from the run two before.
    """
    counts: list[int] = []
    value = digits = 0
    for byte in text:
        code = byte - 48
        if not 0 <= code < 64 or digits == _MAX_DIGITS_PER_COUNT:
            raise ValueError("not a compressed run length")
        value |= (code & 31) << 5 * digits
        digits += 1
        if code & 32:
            continue
        if code & 16:
            value -= 1 << 5 * digits
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = digits = 0
    if digits:
        raise ValueError("a run length that is cut off")
    return counts

"""Heatmap targets of the keypoint-concept loss, made where it compares: at 64 x 64 cells of the training crop.

The released code goes a long way to the same numbers: it stores 64 x 64 cells of the whole image, resizes each map to
the image (bicubic) and to the crop, and its loss resizes the crop back to 64 x 64. Every step is a weighted sum along
rows and along columns, so the whole way is two small matrices, which depend on the image's size alone.

Legend: K maps, c x c cells of the whole image (64), C x C cells of the crop (64), R side of the crop in pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np

from spctrl.crops import crop_of
from spctrl.rendering.heatmaps import CELLS, keypoint_heatmaps

if TYPE_CHECKING:
    from numpy.typing import NDArray

HeatmapType = Literal["partition", "whole"]
"""One map a keypoint, or one of the whole object: the largest of them in each cell."""

_LEVELS = 255
_KEPT_AXES = 512
"""Matrices kept for the next image of the same size; at most 16 MB."""


def heatmap_targets(
    keypoints: NDArray[np.float64],
    size_wh: tuple[int, int],
    resolution: int,
    *,
    heatmap_type: HeatmapType,
    binary: bool,
) -> NDArray[np.float32]:
    """The target of an image's crop.

    Args:
        keypoints: (N, K, 3): x, y in pixels of the whole image, and visibility.
        size_wh: the image's size in pixels.
        resolution: R.
        heatmap_type: what is mapped.
        binary: as ``crop_heatmaps`` has it.

    Returns:
        (K, C, C) or, of the whole object, (1, C, C) float32 in [0, 1].
    """
    heatmaps = keypoint_heatmaps(keypoints, size_wh)
    if heatmap_type == "whole":
        heatmaps = heatmaps.max(axis=0, keepdims=True)
    return crop_heatmaps(heatmaps, size_wh, resolution, binary=binary)


def crop_heatmaps(
    heatmaps: NDArray[np.floating], size_wh: tuple[int, int], resolution: int, *, binary: bool
) -> NDArray[np.float32]:
    """Heatmaps of the whole image, such as stored ones, at the cells of its crop.

    Args:
        heatmaps: (K, c, c), 0 and above; what exceeds 1 counts as 1.
        size_wh: the image's size in pixels.
        resolution: R.
        binary: the target that the released code trains on with index maps: there the crop is made of whole levels
            0..255 (nearest) and clamped to [0, 1], which leaves a disc. Otherwise Gaussians (bilinear).

    Returns:
        (K, C, C) float32 in [0, 1].
    """
    K, _, cells = heatmaps.shape
    targets = np.zeros((K, CELLS, CELLS), np.float32)
    levels = np.floor(np.minimum(heatmaps, 1) * _LEVELS).astype(np.float32)
    shown = np.flatnonzero(levels.any(axis=(1, 2)))
    if not len(shown):
        return targets
    resized_wh, left, top = crop_of(size_wh, resolution)
    axis = _nearest_axis if binary else _bilinear_axis
    across = axis(size_wh[0], resized_wh[0], left, resolution, cells)
    down = axis(size_wh[1], resized_wh[1], top, resolution, cells)
    if binary:
        share = _samples(resolution)[1].astype(np.float32)
        for k in shown.tolist():
            _draw_disc(targets[k], levels[k], down, across, share)
    else:
        targets[shown] = np.clip(down @ (levels[shown] @ across.T) / _LEVELS, 0, 1)
    return targets


def _draw_disc(
    target: NDArray[np.float32],
    levels: NDArray[np.float32],
    down: NDArray[np.float32],
    across: NDArray[np.float32],
    share: NDArray[np.float32],
) -> None:
    """Fill in a binary target (C, C), only where the levels (c, c) reach: a few cells of a keypoint's map are not 0."""
    rows, columns = _extent(levels.any(axis=1)), _extent(levels.any(axis=0))
    to_rows, to_columns = _reached(down[:, rows]), _reached(across[:, columns])
    down = down[2 * to_rows.start : 2 * to_rows.stop, rows]
    across = across[2 * to_columns.start : 2 * to_columns.stop, columns]
    # PIL keeps whole levels after each of its two passes.
    pixels = _whole_levels(down @ _whole_levels(levels[rows, columns] @ across.T))
    lower, right = share[to_rows, None], share[to_columns]
    between_rows = pixels[0::2] * (1 - lower) + pixels[1::2] * lower
    between_columns = between_rows[:, 0::2] * (1 - right) + between_rows[:, 1::2] * right
    np.minimum(between_columns, 1, out=target[to_rows, to_columns])


def _extent(present: NDArray[np.bool_]) -> slice:
    """From the first to the last that is present; empty where none is."""
    places = np.flatnonzero(present)
    return slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0)


def _reached(weights: NDArray[np.float32]) -> slice:
    """The cells of the crop one of whose two pixels has a weight; weights are (2 C, inputs)."""
    pixels = _extent(weights.any(axis=1))
    return slice(pixels.start // 2, (pixels.stop + 1) // 2)


def _whole_levels(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounded in place to 0..255."""
    values += 0.5
    np.floor(values, out=values)
    return np.clip(values, 0, _LEVELS, out=values)


def _samples(resolution: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Where the loss looks along an axis of the crop, from its first pixel to its last (``align_corners``).

    Returns:
        (2 C,) the two pixels that each cell lies between, one pair after the other, and (C,) the second one's share.
    """
    places = np.arange(CELLS) * ((resolution - 1) / (CELLS - 1))
    first = np.floor(places).astype(np.int64)
    pixels = np.stack([first, np.minimum(first + 1, resolution - 1)], axis=1).reshape(-1)
    return pixels, places - first


@functools.lru_cache(_KEPT_AXES)
def _nearest_axis(
    side: int, resized_side: int, offset: int, resolution: int, cells: int
) -> NDArray[np.float32]:
    """(2 C, c): what the cells of an image's axis give at the crop's pixels of ``_samples``, by the image's nearest."""
    pixels, _ = _samples(resolution)
    scale = side / resized_side
    steps = np.full(resized_side, scale)
    steps[0] = scale / 2
    # A sum of steps, as PIL finds the nearest pixels: where a place falls between two, the sum's rounding decides.
    nearest = np.add.accumulate(steps).astype(np.int64)[offset + pixels]
    return np.asarray(_resizing_weights(_cubic, nearest, cells, side), np.float32)


@functools.lru_cache(_KEPT_AXES)
def _bilinear_axis(
    side: int, resized_side: int, offset: int, resolution: int, cells: int
) -> NDArray[np.float32]:
    """(C, c): what the cells of an image's axis give at the crop's cells, with all smoothing on the way."""
    pixels, share = _samples(resolution)
    reach = math.ceil(max(side / resized_side, 1)) + 1
    middle = ((2 * (offset + pixels) + 1) * side) // (2 * resized_side)
    near = middle[:, None] + np.arange(-reach, reach + 1)  # pixels of the image that count at all
    weights = _resizing_weights(_triangle, offset + pixels, side, resized_side, near)
    of_cells = _resizing_weights(_cubic, near.reshape(-1).clip(0, side - 1), cells, side)
    at_pixels = np.einsum("pn,pnc->pc", weights, of_cells.reshape(*near.shape, cells))
    mixed = at_pixels[0::2] * (1 - share[:, None]) + at_pixels[1::2] * share[:, None]
    return np.asarray(mixed, np.float32)


def _resizing_weights(
    kernel: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    outputs: NDArray[np.int64],
    side_in: int,
    side_out: int,
    inputs: NDArray[np.int64] | None = None,
) -> NDArray[np.float64]:
    """(outputs, inputs): what each input gives to some outputs when PIL resizes an axis (``Image.resize``).

    Args:
        kernel: PIL's, over pixels of the longer of the two axes.
        outputs: pixels of the result.
        side_in, side_out: lengths of the axis.
        inputs: for each output the inputs to look at, by default all; those outside the axis get no weight.
    """
    scale = side_in / side_out
    width = max(scale, 1.0)  # an axis that shrinks is smoothed
    centres = (outputs + 0.5) * scale
    if inputs is None:
        inputs = np.arange(side_in)[None, :]
    weights = kernel((inputs + 0.5 - centres[:, None]) / width)
    weights = np.where((inputs >= 0) & (inputs < side_in), weights, 0.0)
    shares: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return shares


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic convolution with a = -1/2, PIL's ``BICUBIC``."""
    x = np.abs(x)
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


def _triangle(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """PIL's ``BILINEAR``."""
    return np.maximum(1 - np.abs(x), 0.0)

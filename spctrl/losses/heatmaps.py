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
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from spctrl.conditions.heatmaps import CELLS, keypoint_heatmaps
from spctrl.data.crops import crop_of, nearest_places

if TYPE_CHECKING:
    from numpy.typing import NDArray

HeatmapType = Literal["partition", "whole"]
"""One map a keypoint, or one of the whole object: the largest of them in each cell."""

_LEVELS = 255
_KEPT_AXES = 512
"""Matrices kept for the next image of the same size; at most 18 MB."""


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
    resized_wh, left, top = crop_of(size_wh, resolution)
    across = _axis(size_wh[0], resized_wh[0], left, resolution, cells, nearest=binary)
    down = _axis(size_wh[1], resized_wh[1], top, resolution, cells, nearest=binary)
    sampling = _sampling(resolution)
    # Most cells of a map are 0: only where they are not, and where the crop sees that, there is something to do.
    present: NDArray[np.bool_] = np.greater(heatmaps, 0)
    rows, columns = _extents(present.max(axis=2)), _extents(present.max(axis=1))
    to_rows, to_columns = down.reached(rows), across.reached(columns)
    places = np.concatenate([rows, columns, to_rows, to_columns]).T.tolist()
    for heatmap, target, (r, r_end, c, c_end, i, i_end, j, j_end) in zip(
        heatmaps, targets, places, strict=True
    ):
        if i >= i_end or j >= j_end:
            continue
        levels = np.floor(np.minimum(heatmap[r:r_end, c:c_end], 1) * _LEVELS).astype(np.float32)
        pixels = levels @ across.weights[2 * j : 2 * j_end, c:c_end].T
        if binary:  # PIL keeps whole levels after each of its two passes
            pixels = down.weights[2 * i : 2 * i_end, r:r_end] @ _whole_levels(pixels)
            pixels = _whole_levels(pixels)
        else:
            pixels = np.maximum((down.weights[2 * i : 2 * i_end, r:r_end] / _LEVELS) @ pixels, 0)
        pixels = sampling[i:i_end, 2 * i : 2 * i_end] @ pixels @ sampling[j:j_end, 2 * j : 2 * j_end].T
        np.minimum(pixels, 1, out=target[i:i_end, j:j_end])
    return targets


def _whole_levels(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounded in place, as PIL rounds; more than 255 may stay, since the target is 1 there either way."""
    values += 0.5
    np.floor(values, out=values)
    return np.maximum(values, 0, out=values)


def _extents(present: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(2, K): the first place present in each row of (K, c), and the one after the last; equal where none is."""
    first, places = present.argmax(axis=1), present.shape[1]
    end = places - present[:, ::-1].argmax(axis=1)
    return np.stack([first, np.where(present.any(axis=1), end, first)])


class _Axis(NamedTuple):
    """What the cells of an image's axis give at the crop's pixels of ``_samples``.

    Attributes:
        weights: (2 C, c).
        inputs: (2, 2 C): for each pixel a cell before which none has a weight, and one from which on none has;
            both ascend.
    """

    weights: NDArray[np.float32]
    inputs: NDArray[np.int64]

    def reached(self, extents: NDArray[np.int64]) -> NDArray[np.int64]:
        """(2, K): from which cell of the crop to which the image's cells of ``extents`` (2, K) have a weight."""
        first = np.searchsorted(self.inputs[1], extents[0], side="right")
        end = np.searchsorted(self.inputs[0], extents[1], side="left")
        return np.stack([first // 2, np.where(extents[1] > extents[0], (end + 1) // 2, 0)])


@functools.lru_cache(_KEPT_AXES)
def _axis(side: int, resized_side: int, offset: int, resolution: int, cells: int, *, nearest: bool) -> _Axis:
    """From cells to the image (bicubic), and to the resized image whose part from ``offset`` on is the crop."""
    pixels = _samples(resolution)[0]
    if nearest:
        places = nearest_places(side, resized_side, offset, resolution)[pixels]
        weights = _resizing_weights(_cubic, places, cells, side)
    else:
        reach = math.ceil(max(side / resized_side, 1)) + 1
        middle = ((2 * (offset + pixels) + 1) * side) // (2 * resized_side)
        near = middle[:, None] + np.arange(-reach, reach + 1)
        of_image = _resizing_weights(_triangle, offset + pixels, side, resized_side, near)
        of_cells = _resizing_weights(_cubic, near.reshape(-1).clip(0, side - 1), cells, side)
        weights = np.einsum("pn,pnc->pc", of_image, of_cells.reshape(*near.shape, cells))
    first, end = _extents(np.asarray(weights != 0))
    # A pixel in the middle of a cell has that cell only; the bounds ascend all the same.
    ascending = np.minimum.accumulate(first[::-1])[::-1], np.maximum.accumulate(end)
    return _Axis(weights.astype(np.float32), np.stack(ascending))


def _samples(resolution: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Where the loss looks along an axis of the crop, from its first pixel to its last (``align_corners``).

    Returns:
        (2 C,) the two pixels that each cell lies between, one pair after the other, and (C,) the second one's share.
    """
    places = np.arange(CELLS) * ((resolution - 1) / (CELLS - 1))
    first = np.floor(places).astype(np.int64)
    pixels = np.stack([first, np.minimum(first + 1, resolution - 1)], axis=1).reshape(-1)
    return pixels, places - first


@functools.cache
def _sampling(resolution: int) -> NDArray[np.float32]:
    """(C, 2 C): what the pixels of ``_samples`` give to each cell."""
    share = _samples(resolution)[1]
    cells = np.arange(CELLS)
    weights = np.zeros((CELLS, 2 * CELLS), np.float32)
    weights[cells, 2 * cells], weights[cells, 2 * cells + 1] = 1 - share, share
    return weights


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
    return np.where(np.abs(x) < 1, 1 - np.abs(x), 0.0)

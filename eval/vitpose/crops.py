"""From a box to the network's input, and from the network's coordinates back to the image's.

REFERENCE section 12. A box becomes a centre and a size: padded by 1.25, its short side lengthened to the input's
aspect ratio.
There are two ways to cut that region out, and a network has to be used with the one it was trained with:

- ``msra``: the plain affine way; W pixels of the region cover W pixels of the input.
- ``udp``: unbiased data processing (Huang et al., CVPR 2020, section 3), which measures sizes between the outer
  pixels' centres: W - 1 steps of the region cover W - 1 steps of the input.

Numbers are float32 as in mmpose's ``GetBBoxCenterScale`` and ``TopdownAffine``: cv2 rounds sampling positions to a
32nd of a pixel, and a matrix that differs in its last digits gives other pixels here and there.

Legend: N instances; W, H width and height of the network's input in pixels; boxes are x, y, width, height in pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

Codec = Literal["msra", "udp"]

PADDING = 1.25
INPUT_WH = (192, 256)


def scale_boxes(
    bboxes_xywh: ArrayLike, from_wh: tuple[int, int], to_wh: tuple[int, int]
) -> NDArray[np.float64]:
    """(N, 4) boxes of an image of one size in the pixels of the same image resized to another."""
    factors: NDArray[np.float64] = np.tile(np.divide(to_wh, from_wh), 2)
    return np.asarray(bboxes_xywh, np.float64).reshape(-1, 4) * factors


def boxes_to_regions(
    bboxes_xywh: ArrayLike, *, padding: float = PADDING, input_wh: tuple[int, int] = INPUT_WH
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Centres and sizes of the regions to cut out, each (N, 2) float32, pixels; sizes have the input's aspect ratio."""
    boxes = np.asarray(bboxes_xywh, np.float32).reshape(-1, 4)
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    centres = (high + low) * np.float32(0.5)
    width, height = ((high - low) * np.float32(padding)).T
    aspect = np.float32(input_wh[0] / input_wh[1])
    sizes = np.where(width > height * aspect, (width, width / aspect), (height * aspect, height))
    return centres, sizes.T.astype(np.float32)


def crop_matrix(
    centre: NDArray[np.float32],
    size: NDArray[np.float32],
    *,
    codec: Codec,
    input_wh: tuple[int, int] = INPUT_WH,
) -> NDArray[np.floating]:
    """(2, 3) matrix that takes the image's pixels to the input's."""
    wh = np.array(input_wh, np.float32)
    half = np.float32(0.5)
    if codec == "udp":
        scale = (wh - 1) / size
        offset = scale * (half * size - centre)
        return np.array([[scale[0], 0, offset[0]], [0, scale[1], offset[1]]], np.float32)
    # One scale for both axes, the width's: the centre, the middle of the left edge, and a third point square to them.
    edge = centre - np.array([size[0] * half, 0], np.float32)
    region = np.stack([centre, edge, edge + (centre - edge)[::-1]])
    middle = np.array([0, wh[1] * half], np.float32)
    target = np.stack([wh * half, middle, middle + (wh * half - middle)[::-1]])
    return np.asarray(cv2.getAffineTransform(region, target), np.float64)


def crop(
    image: NDArray[np.uint8],
    centre: NDArray[np.float32],
    size: NDArray[np.float32],
    *,
    codec: Codec,
    input_wh: tuple[int, int] = INPUT_WH,
) -> NDArray[np.uint8]:
    """A region of an (h, w, 3) uint8 image as (H, W, 3) uint8, bilinear, black where it leaves the image."""
    matrix = crop_matrix(centre, size, codec=codec, input_wh=input_wh)
    return np.asarray(cv2.warpAffine(image, matrix, input_wh, flags=cv2.INTER_LINEAR), np.uint8)


def cells_to_image(
    cells: NDArray[np.floating],
    centres: NDArray[np.floating],
    sizes: NDArray[np.floating],
    *,
    codec: Codec,
    heatmap_wh: tuple[int, int],
) -> NDArray[np.float64]:
    """Heatmap cells (N, K, 2) as pixels of the image, (N, K, 2) float64; the inverse of the crop."""
    steps = np.array(heatmap_wh, np.float64) - (1 if codec == "udp" else 0)
    sizes = sizes[:, None].astype(np.float64)
    keypoints: NDArray[np.float64] = cells.astype(np.float64) / steps * sizes + centres[:, None] - 0.5 * sizes
    return keypoints

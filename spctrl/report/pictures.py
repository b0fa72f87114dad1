"""The page's pictures: index maps in colour, lines that stay visible when small, thumbnails within a budget.

Legend: H, W image size in pixels. Pictures are (H, W, 3) uint8 BGR, as OpenCV has them.
"""

from __future__ import annotations

import base64
import colorsys
from typing import TYPE_CHECKING, Final

import cv2
import numpy as np

from spctrl.data.images import opened_image
from spctrl.data.records import RecordError

if TYPE_CHECKING:
    from numpy.typing import NDArray

THUMBNAIL_SIDE: Final = 320
# Encoded bytes of all thumbnails together; base64 adds a third, so the page stays below 3 MB.
THUMBNAIL_BYTES: Final = 1_900_000
MAX_THUMBNAIL_BYTES: Final = 24_000
# Scale and WebP quality, tried in turn until a thumbnail fits its share of the page.
ENCODINGS: Final = ((1.0, 78), (1.0, 60), (0.8, 50), (0.6, 40), (0.4, 30), (0.3, 20))
NUM_KEYPOINTS: Final = 17
NUM_LINKS: Final = 19
FIRST_LINK: Final = 51


class ThumbnailBudget:
    """Shares the page's bytes among its thumbnails: what simple pictures leave, detailed ones may use."""

    def __init__(self, num_thumbnails: int) -> None:
        self._remaining = num_thumbnails
        self._bytes = THUMBNAIL_BYTES

    def encode(self, picture: NDArray[np.uint8] | None, side: int = THUMBNAIL_SIDE) -> str | None:
        """WebP data URI of a picture, made to fit ``side`` pixels; None for one that was counted on but is not."""
        uri = None
        if picture is not None:
            share = 1.5 * self._bytes / max(1, self._remaining)
            data = encode_thumbnail(picture, side, max_bytes=int(min(share, MAX_THUMBNAIL_BYTES)))
            self._bytes -= len(data)
            uri = f"data:image/webp;base64,{base64.b64encode(data).decode('ascii')}"
        self._remaining -= 1
        return uri


def decode(data: bytes | None, *, gray: bool = False) -> NDArray[np.uint8] | None:
    """A decoded image, None where there is none or it is broken: the report must not fail on it.

    By the library that checked it when the dataset was built: where two see different sizes in one file, the other
    one's may take any amount of memory.
    """
    if not data:
        return None
    try:
        with opened_image(data) as image:
            pixels = np.asarray(image.convert("L" if gray else "RGB"))
    except RecordError:
        return None
    return np.array(pixels if gray else pixels[..., ::-1], order="C")


def encode_thumbnail(picture: NDArray[np.uint8], side: int, *, max_bytes: int) -> bytes:
    """WebP of a picture that fits ``side`` pixels and, if it can, ``max_bytes``."""
    data = b""
    for scale, quality in ENCODINGS:
        small = _fit(picture, max(1, int(side * scale)))
        data = cv2.imencode(".webp", small, [cv2.IMWRITE_WEBP_QUALITY, quality])[1].tobytes()
        if len(data) <= max_bytes:
            break
    return data


def colourise_index_map(index_map: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W) uint8 index map to (H, W, 3) uint8 BGR."""
    return INDEX_COLOURS[index_map]


def overlay_index_map(image: NDArray[np.uint8], index_map: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The drawing of an (H, W) uint8 index map, thickened for a thumbnail, over the dimmed image."""
    dimmed = (image * np.float32(0.6)).astype(np.uint8)
    drawing = np.where((index_map > 0)[:, :, None], colourise_index_map(index_map), np.uint8(0))
    drawing = thicken_lines(drawing)
    return np.where(drawing.any(axis=2, keepdims=True), drawing, dimmed)


def thicken_lines(drawing: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A drawing on black whose lines stay visible in a thumbnail."""
    size = round(max(drawing.shape[:2]) / THUMBNAIL_SIDE)
    if size <= 1:
        return drawing
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * (size // 2) + 1,) * 2)
    return np.asarray(cv2.dilate(drawing, kernel), dtype=np.uint8)


def _fit(picture: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    height, width = picture.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return picture
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _index_colours() -> NDArray[np.uint8]:
    table = np.full((256, 3), 255, dtype=np.uint8)
    table[0] = (24, 19, 16)
    for first, count, brightness in ((1, NUM_KEYPOINTS, 1.0), (FIRST_LINK, NUM_LINKS, 0.66)):
        for i in range(count):
            # Steps of 7 put neighbours far apart on the colour wheel.
            red, green, blue = colorsys.hsv_to_rgb((7 * i % count) / count, 0.62, brightness)
            table[first + i] = [round(255 * channel) for channel in (blue, green, red)]
    return table


INDEX_COLOURS: Final = _index_colours()
"""Colours of the index map's 256 values; (256, 3) uint8, BGR.

0 is near black, 1..17 keypoints are bright, 51..69 links are muted; any other value is white, since it should
not occur.
"""

"""Index maps (REFERENCE section 3) of others' files: read from images of any kind, checked, and resized.

Legend: H and W of a map, R side of the resized one, in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from spctrl.conditions.spatext import BACKGROUND, FIRST_KEYPOINT, FIRST_LINK
from spctrl.data.images import equal_channels, first_pixel, opened_image
from spctrl.data.records import NUM_KEYPOINTS, RecordError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from spctrl.inference.methods import MapResize

MOST_LINKS = 19
"""Of any dataset's index maps."""
VALUES = frozenset(
    (
        BACKGROUND,
        *range(FIRST_KEYPOINT, FIRST_KEYPOINT + NUM_KEYPOINTS),
        *range(FIRST_LINK, FIRST_LINK + MOST_LINKS),
    )
)
_IS_VALUE: NDArray[np.bool_] = np.isin(np.arange(256), list(VALUES))
_MOST_NAMED = 5
_LOSSY_FORMATS = ("JPEG", "MPO")
_LOSSY_COMPRESSIONS = ("jpeg", "tiff_jpeg", "webp")
"""Pillow's names, of TIFF."""


def read_index_map(data: bytes, size_wh: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """(H, W) uint8: the index map in an untrusted image file; see ``index_map_of_image``.

    Args:
        data: the file's bytes. An orientation tag turns nothing.
        size_wh: width and height in pixels that it must have, where they are known.

    Raises:
        RecordError: ``bad_image``: no image, or no index map; ``image_size``.
    """
    with opened_image(data, size_wh, wide=True) as image:
        if _is_lossy(image, data):
            raise RecordError(
                "bad_image",
                f"expected an index map in a lossless format, found {image.format} with lossy compression, which "
                "changes labels. Save the map as PNG",
            )
        stored = next((tile[3] for tile in image.tile), "")  # type: ignore[attr-defined]  # of image files
        if len(image.getbands()) > 1 and ";16" in str(stored):
            raise RecordError(
                "bad_image",
                f"expected an index map of 8 bits a channel, found mode {image.mode} of 16, of which Pillow reads the "
                "upper 8. Convert the map to 8 bits",
            )
        return index_map_of_image(image)


def _is_lossy(image: Image.Image, data: bytes) -> bool:
    if image.format == "WEBP":
        return b"VP8 " in data  # the chunk of lossy frames; lossless ones are in VP8L
    return image.format in _LOSSY_FORMATS or image.info.get("compression") in _LOSSY_COMPRESSIONS


def index_map_of_image(image: Image.Image) -> NDArray[np.uint8]:
    """(H, W) uint8: the index map in an image of any mode whose colour channels are equal.

    Raises:
        RecordError: ``bad_image``: see ``equal_channels``; also a labelled pixel that is not opaque, or a value that
            index maps do not have. Names the first such pixel.
    """
    pixels = equal_channels(image, "an index map")
    # Pillow makes no alpha channel of the modes I and F.
    if image.has_transparency_data and not image.mode.startswith(("I", "F")):
        hidden = (np.asarray(image.convert("RGBA").getchannel("A")) < 255) & (pixels != BACKGROUND)
        if hidden.any():
            x, y = first_pixel(hidden)
            raise RecordError(
                "bad_image",
                f"expected an index map whose labels are opaque, found alpha below 255 at x = {x}, y = {y}. Remove "
                "the alpha channel",
            )
    wrong = ~_IS_VALUE[pixels]
    if wrong.any():
        x, y = first_pixel(wrong)
        raise RecordError("bad_image", f"{value_fault(np.unique(pixels))} The first is at x = {x}, y = {y}.")
    return pixels


def value_fault(values: Iterable[float]) -> str | None:
    """What is wrong with values of a map, in sentences; None where index maps have all of them."""
    unknown = sorted(set(map(float, values)) - VALUES)
    if not unknown:
        return None
    named = ", ".join(f"{each:g}" for each in unknown[:_MOST_NAMED])
    return (
        f"expected an index map: {BACKGROUND}, keypoints {FIRST_KEYPOINT} to {NUM_KEYPOINTS} and links {FIRST_LINK} to "
        f"{max(VALUES)}; found {named}. Is it another kind of condition?"
    )


def resize_index_map(pixels: NDArray[np.uint8], resolution: int, how: MapResize) -> NDArray[np.uint8]:
    """(R, R) uint8 of (H, W): each pixel is one of the map's.

    Args:
        pixels: the map.
        resolution: R.
        how: ``centre`` takes the pixel in which the centre of the resized pixel lies, as in training (PIL's NEAREST):
            of N pixels the one at floor((i + 1/2) N / R), which rounding decides where that falls between two.
            ``floor`` takes that of its upper left corner, as the released inference (torch's ``nearest``):
            floor(i N / R).
    """
    if how == "centre":
        side = (resolution, resolution)
        return np.asarray(Image.fromarray(pixels).resize(side, Image.Resampling.NEAREST))
    import torch  # not needed by readers alone
    import torch.nn.functional as F

    resized = F.interpolate(torch.tensor(pixels)[None, None], (resolution, resolution), mode="nearest")
    return np.asarray(resized[0, 0], np.uint8)

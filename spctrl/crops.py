"""The training crop: the short side resized to R pixels, then the centre cropped.

As torchvision's ``Resize(R)`` and ``CenterCrop(R)`` of a PIL image. Images, their conditions and whatever else lies on
the image's plane go through the same crop.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LONGEST_SIDES = 4
"""Images longer than this many times their short side are cropped before they are resized, not after."""


class Crop(NamedTuple):
    """Where the crop lies.

    Attributes:
        resized_wh: the whole image's size once its short side is R.
        left, top: of the crop in the resized image.
    """

    resized_wh: tuple[int, int]
    left: int
    top: int


def crop_of(size_wh: tuple[int, int], resolution: int) -> Crop:
    """The crop of R x R pixels of an image of a size."""
    width, height = size_wh
    resized_long = int(resolution * max(size_wh) / min(size_wh))
    resized_wh = (resolution, resized_long) if width <= height else (resized_long, resolution)
    left, top = (round((side - resolution) / 2) for side in resized_wh)
    return Crop(resized_wh, left, top)


def training_crop(
    image: Image.Image, resolution: int, resample: Image.Resampling = Image.Resampling.BILINEAR
) -> NDArray[np.uint8]:
    """(R, R, ...) uint8: the crop of an image of 8-bit channels.

    Where the long side is more than ``LONGEST_SIDES`` times the short one, only the crop is computed, since the whole
    resized image could fill any memory; positions then round differently, so that some pixels may differ by one level.
    """
    width, height = image.size
    (resized_w, resized_h), left, top = crop_of(image.size, resolution)
    if max(image.size) <= LONGEST_SIDES * min(image.size):
        resized = image.resize((resized_w, resized_h), resample)
        return np.array(resized.crop((left, top, left + resolution, top + resolution)))
    across, down = width / resized_w, height / resized_h
    right, bottom = min((left + resolution) * across, width), min((top + resolution) * down, height)
    box = (left * across, top * down, right, bottom)
    return np.array(image.resize((resolution, resolution), resample, box=box))

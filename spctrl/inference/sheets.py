"""Pictures for people: index maps in colour, heat over an image, and sheets of labelled pictures.

Legend: H and W in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from spctrl.conditions.openpose import palette
from spctrl.conditions.spatext import FIRST_LINK

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from spctrl.data.skeletons import Skeleton

LABEL_PX, GAP_PX = 20, 4
FONT_PX = 12
HEAT_SHARE = 0.55
BRIGHT_GREY = (230, 230, 230)


def coloured_index_map(index_map: NDArray[np.uint8], skeleton: Skeleton) -> Image.Image:
    """An (H, W) index map in the colours of OpenPose; links that those do not have are grey."""
    colours = palette("openpose", skeleton.keypoint_names, skeleton.links)
    colours += [BRIGHT_GREY] * (FIRST_LINK + len(skeleton.links) - len(colours))
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours)] = colours
    return Image.fromarray(table[index_map])


def heat_over(image: Image.Image, heat: NDArray[np.float32]) -> Image.Image:
    """A map of any size over an image, from dark where it is least to bright where it is most."""
    spread = float(heat.max() - heat.min())
    levels = ((heat - heat.min()) / spread if spread > 0 else np.zeros_like(heat)) * 255
    resized = cv2.resize(levels.astype(np.float32), image.size, interpolation=cv2.INTER_LINEAR)
    colours = cv2.applyColorMap(np.rint(resized).astype(np.uint8), cv2.COLORMAP_INFERNO)
    return Image.blend(image.convert("RGB"), Image.fromarray(colours[..., ::-1]), HEAT_SHARE)


def sheet(pictures: Sequence[tuple[str, Image.Image]], *, columns: int, side_px: int = 256) -> Image.Image:
    """Labelled pictures in rows, each fitted into a square."""
    rows = -(-len(pictures) // columns)
    width, height = side_px + GAP_PX, side_px + LABEL_PX + GAP_PX
    page = Image.new("RGB", (min(columns, len(pictures)) * width + GAP_PX, rows * height + GAP_PX), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(FONT_PX)
    for i, (label, picture) in enumerate(pictures):
        left, top = GAP_PX + i % columns * width, GAP_PX + i // columns * height
        draw.text((left, top), label, fill="black", font=font)
        fitted = ImageOps.contain(picture.convert("RGB"), (side_px, side_px))
        page.paste(fitted, (left, top + LABEL_PX))
    return page

"""Colour renders of a skeleton, in the styles that pose ControlNets are trained on.

Every render is drawn as an index map and coloured by its PNG palette. ``openpose`` follows the released
renders; ``coco`` and ``mmpose`` use the colours of mmpose's dataset configurations
(``configs/_base_/datasets``).

Legend: K keypoints, S links.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2

from spctrl.conditions.png import Canvas, with_palette
from spctrl.conditions.spatext import FIRST_KEYPOINT, FIRST_LINK, draw_index_map

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from spctrl.data.records import Record

Colour = tuple[int, int, int]

STYLES = ("openpose", "keypoints", "coco", "mmpose")

WHEEL: tuple[Colour, ...] = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0),
    (0, 255, 0), (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255),
    (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85),
)  # fmt: skip
LINK_BRIGHTNESS = 0.6

_BLUE, _GREEN, _ORANGE = (51, 153, 255), (0, 255, 0), (255, 128, 0)
_SIDES = {"left": _GREEN, "right": _ORANGE}
_FACE, _TORSO = {"nose", "eye", "ear"}, {"shoulder", "hip"}

_MMPOSE_AP10K_KEYPOINTS = (
    _GREEN, _ORANGE, _BLUE, _BLUE, _BLUE, _BLUE, _BLUE, _GREEN, _GREEN, _ORANGE, _GREEN,
    _ORANGE, _ORANGE, _GREEN, _GREEN, _GREEN, _GREEN,
)  # fmt: skip
_MMPOSE_AP10K_LINKS = (
    *[(0, 0, 255)] * 3, *[(0, 255, 0)] * 2,
    *[(0, 255, 255)] * 3, *[(6, 156, 250)] * 3, *[(0, 255, 255)] * 3, *[(6, 156, 250)] * 3,
)  # fmt: skip
_MMPOSE_RADIUS_PX = 3
_MMPOSE_LINE_WIDTH_PX = 1


def render_openpose(
    record: Record,
    index_map_png: bytes | None = None,
    *,
    style: str,
    keypoint_names: Sequence[str],
    links: Sequence[Sequence[int]],
    keypoint_radius_px: int,
    link_half_width_px: int,
) -> bytes:
    """The record's skeleton in colour on black, as an indexed (palette) PNG of the image's own size.

    Args:
        record: the instances to draw.
        index_map_png: of ``render_spatext`` for this record and these sizes, where it shows what this style shows: it
            is coloured then instead of drawn again.
        style: one of ``STYLES``.
        keypoint_names: K names, which decide the colours of ``coco`` and ``mmpose``.
        links: pairs of 0-based keypoint indices; ``openpose`` draws the first 18, one for each colour of its
            wheel.
        keypoint_radius_px: radius of a keypoint's disc (not for ``mmpose``, which has its own thin lines).
        link_half_width_px: half the width of a link's ellipse (likewise).
    """
    colours = palette(style, keypoint_names, links)
    if index_map_png is not None:
        return with_palette(index_map_png, colours)
    canvas = Canvas(record.size_wh)
    if style == "mmpose":
        _draw_thin(canvas.pixels, record.keypoints, links)
    else:
        draw_index_map(
            canvas.pixels,
            record.keypoints,
            links=drawn_links(style, links),
            keypoint_radius_px=keypoint_radius_px,
            link_half_width_px=link_half_width_px,
        )
    return canvas.to_png(colours)


def drawn_links(style: str, links: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    """The links that a style shows. The released renders have no colour for a 19th, so they leave it out."""
    if style == "keypoints":
        return ()
    return links[: len(WHEEL)] if style == "openpose" else links


def palette(style: str, keypoint_names: Sequence[str], links: Sequence[Sequence[int]]) -> list[Colour]:
    """RGB colour of every index value, up to the last link's."""
    if style in ("openpose", "keypoints"):
        keypoint_colours: Sequence[Colour] = WHEEL[: len(keypoint_names)]
        link_colours: Sequence[Colour] = [_darker(colour) for colour in WHEEL[: len(links)]]
    elif (
        style == "mmpose" and len(keypoint_names) == len(_MMPOSE_AP10K_KEYPOINTS) and "neck" in keypoint_names
    ):
        keypoint_colours, link_colours = _MMPOSE_AP10K_KEYPOINTS, _MMPOSE_AP10K_LINKS
    elif style in STYLES:
        keypoint_colours = [_coco_colour(name) for name in keypoint_names]
        link_colours = [_coco_colour(keypoint_names[a], keypoint_names[b]) for a, b in links]
    else:
        raise ValueError(f"expected a render style among {', '.join(STYLES)}, found {style!r}")
    unused: list[Colour] = [(0, 0, 0)] * (FIRST_LINK - FIRST_KEYPOINT - len(keypoint_colours))
    return [(0, 0, 0), *keypoint_colours, *unused, *link_colours]


def _darker(colour: Colour) -> Colour:
    red, green, blue = (int(channel * LINK_BRIGHTNESS) for channel in colour)
    return red, green, blue


def _coco_colour(*names: str) -> Colour:
    """Green on the left, orange on the right, blue for the face, the torso and whatever joins the two sides."""
    sides, parts = {name.split("_")[0] for name in names}, {name.split("_")[-1] for name in names}
    if len(sides) > 1 or parts & _FACE or parts == _TORSO:
        return _BLUE
    return _SIDES.get(sides.pop(), _BLUE)


def _draw_thin(
    pixels: NDArray[np.uint8], keypoints: NDArray[np.float64], links: Sequence[Sequence[int]]
) -> None:
    for instance in keypoints.tolist():
        for value, (start, end) in enumerate(links, FIRST_LINK):
            (x1, y1, v1), (x2, y2, v2) = instance[start], instance[end]
            if v1 > 0 and v2 > 0:
                ends = (int(x1), int(y1)), (int(x2), int(y2))
                cv2.line(pixels, *ends, value, _MMPOSE_LINE_WIDTH_PX)
        for value, (x, y, v) in enumerate(instance, FIRST_KEYPOINT):
            if v > 0:
                cv2.circle(pixels, (int(x), int(y)), _MMPOSE_RADIUS_PX, value, cv2.FILLED)

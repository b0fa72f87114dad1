"""Backdrops: a ground that comes towards the viewer below a horizon, and what stands far behind it.

Nearness is the sample's depth: 0 far to 255 near, before rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np

from spctrl.demo_data.raster import smooth_noise

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from spctrl.demo_data.figures import Rgb

FarObjects = Literal["hills", "trees", "dunes", "mountains", "wall", "curtain", "blur"]
Floor = Literal["grass", "soil", "tiles", "planks", "plain"]

HORIZON_NEARNESS = 28.0
FRONT_NEARNESS = 205.0


@dataclass(frozen=True, kw_only=True)
class Backdrop:
    """Colours are 0..255 RGB, sky from top to bottom, ground from far to near; `words` go into captions."""

    words: str
    sky: tuple[Rgb, Rgb]
    ground: tuple[Rgb, Rgb]
    far: FarObjects
    far_rgb: Rgb
    floor: Floor
    water: bool = False


OUTDOOR: dict[int, Backdrop] = {
    1: Backdrop(
        words="on a meadow", sky=((96, 166, 222), (214, 234, 240)), ground=((168, 190, 108), (92, 148, 62)),
        far="hills", far_rgb=(120, 162, 118), floor="grass",
    ),
    2: Backdrop(
        words="in a forest", sky=((150, 196, 190), (222, 234, 206)), ground=((122, 150, 92), (72, 104, 58)),
        far="trees", far_rgb=(62, 104, 72), floor="grass",
    ),
    3: Backdrop(
        words="among rocks", sky=((168, 188, 206), (232, 226, 214)), ground=((176, 158, 138), (132, 108, 88)),
        far="mountains", far_rgb=(146, 134, 132), floor="soil",
    ),
    4: Backdrop(
        words="in the snow", sky=((158, 184, 218), (236, 236, 242)),
        ground=((226, 234, 244), (246, 249, 252)), far="mountains", far_rgb=(160, 178, 204), floor="plain",
    ),
    5: Backdrop(
        words="in a room", sky=((224, 206, 180), (240, 226, 204)), ground=((190, 150, 118), (158, 112, 82)),
        far="wall", far_rgb=(206, 178, 150), floor="tiles",
    ),
    6: Backdrop(
        words="by a river", sky=((120, 180, 214), (228, 236, 228)), ground=((164, 176, 120), (118, 128, 78)),
        far="trees", far_rgb=(86, 132, 104), floor="grass", water=True,
    ),
    7: Backdrop(
        words="in the desert", sky=((94, 164, 214), (248, 224, 182)),
        ground=((238, 206, 146), (222, 172, 104)), far="dunes", far_rgb=(226, 180, 116), floor="plain",
    ),
    8: Backdrop(
        words="before a soft background", sky=((104, 138, 118), (168, 178, 138)),
        ground=((150, 160, 116), (96, 118, 82)), far="blur", far_rgb=(190, 196, 140), floor="plain",
    ),
}  # fmt: skip

STAGES: tuple[Backdrop, ...] = (
    Backdrop(
        words="on a stage", sky=((92, 30, 52), (150, 44, 60)), ground=((176, 124, 86), (206, 156, 108)),
        far="curtain", far_rgb=(120, 28, 46), floor="planks",
    ),
    Backdrop(
        words="in a dance studio", sky=((196, 206, 216), (232, 232, 228)),
        ground=((198, 158, 116), (222, 184, 136)), far="wall", far_rgb=(150, 172, 192), floor="planks",
    ),
    Backdrop(
        words="in a park at sunset", sky=((104, 86, 150), (252, 178, 120)),
        ground=((126, 118, 96), (78, 92, 66)), far="trees", far_rgb=(74, 60, 92), floor="grass",
    ),
    Backdrop(
        words="on a square at night", sky=((24, 30, 66), (78, 74, 122)),
        ground=((92, 92, 118), (124, 120, 140)), far="mountains", far_rgb=(50, 52, 92), floor="tiles",
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Ground:
    """A painted backdrop: `rgb` (H,W,3) float32 0..255, `nearness` (H,W) float32, the horizon's row."""

    rgb: NDArray[np.float32]
    nearness: NDArray[np.float32]
    horizon_row: int


def paint_backdrop(backdrop: Backdrop, size_wh: tuple[int, int], rng: np.random.Generator) -> Ground:
    """Paints sky, far objects and ground for an image of the given size."""
    width, height = size_wh
    horizon = round(height * rng.uniform(0.38, 0.55))
    rgb = np.empty((height, width, 3), np.float32)
    rgb[:horizon] = _ramp(backdrop.sky, horizon)
    rgb[horizon:] = _ramp(backdrop.ground, height - horizon)
    nearness = np.empty((height, width), np.float32)
    nearness[:horizon] = np.linspace(4, 12, horizon, dtype=np.float32)[:, None]
    nearness[horizon:] = np.linspace(HORIZON_NEARNESS, FRONT_NEARNESS, height - horizon, dtype=np.float32)[
        :, None
    ]

    sky = rgb[:horizon]
    if backdrop.far not in ("wall", "curtain"):
        clouds = np.clip(smooth_noise(rng, (width, horizon), (0.3 * width, 0.1 * width)) * 0.5 - 0.1, 0, 0.6)
        sky += (np.float32(250) - sky) * clouds[..., None]
    _paint_far(backdrop, rgb, nearness, horizon, rng)
    _paint_floor(backdrop, rgb[horizon:], rng)
    if backdrop.water:
        bank = horizon + round((height - horizon) * rng.uniform(0.15, 0.3))
        waves = smooth_noise(rng, (width, bank - horizon), (0.15 * width, 2.0))
        rgb[horizon:bank] = np.array((112, 164, 190), np.float32) + 16 * waves[..., None]
    grain = 3 * rng.standard_normal((97, 89), dtype=np.float32)
    rgb += np.tile(grain, (height // 97 + 1, width // 89 + 1))[:height, :width, None]
    return Ground(rgb=rgb, nearness=nearness, horizon_row=horizon)


def _ramp(ends: tuple[Rgb, Rgb], rows: int) -> NDArray[np.float32]:
    t = np.linspace(0, 1, rows, dtype=np.float32)[:, None, None]
    return np.asarray((1 - t) * np.array(ends[0], np.float32) + t * np.array(ends[1], np.float32), np.float32)


def _paint_far(
    backdrop: Backdrop,
    rgb: NDArray[np.float32],
    nearness: NDArray[np.float32],
    horizon: int,
    rng: np.random.Generator,
) -> None:
    width = rgb.shape[1]
    color = np.array(backdrop.far_rgb, np.float32)
    x = np.arange(width)
    if backdrop.far in ("hills", "mountains", "dunes"):
        for depth, height in ((0, 0.42), (1, 0.24)):
            ridge = smooth_noise(rng, (width, 1), (0.22 * width, 1))[0]
            ridge = np.abs(ridge) if backdrop.far == "mountains" else 0.5 + 0.3 * ridge
            _fill_below(
                rgb, nearness, horizon, horizon * height * ridge, color + 26 * (1 - depth), 14.0 + 6 * depth
            )
        return
    if backdrop.far == "trees":
        for depth in (0, 1):
            tops = np.zeros(width, np.float32)
            for _ in range(14):
                center, radius = rng.uniform(0, width), rng.uniform(0.04, 0.1) * width
                crown = rng.uniform(0.3, 0.75) * horizon * (1 - 0.25 * depth)
                tops = np.maximum(
                    tops, crown * np.sqrt(np.clip(1 - ((x - center) / radius) ** 2, 0, 1)) ** 0.7
                )
            tops += 0.12 * horizon + 3 * np.sin(x * 0.9 + depth)
            _fill_below(rgb, nearness, horizon, tops, color + 34 * (1 - depth), 16.0 + 6 * depth)
        return
    wall = rgb[:horizon]
    if backdrop.far == "blur":
        lights = smooth_noise(rng, (width, horizon), (0.12 * width, 0.12 * width))
        wall += (color - wall) * np.clip(0.4 * lights, 0, 1)[..., None]
        return
    nearness[:horizon] = np.linspace(HORIZON_NEARNESS - 8, HORIZON_NEARNESS, horizon, dtype=np.float32)[
        :, None
    ]
    if backdrop.far == "curtain":
        folds = np.sin(
            x * (2 * np.pi / (0.06 * width)) + 1.5 * smooth_noise(rng, (width, 1), (0.2 * width, 1))[0]
        )
        wall += (26 * folds.astype(np.float32))[None, :, None]
        return
    stripes = (x // max(6, width // 22)) % 2
    wall -= (6 * stripes.astype(np.float32))[None, :, None]
    skirting = max(2, horizon // 24)
    wall[-skirting:] = color * 0.8
    frame_w, frame_h = round(0.2 * width), round(0.42 * horizon)
    left, top = int(rng.integers(0, width - frame_w)), round(0.18 * horizon)
    wall[top : top + frame_h, left : left + frame_w] = color * 0.72
    wall[top + 5 : top + frame_h - 5, left + 5 : left + frame_w - 5] = np.array((176, 212, 232), np.float32)
    wall[top + frame_h // 2 : top + frame_h - 5, left + 5 : left + frame_w - 5] = np.array(
        (150, 186, 128), np.float32
    )


def _fill_below(
    rgb: NDArray[np.float32],
    nearness: NDArray[np.float32],
    horizon: int,
    height_of_column: NDArray[np.float32],
    color: NDArray[np.float32],
    near: float,
) -> None:
    top = max(0, horizon - 1 - int(height_of_column.max()))
    rows = np.arange(top, horizon, dtype=np.float32)[:, None]
    inside = np.clip(rows - (horizon - height_of_column[None, :]), 0, 1).astype(np.float32)
    above = rgb[top:horizon]
    above += (np.clip(color, 0, 255) - above) * inside[..., None]
    np.copyto(nearness[top:horizon], np.float32(near), where=inside >= 0.5)


def _paint_floor(backdrop: Backdrop, floor: NDArray[np.float32], rng: np.random.Generator) -> None:
    height, width = floor.shape[:2]
    floor += (9 * smooth_noise(rng, (width, height), (0.16 * width, 0.05 * width)))[..., None]
    if backdrop.floor in ("tiles", "planks"):
        # One row of the floor is `spread` wide on the ground: lines meet at the horizon.
        depth = np.linspace(0.12, 1, height, dtype=np.float32)[:, None]
        across = (np.arange(width, dtype=np.float32) - width * rng.uniform(0.3, 0.7)) / (depth * width) * 7
        joints = np.abs(across - np.round(across)) < 0.018 / depth
        cells = np.floor(across + 0.5)
        if backdrop.floor == "tiles":
            away = np.float32(2.2) / depth + np.float32(rng.random())
            joints = joints | (np.abs(away - np.round(away)) < 0.03)
            cells = cells + np.floor(away + 0.5)
        floor -= (10 * (cells % 2) + 16 * joints).astype(np.float32)[..., None]
        return
    speck = smooth_noise(rng, (width, height), (3.0, 2.0))
    strength = {"grass": 8.0, "soil": 9.0}.get(backdrop.floor, 2.5)
    floor += (strength * speck)[..., None]
    if backdrop.floor == "grass":
        for x, y, lean in zip(
            rng.integers(0, width, 130),
            np.sort(rng.integers(0, height, 130)),
            rng.integers(-3, 4, 130),
            strict=True,
        ):
            blade = 3 + int(9 * y / height)
            tone = floor[y, x] * rng.uniform(0.72, 1.22)
            color = tuple(float(v) for v in np.clip(tone, 0, 255))
            cv2.line(floor, (int(x), int(y)), (int(x + lean), int(y - blade)), color, 1, cv2.LINE_AA)

"""Scenes: one to three figures on a backdrop, painted from far to near, with the exact truth about them.

Shapes: H, W image; K keypoints (17 of AP-10K, 21 of HumanArt).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import cv2
import numpy as np

from spctrl.demo_data.animals import SPECIES, Species, make_animal
from spctrl.demo_data.backdrops import (
    FRONT_NEARNESS,
    HORIZON_NEARNESS,
    OUTDOOR,
    STAGES,
    Backdrop,
    Ground,
    paint_backdrop,
)
from spctrl.demo_data.figures import Figure, FigureBuilder, Material, vector, view
from spctrl.demo_data.people import make_person
from spctrl.demo_data.raster import Layer, draw_figure, smooth_noise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

SIZES_WH = (
    (320, 240), (400, 300), (480, 360), (640, 480), (512, 384), (576, 384), (360, 480), (384, 512),
    (400, 400),
)  # fmt: skip
MIN_VISIBLE_FRACTION = 0.35
MIN_VISIBLE_PIXELS = 300


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One annotated figure.

    Attributes:
        category_id: the dataset's category.
        keypoints_xyv: (K,3) float64 pixels and v; an unlabelled one is (0, 0, 0), a labelled one has v = 2.
        contacts_xy: (S,2) float64 pixels.
        visible: (H,W) bool, the pixels that show it.
        whole: (H,W) bool, the pixels that it would cover without what stands before it.
    """

    category_id: int
    keypoints_xyv: NDArray[np.float64]
    contacts_xy: NDArray[np.float64]
    visible: NDArray[np.bool_]
    whole: NDArray[np.bool_]

    @property
    def bbox_xywh(self) -> tuple[int, int, int, int]:
        """The tight box of the visible pixels."""
        x, y, w, h = cv2.boundingRect(self.visible.astype(np.uint8))
        return x, y, w, h


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A finished picture: `rgb` (H,W,3) uint8, `depth` (H,W) uint8, near is bright, instances far to near.

    `background` is AP-10K's number, 0 where there is none; `description` is empty for animals.
    """

    rgb: NDArray[np.uint8]
    depth: NDArray[np.uint8]
    instances: tuple[Instance, ...]
    background: int
    description: str

    @property
    def mask(self) -> NDArray[np.uint8]:
        """(H,W) uint8, 255 where any instance is visible, else 0."""
        return np.where(np.any([i.visible for i in self.instances], axis=0), 255, 0).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class _Actor:
    """A figure in view axes with its place in the image; `category_id` is None for props: not annotated."""

    figure: Figure
    category_id: int | None
    px_per_unit: float
    origin_xy: tuple[float, float]
    nearness: float
    layer: Layer


def draw_animal_scene(rng: np.random.Generator, species: Species | None = None) -> Scene:
    """A scene for AP-10K: animals of one species, by default a random one."""
    species = species or SPECIES[int(rng.integers(len(SPECIES)))]
    background = int(rng.choice(8, p=(0.26, 0.14, 0.1, 0.1, 0.14, 0.1, 0.1, 0.06))) + 1
    size_wh = _size(rng)
    casts = []
    for _ in range(_count(rng)):
        yaw = float(rng.choice((0.0, 180.0)) + rng.normal(0, 24))
        if rng.random() < 0.28:
            yaw = float(rng.choice((-90.0, -90.0, 90.0)) + rng.normal(0, 30))
        casts.append((species.category_id, make_animal(species, rng), None, yaw))
    # A mugshot is a close view: the figure is larger than the image, and the head is in it.
    return _compose(OUTDOOR[background], casts, size_wh, rng, close=background == 8, background=background)


def draw_people_scene(rng: np.random.Generator) -> Scene:
    """A scene for HumanArt, with a description of the people and the place."""
    backdrop = (*STAGES, *STAGES, *OUTDOOR.values())[int(rng.integers(2 * len(STAGES) + len(OUTDOOR)))]
    size_wh = _size(rng)
    people = [make_person(rng) for _ in range(_count(rng))]
    yaws = [float(-90 + rng.normal(0, 42) + (180 if rng.random() < 0.08 else 0)) for _ in people]
    casts = [(1, p.figure, p.seat, yaw) for p, yaw in zip(people, yaws, strict=True)]
    scene = _compose(backdrop, casts, size_wh, rng, close=False, background=0)
    who = {1: "a person", 2: "two people", 3: "three people"}[len(scene.instances)]
    if len(people) == 1:
        who = people[0].description
    return replace(scene, description=f"{who} {backdrop.words}")


def _size(rng: np.random.Generator) -> tuple[int, int]:
    return SIZES_WH[int(rng.integers(len(SIZES_WH)))]


def _count(rng: np.random.Generator) -> int:
    return int(rng.choice(3, p=(0.64, 0.25, 0.11))) + 1


def _compose(
    backdrop: Backdrop,
    casts: Sequence[tuple[int, Figure, Figure | None, float]],
    size_wh: tuple[int, int],
    rng: np.random.Generator,
    *,
    close: bool,
    background: int,
) -> Scene:
    ground = paint_backdrop(backdrop, size_wh, rng)
    pitch_deg = rng.uniform(3, 13)
    actors: list[_Actor] = []
    places = np.sort(rng.uniform(0.35, 1.0, len(casts)))
    columns = (rng.permutation(len(casts)) + 0.5 + rng.uniform(-0.16, 0.16, len(casts))) / len(casts)
    for (category_id, figure, seat, yaw), place, column in zip(casts, places, columns, strict=True):
        seen = view(figure, yaw_deg=yaw, pitch_deg=pitch_deg)
        scale, origin_xy = _placement(
            seen, size_wh, (float(column), float(place)), len(casts), rng, close=close
        )
        depth_row = origin_xy[1] if not close else 0.9 * size_wh[1]
        if seat is not None:
            seen_seat = view(seat, yaw_deg=yaw, pitch_deg=pitch_deg)
            actors += _actor(seen_seat, None, scale, origin_xy, depth_row, ground, size_wh, rng)
        actors += _actor(seen, category_id, scale, origin_xy, depth_row, ground, size_wh, rng)
    if rng.random() < 0.3 and not close:
        actors += _prop(size_wh, ground, rng)

    shape = (size_wh[1], size_wh[0])
    wholes = [_whole(actor.layer, shape) for actor in actors]
    owner = _owner(wholes)
    hidden = {
        i
        for i, actor in enumerate(actors)
        if actor.category_id is not None
        and np.count_nonzero(owner == i)
        < max(MIN_VISIBLE_PIXELS, MIN_VISIBLE_FRACTION * np.count_nonzero(wholes[i]))
    }
    # A figure that hardly shows is taken out of the picture, so that everything that does show is annotated.
    # Where that would leave none, what stands before them goes instead.
    annotated = {i for i, actor in enumerate(actors) if actor.category_id is not None}
    dropped = hidden if annotated - hidden else set(range(len(actors))) - annotated
    if dropped:
        actors = [actor for i, actor in enumerate(actors) if i not in dropped]
        wholes = [whole for i, whole in enumerate(wholes) if i not in dropped]
        owner = _owner(wholes)

    rgb, nearness = _paint(ground, actors, wholes)
    instances = tuple(
        _instance(actor, actor.category_id, i, owner, wholes[i], rng)
        for i, actor in enumerate(actors)
        if actor.category_id is not None
    )
    return Scene(
        rgb=_to_uint8(rgb),
        depth=_to_uint8(np.round(nearness)),
        instances=instances,
        background=background,
        description="",
    )


def _placement(
    figure: Figure,
    size_wh: tuple[int, int],
    column_place: tuple[float, float],
    count: int,
    rng: np.random.Generator,
    *,
    close: bool,
) -> tuple[float, tuple[float, float]]:
    """Pixels per unit and the image position of the figure's origin.

    `column_place` is where it stands among several, each 0..1: from left to right and from far to near.
    """
    (width, height), (column, place) = size_wh, column_place
    left, top, right, bottom = figure.extent_xyxy()
    if close:
        head = figure.keypoints[:3].mean(axis=0)
        scale = 1.5 * max(size_wh) / max(right - left, bottom - top)
        return scale, (0.5 * width - scale * float(head[0]), 0.42 * height - scale * float(head[1]))
    fill = rng.uniform(0.66, 0.9) if count == 1 else rng.uniform(0.62, 0.8) * (0.62 + 0.38 * place)
    share = 1.0 if count == 1 else 1.5 / count**0.5
    scale = fill * min(share * width / (right - left), height / (bottom - top))
    scale = min(scale, 0.95 * height / (bottom - top))
    foot_row = height * (rng.uniform(0.86, 0.96) if count == 1 else 0.7 + 0.27 * place)
    foot_row = max(foot_row, scale * (bottom - top) + 2)
    half = scale * (right - left) / 2
    center = rng.uniform(min(half, width / 2), max(width - half, width / 2)) if count == 1 else column * width
    if rng.random() < 0.14:
        inset = half * rng.uniform(-0.1, 0.45)
        center = inset if rng.random() < 0.5 else width - inset
    return float(scale), (float(center - scale * (left + right) / 2), float(foot_row - scale * bottom))


def _actor(
    figure: Figure,
    category_id: int | None,
    px_per_unit: float,
    origin_xy: tuple[float, float],
    depth_row: float,
    ground: Ground,
    size_wh: tuple[int, int],
    rng: np.random.Generator,
) -> list[_Actor]:
    layer = draw_figure(figure, px_per_unit=px_per_unit, origin_xy=origin_xy, size_wh=size_wh, rng=rng)
    if layer is None:
        return []
    t = (depth_row - ground.horizon_row) / (size_wh[1] - ground.horizon_row)
    nearness = HORIZON_NEARNESS + (FRONT_NEARNESS - HORIZON_NEARNESS) * float(np.clip(t, 0.1, 1.1))
    return [
        _Actor(
            figure=figure,
            category_id=category_id,
            px_per_unit=px_per_unit,
            origin_xy=origin_xy,
            nearness=nearness,
            layer=layer,
        )
    ]


def _prop(size_wh: tuple[int, int], ground: Ground, rng: np.random.Generator) -> list[_Actor]:
    """A bush, a rock or a pillar in front of everything."""
    width, height = size_wh
    builder = FigureBuilder()
    kind = ("bush", "rock", "pillar")[int(rng.integers(3))]
    if kind == "bush":
        for _ in range(16):
            leaves = Material(rgb=(56, round(rng.uniform(96, 138)), 52), grain=16)
            center = vector(rng.uniform(-0.4, 0.4), rng.uniform(-0.4, 0.4), rng.uniform(0.1, 0.5))
            builder.ball(center, rng.uniform(0.12, 0.22), leaves)
    elif kind == "rock":
        stone = Material(rgb=(142, 138, 136), grain=9)
        for _ in range(4):
            a, b = rng.uniform(-0.3, 0.3, 3), rng.uniform(-0.3, 0.3, 3)
            a[2], b[2] = 0.16, rng.uniform(0.15, 0.3)
            builder.chain((a, b), (0.24, 0.2), stone)
    else:
        paint = Material(rgb=((214, 206, 192), (150, 104, 70), (176, 74, 64))[int(rng.integers(3))], grain=4)
        builder.chain((vector(0, 0, -0.1), vector(0, 0, 4.0)), (0.13, 0.13), paint)
    seen = view(builder.build(), yaw_deg=0.0, pitch_deg=8.0)
    scale = height * rng.uniform(0.32, 0.46)
    origin_xy = (width * rng.uniform(0.1, 0.9), height * rng.uniform(0.99, 1.06))
    return _actor(seen, None, scale, origin_xy, height * 1.1, ground, size_wh, rng)


def _whole(layer: Layer, shape: tuple[int, int]) -> NDArray[np.bool_]:
    whole = np.zeros(shape, np.bool_)
    whole[layer.rows, layer.columns] = layer.coverage >= 0.5
    return whole


def _owner(wholes: Sequence[NDArray[np.bool_]]) -> NDArray[np.int8]:
    """(H,W) index of the nearest figure, -1 where the backdrop shows."""
    owner = np.full(wholes[0].shape, -1, np.int8)
    for i, whole in enumerate(wholes):
        owner[whole] = i
    return owner


def _paint(
    ground: Ground, actors: Sequence[_Actor], wholes: Sequence[NDArray[np.bool_]]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    rgb, nearness = ground.rgb, ground.nearness
    height, width = nearness.shape
    shadow = np.zeros((height // 4 + 1, width // 4 + 1), np.uint8)
    for actor in actors:
        left, _, right, _ = (v * actor.px_per_unit for v in actor.figure.extent_xyxy())
        center = (round((actor.origin_xy[0] + (left + right) / 2) / 4), round(actor.origin_xy[1] / 4))
        axes = (max(1, round(0.42 * (right - left) / 4)), max(1, round(0.09 * (right - left) / 4)))
        cv2.ellipse(shadow, center, axes, 0, 0, 360, 120, -1)
    soft = np.asarray(cv2.resize(cv2.GaussianBlur(shadow, (0, 0), 2.5), (width, height)), np.float32)
    rgb *= (1 - soft / 255)[..., None]
    for actor, whole in zip(actors, wholes, strict=True):
        layer = actor.layer
        window = (layer.rows, layer.columns)
        rgb[window] += (layer.rgb - rgb[window]) * layer.coverage[..., None]
        # A figure spans about 50 levels of depth, whatever its size: one unit is a third of it or more.
        levels = np.clip(layer.towards * (22 / actor.px_per_unit), -25, 25)
        np.copyto(nearness[window], actor.nearness + levels, where=whole[window])
    return rgb, nearness


def _instance(
    actor: _Actor,
    category_id: int,
    index: int,
    owner: NDArray[np.int8],
    whole: NDArray[np.bool_],
    rng: np.random.Generator,
) -> Instance:
    figure, scale, layer = actor.figure, actor.px_per_unit, actor.layer
    visible = owner == index
    height, width = owner.shape
    box_x, box_y, box_w, box_h = cv2.boundingRect(visible.astype(np.uint8))
    keypoints = np.zeros((len(figure.keypoints), 3))
    for k, (x, y, towards) in enumerate(figure.keypoints * scale + (*actor.origin_xy, 0.0)):
        column, row = round(float(x)), round(float(y))
        draws = rng.random(2)
        if not (box_x <= column < min(width, box_x + box_w) and box_y <= row < min(height, box_y + box_h)):
            continue
        behind = float(layer.towards[row - layer.rows.start, column - layer.columns.start]) - towards
        hidden_by_self = behind > 1.7 * figure.keypoint_radii[k] * scale + 2
        hidden_by_other = int(owner[row, column]) > index
        # Faces turned away are never labelled; other hidden keypoints now and then, as annotators guess them.
        guessed = draws[0] < (0.25 if hidden_by_other else 0.0 if k < 3 else 0.4)
        if draws[1] < 0.03 or ((hidden_by_self or hidden_by_other) and not guessed):
            continue
        keypoints[k] = (x, y, 2.0)
    contacts = figure.contacts[:, :2] * scale + actor.origin_xy
    inside = np.all((contacts >= 0) & (contacts < (width, height)), axis=1)
    return Instance(
        category_id=category_id,
        keypoints_xyv=keypoints,
        contacts_xy=contacts[inside],
        visible=visible,
        whole=whole,
    )


def apply_style(rgb: NDArray[np.uint8], scenario: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The picture (H,W,3) uint8 in the manner of a HumanArt scenario; shapes stay where they are."""
    if scenario == "cartoon":
        flat = cv2.medianBlur(rgb, 5) // 24 * 24 + 14
        edges = cv2.morphologyEx(cv2.medianBlur(rgb, 3), cv2.MORPH_GRADIENT, np.ones((2, 2), np.uint8))
        return np.where(edges.max(axis=2)[..., None] > 56, flat // 3, flat).astype(np.uint8)
    if scenario == "oil_painting":
        strokes = smooth_noise(rng, (rgb.shape[1], rgb.shape[0]), (5.0, 9.0))
        painted = cv2.medianBlur(rgb, 5).astype(np.float32) * np.array((1.05, 1.0, 0.9), np.float32)
        return _to_uint8(painted + 6 * strokes[..., None])
    if scenario == "movie":
        height, width = rgb.shape[:2]
        across, down = np.linspace(-1, 1, width) ** 2, np.linspace(-1, 1, height)[:, None] ** 2
        vignette = (1 - 0.3 * (across + down)).astype(np.float32)[..., None]
        graded = rgb.astype(np.float32) * vignette * np.array((1.06, 0.98, 0.9), np.float32)
        return _to_uint8(graded + np.array((0, 4, 14), np.float32))
    if scenario == "digital_art":
        hsv = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = np.minimum(hsv[..., 1].astype(np.uint16) * 5 // 4, 255)
        return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.uint8)
    return rgb


def _to_uint8(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.clip(values, 0, 255).astype(np.uint8)

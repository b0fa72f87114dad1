"""Four-legged animals with AP-10K's keypoints.

Lengths are in units of a body of about the distance between hips and shoulders.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from spctrl.demo_data.figures import Coat, Figure, FigureBuilder, Material, Rgb, head_axes, vector

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    _BodyFrame = Callable[[float, float, float], NDArray[np.float64]]

Gait = Literal["stand", "walk", "trot", "gallop", "graze", "sit", "lie"]

DARK: Rgb = (30, 24, 24)
WHITE: Rgb = (245, 243, 238)
TORSO_LENGTH = 0.86


@dataclass(frozen=True, kw_only=True)
class Species:
    """An AP-10K category (its real id and family) with its proportions and colours."""

    category_id: int
    name: str
    family: str
    rgb: Rgb
    belly_rgb: Rgb
    limb_rgb: Rgb
    foot_rgb: Rgb
    head_rgb: Rgb | None = None
    nose_rgb: Rgb = (40, 32, 34)
    ear_rgb: Rgb | None = None
    coat: Coat = Coat()  # noqa: RUF009 - frozen, so it can be shared
    leg: float = 0.65
    chest: float = 0.23
    belly: float = 0.22
    rump: float = 0.21
    neck: float = 0.3
    neck_deg: float = 45.0
    neck_radius: float = 0.13
    head: float = 0.15
    muzzle: float = 0.2
    muzzle_radius: float = 0.08
    thigh_radius: float = 0.12
    shin_radius: float = 0.055
    ear: float = 0.14
    ear_shape: Literal["pointed", "flop", "round", "fan"] = "pointed"
    horn: float = 0.0
    tail: float = 0.45
    tail_radius: float = 0.04
    tail_deg: float = -60.0
    mane_rgb: Rgb | None = None
    ruff: float = 0.0
    eye_patch_rgb: Rgb | None = None
    trunk: bool = False
    gaits: tuple[Gait, ...] = ("stand", "walk", "trot", "gallop", "graze")


_PREDATOR: tuple[Gait, ...] = ("stand", "walk", "trot", "gallop", "sit", "sit", "lie")

SPECIES: tuple[Species, ...] = (
    Species(
        category_id=1, name="antelope", family="Bovidae", rgb=(190, 128, 72), belly_rgb=(244, 232, 210),
        limb_rgb=(196, 140, 88), foot_rgb=(60, 48, 42), leg=0.85, chest=0.24, belly=0.23, rump=0.22,
        neck=0.48, neck_deg=58, neck_radius=0.1, head=0.115, muzzle=0.22, muzzle_radius=0.06,
        thigh_radius=0.12, shin_radius=0.04, ear=0.17, horn=0.42, tail=0.22,
    ),
    Species(
        category_id=5, name="cow", family="Bovidae", rgb=(246, 242, 234), belly_rgb=(246, 214, 200),
        limb_rgb=(240, 234, 224), foot_rgb=(74, 62, 58), head_rgb=(238, 230, 220), nose_rgb=(232, 150, 146),
        ear_rgb=(72, 52, 46), coat=Coat(kind="patches", rgb=(66, 46, 40), period=0.4), leg=0.66, chest=0.33,
        belly=0.35, rump=0.31, neck=0.32, neck_deg=28, neck_radius=0.2, head=0.165, muzzle=0.25,
        muzzle_radius=0.115, thigh_radius=0.15, shin_radius=0.065, ear=0.17, ear_shape="flop", horn=0.14,
        tail=0.6, tail_radius=0.03, tail_deg=-80,
    ),
    Species(
        category_id=8, name="dog", family="Canidae", rgb=(206, 150, 88), belly_rgb=(248, 230, 200),
        limb_rgb=(214, 164, 106), foot_rgb=(250, 238, 216), ear_rgb=(138, 88, 50), ear=0.2, ear_shape="flop",
        head=0.175, muzzle=0.17, muzzle_radius=0.09, tail=0.45, tail_radius=0.05, tail_deg=45,
        gaits=_PREDATOR,
    ),
    Species(
        category_id=9, name="fox", family="Canidae", rgb=(226, 112, 44), belly_rgb=(252, 240, 226),
        limb_rgb=(206, 98, 40), foot_rgb=(48, 36, 34), ear_rgb=(70, 44, 36), leg=0.55, chest=0.19, belly=0.17,
        rump=0.17, neck=0.26, head=0.15, muzzle=0.21, muzzle_radius=0.055, thigh_radius=0.1,
        shin_radius=0.042, ear=0.19, tail=0.72, tail_radius=0.11, tail_deg=-20, gaits=_PREDATOR,
    ),
    Species(
        category_id=20, name="elephant", family="Elephantidae", rgb=(140, 142, 152),
        belly_rgb=(118, 118, 128), limb_rgb=(132, 134, 144), foot_rgb=(176, 172, 168), leg=0.72, chest=0.42,
        belly=0.46, rump=0.41, neck=0.3, neck_deg=22, neck_radius=0.28, head=0.27, muzzle=0.2,
        muzzle_radius=0.13, thigh_radius=0.18, shin_radius=0.12, ear=0.44, ear_shape="fan", tail=0.45,
        tail_radius=0.03, tail_deg=-78, trunk=True, gaits=("stand", "walk"),
    ),
    Species(
        category_id=21, name="horse", family="Equidae", rgb=(146, 84, 48), belly_rgb=(166, 104, 64),
        limb_rgb=(136, 76, 44), foot_rgb=(44, 34, 32), leg=0.9, chest=0.28, belly=0.28, rump=0.29, neck=0.55,
        neck_deg=52, neck_radius=0.16, head=0.135, muzzle=0.31, muzzle_radius=0.085, thigh_radius=0.16,
        shin_radius=0.052, ear=0.12, tail=0.62, tail_radius=0.07, tail_deg=-66, mane_rgb=(48, 32, 28),
    ),
    Species(
        category_id=22, name="zebra", family="Equidae", rgb=(244, 242, 236), belly_rgb=(244, 242, 236),
        limb_rgb=(240, 238, 232), foot_rgb=(36, 32, 32),
        coat=Coat(kind="stripes", rgb=(34, 30, 32), period=0.13), leg=0.78, chest=0.29, belly=0.3, rump=0.29,
        neck=0.44, neck_deg=50, neck_radius=0.16, head=0.135, muzzle=0.27, muzzle_radius=0.085,
        thigh_radius=0.15, shin_radius=0.052, ear=0.14, tail=0.5, mane_rgb=(36, 32, 34),
    ),
    Species(
        category_id=24, name="cat", family="Felidae", rgb=(150, 146, 150), belly_rgb=(240, 236, 232),
        limb_rgb=(158, 154, 158), foot_rgb=(246, 242, 240), nose_rgb=(232, 140, 146),
        coat=Coat(kind="stripes", rgb=(84, 80, 88), period=0.15), leg=0.5, chest=0.19, belly=0.2, rump=0.19,
        neck=0.2, neck_deg=40, neck_radius=0.12, head=0.185, muzzle=0.1, muzzle_radius=0.085,
        thigh_radius=0.11, shin_radius=0.055, ear=0.15, tail=0.75, tail_radius=0.045, tail_deg=40,
        gaits=_PREDATOR,
    ),
    Species(
        category_id=28, name="leopard", family="Felidae", rgb=(226, 172, 88), belly_rgb=(250, 238, 214),
        limb_rgb=(228, 180, 104), foot_rgb=(240, 212, 160),
        coat=Coat(kind="rosettes", rgb=(60, 40, 28), period=0.105), leg=0.52, chest=0.21, belly=0.2, rump=0.2,
        neck=0.24, neck_deg=25, head=0.155, muzzle=0.12, muzzle_radius=0.09, thigh_radius=0.13,
        shin_radius=0.06, ear=0.08, ear_shape="round", tail=0.8, tail_radius=0.045, tail_deg=-35,
        gaits=_PREDATOR,
    ),
    Species(
        category_id=29, name="lion", family="Felidae", rgb=(218, 166, 94), belly_rgb=(244, 222, 180),
        limb_rgb=(220, 172, 104), foot_rgb=(232, 196, 136), leg=0.56, chest=0.25, belly=0.22, rump=0.21,
        neck=0.28, neck_deg=32, neck_radius=0.17, head=0.17, muzzle=0.16, muzzle_radius=0.1,
        thigh_radius=0.14, shin_radius=0.065, ear=0.09, ear_shape="round", tail=0.7, tail_radius=0.035,
        tail_deg=-50, mane_rgb=(134, 72, 34), ruff=1.0, gaits=_PREDATOR,
    ),
    Species(
        category_id=32, name="tiger", family="Felidae", rgb=(232, 138, 48), belly_rgb=(252, 244, 230),
        limb_rgb=(234, 146, 62), foot_rgb=(250, 232, 206),
        coat=Coat(kind="stripes", rgb=(42, 30, 28), period=0.16), leg=0.53, chest=0.25, belly=0.23, rump=0.22,
        neck=0.24, neck_deg=25, neck_radius=0.16, head=0.175, muzzle=0.13, muzzle_radius=0.1,
        thigh_radius=0.14, shin_radius=0.068, ear=0.09, ear_shape="round", tail=0.72, tail_radius=0.045,
        tail_deg=-40, gaits=_PREDATOR,
    ),
    Species(
        category_id=33, name="giraffe", family="Giraffidae", rgb=(246, 222, 170), belly_rgb=(250, 238, 212),
        limb_rgb=(246, 226, 184), foot_rgb=(92, 70, 56),
        coat=Coat(kind="mosaic", rgb=(178, 104, 48), period=0.17), leg=1.15, chest=0.3, belly=0.27, rump=0.25,
        neck=1.15, neck_deg=64, neck_radius=0.15, head=0.14, muzzle=0.24, muzzle_radius=0.08,
        thigh_radius=0.14, shin_radius=0.055, ear=0.15, horn=0.15, tail=0.5, tail_radius=0.03, tail_deg=-76,
        gaits=("stand", "walk", "trot"),
    ),
    Species(
        category_id=48, name="pig", family="Suidae", rgb=(240, 172, 166), belly_rgb=(226, 150, 148),
        limb_rgb=(234, 164, 158), foot_rgb=(150, 100, 98), nose_rgb=(214, 118, 122), leg=0.42, chest=0.3,
        belly=0.32, rump=0.29, neck=0.24, neck_deg=14, neck_radius=0.23, head=0.2, muzzle=0.2,
        muzzle_radius=0.1, thigh_radius=0.13, shin_radius=0.06, ear=0.15, ear_shape="flop", tail=0.2,
        tail_radius=0.025, tail_deg=30, gaits=("stand", "walk", "trot", "graze", "sit"),
    ),
    Species(
        category_id=52, name="panda", family="Ursidae", rgb=(246, 244, 238), belly_rgb=(232, 228, 220),
        limb_rgb=(48, 44, 48), foot_rgb=(40, 36, 40), ear_rgb=(44, 40, 44), leg=0.42, chest=0.31, belly=0.34,
        rump=0.31, neck=0.26, neck_deg=20, neck_radius=0.21, head=0.24, muzzle=0.13, muzzle_radius=0.11,
        thigh_radius=0.17, shin_radius=0.12, ear=0.1, ear_shape="round", tail=0.08, tail_radius=0.06,
        eye_patch_rgb=(40, 36, 40), gaits=("stand", "walk", "sit", "sit", "lie"),
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Posture:
    """Heights and angles of one animal; feet are left front, right front, left hind, right hind."""

    torso_pitch_deg: float = 0.0
    hip_height: float = 1.0
    foot_offsets: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    foot_lifts: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    hind_bend: float = -1.0
    neck_deg: float = 0.0
    head_pitch_deg: float = -25.0


def make_animal(species: Species, rng: np.random.Generator) -> Figure:
    """An animal in a random posture, standing on z = 0, with the 17 AP-10K keypoints."""
    species = _individual(species, rng)
    gait: Gait = species.gaits[int(rng.integers(len(species.gaits)))]
    posture = _posture(species, gait, rng)
    skin = Material(rgb=species.rgb, belly_rgb=species.belly_rgb, patterned=True)
    limb = Material(rgb=species.limb_rgb, patterned=species.coat.kind != "patches")
    foot = Material(rgb=species.foot_rgb)
    builder = FigureBuilder()

    pitch = np.deg2rad(posture.torso_pitch_deg)
    hip_center = vector(-0.5, 0, posture.hip_height * species.leg)

    def body(x: float, y: float, z: float) -> NDArray[np.float64]:
        x = x * TORSO_LENGTH
        return hip_center + vector(
            np.cos(pitch) * x - np.sin(pitch) * z, y, np.sin(pitch) * x + np.cos(pitch) * z
        )

    rise = 0.3 * species.chest
    deep = rise - 0.14 * species.chest
    torso = [body(-0.06, 0, rise), body(0.42, 0, rise), body(0.86, 0, deep), body(1.04, 0, rise)]
    builder.chain(torso, (species.rump, species.belly, 1.1 * species.chest, 0.86 * species.chest), skin)
    withers = body(0.85, 0, rise + 0.2 * species.chest)
    builder.chain((torso[1], withers), (species.belly, species.chest), skin, along=0.48 * TORSO_LENGTH)

    legs = _add_legs(builder, species, posture, body, limb, foot)
    neck = body(1.0 + 0.5 * species.chest, 0, rise + 0.62 * species.chest)
    tail_root = body(-0.06 - 0.8 * species.rump, 0, rise + 0.5 * species.rump)
    _add_tail(builder, species, tail_root, posture, skin, rng)
    head_points = _add_head(
        builder, species, posture, body(1.0, 0, rise + 0.2 * species.chest), neck, skin, rng
    )
    left_front, right_front, left_hind, right_hind = legs
    keypoints = [*head_points, neck, tail_root, *left_front, *right_front, *left_hind, *right_hind]
    leg_radii = (1.3 * species.thigh_radius, 1.4 * species.shin_radius, 1.4 * species.shin_radius)
    radii = [0.5 * species.head] * 2 + [
        0.6 * species.muzzle_radius,
        species.neck_radius,
        species.rump,
        *leg_radii * 4,
    ]
    return builder.build(keypoints, radii, coat=species.coat)


def _individual(species: Species, rng: np.random.Generator) -> Species:
    tone = rng.uniform(0.9, 1.06)

    def vary(rgb: Rgb) -> Rgb:
        red, green, blue = (min(255, round(channel * tone)) for channel in rgb)
        return red, green, blue

    return replace(
        species,
        rgb=vary(species.rgb),
        limb_rgb=vary(species.limb_rgb),
        head_rgb=vary(species.head_rgb or species.rgb),
        leg=species.leg * rng.uniform(0.93, 1.07),
        belly=species.belly * rng.uniform(0.94, 1.08),
        head=species.head * rng.uniform(0.96, 1.1),
    )


def _posture(species: Species, gait: Gait, rng: np.random.Generator) -> _Posture:
    phase = rng.uniform(0, 2 * np.pi)
    neck_deg = species.neck_deg + rng.uniform(-16, 14)
    head_pitch_deg = rng.uniform(-38, -4)
    if gait == "sit":
        tilt = rng.uniform(46, 58)
        reach = species.leg * 0.78
        return _Posture(
            torso_pitch_deg=tilt, hip_height=(0.85 * species.rump) / species.leg, hind_bend=1.0,
            foot_offsets=(0.1, 0.04, reach, 0.92 * reach), neck_deg=neck_deg + 0.45 * tilt,
            head_pitch_deg=rng.uniform(-25, 5),
        )  # fmt: skip
    if gait == "lie":
        reach = species.leg * rng.uniform(0.78, 0.9)
        return _Posture(
            hip_height=(0.8 * species.belly) / species.leg, hind_bend=1.0, torso_pitch_deg=rng.uniform(0, 9),
            foot_offsets=(reach, 0.85 * reach, 0.72 * reach, 0.66 * reach), neck_deg=neck_deg + 12,
            head_pitch_deg=head_pitch_deg,
        )  # fmt: skip
    if gait == "graze":
        drop_deg = np.rad2deg(
            np.arcsin(min(0.9, 0.85 * species.leg / (species.neck + species.muzzle + 0.35)))
        )
        neck_deg, head_pitch_deg = -drop_deg + rng.uniform(-4, 10), rng.uniform(-72, -52)
    stride, lift, offsets = {
        "walk": (0.24, 0.1, (0.25, 0.75, 0.0, 0.5)),
        "trot": (0.32, 0.17, (0.0, 0.5, 0.5, 0.0)),
        "gallop": (0.5, 0.26, (0.0, 0.12, 0.62, 0.5)),
    }.get(gait, (0.07, 0.0, (0.0, 0.37, 0.2, 0.6)))
    phases = phase + 2 * np.pi * np.array(offsets)
    swings = tuple(float(v) for v in species.leg * stride * np.cos(phases))
    lifts = tuple(float(v) for v in species.leg * lift * np.maximum(0, -np.sin(phases)))
    return _Posture(
        torso_pitch_deg=9 * np.sin(phase) if gait == "gallop" else rng.uniform(-2, 2),
        foot_offsets=(swings[0], swings[1], swings[2], swings[3]),
        foot_lifts=(lifts[0], lifts[1], lifts[2], lifts[3]),
        neck_deg=neck_deg - (14 if gait == "gallop" else 0),
        head_pitch_deg=head_pitch_deg,
    )


def _add_legs(
    builder: FigureBuilder,
    species: Species,
    posture: _Posture,
    body: _BodyFrame,
    limb: Material,
    foot: Material,
) -> list[list[NDArray[np.float64]]]:
    """Adds the legs left front, right front, left hind, right hind; each returned as its three keypoints."""
    legs = []
    segment = 0.515 * (species.leg - 0.9 * species.shin_radius)
    for i, (x, side) in enumerate(((0.93, 1), (0.93, -1), (0.03, 1), (0.03, -1))):
        front = i < 2
        width = (0.62 * species.chest if front else 0.6 * species.rump) * side
        root = body(x, width, 0.0)
        sole = species.shin_radius * 0.9
        target = vector(root[0] + posture.foot_offsets[i], 0.9 * width, sole + posture.foot_lifts[i])
        bend = 1.0 if front else posture.hind_bend
        middle, paw = _two_bones(root, target, segment, bend)
        thigh = species.thigh_radius * (1.1 if front else 1.4)
        builder.chain((root, middle), (thigh, 1.2 * species.shin_radius), limb)
        builder.chain((middle, paw), (1.15 * species.shin_radius, species.shin_radius), limb)
        toe = paw + vector(0.8 * species.shin_radius, 0, -0.1 * species.shin_radius)
        builder.chain((paw, toe), (1.12 * species.shin_radius, 0.95 * species.shin_radius), foot)
        legs.append([root, middle, paw])
    return legs


def _two_bones(
    root: NDArray[np.float64], target: NDArray[np.float64], segment: float, bend: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Middle joint and foot of a leg of two equal segments; with bend > 0 the joint points forward."""
    reach = target - root
    distance = float(np.hypot(reach[0], reach[2]))
    foot = root + reach * min(1.0, 1.99 * segment / distance)
    distance = min(distance, 1.99 * segment)
    across = vector(-reach[2], 0, reach[0]) / np.hypot(reach[0], reach[2])
    return (root + foot) / 2 + across * bend * np.sqrt(max(segment**2 - (distance / 2) ** 2, 0)), foot


def _add_tail(
    builder: FigureBuilder,
    species: Species,
    root: NDArray[np.float64],
    posture: _Posture,
    skin: Material,
    rng: np.random.Generator,
) -> None:
    # On a seated or lying animal a hanging tail would go through the ground.
    low = posture.hip_height * species.leg < 0.75 * species.leg
    angle = 8.0 if low and species.tail_deg < 0 else species.tail_deg + rng.uniform(-12, 12)
    swing = rng.uniform(-0.5, 0.5)
    points = [root]
    for i in range(4):
        bend = np.deg2rad(angle + (12 if species.tail_deg > 0 else -3) * i)
        step = vector(-np.cos(bend) * np.cos(swing), np.cos(bend) * np.sin(swing), np.sin(bend))
        after = points[-1] + step * species.tail / 4
        after[2] = max(after[2], species.tail_radius)
        points.append(after)
    r = species.tail_radius
    radii = (r, 1.1 * r, 1.1 * r, 0.9 * r, 0.6 * r)
    hair = Material(rgb=species.mane_rgb, grain=9) if species.mane_rgb and not species.ruff else skin
    builder.chain(points, radii, hair)
    if species.name == "fox":
        builder.chain(points[3:], (1.0 * r, 0.55 * r), Material(rgb=WHITE))
    elif species.tail > 0.4 and (r < 0.04 or species.ruff):
        builder.ball(points[-1], 1.9 * r, Material(rgb=species.mane_rgb or species.foot_rgb, grain=8))


def _add_head(
    builder: FigureBuilder,
    species: Species,
    posture: _Posture,
    neck_start: NDArray[np.float64],
    neck: NDArray[np.float64],
    skin: Material,
    rng: np.random.Generator,
) -> list[NDArray[np.float64]]:
    """Adds neck and head; returns left eye, right eye and nose."""
    turn = rng.uniform(-28, 28)
    neck_forward, _, neck_up = head_axes(posture.neck_deg, 0.35 * turn)
    forward, left, up = head_axes(posture.head_pitch_deg, turn)
    r = species.head
    face = Material(
        rgb=species.head_rgb or species.rgb,
        belly_rgb=species.belly_rgb,
        patterned=species.coat.kind in ("rosettes", "mosaic") or species.family == "Equidae",
    )
    center = neck + neck_forward * species.neck
    center[2] = max(center[2], r + 0.25 * species.muzzle)
    nape = center - 0.3 * r * forward
    builder.chain(
        (neck_start, neck, nape), (1.3 * species.neck_radius, 1.12 * species.neck_radius, 0.8 * r), skin
    )
    if species.mane_rgb and not species.ruff:
        back = [
            neck + neck_up * 0.75 * species.neck_radius,
            (neck + nape) / 2 + neck_up * 0.75 * species.neck_radius,
        ]
        back.append(center + up * 0.75 * r)
        builder.chain(back, (0.07, 0.075, 0.06), Material(rgb=species.mane_rgb, grain=9))
    if species.ruff and species.mane_rgb:
        ruff = Material(rgb=species.mane_rgb, grain=10)
        for angle in np.arange(11) * (2 * np.pi / 11):
            lock = center + 0.95 * r * (np.cos(angle) * left + np.sin(angle) * up) - 0.4 * r * forward
            builder.chain((lock, lock - 0.9 * r * forward), (0.48 * species.ruff * r, 0.5 * r), ruff)
        builder.chain((center - 0.8 * r * forward, neck), (1.2 * r, 1.5 * species.neck_radius), ruff)
    builder.ball(center, r, face)
    tip = center + forward * (0.75 * r + species.muzzle) - up * 0.2 * r
    snout = Material(rgb=species.belly_rgb if species.muzzle < 0.25 else face.rgb, patterned=False)
    builder.chain((center + 0.35 * r * forward - 0.15 * up * r, tip), (0.78 * r, species.muzzle_radius), face)
    mouth = center + forward * (0.6 * r + 0.72 * species.muzzle) - up * 0.3 * r
    builder.chain((mouth, tip - 0.03 * up), (0.98 * species.muzzle_radius, species.muzzle_radius), snout)
    nose = tip + forward * 0.8 * species.muzzle_radius + up * 0.25 * species.muzzle_radius
    if species.trunk:
        nose = _add_trunk(builder, species, tip, forward, left, up, rng)
    else:
        for side in (-0.25, 0.25):
            nostril = nose + left * side * species.muzzle_radius
            builder.ball(nostril, 0.42 * species.muzzle_radius, Material(rgb=species.nose_rgb, grain=0))
    eyes = [_add_eye(builder, species, center, forward, left, up, side) for side in (1.0, -1.0)]
    for side in (1.0, -1.0):
        _add_ear(builder, species, center, (forward, left, up), side)
        if species.horn:
            base = center + (up * 0.8 + left * side * 0.38) * r
            bend = base + (up * 0.6 - forward * 0.25 + left * side * 0.3) * species.horn
            horn_tip = base + (up * 1.0 - forward * 0.5 + left * side * 0.35) * species.horn
            builder.chain((base, bend, horn_tip), (0.2 * r, 0.15 * r, 0.05 * r), Material(rgb=(78, 66, 58)))
    return [*eyes, nose]


def _add_trunk(
    builder: FigureBuilder,
    species: Species,
    tip: NDArray[np.float64],
    forward: NDArray[np.float64],
    left: NDArray[np.float64],
    up: NDArray[np.float64],
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    material = Material(rgb=species.limb_rgb)
    curl = rng.uniform(-0.2, 0.45)
    points = [tip - 0.1 * forward]
    for i in range(5):
        points.append(points[-1] + vector(0.05 + curl * 0.035 * i * i * 0.5, 0, -0.17 + 0.02 * i))
    r = species.muzzle_radius
    builder.chain(points, (1.05 * r, 0.9 * r, 0.75 * r, 0.62 * r, 0.52 * r, 0.46 * r), material)
    for side in (1.0, -1.0):
        root = tip - forward * 0.08 + left * side * 0.14 - up * 0.08
        bow = root + forward * 0.18 - up * 0.14
        builder.chain(
            (root, bow, bow + forward * 0.16 + up * 0.02), (0.045, 0.04, 0.015), Material(rgb=(250, 242, 222))
        )
    return points[-1]


def _add_eye(
    builder: FigureBuilder,
    species: Species,
    center: NDArray[np.float64],
    forward: NDArray[np.float64],
    left: NDArray[np.float64],
    up: NDArray[np.float64],
    side: float,
) -> NDArray[np.float64]:
    out = forward * 0.62 + up * 0.42 + left * side * 0.66
    out = out / np.linalg.norm(out)
    eye, r = center + out * species.head * 0.94, species.head
    if species.eye_patch_rgb:
        patch = Material(rgb=species.eye_patch_rgb, grain=0)
        builder.chain((eye, eye - 0.28 * r * up + 0.1 * r * left * side), (0.3 * r, 0.26 * r), patch)
        eye = eye + 0.2 * r * out
    builder.ball(eye, 0.2 * r, Material(rgb=WHITE, grain=0))
    builder.ball(eye + 0.07 * r * out, 0.165 * r, Material(rgb=DARK, grain=0))
    builder.ball(eye + 0.2 * r * out + 0.07 * r * up, 0.06 * r, Material(rgb=(255, 255, 255), grain=0))
    return eye


def _add_ear(
    builder: FigureBuilder,
    species: Species,
    center: NDArray[np.float64],
    axes: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]],
    side: float,
) -> None:
    forward, left, up = axes
    r, length = species.head, species.ear
    material = Material(rgb=species.ear_rgb or species.head_rgb or species.rgb)
    outward = left * side
    base = center + (0.62 * up + 0.6 * outward - 0.15 * forward) * r
    if species.ear_shape == "round":
        builder.ball(base + (0.35 * up + 0.35 * outward) * length, length, material)
        inner = Material(rgb=(226, 168, 150) if species.ear_rgb is None else species.ear_rgb)
        builder.ball(
            base + (0.35 * up + 0.35 * outward) * length + 0.45 * length * forward, 0.62 * length, inner
        )
    elif species.ear_shape == "flop":
        tip = base + 0.5 * length * outward - 0.75 * length * up
        builder.chain((base, base + 0.42 * length * outward, tip), (0.3 * r, 0.34 * r, 0.28 * r), material)
    elif species.ear_shape == "fan":
        root = center + 0.6 * outward * r - 0.25 * forward * r
        for angle in np.deg2rad([62, 38, 14, -10, -34, -58]):
            rim = root + length * (0.8 * np.cos(angle) * outward - 0.35 * forward + 0.72 * np.sin(angle) * up)
            builder.chain((root, rim), (0.09, 0.1), material)
    else:
        tip = base + (0.9 * up + 0.38 * outward) * length
        builder.chain((base, tip), (0.36 * r, 0.08 * r), material)
        inner_base = base + 0.2 * r * forward + 0.1 * length * up
        builder.chain((inner_base, tip + 0.02 * forward), (0.2 * r, 0.03 * r), Material(rgb=(232, 178, 164)))

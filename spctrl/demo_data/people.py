"""People with HumanArt's 21 keypoints: COCO's 17, then left and right finger, left and right toe.

Lengths are in units of about an adult's height.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from spctrl.demo_data.figures import (
    Coat,
    Figure,
    FigureBuilder,
    Material,
    PatternKind,
    Rgb,
    head_axes,
    vector,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

Angles = tuple[float, float]

SKIN: tuple[Rgb, ...] = ((250, 214, 184), (234, 186, 146), (198, 142, 100), (146, 96, 64), (98, 64, 46))
HAIR: tuple[Rgb, ...] = (
    (46, 34, 32),
    (96, 58, 36),
    (206, 158, 84),
    (170, 74, 40),
    (200, 196, 196),
    (36, 36, 48),
)
COLOURS: dict[str, Rgb] = {
    "red": (214, 62, 58), "yellow": (242, 196, 70), "green": (78, 158, 98), "blue": (66, 110, 196),
    "teal": (52, 160, 164), "purple": (142, 88, 178), "orange": (236, 134, 58), "pink": (238, 142, 170),
    "white": (240, 238, 232),
}  # fmt: skip
_SHIRT_PATTERNS: tuple[PatternKind, ...] = ("plain", "stripes", "spots")
TROUSERS: tuple[Rgb, ...] = ((52, 66, 110), (70, 66, 72), (128, 102, 78), (86, 108, 92), (40, 44, 56))


KEYPOINT_NAMES_21 = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder",
    "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip",
    "left_knee", "right_knee", "left_ankle", "right_ankle",
    "left_finger", "right_finger", "left_toe", "right_toe",
)  # fmt: skip
# How deep under the person's own surface a keypoint lies.
_RADII = {
    "nose": 0.02, "eye": 0.03, "ear": 0.06, "shoulder": 0.07, "elbow": 0.045, "wrist": 0.04, "hip": 0.11,
    "knee": 0.06, "ankle": 0.05, "finger": 0.035, "toe": 0.04,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Pose:
    """Limb directions as (swing forward, spread outward) in degrees from hanging down, left before right."""

    verb: str
    arms: tuple[Angles, Angles]
    forearms: tuple[Angles, Angles]
    thighs: tuple[Angles, Angles] = ((2, 4), (-2, 4))
    shins: tuple[Angles, Angles] = ((0, 3), (-3, 3))
    lean_deg: float = 2.0
    leap: float = 0.0
    seated: bool = False
    hands_on_body: bool = False


POSES: tuple[Pose, ...] = (
    Pose(verb="standing", arms=((6, 12), (-4, 12)), forearms=((20, 6), (14, 6))),
    Pose(verb="waving", arms=((10, 96), (2, 14)), forearms=((10, 168), (18, 6))),
    Pose(verb="waving", arms=((4, 14), (20, 104)), forearms=((16, 8), (10, 162))),
    Pose(
        verb="walking", arms=((-24, 10), (26, 10)), forearms=((-2, 6), (48, 4)), thighs=((26, 3), (-20, 3)),
        shins=((18, 3), (-38, 3)), lean_deg=4,
    ),
    Pose(
        verb="running", arms=((-58, 14), (46, 10)), forearms=((32, 2), (128, -12)),
        thighs=((62, 3), (-34, 3)), shins=((-18, 3), (-96, 3)), lean_deg=14, leap=0.05,
    ),
    Pose(
        verb="sitting", arms=((22, 14), (26, 12)), forearms=((62, -8), (70, -6)), thighs=((84, 12), (80, 10)),
        shins=((2, 6), (12, 6)), lean_deg=0, seated=True,
    ),
    Pose(
        verb="dancing", arms=((8, 118), (6, 84)), forearms=((0, 158), (30, 112)), thighs=((12, 44), (4, 6)),
        shins=((-34, 20), (0, 4)), lean_deg=-3,
    ),
    Pose(
        verb="dancing", arms=((60, 30), (-30, 70)), forearms=((120, 10), (-20, 120)),
        thighs=((-36, 8), (14, 4)), shins=((-92, 8), (2, 4)), lean_deg=8,
    ),
    Pose(
        verb="jumping", arms=((10, 136), (10, 132)), forearms=((4, 160), (4, 152)),
        thighs=((16, 34), (10, 38)), shins=((-26, 22), (-36, 26)), leap=0.12,
    ),
    Pose(
        verb="posing", arms=((-12, 44), (-12, 46)), forearms=((24, -46), (24, -46)),
        thighs=((2, 10), (2, 10)), shins=((0, 8), (0, 8)), hands_on_body=True,
    ),
    Pose(
        verb="pointing", arms=((76, 18), (0, 14)), forearms=((88, 12), (20, 4)), thighs=((8, 8), (-8, 8)),
        shins=((0, 6), (-10, 6)),
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Person:
    """A person, what they sit on (drawn behind, not annotated), and words for the caption."""

    figure: Figure
    seat: Figure | None
    description: str


def make_person(rng: np.random.Generator) -> Person:
    """A person in a random pose and random clothes, the lowest sole on z = 0 unless leaping or seated."""
    pose = POSES[int(rng.integers(len(POSES)))]
    shirt_name = str(rng.choice(list(COLOURS)))
    skirted = bool(rng.random() < 0.4)
    coat_kind = _SHIRT_PATTERNS[int(rng.choice(3, p=(0.55, 0.25, 0.2)))]
    marks_rgb = COLOURS["red" if shirt_name == "white" else "white"]
    coat = Coat(kind=coat_kind, rgb=marks_rgb, period=0.07)
    skin = Material(rgb=SKIN[int(rng.integers(len(SKIN)))], grain=1.5)
    hair = Material(rgb=HAIR[int(rng.integers(len(HAIR)))], grain=8)
    shirt = Material(rgb=COLOURS[shirt_name], patterned=True)
    trousers = Material(rgb=TROUSERS[int(rng.integers(len(TROUSERS)))])
    long_sleeves, long_hair = bool(rng.random() < 0.5), bool(rng.random() < 0.5)

    builder = FigureBuilder()
    lean = np.deg2rad(pose.lean_deg + rng.uniform(-3, 3))

    def trunk(y: float, z: float) -> NDArray[np.float64]:
        return vector(np.sin(lean) * z, y, np.cos(lean) * z)

    joints: dict[str, NDArray[np.float64]] = {}
    for side, sign in (("left", 1.0), ("right", -1.0)):
        i = 0 if sign > 0 else 1
        leg_material = skin if skirted else trousers
        sleeve = shirt if long_sleeves else skin
        hip, shoulder = trunk(0.075 * sign, 0.0), trunk(0.135 * sign, 0.285)
        knee = hip + 0.235 * _direction(pose.thighs[i], sign, rng)
        ankle = knee + 0.235 * _direction(pose.shins[i], sign, rng)
        elbow = shoulder + 0.155 * _direction(pose.arms[i], sign, rng)
        wrist = elbow + 0.14 * _direction(pose.forearms[i], sign, rng)
        finger = wrist + 0.06 * (wrist - elbow) / np.linalg.norm(wrist - elbow)
        toe = ankle + vector(0.095, 0.02 * sign, -0.015)
        builder.chain((hip, knee), (0.074, 0.052), leg_material)
        builder.chain((knee, ankle), (0.05, 0.034), leg_material)
        builder.chain(
            (ankle, toe), (0.038, 0.032), Material(rgb=(70, 50, 46) if skirted else (232, 230, 226))
        )
        builder.chain((shoulder, (shoulder + elbow) / 2), (0.052, 0.048), shirt)
        builder.chain(((shoulder + elbow) / 2, elbow), (0.045 if long_sleeves else 0.038, 0.034), sleeve)
        builder.chain((elbow, wrist), (0.034, 0.026), sleeve)
        builder.chain((wrist, finger), (0.028, 0.022), skin)
        builder.chain(
            (trunk(0.035 * sign, 0.05), trunk(0.075 * sign, 0.25)), (0.086, 0.074), shirt, along=0.04
        )
        joints |= {
            f"{side}_shoulder": shoulder, f"{side}_elbow": elbow, f"{side}_wrist": wrist, f"{side}_hip": hip,
            f"{side}_knee": knee, f"{side}_ankle": ankle, f"{side}_finger": finger, f"{side}_toe": toe,
        }  # fmt: skip
    builder.chain((trunk(0, 0.01), trunk(0, 0.25)), (0.092, 0.088), shirt)
    if skirted:
        skirt = shirt if rng.random() < 0.5 else trousers
        _add_skirt(builder, joints, skirt)
        builder.chain((trunk(0.064, -0.01), trunk(-0.064, -0.01)), (0.095, 0.095), skirt)
    else:
        builder.chain((trunk(0.045, -0.02), trunk(-0.045, -0.02)), (0.088, 0.088), trousers)
    neck = trunk(0, 0.3)
    builder.chain((neck, neck + vector(np.sin(lean) * 0.06, 0, 0.06)), (0.042, 0.04), skin)
    joints |= _add_head(builder, neck, skin, hair, long_hair, rng)

    figure = builder.build(
        [joints[name] for name in KEYPOINT_NAMES_21],
        [_RADII[name.split("_")[-1]] for name in KEYPOINT_NAMES_21],
        contacts=[joints["left_wrist"], joints["right_wrist"]] if pose.hands_on_body else [],
        coat=coat,
    )
    lowest = float((figure.ends[..., 2] - figure.radii).min())
    shift = vector(0, 0, -lowest + pose.leap)
    figure = _moved(figure, shift)
    seat = None
    if pose.seated:
        seat_builder = FigureBuilder()
        top = max(float(shift[2]) - 0.21, 0.16)
        cushion = Material(rgb=COLOURS[str(rng.choice(list(COLOURS)))], grain=5)
        seat_builder.chain((vector(0, 0, top), vector(0, 0, 0.15)), (0.15, 0.16), cushion)
        seat = seat_builder.build()
    garment = "dress" if skirted else "shirt"
    looks = {"stripes": "striped ", "spots": "dotted "}.get(coat_kind, "")
    return Person(
        figure=figure, seat=seat, description=f"a person in a {looks}{shirt_name} {garment} {pose.verb}"
    )


def _direction(angles: Angles, sign: float, rng: np.random.Generator) -> NDArray[np.float64]:
    swing, spread = np.deg2rad(np.array(angles) + rng.normal(0, 5, 2))
    return vector(np.sin(swing) * np.cos(spread), sign * np.sin(spread), -np.cos(swing) * np.cos(spread))


def _moved(figure: Figure, shift: NDArray[np.float64]) -> Figure:
    return replace(
        figure,
        ends=figure.ends + shift,
        keypoints=figure.keypoints + shift,
        contacts=figure.contacts + shift,
    )


def _add_skirt(builder: FigureBuilder, joints: dict[str, NDArray[np.float64]], material: Material) -> None:
    waist = (joints["left_hip"] + joints["right_hip"]) / 2 + vector(0, 0, 0.03)
    hems = [0.28 * joints[f"{side}_hip"] + 0.72 * joints[f"{side}_knee"] for side in ("left", "right")]
    center, half = (hems[0] + hems[1]) / 2, (hems[0] - hems[1]) / 2
    # The hem goes around both thighs: pleats from the waist to points of an ellipse that holds them.
    for angle in np.arange(14) * (2 * np.pi / 14):
        wide = (1 + 0.06 / np.linalg.norm(half)) * half
        pleat = center + np.cos(angle) * wide + np.sin(angle) * vector(0.1, 0, 0)
        builder.chain((waist, pleat), (0.088, 0.036), material)


def _add_head(
    builder: FigureBuilder,
    neck: NDArray[np.float64],
    skin: Material,
    hair: Material,
    long_hair: bool,
    rng: np.random.Generator,
) -> dict[str, NDArray[np.float64]]:
    forward, left, up = head_axes(rng.uniform(-14, 10), rng.uniform(-28, 28))
    r = 0.098
    center = neck + vector(0.012, 0, 0.06 + 0.8 * r)
    chin = center + 0.16 * r * forward - 0.42 * r * up
    builder.chain((center, chin), (r, 0.68 * r), skin)
    cap = center - 0.2 * r * forward + 0.2 * r * up
    builder.chain((cap, cap - 0.3 * r * forward - 0.2 * r * up), (1.04 * r, 0.98 * r), hair)
    for side in (-0.5, 0.1, 0.55):
        fringe = center + r * (0.62 * forward + 0.68 * up + side * left)
        builder.ball(fringe, 0.3 * r, hair)
    if long_hair:
        nape = center - 0.55 * r * forward
        builder.chain((nape, nape - 1.9 * r * up - 0.15 * r * forward), (0.95 * r, 0.5 * r), hair)
    nose = center + r * (1.0 * forward - 0.14 * up)
    builder.ball(nose, 0.15 * r, Material(rgb=_darker(skin.rgb, 0.93), grain=0))
    joints = {"nose": nose + 0.1 * r * forward}
    for name, sign in (("left", 1.0), ("right", -1.0)):
        outward = sign * left
        gaze = 0.87 * forward + 0.14 * up + 0.4 * outward
        eye = center + r * 0.94 * gaze / np.linalg.norm(gaze)
        builder.ball(eye, 0.16 * r, Material(rgb=(250, 250, 250), grain=0))
        builder.ball(eye + 0.09 * r * forward, 0.115 * r, Material(rgb=(38, 28, 30), grain=0))
        brow = eye + 0.3 * r * up
        builder.chain((brow - 0.12 * r * outward, brow + 0.12 * r * outward), (0.045 * r, 0.035 * r), hair)
        cheek = center + r * (0.68 * forward - 0.34 * up + 0.44 * outward)
        builder.ball(cheek, 0.16 * r, Material(rgb=_blushing(skin.rgb), grain=0))
        ear = center + r * (0.98 * outward - 0.06 * up)
        builder.ball(ear, 0.22 * r, skin)
        joints |= {f"{name}_eye": eye, f"{name}_ear": ear}
    smile = ((-0.2, 0.5), (0.0, 0.57), (0.2, 0.5))
    mouth = [center + r * (0.93 * forward - drop * up + side * left) for side, drop in smile]
    builder.chain(mouth, (0.05 * r, 0.065 * r, 0.05 * r), Material(rgb=(150, 52, 56), grain=0))
    return joints


def _darker(rgb: Rgb, factor: float) -> Rgb:
    red, green, blue = (round(channel * factor) for channel in rgb)
    return red, green, blue


def _blushing(rgb: Rgb) -> Rgb:
    return min(255, rgb[0] + 4), round(rgb[1] * 0.86), round(rgb[2] * 0.86)

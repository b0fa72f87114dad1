"""Figures: animals, people and props as tapered capsules in 3D, seen by an orthographic camera.

Body axes: x forward, y to the figure's own left, z up; lengths in body units. View axes: x right, y down,
z towards the viewer. Because left and right are set once in body axes, every view of a figure has its sides
right.
Legend: C cones of a figure, K keypoints, M materials.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    # Start, end, radii at the two, distance along the chain at the two, material index.
    _Cone = tuple[NDArray[np.float64], NDArray[np.float64], tuple[float, float], tuple[float, float], int]

Rgb = tuple[int, int, int]
PatternKind = Literal["plain", "stripes", "spots", "rosettes", "patches", "mosaic"]


@dataclass(frozen=True, kw_only=True)
class Material:
    """The colour of a part, 0..255 RGB.

    `belly_rgb` tints what faces down, `patterned` lets the coat show, `grain` is the noise: 160 is as strong
    as the colour itself.
    """

    rgb: Rgb
    belly_rgb: Rgb | None = None
    patterned: bool = False
    grain: float = 3.0


@dataclass(frozen=True, kw_only=True)
class Coat:
    """The pattern on a figure's patterned parts; `period` is the distance of two marks in body units."""

    kind: PatternKind = "plain"
    rgb: Rgb = (0, 0, 0)
    period: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Figure:
    """C tapered capsules and K keypoints, in body axes or, after `view`, in view axes.

    Attributes:
        ends: (C,2,3) capsule ends.
        radii: (C,2) radii at the ends.
        along: (C,2) distance of the ends along their chain, the coordinate that stripes follow.
        material_index: (C,) index into `materials`.
        keypoints: (K,3), with (K,) `keypoint_radii`: how deep each may lie under the figure's own surface.
        contacts: (S,3) points where the figure touches itself.
    """

    ends: NDArray[np.float64]
    radii: NDArray[np.float64]
    along: NDArray[np.float64]
    material_index: NDArray[np.intp]
    materials: tuple[Material, ...]
    coat: Coat
    keypoints: NDArray[np.float64]
    keypoint_radii: NDArray[np.float64]
    contacts: NDArray[np.float64]

    def extent_xyxy(self) -> tuple[float, float, float, float]:
        """The box around the whole figure in the first two axes: meaningful after `view`."""
        low = (self.ends[..., :2] - self.radii[..., None]).min(axis=(0, 1))
        high = (self.ends[..., :2] + self.radii[..., None]).max(axis=(0, 1))
        return float(low[0]), float(low[1]), float(high[0]), float(high[1])


@dataclass
class FigureBuilder:
    """Collects the parts of a figure. Points are 3-vectors in body axes."""

    _cones: list[_Cone] = field(default_factory=list)
    _materials: list[Material] = field(default_factory=list)

    def chain(
        self,
        points: Sequence[NDArray[np.float64]],
        radii: Sequence[float],
        material: Material,
        along: float = 0.0,
    ) -> None:
        """Adds capsules from each point to the next one; `along` is where the stripes' coordinate starts."""
        if material not in self._materials:
            self._materials.append(material)
        index = self._materials.index(material)
        for i in range(len(points) - 1):
            length = float(np.linalg.norm(points[i + 1] - points[i]))
            ends_along = (along, along + length)
            self._cones.append((points[i], points[i + 1], (radii[i], radii[i + 1]), ends_along, index))
            along += length

    def ball(self, center: NDArray[np.float64], radius: float, material: Material) -> None:
        self.chain((center, center), (radius, radius), material)

    def build(
        self,
        keypoints: Sequence[NDArray[np.float64]] = (),
        keypoint_radii: Sequence[float] = (),
        contacts: Sequence[NDArray[np.float64]] = (),
        coat: Coat | None = None,
    ) -> Figure:
        return Figure(
            ends=np.array([(start, end) for start, end, *_ in self._cones], np.float64),
            radii=np.array([cone[2] for cone in self._cones], np.float64),
            along=np.array([cone[3] for cone in self._cones], np.float64),
            material_index=np.array([cone[4] for cone in self._cones], np.intp),
            materials=tuple(self._materials),
            coat=coat or Coat(),
            keypoints=np.array(keypoints, np.float64).reshape(-1, 3),
            keypoint_radii=np.array(keypoint_radii, np.float64),
            contacts=np.array(contacts, np.float64).reshape(-1, 3),
        )


def view(figure: Figure, *, yaw_deg: float, pitch_deg: float) -> Figure:
    """The figure in view axes.

    Yaw 0 faces right, 90 away, 180 left, -90 the viewer; pitch > 0 looks from above.
    """
    yaw, pitch = np.deg2rad([yaw_deg, pitch_deg])
    right = np.array([np.cos(yaw), -np.sin(yaw), 0.0])
    away = np.array([np.sin(yaw), np.cos(yaw), 0.0])
    up = np.array([0.0, 0.0, 1.0])
    down_on_screen = -(np.cos(pitch) * up + np.sin(pitch) * away)
    towards = np.sin(pitch) * up - np.cos(pitch) * away
    to_view = np.stack([right, down_on_screen, towards], axis=1)
    return replace(
        figure,
        ends=figure.ends @ to_view,
        keypoints=figure.keypoints @ to_view,
        contacts=figure.contacts @ to_view,
    )


def vector(x: float, y: float, z: float) -> NDArray[np.float64]:
    return np.array([x, y, z], np.float64)


def head_axes(pitch_deg: float, yaw_deg: float) -> tuple[NDArray[np.float64], ...]:
    """Unit vectors (forward, left, up) of a head; pitch > 0 looks up, yaw > 0 to the figure's left."""
    pitch, yaw = np.deg2rad([pitch_deg, yaw_deg])
    forward = vector(np.cos(pitch) * np.cos(yaw), np.cos(pitch) * np.sin(yaw), np.sin(pitch))
    left = vector(-np.sin(yaw), np.cos(yaw), 0.0)
    return forward, left, np.cross(forward, left)

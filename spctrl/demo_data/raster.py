"""Drawing one figure: per pixel the nearest capsule surface, its shading and its coat.

Shapes: h, w the window of the image that the figure covers. Pixel centres have integer coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from spctrl.demo_data.figures import Coat, Figure

    Plane = NDArray[np.float32]

TO_LIGHT = (-0.42, -0.62, 0.66)
_NEIGHBOURS = np.ones((3, 3), np.uint8)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A figure drawn alone.

    Attributes:
        rows, columns: the window in the image.
        rgb: (h,w,3) float32, 0..255.
        coverage: (h,w) float32, 0..1; the figure's own mask is coverage >= 0.5.
        towards: (h,w) float32, the surface's distance from the figure's origin towards the viewer, in pixels.
    """

    rows: slice
    columns: slice
    rgb: NDArray[np.float32]
    coverage: NDArray[np.float32]
    towards: NDArray[np.float32]


def smooth_noise(rng: np.random.Generator, size_wh: tuple[int, int], cell_wh: tuple[float, float]) -> Plane:
    """(H,W) float32 value noise of about unit variance, one random value per cell, interpolated smoothly."""
    columns = max(2, round(size_wh[0] / max(cell_wh[0], 1.0)) + 2)
    rows = max(2, round(size_wh[1] / max(cell_wh[1], 1.0)) + 2)
    grid = rng.standard_normal((rows, columns), dtype=np.float32)
    return np.asarray(cv2.resize(grid, size_wh, interpolation=cv2.INTER_CUBIC), np.float32)


def draw_figure(
    figure: Figure,
    *,
    px_per_unit: float,
    origin_xy: tuple[float, float],
    size_wh: tuple[int, int],
    rng: np.random.Generator,
) -> Layer | None:
    """Draws a figure in view axes, its origin at `origin_xy`; None where nothing of it is in the image."""
    left, top, right, bottom = (v * px_per_unit for v in figure.extent_xyxy())
    x0, y0 = max(0, int(origin_xy[0] + left) - 2), max(0, int(origin_xy[1] + top) - 2)
    x1, y1 = min(size_wh[0], int(origin_xy[0] + right) + 3), min(size_wh[1], int(origin_xy[1] + bottom) + 3)
    if x1 - x0 < 4 or y1 - y0 < 4:
        return None
    shift = np.array([origin_xy[0] - x0, origin_xy[1] - y0, 0.0])
    surface = _surface(
        figure, figure.ends * px_per_unit + shift, figure.radii * px_per_unit, (x1 - x0, y1 - y0)
    )
    if not surface.coverage.any():
        return None
    rgb = _shade(figure, surface, px_per_unit, rng)
    return Layer(
        rows=slice(y0, y1), columns=slice(x0, x1), rgb=rgb, coverage=surface.coverage, towards=surface.towards
    )


@dataclass(frozen=True)
class _Surface:
    towards: Plane
    coverage: Plane
    along: Plane
    material: NDArray[np.uint8]


def _surface(
    figure: Figure, ends_px: NDArray[np.float64], radii_px: NDArray[np.float64], size_wh: tuple[int, int]
) -> _Surface:
    shape = (size_wh[1], size_wh[0])
    nowhere = np.float32(ends_px[..., 2].min() - radii_px.max())
    surface = _Surface(
        towards=np.full(shape, nowhere, np.float32),
        coverage=np.zeros(shape, np.float32),
        along=np.zeros(shape, np.float32),
        material=np.zeros(shape, np.uint8),
    )
    for (start, end), (r0, r1), along, material in zip(
        ends_px, radii_px, figure.along, figure.material_index, strict=True
    ):
        _add_cone(surface, start, end, (r0, r1), along, int(material))
    return surface


def _add_cone(
    surface: _Surface,
    start: NDArray[np.float64],
    end: NDArray[np.float64],
    radii: tuple[float, float],
    along: NDArray[np.float64],
    material: int,
) -> None:
    height, width = surface.towards.shape
    margin = max(radii) + 1.0
    x0, x1 = max(0, int(min(start[0], end[0]) - margin)), min(width, int(max(start[0], end[0]) + margin) + 2)
    y0, y1 = max(0, int(min(start[1], end[1]) - margin)), min(height, int(max(start[1], end[1]) + margin) + 2)
    if x0 >= x1 or y0 >= y1:
        return
    x = np.arange(x0, x1, dtype=np.float32) - np.float32(start[0])
    y = (np.arange(y0, y1, dtype=np.float32) - np.float32(start[1]))[:, None]
    # A cone is the union of the spheres of radius r(t) around start + t * step, t in 0..1. Its outline at a
    # pixel is made by the sphere that reaches out furthest, its surface by the one nearest to the viewer.
    step_x, step_y, step_z = (np.float32(v) for v in end - start)
    radius, widening = np.float32(radii[0]), np.float32(radii[1] - radii[0])
    flat_squared = step_x * step_x + step_y * step_y
    along_step, radius_squared = x * step_x + y * step_y, x * x + y * y
    wider_end = np.float32(widening > 0)
    t: Plane | np.float32 = wider_end
    if flat_squared > widening * widening + 1e-3:
        aside = np.abs(x * step_y - y * step_x) * (widening / np.sqrt(flat_squared - widening * widening))
        t = _unit((along_step + aside) / flat_squared)
    distance_squared = radius_squared - 2 * t * along_step + t * t * flat_squared
    reach = radius + t * widening - np.sqrt(np.maximum(distance_squared, 0))
    coverage = _unit(reach + np.float32(0.5))

    # The squared height of sphere t over the pixel is a t^2 + b t + c; the highest point solves a quadratic.
    a = widening * widening - flat_squared
    a = a if abs(a) > 1e-3 else np.float32(-1e-3)
    b = 2 * (radius * widening + along_step)
    c = radius * radius - radius_squared
    t = wider_end
    if step_z * step_z > a:
        steep = step_z / np.sqrt(step_z * step_z - a)
        t = _unit((b + steep * np.sqrt(np.maximum(b * b - 4 * a * c, 0))) / (-2 * a))
    z = np.float32(start[2]) + t * step_z + np.sqrt(np.maximum((a * t + b) * t + c, 0))
    length = max(float(np.linalg.norm(end - start)), 1e-6)
    scale = np.float32((along[1] - along[0]) / length**2)
    u = np.float32(along[0]) + scale * (x * step_x + y * step_y + (z - np.float32(start[2])) * step_z)
    window = (slice(y0, y1), slice(x0, x1))
    # Neighbours of a chain share a sphere: without the tolerance rounding would pick between them per pixel.
    nearest = (coverage > 0) & (z > surface.towards[window] + np.float32(0.02))
    surface.coverage[window] = np.maximum(surface.coverage[window], coverage)
    np.copyto(surface.towards[window], z, where=nearest)
    np.copyto(surface.along[window], u, where=nearest)
    np.copyto(surface.material[window], np.uint8(material), where=nearest)


def _unit(values: Plane) -> Plane:
    # np.clip costs several times as much on the small windows of most cones.
    return np.minimum(np.maximum(values, np.float32(0)), np.float32(1))


def _shade(
    figure: Figure, surface: _Surface, px_per_unit: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    towards = cv2.GaussianBlur(surface.towards, (3, 3), 0)
    slope_x = cv2.Sobel(towards, cv2.CV_32F, 1, 0, ksize=3, scale=1 / 8)
    slope_y = cv2.Sobel(towards, cv2.CV_32F, 0, 1, ksize=3, scale=1 / 8)
    facing = 1 / np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
    light = (TO_LIGHT[2] - TO_LIGHT[0] * slope_x - TO_LIGHT[1] * slope_y) * facing
    creases = np.clip((cv2.dilate(towards, _NEIGHBOURS) - towards) / (0.14 * px_per_unit), 0, 1)
    # Far limbs are darker, so that near and far side can be told apart.
    inside = surface.coverage >= 0.5
    nearest, middle = float(towards[inside].max()), float(np.median(towards[inside]))
    remoteness = np.clip((middle - towards) / max(nearest - middle, 0.2 * px_per_unit), 0, 1)
    shade = (0.68 + 0.42 * light) * (0.8 + 0.2 * facing) * (1 - 0.45 * creases) * (1 - 0.3 * remoteness)

    materials = figure.materials
    palette = np.array([m.rgb for m in materials], np.float32)
    belly = np.array([m.belly_rgb or m.rgb for m in materials], np.float32)
    patterned = np.array([m.patterned for m in materials], np.float32)
    grain = np.array([m.grain for m in materials], np.float32)
    index = surface.material
    rgb = palette[index]
    downwards = np.clip((-slope_y * facing - 0.1) * 2.0, 0, 1)
    if any(m.belly_rgb for m in materials):
        rgb += (belly - palette)[index] * downwards[..., None]
    if figure.coat.kind != "plain" and patterned.any():
        amount = (
            _pattern(figure.coat, surface.along, px_per_unit, rng) * patterned[index] * (1 - 0.5 * downwards)
        )
        rgb += (np.array(figure.coat.rgb, np.float32) - rgb) * amount[..., None]
    size_wh = (rgb.shape[1], rgb.shape[0])
    shade *= 1 + smooth_noise(rng, size_wh, (2.0, 4.0)) * (grain / 160)[index]
    rgb *= shade[..., None]
    # Where two surfaces or materials meet, the pixel is shared: soften it as the outline is softened.
    shared = (creases > 0.1) | (cv2.dilate(index, _NEIGHBOURS) != cv2.erode(index, _NEIGHBOURS))
    rgb[shared] = 0.35 * rgb[shared] + 0.65 * cv2.blur(rgb, (3, 3))[shared]
    return np.minimum(rgb, np.float32(255))


def _pattern(coat: Coat, along: Plane, px_per_unit: float, rng: np.random.Generator) -> Plane:
    """(h,w) float32 strength of the coat's marks, 0..1."""
    size_wh = (along.shape[1], along.shape[0])
    period_px = max(coat.period * px_per_unit, 3.0)
    if coat.kind == "stripes":
        waves = smooth_noise(rng, size_wh, (2.5 * period_px, 2.5 * period_px))
        wave = np.sin(along * (2 * np.pi / coat.period) + 0.9 * waves)
        return np.asarray(0.5 + 0.5 * np.tanh(3 * wave - 0.9), np.float32)
    if coat.kind == "patches":
        return np.asarray(
            np.clip(smooth_noise(rng, size_wh, (period_px, period_px)) * 4 - 0.4, 0, 1), np.float32
        )
    marks = np.zeros(along.shape, np.uint8)
    shift_bits = 4
    for row in range(int(size_wh[1] / period_px) + 2):
        for column in range(int(size_wh[0] / period_px) + 2):
            jitter = rng.uniform(-0.22, 0.22, 4)
            center = (np.array([column + 0.5 * (row % 2), row]) + jitter[:2]) * period_px
            if coat.kind == "mosaic":
                angles = np.arange(6) * (np.pi / 3) + jitter[2]
                corners = center + 0.52 * period_px * np.stack([np.cos(angles), np.sin(angles)], axis=1)
                cv2.fillConvexPoly(
                    marks, np.round(corners * 16).astype(np.int32), 255, cv2.LINE_AA, shift_bits
                )
                continue
            radius = period_px * (0.27 + 0.3 * jitter[2])
            thickness = max(1, round(0.13 * period_px)) if coat.kind == "rosettes" else -1
            at = (round(float(center[0]) * 16), round(float(center[1]) * 16))
            cv2.circle(marks, at, round(radius * 16), 255, thickness, cv2.LINE_AA, shift_bits)
    return np.asarray(marks / np.float32(255), np.float32)

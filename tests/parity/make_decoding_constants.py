"""Write tests/parity/decoding.npz: what mmpose 1.3.2's codecs find in special heatmaps.

    pip download --no-deps mmpose==1.3.2 --dest build/mmpose && unzip build/mmpose/*.whl -d build/mmpose
    .venv/bin/python tests/parity/make_decoding_constants.py build/mmpose

Only two files of mmpose are run, which need no mmcv. A keypoint is NaN where mmpose gives no number or fails, or where
a change of the heatmap by a millionth moves it: there rounding errors decide.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

CONSTANTS = Path(__file__).with_name("decoding.npz")
STEPS = 64
"""Heatmaps are kept as whole numbers of this part."""
INSTANCES, KEYPOINTS, HEIGHT, WIDTH = 12, 6, 20, 16
BLUR_KERNEL = 11
SMALL_CHANGE, SAME_CELLS = 1e-6, 1e-3

Maps = NDArray[np.float32]


def main(folder: Path) -> None:
    post_processing, refinement = load_utilities(folder)

    def decoded(maps: Maps, codec: str) -> tuple[NDArray[Any], NDArray[Any]]:
        maps = maps.copy()
        keypoints, scores = post_processing.get_heatmap_maximum(maps)
        if codec == "msra":
            return refinement.refine_keypoints(keypoints[None], maps)[0], scores
        try:
            return refinement.refine_keypoints_dark_udp(keypoints[None], maps, BLUR_KERNEL)[0], scores
        except np.linalg.LinAlgError:  # a singular Hessian
            return np.full_like(keypoints, np.nan), scores

    rng = np.random.default_rng(0)
    kept: dict[str, NDArray[Any]] = {}
    for name, make in KINDS.items():
        levels = np.clip(np.round(make(rng) * STEPS), -127, 127).astype(np.int8)
        kept[f"{name}_levels"] = levels
        maps = levels.astype(np.float32) / STEPS
        for codec in ("msra", "udp"):
            found = [decoded(each, codec) for each in maps]
            keypoints = np.stack([each for each, _ in found])
            changed = maps * (1 + SMALL_CHANGE * rng.standard_normal((*maps.shape[:2], 1, 1))).astype(
                np.float32
            )
            again = np.stack([decoded(each, codec)[0] for each in changed])
            stable = np.abs(keypoints - again).max(axis=-1, keepdims=True) < SAME_CELLS
            kept[f"{name}_{codec}"] = np.where(stable, keypoints, np.nan).astype(np.float32)
            kept[f"{name}_scores"] = np.stack([scores for _, scores in found])
    np.savez_compressed(CONSTANTS, **kept)
    print(f"{CONSTANTS}: {CONSTANTS.stat().st_size / 1024:.0f} KB")


def load_utilities(folder: Path) -> tuple[Any, Any]:
    """mmpose's post_processing.py and refinement.py, without the packages that they are in."""
    package = types.ModuleType("codec_utils")
    package.__path__ = [str(folder / "mmpose/codecs/utils")]
    sys.modules[package.__name__] = package
    return tuple(importlib.import_module(f"codec_utils.{name}") for name in ("post_processing", "refinement"))  # type: ignore[return-value]


SHAPE = (INSTANCES, KEYPOINTS, HEIGHT, WIDTH)


def peaks(rng: np.random.Generator) -> Maps:
    """A Gaussian of height 1 in each, some centres up to 2 cells outside."""
    centres = rng.uniform((-2, -2), (WIDTH + 2, HEIGHT + 2), (INSTANCES, KEYPOINTS, 2))
    return gaussians(centres)


def gaussians(centres: NDArray[Any]) -> Maps:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    x, y = centres[..., 0, None, None], centres[..., 1, None, None]
    return np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 8).astype(np.float32)


def at_borders(rng: np.random.Generator) -> Maps:
    """Maxima in corners and in the two outermost rows and columns."""
    x = rng.choice([0, 1, 2, WIDTH - 3, WIDTH - 2, WIDTH - 1], (INSTANCES, KEYPOINTS))
    y = rng.choice([0, 1, 2, HEIGHT - 3, HEIGHT - 2, HEIGHT - 1], (INSTANCES, KEYPOINTS))
    return gaussians(np.stack([x, y], axis=-1))


def noise(rng: np.random.Generator) -> Maps:
    smooth = [
        cv2.GaussianBlur(each, (0, 0), 1.5)
        for each in rng.standard_normal((INSTANCES * KEYPOINTS, *SHAPE[2:]))
    ]
    return 2 * np.reshape(smooth, SHAPE).astype(np.float32)


def some(bad: Callable[[np.random.Generator], Any]) -> Callable[[np.random.Generator], Maps]:
    """Half of the maps are special, and the others' maxima are anywhere; so all orders of the two occur."""

    def make(rng: np.random.Generator) -> Maps:
        good = np.where(
            rng.random((INSTANCES, 1, 1, 1)) < 0.5, at_borders(rng), peaks(rng) + 0.1 * noise(rng)
        )
        return np.where(rng.random((INSTANCES, KEYPOINTS, 1, 1)) < 0.5, bad(rng), good)

    return make


KINDS: dict[str, Callable[[np.random.Generator], Any]] = {
    "peaks": peaks,
    "borders": at_borders,
    "noise": noise,
    "plateaus": lambda rng: np.minimum(peaks(rng), 0.5),
    "ties": lambda rng: np.round(3 * peaks(rng)) / 3,
    "low": lambda rng: np.round(3 * peaks(rng)) / STEPS,
    "spikes": lambda rng: np.where(rng.random(SHAPE) < 0.002, 0.1, -1.0),
    "flip_average": lambda rng: (peaks(rng) + peaks(rng)) / 2 - 0.2,
    "negative": some(lambda rng: -0.1 - np.abs(noise(rng))),
    "negative_constant": some(lambda rng: np.full(SHAPE, -0.5)),
    "all_negative_constant": lambda rng: np.full(SHAPE, -0.5),
    "zero_maximum": some(lambda rng: -np.abs(noise(rng)) * (rng.random(SHAPE) < 0.98)),
    "zeros": some(lambda rng: np.zeros(SHAPE)),
}

if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""The Frechet distance at Inception's 2,048 features against a matrix square root, and one bootstrap resample of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import Report, interleaved
from eval.fid import ResampledFid, Statistics, frechet_distance, statistics

FEATURES, QUICK_FEATURES = 2048, 256
REPEATS, QUICK_REPEATS = 3, 1
VALIDATION_IMAGES = 995
"""Of AP-10K."""
EXACT = 1e-9

OURS, SQRTM = "Cholesky, eigvalsh (this project)", "scipy.linalg.sqrtm"


def run(report: Report) -> None:
    F = QUICK_FEATURES if report.quick else FEATURES
    first, second = (statistics(features(2 * F, F, seed)) for seed in (0, 1))
    ways: dict[str, Callable[[], float]] = {
        OURS: lambda: frechet_distance(first, second),
        SQRTM: lambda: _by_square_root(first, second),
    }
    values = {name: way() for name, way in ways.items()}
    apart = abs(values[OURS] / values[SQRTM] - 1)
    if apart > EXACT:
        raise RuntimeError(f"the distance is {apart:g} (relative) from scipy's, expected at most {EXACT:g}")
    repeats = QUICK_REPEATS if report.quick else REPEATS
    costs = interleaved(ways, repeats)
    base_s = costs[SQRTM].wall_s
    report.table(
        f"Frechet distance, {F:,} features, medians of {repeats} turns",
        ("", "wall s", "CPU s", "times sqrtm", "relative to sqrtm's value"),
        [
            (
                name,
                f"{cost.wall_s:.3f}",
                f"{cost.cpu_s:.3f}",
                f"{base_s / cost.wall_s:.1f}",
                f"{values[name] / values[SQRTM] - 1:+.1e}",
            )
            for name, cost in costs.items()
        ],
        f"From float64 statistics of {2 * F:,} images each.",
    )
    _resample(report, F, repeats)
    report.target("scipy.linalg.sqrtm / ours, wall time", base_s / costs[OURS].wall_s, at_least=8)


def _resample(report: Report, F: int, repeats: int) -> None:
    """What one bootstrap resample of a validation split costs."""
    real, fake = features(VALIDATION_IMAGES, F, 2), features(VALIDATION_IMAGES, F, 3)
    resampled = ResampledFid(real, fake)
    weights = np.bincount(np.random.default_rng(0).integers(0, len(real), len(real)), minlength=len(real))
    drawn = np.repeat(np.arange(len(real)), weights)
    ways: dict[str, Callable[[], float]] = {
        "from inner products": lambda: resampled(weights),
        "from statistics": lambda: frechet_distance(statistics(real[drawn]), statistics(fake[drawn])),
    }
    values = [way() for way in ways.values()]
    costs = interleaved(ways, repeats)
    report.table(
        f"One bootstrap resample of FID, {len(real)} images, {F:,} features, medians of {repeats} turns",
        ("", "wall s", "CPU s", "FID"),
        [
            (name, f"{cost.wall_s:.3f}", f"{cost.cpu_s:.3f}", f"{value:.9g}")
            for (name, cost), value in zip(costs.items(), values, strict=True)
        ],
    )


def features(count: int, F: int, seed: int) -> NDArray[np.float64]:
    """(N, F) correlated features with a spectrum that falls as Inception's does, all positive."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(9 + seed).normal(size=(F, F)) / np.sqrt(F)
    scales = 1 / np.sqrt(1 + np.arange(F))
    return np.asarray(np.abs((rng.normal(size=(count, F)) * scales) @ mix + 0.01 * seed))


def _by_square_root(first: Statistics, second: Statistics) -> float:
    from scipy.linalg import sqrtm

    root = np.asarray(sqrtm(first.covariance @ second.covariance)).real
    offset = first.mean - second.mean
    return float(offset @ offset + np.trace(first.covariance + second.covariance - 2 * root))

"""The Frechet distance at Inception's 2,048 features against a matrix square root, and subsamples of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import Report, interleaved
from eval.bootstrap import subsamples
from eval.fid import Statistics, frechet_distance, statistics
from eval.fid_subsets import PairedFid

FEATURES, QUICK_FEATURES = 2048, 256
REPEATS, QUICK_REPEATS = 3, 1
SUBSAMPLES = 300
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
    _subsamples(report, F, repeats)
    report.target("scipy.linalg.sqrtm / ours, wall time", base_s / costs[OURS].wall_s, at_least=8)


def _subsamples(report: Report, F: int, repeats: int) -> None:
    """What the interval of a validation split's FID costs."""
    real, fake = features(VALIDATION_IMAGES, F, 2), features(VALIDATION_IMAGES, F, 3)
    paired, every = PairedFid(real, fake), np.arange(VALIDATION_IMAGES)
    left_out = subsamples(VALIDATION_IMAGES, SUBSAMPLES)
    of_one = np.delete(every, left_out[0])
    ways: dict[str, Callable[[], float]] = {
        f"{SUBSAMPLES} at once": lambda: float(paired.without(left_out)[0]),
        "one, from inner products": lambda: paired.of(of_one),
        "one, from statistics": lambda: frechet_distance(statistics(real[of_one]), statistics(fake[of_one])),
    }
    values = [way() for way in ways.values()]
    costs = interleaved(ways, repeats)
    together, alone, by_statistics = (cost.wall_s for cost in costs.values())
    report.table(
        f"Subsamples of FID, {VALIDATION_IMAGES} images, {F:,} features, medians of {repeats} turns",
        ("", "wall s", "CPU s", "FID of the first"),
        [
            (name, f"{cost.wall_s:.3f}", f"{cost.cpu_s:.3f}", f"{value:.6g}")
            for (name, cost), value in zip(costs.items(), values, strict=True)
        ],
        f"{SUBSAMPLES} one by one take {SUBSAMPLES * alone:.0f} s, and {SUBSAMPLES * by_statistics:.0f} s.",
    )
    report.target(f"{SUBSAMPLES} subsamples of FID, seconds", together, at_most=10)
    report.target(f"{SUBSAMPLES} subsamples one by one / at once", SUBSAMPLES * alone / together, at_least=3)


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

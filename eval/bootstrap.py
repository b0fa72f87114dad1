"""Bootstrap over images: how far a number, or the difference of two methods, may be off by the choice of images.

A resample of I images is a vector of how often each was drawn. A metric that can be computed for such weights is
computed for each of R resamples; percentiles of the results are the interval (Efron and Tibshirani, "An Introduction to
the Bootstrap", 1993, section 13.3). With one seed, all methods see the same resamples of the same images: their
differences are paired, and most of what the choice of images does to both cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Statistic = Callable[[NDArray[np.int64]], ArrayLike]
"""Numbers of any one shape for weights (I,)."""

RESAMPLES = 1000
LEVEL = 0.95


class Interval(NamedTuple):
    """A number and where it may lie; ``low`` and ``high`` are NaN where no resample gave a number."""

    value: float
    low: float
    high: float


def resamples(num_images: int, count: int = RESAMPLES, seed: int = 0) -> Iterator[NDArray[np.int64]]:
    """(I,) how often each image was drawn, for each resample; the same ones for the same arguments.

    Raises:
        ValueError: there is no image, or no resample is asked for.
    """
    if num_images < 1 or count < 1:
        raise ValueError(f"expected images and resamples, found {num_images} and {count}")
    generator = np.random.default_rng(seed)
    for _ in range(count):
        yield np.bincount(generator.integers(0, num_images, num_images), minlength=num_images)


def bootstrap(statistic: Statistic, num_images: int, count: int = RESAMPLES, seed: int = 0) -> Floats:
    """(R, ...) the statistic of each resample."""
    return np.stack([np.asarray(statistic(each), np.float64) for each in resamples(num_images, count, seed)])


def interval(value: float, samples: Floats, level: float = LEVEL, *, centred: bool = False) -> Interval:
    """Percentile interval of one number.

    Args:
        value: of all images.
        samples: (R,) of the resamples; NaN where one left nothing to measure.
        level: share of the resamples inside.
        centred: shift the samples so that their mean is ``value``. For numbers that depend on how many different images
            there are, such as FID: a resample has fewer, so that all its values are too high.

    Raises:
        ValueError: the samples are not one number for each resample, or the level is not between 0 and 1.
    """
    if samples.ndim != 1 or not 0 < level < 1:
        raise ValueError(
            f"expected (R,) samples and a level between 0 and 1, found shape {samples.shape}, {level}"
        )
    samples = samples[~np.isnan(samples)]
    if not len(samples):
        return Interval(value, float("nan"), float("nan"))
    if centred:
        samples = samples + (value - samples.mean())
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def difference(
    value: float,
    samples: Floats,
    other_value: float,
    other_samples: Floats,
    level: float = LEVEL,
    *,
    centred: bool = False,
) -> Interval:
    """Paired interval of ``value - other_value``; 0 outside it means that the methods differ.

    Both must come from the same images and the same ``count`` and ``seed``.

    Raises:
        ValueError: not as many samples of one as of the other.
    """
    if samples.shape != other_samples.shape:
        raise ValueError(
            f"expected samples of the same resamples, found {samples.shape} and {other_samples.shape}"
        )
    return interval(value - other_value, samples - other_samples, level, centred=centred)


def weighted_mean(values: ArrayLike, weights: NDArray[Any]) -> float:
    """Mean of (I,) values, image i counted ``weights[i]`` times; NaN values do not count."""
    values = np.asarray(values, np.float64)
    valid = ~np.isnan(values)
    total = weights[valid].sum()
    return float(values[valid] @ weights[valid] / total) if total else float("nan")

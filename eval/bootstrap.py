"""Resampling of images: how far a number, or the difference of two methods, may be off by the choice of images.

A resample of I images is a vector of how often each was taken. A metric that can be computed for such weights is
computed for each of R resamples, and percentiles of the results are the interval (Efron and Tibshirani, "An
Introduction to the Bootstrap", 1993, section 13.3). With one seed, all methods see the same resamples of the same
images: their differences are paired, and most of what the choice of images does to both cancels.

Percentile intervals of few images are too narrow. They are widened by taking percentiles further out: the expanded
percentile interval (Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 69, 2015).

Legend: I images, R resamples, B of them in one block, C groups of images over which a number is a mean.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln, ndtr, ndtri, stdtrit, xlog1py, xlogy

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Weights = NDArray[Any]
Statistic = Callable[[Integers], ArrayLike]
"""Numbers (B, ...) for weights (B, I)."""

RESAMPLES = 1000
LEVEL = 0.95
MIN_IMAGES = 5
"""Of fewer images there is no interval: one image has no spread at all, and the spread of two to four is chance."""
FEW_IMAGES = 10
"""Of fewer, neither pose AP nor KID can be trusted; nor can a mean over species with fewer than ``MIN_IMAGES`` each."""
LEFT_OUT_SHARE = 0.1
"""Of the images, that a subsample leaves out."""

_BLOCK_NUMBERS = 2**17


class Interval(NamedTuple):
    """A number and where it may lie; ``low`` and ``high`` are NaN where there is no interval."""

    value: float
    low: float
    high: float


class Support(NamedTuple):
    """The images that a number is based on.

    Attributes:
        images: how many.
        groups: (C,) images of each group, all above 0, where the number is a mean over groups such as species; an image
            may be in several. One group of all images for any other number.
        num_resampled: I, how many images were resampled, also those that the number does not depend on.
    """

    images: int
    groups: tuple[int, ...]
    num_resampled: int

    @property
    def few(self) -> bool:
        """Whether neither the number nor its interval can be trusted."""
        return self.images < FEW_IMAGES or sum(self.groups) < MIN_IMAGES * len(self.groups)


def support(members: NDArray[np.bool_]) -> Support:
    """Support of a mean over C groups, from (I, C) whether an image is in a group; (I,) of a single group."""
    members = members[:, None] if members.ndim == 1 else members
    groups = members.sum(axis=0)
    return Support(int(members.any(axis=1).sum()), tuple(groups[groups > 0].tolist()), len(members))


def resamples(num_images: int, count: int = RESAMPLES, seed: int = 0) -> Iterator[Integers]:
    """(I,) how often each image was taken, for each resample; the same ones for the same arguments.

    Raises:
        ValueError: there is no image, or no resample is asked for.
    """
    _check_counts(num_images, count)
    generator = np.random.default_rng(seed)
    for _ in range(count):
        yield np.bincount(generator.integers(0, num_images, num_images), minlength=num_images)


def subsamples(num_images: int, count: int, seed: int = 0) -> Integers:
    """(R, D) ascending indices of the images that each subsample leaves out: a tenth of them, at least one.

    Raises:
        ValueError: there are not two images, or no subsample is asked for.
    """
    _check_counts(num_images - 1, count)
    generator = np.random.default_rng(seed)
    out = max(1, round(LEFT_OUT_SHARE * num_images))
    return np.stack([np.sort(generator.permutation(num_images)[:out]) for _ in range(count)])


def _check_counts(num_images: int, count: int) -> None:
    if num_images < 1 or count < 1:
        raise ValueError(f"expected images and resamples, found {num_images} and {count}")


def bootstrap(
    statistic: Statistic, num_images: int, count: int = RESAMPLES, seed: int = 0, *, size: int = 0
) -> Floats:
    """(R, ...) the statistic of each resample.

    Args:
        statistic: of some resamples at once.
        num_images: I.
        count: R.
        seed: of the resamples.
        size: numbers that the statistic has in memory for a resample, if more than I: so that blocks fit into caches.
    """
    block = max(1, _BLOCK_NUMBERS // max(size, num_images))
    weights = resamples(num_images, count, seed)
    blocks = iter(lambda: list(itertools.islice(weights, block)), [])
    return np.concatenate([np.asarray(statistic(np.stack(each)), np.float64) for each in blocks])


def rescaled(value: float, samples: Floats, num_images: int, left_out: int) -> Floats:
    """Values of subsamples as if they were of resamples: their deviations from their mean, added to ``value``.

    A subsample has most images in common with all images, so that it deviates less than new images would: by
    sqrt(D / (I - D)) for a mean, if it leaves out D of I. For numbers that depend on how many different images there
    are, such as FID: resamples repeat images, and all their values are too high.
    """
    return np.asarray(
        value + (samples - samples.mean()) * math.sqrt((num_images - left_out) / left_out), np.float64
    )


class FewImages(NamedTuple):
    """How an interval from resamples must be wider to hold what it claims.

    Attributes:
        spread: true standard deviation over that of resamples, which is too small within small groups.
        degrees_of_freedom: of the standard deviation, which is itself an estimate.
    """

    spread: float
    degrees_of_freedom: float

    def expansion(self, tail: float = (1 - LEVEL) / 2) -> float:
        """Factor of the width of an interval that leaves out ``tail`` on each side; near 1 for many images."""
        return float(self.spread * stdtrit(self.degrees_of_freedom, tail) / ndtri(tail))


def few_images(of: Support) -> FewImages:
    """What the number of images does to an interval.

    Within a group of m images the deviations of resamples are too small by sqrt((m - 1) / m). Of a mean over groups,
    they have a random number of images of each, often none of a group that has one or two. The factor is exact for
    groups of equal variances and means; if the means are different, which groups are there adds to the true deviation
    and to that of resamples alike.
    """
    m = np.asarray(of.groups)
    mean_inverse, present = _resampled_counts(m, of.num_resampled)
    of_resamples = ((m - 1) / m * mean_inverse + present * (1 - present) / m).sum() / present.sum() ** 2
    true = (1 / m).sum() / len(m) ** 2
    spread = max(1.0, math.sqrt(true / of_resamples)) if of_resamples else math.inf
    return FewImages(spread, float(max(m.sum() - len(m), 1)))


def _resampled_counts(m: Integers, num_images: int) -> tuple[Floats, Floats]:
    """(C,) expected inverse of a group's images in a resample, 0 for none, and chance that there is any.

    The number of images is binomial: ``num_images`` are taken, each with a chance of m / ``num_images``.
    """
    k = np.arange(1, num_images + 1)
    sizes, inverse = np.unique(m, return_inverse=True)
    share = sizes[:, None] / num_images
    log_chance = gammaln(num_images + 1) - gammaln(k + 1) - gammaln(num_images - k + 1)
    chance = np.exp(log_chance + xlogy(k, share) + xlog1py(num_images - k, -share))
    return (chance / k).sum(axis=1)[inverse], chance.sum(axis=1)[inverse]


def interval(value: float, samples: Floats, level: float = LEVEL, *, expanded: float = 1.0) -> Interval:
    """Percentile interval of one number.

    Args:
        value: of all images.
        samples: (R,) of the resamples; NaN where one left nothing to measure.
        level: share of the resamples inside, before it is expanded.
        expanded: by how much the interval is wider (see ``FewImages``), if the samples are normally distributed.

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
    tail = ndtr(ndtri((1 - level) / 2) * expanded)
    # Weibull's plotting positions are the unbiased ones: numpy's default of 100 resamples has a level of 93 %.
    low, high = np.quantile(samples, [tail, 1 - tail], method="weibull")
    return Interval(value, float(low), float(high))


def normal_interval(
    value: float, samples: Floats, level: float = LEVEL, *, expanded: float = 1.0
) -> Interval:
    """Interval of one number from the standard deviation of samples (R,), for such as ``rescaled`` ones.

    Percentiles of subsamples are less sure: the spread of FID grows with its value, and few images have few subsamples.
    """
    half_width = float(samples.std(ddof=1) * ndtri((1 + level) / 2) * expanded)
    return Interval(value, value - half_width, value + half_width)


def weighted_mean(values: ArrayLike, weights: Weights) -> Floats:
    """(...) means of (I,) values, image i counted ``weights[..., i]`` times; NaN values do not count."""
    values = np.asarray(values, np.float64)
    valid = ~np.isnan(values)
    used = np.asarray(weights)[..., valid]
    total = np.asarray(used.sum(axis=-1), np.float64)
    found = np.divide(used @ values[valid], total, out=np.full_like(total, np.nan), where=total > 0)
    return np.asarray(found)

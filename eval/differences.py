"""Which methods differ: paired differences of all pairs, with intervals that hold for all of them together.

Where many pairs are compared, each with an interval of its own level, some differ by chance: of 7 methods that are the
same, 21 pairs, in every second table. So the intervals of a metric are as wide as the largest deviation of any pair
requires (the max-T procedure of Westfall and Young, "Resampling-Based Multiple Testing", 1993): in 95 % of the tables
all of them contain the true differences. The methods share their resamples, which show which pairs deviate together.

Legend: R resamples, P pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr

from eval.bootstrap import MIN_IMAGES, FewImages, Floats
from eval.scores import Score, Scores

NO_INTERVAL = f"no interval: fewer than {MIN_IMAGES} images, or no resample changes them"
_ROUNDING = 1e-12
"""Relative to the values; what varies less does not vary."""


class Difference(NamedTuple):
    """How much more one method has of a metric than another, on the same images and resamples.

    Attributes:
        metric: its name.
        method, other: their names.
        value: of ``method`` less that of ``other``.
        low, high: interval that holds for all pairs of the metric together; NaN where there is none.
        pairs: how many have an interval.
        reason: why there is none; empty where there is one.
    """

    metric: str
    method: str
    other: str
    value: float
    low: float
    high: float
    pairs: int
    reason: str = ""

    @property
    def differ(self) -> bool:
        """Whether the interval is without 0."""
        return self.low > 0 or self.high < 0


def differences(
    metric: str, of_methods: Mapping[str, Scores], level: float, reference: str = ""
) -> list[Difference]:
    """Differences of all pairs of methods that have a value and were measured on the same images.

    Args:
        metric: of which.
        of_methods: scores that have the metric, by method.
        level: of all intervals of the metric together.
        reference: subtract this method from each other one, and compare no other pairs: fewer, so that smaller
            differences show.
    """
    numbers = {method: _overall(scores, metric) for method, scores in of_methods.items()}
    values = {
        (method, other): numbers[method].value - numbers[other].value
        for method, other in _pairs(list(of_methods), reference)
        if np.array_equal(of_methods[method].image_ids, of_methods[other].image_ids)
    }
    values = {pair: value for pair, value in values.items() if not np.isnan(value)}
    compared = [pair for pair in values if _have_interval(*(numbers[method] for method in pair))]
    half_widths: dict[tuple[str, str], float] = {}
    if compared:
        samples = [
            of_methods[method].samples[metric] - of_methods[other].samples[metric]
            for method, other in compared
        ]
        negligible = _ROUNDING * max(abs(numbers[method].value) for pair in compared for method in pair)
        quantile, spread = largest_deviation(np.stack(samples, axis=1), level, negligible=negligible)
        for pair, deviation in zip(compared, spread.tolist(), strict=True):
            half_widths[pair] = deviation and quantile * deviation * max(
                _few_images(numbers[method]).expansion(float(ndtr(-quantile))) for method in pair
            )
            if abs(values[pair]) <= negligible:
                values[pair] = 0.0
    found = []
    for pair, value in values.items():
        half_width = half_widths.get(pair, np.nan)
        reason = NO_INTERVAL if np.isnan(half_width) else ""
        found.append(
            Difference(metric, *pair, value, value - half_width, value + half_width, len(compared), reason)
        )
    return found


def _have_interval(one: Score, other: Score) -> bool:
    """Whether both are of enough images, and resamples change one of them: the other may be right everywhere."""
    enough = min(one.images, other.images) >= MIN_IMAGES
    return enough and not (np.isnan(one.low) and np.isnan(other.low))


def _pairs(methods: Sequence[str], reference: str) -> list[tuple[str, str]]:
    if reference:
        return [(method, reference) for method in methods if method != reference and reference in methods]
    return list(itertools.combinations(methods, 2))


def largest_deviation(samples: Floats, level: float, *, negligible: float = 0.0) -> tuple[float, Floats]:
    """Quantile of the largest absolute deviation of several numbers, in their standard deviations.

    Args:
        samples: (R, P) of the resamples; one that has a NaN does not count.
        level: of the quantile.
        negligible: a standard deviation up to this is 0.

    Returns:
        It, and (P,) the standard deviations; NaN where no two resamples count.
    """
    samples = samples[~np.isnan(samples).any(axis=1)]
    if len(samples) < 2:
        return np.nan, np.full(samples.shape[1], np.nan)
    deviations = samples - samples.mean(axis=0)
    spread = deviations.std(axis=0, ddof=1)
    varies = spread > negligible
    if not varies.any():
        return 0.0, np.zeros(len(spread))
    largest = np.abs(deviations[:, varies] / spread[varies]).max(axis=1)
    return float(np.quantile(largest, level, method="weibull")), np.where(varies, spread, 0.0)


def _few_images(score: Score) -> FewImages:
    return FewImages(score.spread, score.degrees_of_freedom)


def _overall(scores: Scores, metric: str) -> Score:
    return next(row for row in scores.rows if row.metric == metric and not row.kind)

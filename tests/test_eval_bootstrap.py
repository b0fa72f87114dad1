"""Resamples, subsamples, and what the intervals from them hold."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from eval.bootstrap import (
    FewImages,
    Support,
    bootstrap,
    few_images,
    interval,
    normal_interval,
    resamples,
    rescaled,
    subsamples,
    support,
    weighted_mean,
)


def test_resamples_are_with_replacement_and_repeat() -> None:
    drawn = np.stack(list(resamples(50, 200, seed=3)))
    assert (drawn.sum(axis=1) == 50).all() and (drawn == 0).any()
    assert drawn.mean() == 1 and abs(drawn.var() - 0.98) < 0.05  # binomial: 1 - 1/50
    assert np.array_equal(drawn, np.stack(list(resamples(50, 200, seed=3))))
    assert not np.array_equal(drawn, np.stack(list(resamples(50, 200, seed=4))))
    with pytest.raises(ValueError, match="expected images and resamples"):
        next(resamples(0))


def test_subsamples_leave_out_a_tenth_and_repeat() -> None:
    left_out = subsamples(50, 400, seed=3)
    assert left_out.shape == (400, 5) and (np.diff(left_out, axis=1) > 0).all()
    counts = Counter(left_out.reshape(-1).tolist())
    assert sorted(counts) == list(range(50)) and max(counts.values()) < 70, "40 of each are expected"
    assert np.array_equal(left_out, subsamples(50, 400, seed=3))
    assert subsamples(7, 3).shape == (3, 1)
    with pytest.raises(ValueError, match="expected images"):
        subsamples(1, 10)


@pytest.mark.parametrize("count", [1, 7, 700])
def test_the_size_of_a_block_changes_nothing(count: int) -> None:
    values = np.random.default_rng(0).normal(size=40)
    sizes = []

    def statistic(weights: np.ndarray) -> np.ndarray:
        sizes.append(len(weights))
        return np.stack([weighted_mean(values, weights), weights[:, 0]], axis=1)

    samples = bootstrap(statistic, 40, count)
    assert samples.shape == (count, 2) and sum(sizes) == count
    sizes.clear()
    assert np.allclose(bootstrap(statistic, 40, count, size=60_000), samples, rtol=1e-12)
    assert set(sizes) <= {1, 2}


def test_means_of_one_and_of_many_weightings() -> None:
    values = np.array([1.0, np.nan, 4.0])
    assert weighted_mean(values, np.array([2, 5, 1])) == 2
    found = weighted_mean(values, np.array([[2, 5, 1], [0, 3, 0], [0, 0, 2]]))
    assert found[[0, 2]].tolist() == [2, 4] and np.isnan(found[1])


def test_the_interval_of_a_mean_is_that_of_theory() -> None:
    values = np.random.default_rng(0).normal(10, 2, 400)
    samples = bootstrap(lambda weights: weighted_mean(values, weights), 400, 2000)
    found = interval(values.mean(), samples)
    error = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - error, abs=0.03)
    assert found.high == pytest.approx(values.mean() + error, abs=0.03)


def test_percentiles_are_unbiased() -> None:
    """95 % of 999 resamples are between the 25th and the 975th; of 99, between the 2.5th and the 97.5th."""
    assert interval(5.0, np.arange(1.0, 1000))[1:] == pytest.approx((25, 975))
    assert interval(5.0, np.arange(1.0, 100))[1:] == pytest.approx((2.5, 97.5))
    assert interval(5.0, np.arange(1.0, 100), 0.8)[1:] == pytest.approx((10, 90))


def test_expanded_intervals_are_wider_and_stay_within_the_samples() -> None:
    samples = np.random.default_rng(0).normal(size=200_000)
    found = interval(0.0, samples, expanded=1.25)
    assert found.high == pytest.approx(1.25 * 1.96, abs=0.03) and found.low == pytest.approx(
        -1.25 * 1.96, abs=0.03
    )
    assert interval(0.0, samples[:50], expanded=math.inf)[1:] == (samples[:50].min(), samples[:50].max())


def test_intervals_of_missing_samples() -> None:
    samples = np.random.default_rng(0).normal(3, 1, 1000)
    holes = np.where(np.arange(1000) % 2, samples, np.nan)
    assert interval(3.0, holes).low == pytest.approx(interval(3.0, samples).low, abs=0.2)
    assert np.isnan(interval(0.0, np.full(5, np.nan)).low)
    with pytest.raises(ValueError, match="expected"):
        interval(0.0, np.zeros((3, 2)))


@pytest.mark.parametrize("n", [5, 12, 40])
def test_means_of_few_images_need_wider_intervals(n: int) -> None:
    """Coverage of 2,000 intervals; the widening is that of theory."""
    few = few_images(support(np.ones(n, bool)))
    assert few.spread == pytest.approx(math.sqrt(n / (n - 1)))
    assert few.degrees_of_freedom == n - 1
    generator = np.random.default_rng(n)
    weights = np.stack(list(resamples(n, 400)))
    covered = {1.0: 0, few.expansion(): 0}
    for _ in range(2000):
        values = generator.normal(size=n)
        samples = weighted_mean(values, weights)
        for expanded in covered:
            found = interval(values.mean(), samples, expanded=expanded)
            covered[expanded] += found.low <= 0 <= found.high
    plain, expanded = (count / 2000 for count in covered.values())
    assert plain < expanded
    assert 0.92 < expanded < 0.965
    assert n > 12 or plain < 0.92


@pytest.mark.parametrize("groups", [(30, 30), (1, 1, 2, 2, 3, 20), (1,) * 10 + (2,) * 10 + (5,) * 4])
def test_means_over_species_of_few_images(groups: tuple[int, ...]) -> None:
    """The spread of resamples, on average over samples, is as much too small as is said."""
    generator = np.random.default_rng(0)
    n = sum(groups)
    group_of = np.repeat(np.arange(len(groups)), groups)
    weights = np.stack(list(resamples(n, 300, seed=1)))
    counts = np.stack([weights[:, group_of == group].sum(axis=1) for group in range(len(groups))], axis=1)
    variances = []
    for _ in range(400):
        values = generator.normal(size=n)
        sums = np.stack(
            [weights[:, group_of == g] @ values[group_of == g] for g in range(len(groups))], axis=1
        )
        means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
        variances.append(np.nanmean(means, axis=1).var())
    true = np.mean([1 / size for size in groups]) / len(groups)
    members = group_of[:, None] == np.arange(len(groups))
    found = few_images(support(members))
    assert found.spread == pytest.approx(max(1, math.sqrt(true / np.mean(variances))), rel=0.06)
    assert found.degrees_of_freedom == n - len(groups)


def test_the_images_that_a_number_is_based_on() -> None:
    members = np.zeros((6, 3), bool)
    members[:4, 0] = members[3:5, 2] = True
    assert support(members) == Support(5, (4, 2), 6)
    assert support(members[:, 0]) == Support(4, (4,), 6)
    assert FewImages(1.0, 1e6).expansion() == pytest.approx(1, abs=1e-4)
    assert FewImages(1.0, 30.0).expansion(1e-18) > 2, "also far out"


@pytest.mark.parametrize(
    ("groups", "few"),
    [((9,), True), ((10,), False), ((2,) * 30, True), ((3, 20, 20, 20), False), ((40, 1), False)],
)
def test_numbers_of_few_images_or_of_few_of_each_species(groups: tuple[int, ...], few: bool) -> None:
    members = np.repeat(np.arange(len(groups)), groups)[:, None] == np.arange(len(groups))
    assert support(members).few == few


@pytest.mark.parametrize("n", [20, 95])
def test_subsamples_tell_the_deviation_of_a_mean(n: int) -> None:
    generator = np.random.default_rng(0)
    left_out = subsamples(n, 300)
    ratios = []
    for _ in range(200):
        values = generator.normal(5, 2, n)
        means = (values.sum() - values[left_out].sum(axis=1)) / (n - left_out.shape[1])
        samples = rescaled(7.0, means, n, left_out.shape[1])
        assert samples.mean() == pytest.approx(7)
        ratios.append(samples.var() / (4 / n))
    assert np.mean(ratios) == pytest.approx(1, abs=0.08)
    found = normal_interval(7.0, samples)
    assert (
        found.high - 7 == pytest.approx(7 - found.low) == pytest.approx(1.96 * samples.std(ddof=1), rel=1e-3)
    )

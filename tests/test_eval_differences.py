"""Which methods are called different, and how often those that are the same."""

from __future__ import annotations

import numpy as np
import pytest

from eval.bootstrap import interval
from eval.differences import NO_INTERVAL, differences, largest_deviation
from eval.scores import Scores, mean_scores
from eval.settings import Intervals

INTERVALS = Intervals(resamples=400)


def scores_of(values: np.ndarray) -> Scores:
    return mean_scores("CLIP-score", dict(enumerate(values.tolist())), INTERVALS)


def same_methods(generator: np.random.Generator, count: int, n: int = 60) -> dict[str, Scores]:
    hard = generator.normal(size=n)
    return {f"m{i}": scores_of(20 + hard + generator.normal(size=n)) for i in range(count)}


def test_methods_that_are_the_same_seldom_differ_however_many_there_are() -> None:
    """Alone, each of 21 intervals holds in 95 % of the tables; all together hold in that many here."""
    generator = np.random.default_rng(0)
    together = alone = 0
    for _ in range(100):
        methods = same_methods(generator, 7)
        found = differences("CLIP-score", methods, 0.95)
        assert len(found) == 21 and {each.pairs for each in found} == {21}
        together += any(each.differ for each in found)
        for each in found:
            one, other = methods[each.method], methods[each.other]
            apart = one.samples["CLIP-score"] - other.samples["CLIP-score"]
            low, high = interval(each.value, apart)[1:]
            if low > 0 or high < 0:
                alone += 1
                break
    assert together / 100 < 0.1
    assert alone / 100 > 0.3


def test_methods_that_are_not_the_same_differ() -> None:
    generator = np.random.default_rng(1)
    hard = generator.normal(size=60)
    methods = {
        "good": scores_of(22 + hard + generator.normal(size=60)),
        "bad": scores_of(20 + hard + generator.normal(size=60)),
        "worse": scores_of(19.5 + hard + generator.normal(size=60)),
    }
    found = {(each.method, each.other): each for each in differences("CLIP-score", methods, 0.95)}
    assert found["good", "bad"].differ and found["good", "worse"].differ
    assert found["good", "bad"].low < 2 < found["good", "bad"].high


def test_a_reference_makes_the_intervals_narrower() -> None:
    methods = same_methods(np.random.default_rng(2), 7)
    every = {(each.method, each.other): each for each in differences("CLIP-score", methods, 0.95)}
    with_reference = differences("CLIP-score", methods, 0.95, "m3")
    assert [(each.method, each.other) for each in with_reference] == [
        (each, "m3") for each in ("m0", "m1", "m2", "m4", "m5", "m6")
    ]  # fmt: skip
    for each in with_reference:
        assert each.pairs == 6
        wide = every[min(each.method, each.other), max(each.method, each.other)]
        assert abs(each.value) == abs(wide.value) and each.high - each.low < wide.high - wide.low
    (only,) = differences("CLIP-score", {name: methods[name] for name in ("m0", "m1")}, 0.95)
    assert only.pairs == 1 and only.high - only.low < every["m0", "m1"].high - every["m0", "m1"].low
    assert differences("CLIP-score", methods, 0.95, "of another benchmark") == []


def test_the_interval_of_one_pair_is_that_of_theory() -> None:
    generator = np.random.default_rng(3)
    one, other = generator.normal(1, 1, 500), generator.normal(0, 1, 500)
    (found,) = differences("CLIP-score", {"a": scores_of(one), "b": scores_of(other)}, 0.95)
    error = 1.96 * (one - other).std(ddof=1) / np.sqrt(500)
    assert found.value == pytest.approx((one - other).mean())
    assert found.high - found.value == pytest.approx(error, rel=0.12)


def test_methods_with_the_same_images_do_not_differ() -> None:
    values = np.random.default_rng(4).normal(20, 1, 50)
    methods = {"a": scores_of(values), "b": scores_of(values), "c": scores_of(values + 0.1)}
    found = {(each.method, each.other): each for each in differences("CLIP-score", methods, 0.95)}
    same, shifted = found["a", "b"], found["a", "c"]
    assert (same.low, same.high, same.differ) == (0, 0, False)
    assert shifted.differ and shifted.low == pytest.approx(-0.1) == pytest.approx(shifted.high)


def test_few_images_have_differences_without_an_interval() -> None:
    (found,) = differences(
        "CLIP-score", {"a": scores_of(np.array([1.0, 2, 4])), "b": scores_of(np.array([5.0, 6, 6]))}, 0.95
    )
    assert found.value == pytest.approx(-10 / 3)
    assert np.isnan([found.low, found.high]).all() and not found.differ


def test_a_method_of_few_images_takes_no_interval_from_the_others() -> None:
    generator = np.random.default_rng(7)
    methods = same_methods(generator, 2)
    (alone,) = differences("CLIP-score", methods, 0.95)
    tiny = {name: scores_of(generator.normal(size=4)) for name in "xy"}
    found = {(each.method, each.other): each for each in differences("CLIP-score", {**methods, **tiny}, 0.95)}
    assert found["m0", "m1"][3:] == alone[3:]
    assert found["x", "y"].reason == NO_INTERVAL and np.isnan(found["x", "y"].low)
    assert found["x", "y"].pairs == 1 and set(found) == {("m0", "m1"), ("x", "y")}, "others have other images"


def test_rounding_is_no_difference() -> None:
    values = np.random.default_rng(8).normal(20, 1, 50)
    one, other = scores_of(values), scores_of(values)
    other.samples["CLIP-score"] += np.random.default_rng(9).normal(0, 1e-15, 400)
    other.rows[0] = other.rows[0]._replace(value=other.rows[0].value + 4e-15)
    (found,) = differences("CLIP-score", {"a": one, "b": other}, 0.95)
    assert (found.value, found.low, found.high, found.differ) == (0, 0, 0, False)


def test_numbers_that_no_resample_changes_have_no_interval() -> None:
    scores = scores_of(np.ones(30))
    assert (
        np.isnan(scores.rows[0].low) and scores.rows[0].reason == "no interval: all resamples have this value"
    )
    (found,) = differences("CLIP-score", {"a": scores, "b": scores_of(np.zeros(30))}, 0.95)
    assert found.value == 1 and not found.differ and found.reason == NO_INTERVAL
    others = scores_of(np.random.default_rng(10).normal(0, 0.2, 30))
    (found,) = differences("CLIP-score", {"a": scores, "b": others}, 0.95)
    assert found.differ and found.high - found.low == pytest.approx(2 * 2.05 * 0.2 / np.sqrt(30), rel=0.4)


def test_fewer_images_need_larger_differences() -> None:
    """Of 8 images more than the largest deviation of resamples, as their own spread is uncertain."""
    generator = np.random.default_rng(5)
    values = generator.normal(size=(2, 8))
    methods = {name: scores_of(each) for name, each in zip("ab", values, strict=True)}
    (found,) = differences("CLIP-score", methods, 0.95)
    samples = methods["a"].samples["CLIP-score"] - methods["b"].samples["CLIP-score"]
    quantile, (spread,) = largest_deviation(samples[:, None], 0.95)
    assert found.high - found.value > 1.2 * quantile * spread


def test_resamples_without_a_value_do_not_count() -> None:
    samples = np.random.default_rng(6).normal(size=(1000, 3))
    quantile, _ = largest_deviation(samples, 0.95)
    assert quantile == pytest.approx(2.39, abs=0.15), "of three independent normal numbers"
    holes = samples.copy()
    holes[::10, 1] = np.nan
    assert largest_deviation(holes, 0.95)[0] == pytest.approx(quantile, abs=0.15)
    nothing, of_none = largest_deviation(np.full((9, 2), np.nan), 0.95)
    assert np.isnan(nothing) and np.isnan(of_none).all()

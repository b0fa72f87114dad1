"""The simulation that measures the intervals: its counts, and that no printed metric is missing from it."""

from __future__ import annotations

import math

import pytest

from benchmarks.coverage import FULL, Case, Outcome, simulate, simulate_kid, summarise
from eval.scores import Score
from eval.tables import METRIC


def test_every_printed_metric_is_simulated() -> None:
    found = set()
    for population in ("one category", "50 species", "64 features"):
        outcome = simulate(Case(population, 12, 1, 40, 2), 0)
        assert len(outcome.rows) == 2 and set(outcome.differ) == {2}
        found |= {row.metric for row in outcome.rows[0]}
    assert found == set(METRIC)
    assert {case.images for case in FULL} >= {5, 20, 100, 995}


def test_kid_of_paired_sets_is_above_that_for_independent_sets() -> None:
    samples = [simulate_kid(16, 20, repetition) for repetition in range(10)]
    assert all(row.metric == "KID" and row.low < row.value < row.high for row, _ in samples)
    assert sum(row.value - independent for row, independent in samples) > 0


def test_shares_are_counted() -> None:
    def outcome(value: float, low: float, high: float, differ: bool) -> Outcome:
        row = Score("PCK", "", "", value, low, high, 20, math.isnan(low))
        return Outcome([[row, row._replace(kind="species")]], {2: {"PCK": differ}})

    outcomes = [
        outcome(0.4, 0.3, 0.5, True),
        outcome(0.6, 0.55, 0.65, False),
        outcome(0.5, math.nan, math.nan, False),
        outcome(0.5, 0.45, 0.55, False),
    ]
    found = summarise("PCK", outcomes, 0.64)
    assert found.coverage == pytest.approx(2 / 3), "of the mean, 0.5"
    assert found.of_truth == pytest.approx(1 / 3)
    assert found.bias == pytest.approx(100 * -0.14)
    assert (found.none, found.few, found.differ) == (0.25, 0.25, {2: 0.25})
    deviation = math.sqrt(0.02 / 3)
    assert found.width_ratio == pytest.approx((0.2 + 0.1 + 0.1) / 3 / (2 * 1.96 * deviation))

"""The benchmark as one self-contained HTML page; it loads nothing.

Prompts, file names and method names are not trusted: every text goes through the template's escaping.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jinja2

from eval.report.cases import Case
from eval.tables import (
    FEW_NOTE,
    METRIC,
    Metric,
    Number,
    Table,
    heading,
    printed,
    printed_interval,
    printed_number,
    provenance_link,
)
from spctrl.report.pictures import ThumbnailBudget
from spctrl.report.text import visible, words

COMPARED = ("AP", "FID", "FID-infinity", "CLIP-score", "PCK", "KID", "diversity")
"""Metrics whose differences are shown; table.json has them all."""
PLOT_WIDTH, PLOT_HEIGHT = 640, 260
"""Of the chart's drawing area; SVG units."""


class Cell(NamedTuple):
    """A cell of a table on the page."""

    text: str
    interval: str = ""
    marks: str = ""
    rank: int = 0
    link: str = ""


class Dot(NamedTuple):
    """A method's value in percent with its interval, if it has one; ``few`` is whether few images have it."""

    value: float
    interval: tuple[float, float] | None
    few: bool


@dataclass(frozen=True, kw_only=True)
class Dots:
    """A row of a dot chart: a name, and each method's dot, or None."""

    name: str
    values: tuple[Dot | None, ...]

    @property
    def few(self) -> bool:
        return any(dot is not None and dot.few for dot in self.values)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A method's precision against the OKS threshold.

    Attributes:
        method: its name.
        points: ``x,y x,y ...`` in SVG units, for a polyline.
        marks: (x, y) of each threshold.
        values: in percent, as printed.
    """

    method: str
    points: str
    marks: tuple[tuple[float, float], ...]
    values: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CaseView:
    """A case with its pictures as data URIs (None where there is none)."""

    case: Case
    uris: tuple[str | None, ...]


def render_benchmark(
    table: Table, cases: Sequence[Case], *, store: str, made_at: str, warnings: Sequence[str] = ()
) -> str:
    """The page.

    Args:
        table: all numbers.
        cases: best and worst ones; none where poses were not measured.
        store: path of the store from where the page will lie, for links to how a number was made.
        made_at: when, in words.
        warnings: what the metrics had to say.

    Returns:
        A whole HTML document.
    """
    budget = ThumbnailBudget(sum(len(case.panels) for case in cases))
    ranks = table.ranks()
    columns = table.columns
    rows = [
        (
            method,
            [
                _cell(table.cells.get(key), metric, ranks.get(key, 0), store)
                for metric, source in columns
                for key in [(method, metric.name, source)]
            ],
        )
        for method in table.methods
    ]
    methods = [each.method for each in table.measured]
    thresholds = _groups(table, "AP", "oks_threshold")
    return (
        _environment()
        .get_template("benchmark.html.j2")
        .render(
            table=table,
            made_at=made_at,
            warnings=[*(f"{note}." for mark, note in table.notes.items() if mark in "RPNS"), *warnings],
            columns=[(heading(metric), source) for metric, source in columns],
            rows=rows,
            methods=methods,
            few_note=FEW_NOTE,
            categories=[
                (kind, dots) for kind in ("species", "scenario") if (dots := _groups(table, "AP", kind))
            ],
            keypoints=_groups(table, "PCK", "keypoint"),
            thresholds=[row.name for row in thresholds],
            curves=_curves(methods, thresholds),
            plot=(PLOT_WIDTH, PLOT_HEIGHT),
            differences=_differences(table),
            cases=[_case_view(case, budget) for case in cases],
        )
    )


def _cell(number: Number | None, metric: Metric, rank: int, store: str) -> Cell:
    if number is None:
        return Cell("–")
    return Cell(
        printed_number(number, metric),
        printed_interval(number, metric),
        number.marks,
        rank,
        provenance_link(number, store),
    )


def _groups(table: Table, metric: str, kind: str) -> list[Dots]:
    """A row for each species, scenario, keypoint or threshold."""
    found: dict[str, dict[str, Dot]] = {}
    for each in table.measured:
        for score in each.scores:
            if (score.metric, score.kind) == (metric, kind) and not math.isnan(score.value):
                interval = None if math.isnan(score.low) else (100 * score.low, 100 * score.high)
                dot = Dot(100 * score.value, interval, score.few)
                found.setdefault(score.group, {})[each.method] = dot
    methods = [each.method for each in table.measured]
    return [
        Dots(name=name, values=tuple(values.get(method) for method in methods))
        for name, values in found.items()
    ]


def _curves(methods: Sequence[str], thresholds: Sequence[Dots]) -> list[Curve]:
    curves = []
    for i, method in enumerate(methods):
        points = [
            (
                PLOT_WIDTH * position / max(len(thresholds) - 1, 1),
                PLOT_HEIGHT * (1 - found.value / 100),
                found.value,
            )
            for position, row in enumerate(thresholds)
            if (found := row.values[i]) is not None
        ]
        if points:
            curves.append(
                Curve(
                    method=method,
                    points=" ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points),
                    marks=tuple((x, y) for x, y, _ in points),
                    values=tuple(f"{value:.1f}" for *_, value in points),
                )
            )
    return curves


class DifferenceView(NamedTuple):
    """How two methods differ, in words and numbers; ``pairs`` is how many the interval holds for."""

    metric: str
    pair: str
    value: str
    interval: str
    differ: bool
    pairs: int


def _differences(table: Table) -> list[DifferenceView]:
    views = []
    for each in table.differences:
        if each.metric not in COMPARED or math.isnan(each.value):
            continue
        metric = METRIC[each.metric]
        number = Number(each.value, each.low, each.high, reason=each.reason)
        both = {
            letter
            for name in (each.method, each.other)
            for letter in table.cells[name, each.metric, "measured"].marks
        }
        views.append(
            DifferenceView(
                heading(metric) + " (RANDOM WEIGHTS)" * ("R" in both),
                f"{each.method} − {each.other}",
                f"{'+' if each.value > 0 else ''}{printed(each.value, metric)}",
                printed_interval(number, metric),
                each.differ,
                each.pairs,
            )
        )
    return views


def _case_view(case: Case, budget: ThumbnailBudget) -> CaseView:
    return CaseView(case=case, uris=tuple(budget.encode(panel.picture) for panel in case.panels))


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader("eval"), jinja2.PackageLoader("spctrl")]),
        autoescape=True,
        finalize=visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["words"] = words
    return environment

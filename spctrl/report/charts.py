"""Counts and distributions of one dataset, as the page's tables and charts show them, split beside split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from spctrl.audit.counts import HISTOGRAM_EDGES
from spctrl.report.text import shorten

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from spctrl.audit.counts import GroupCounts, SplitAudit

ROWS_PER_COLUMN: Final = 24
REJECT_EXAMPLES: Final = 3
MAX_MESSAGE: Final = 300

BarRow = tuple[str, tuple[int, ...], int]
"""A name, its counts in each split, and its other count in all of them."""
RejectRow = tuple[str, str, tuple[int, ...], tuple[str, ...]]
"""A stage, a reason code, the counts in each split, and a few examples."""


@dataclass(frozen=True, kw_only=True)
class BarTable:
    """Counts per name and split, most first.

    Attributes:
        what: what the names are, in the singular.
        unit: what the bars count, images or instances.
        other_unit: the other of these two.
        widest: the largest count of a name in all splits together.
        num_names: rows of all columns.
        columns: the rows, in one or two columns of the page.
    """

    what: str
    unit: str
    other_unit: str
    widest: int
    num_names: int
    columns: tuple[tuple[BarRow, ...], ...]


@dataclass(frozen=True)
class Chart:
    """How the splits' histograms of one name are shown; the ticks are (percent of the plot's width, text)."""

    histogram: str
    title: str
    explanation: str
    ticks: tuple[tuple[float, str], ...]


def bar_table(what: str, per_split: Sequence[GroupCounts], *, by_images: bool) -> BarTable:
    """Counts of the names of all splits; a name that a split lacks counts 0 there."""
    units, main = (("images", "instances"), 0) if by_images else (("instances", "images"), 1)
    rows: list[BarRow] = []
    for name in {name for groups in per_split for name in groups}:
        counts = [groups.get(name, (0, 0)) for groups in per_split]
        rows.append((name, tuple(count[main] for count in counts), sum(count[1 - main] for count in counts)))
    rows.sort(key=lambda row: (-sum(row[1]), row[0]))
    half = (len(rows) + 1) // 2
    return BarTable(
        what=what,
        unit=units[0],
        other_unit=units[1],
        widest=sum(rows[0][1]) if rows else 0,
        num_names=len(rows),
        columns=(tuple(rows),) if len(rows) <= ROWS_PER_COLUMN else (tuple(rows[:half]), tuple(rows[half:])),
    )


def keypoint_rows(audits: Sequence[SplitAudit]) -> list[tuple[str, tuple[float | None, ...]]]:
    """Keypoints with the share of instances in which they are labelled, None in a split without instances."""
    return [
        (
            name,
            tuple(
                audit.num_labelled[name] / audit.num_instances if audit.num_instances else None
                for audit in audits
            ),
        )
        for name in audits[0].num_labelled
    ]


def reject_rows(audits: Sequence[SplitAudit]) -> list[RejectRow]:
    """Rejects by stage and reason code: stages as they appear, a stage's commonest reason first."""
    reasons = dict.fromkeys(reason for audit in audits for reason in audit.rejects)
    stages = list(dict.fromkeys(stage for stage, _ in reasons))
    rows: list[RejectRow] = []
    for stage, code in reasons:
        tables = [audit.rejects.get((stage, code), audit.tables.rejects.slice(0, 0)) for audit in audits]
        counts = tuple(table.num_rows for table in tables)
        examples = [row for table in tables for row in table.slice(0, REJECT_EXAMPLES).to_pylist()]
        rows.append((stage, code, counts, tuple(map(_example_text, examples[:REJECT_EXAMPLES]))))
    return sorted(rows, key=lambda row: (stages.index(row[0]), -sum(row[2]), row[1]))


def _example_text(reject: Mapping[str, Any]) -> str:
    where = [
        reject["file_name"],
        None if reject["image_id"] is None else f"image {reject['image_id']}",
        None if reject["annotation_id"] is None else f"annotation {reject['annotation_id']}",
    ]
    text = f"{', '.join(part for part in where if part) or 'whole file'}: {reject['message'] or ''}"
    return shorten(text, MAX_MESSAGE)


def _chart(histogram: str, title: str, explanation: str, ticks: Mapping[float, str]) -> Chart:
    edges = HISTOGRAM_EDGES[histogram]
    positions = np.interp(list(ticks), edges, np.linspace(0, 100, len(edges)))
    return Chart(histogram, title, explanation, tuple(zip(positions.tolist(), ticks.values(), strict=True)))


CHARTS: Final = (
    _chart(
        "long_side", "Longer image side", "pixels, bins of 100",
        {0: "0", 500: "500", 1000: "1,000", 1500: "1,500", 2400: "2,400+"},
    ),
    _chart(
        "aspect_ratio", "Aspect ratio", "width : height, logarithmic",
        {0.25: "1:4", 0.5: "1:2", 1: "1:1", 2: "2:1", 4: "4:1"},
    ),
    _chart(
        "instance_size", "Instance size", "square root of box area over image area",
        {0: "0", 0.25: "0.25", 0.5: "0.5", 0.75: "0.75", 1: "1"},
    ),
    _chart(
        "instances_per_image", "Instances per image", "annotated instances",
        {**{n: str(n) for n in range(8)}, 8: "8+"},
    ),
)  # fmt: skip

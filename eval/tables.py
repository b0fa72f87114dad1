"""The paper's tables: measured beside reported numbers, in CSV, Markdown, LaTeX, JSON and Parquet.

A number that cannot be taken at face value is marked wherever it is printed: ``R`` for random weights, ``P`` for a part
of the split, ``S`` for few images, ``A`` for another area of unmatched detections, ``D`` for a reported number that is
doubtful. Random and doubtful ones are never best. Notes without a mark in the table are of all measured numbers or of
columns: ``N`` how many images a split has whose whole size is not known here, ``F``, ``I`` and ``K`` what is printed as
FID, FID∞ and KID, ``M`` that AP is a mean over species.

Legend: values are in the printed scale, AP times 100 and KID times 1,000.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

import pyarrow as pa

from eval.bootstrap import FEW_IMAGES, MIN_IMAGES
from eval.differences import Difference
from eval.kid import PRINTED_SCALE
from eval.scores import FID_IMAGES_PER_FEATURE, FID_INFINITY, Score
from eval.settings import DetectionArea, KidEstimator

Source = Literal["measured", "reported"]
SOURCES: tuple[Source, ...] = ("measured", "reported")
NOTHING = "–"
NOT_COMPUTED = "not computed"


class Metric(NamedTuple):
    """How a metric is printed.

    Attributes:
        name: in ``eval.scores``.
        title: heading of its column.
        higher_is_better: None where neither is.
        scale: factor of the printed value.
        decimals: printed ones.
    """

    name: str
    title: str
    higher_is_better: bool | None
    scale: float = 1.0
    decimals: int = 2


METRICS = (
    Metric("AP", "pose mAP", True, 100),
    Metric("FID", "FID", False),
    Metric("CLIP-score", "CLIP-score", True),
    Metric("AP50", "AP50", True, 100),
    Metric("AP75", "AP75", True, 100),
    Metric("AP-M", "AP-M", True, 100),
    Metric("AP-L", "AP-L", True, 100),
    Metric("AR", "AR", True, 100),
    Metric("PCK", "PCK", True, 100),
    Metric(FID_INFINITY, "FID∞", False),
    Metric("KID", f"KID × {PRINTED_SCALE:,}", False, PRINTED_SCALE),
    Metric("counting error", "people counting error", False),
    Metric("diversity", "diversity", None),
)
METRIC = {metric.name: metric for metric in METRICS}
PAPER_METRICS = ("AP", "FID", "CLIP-score")
"""Those of the paper's table; the others are this project's."""

PAPER_ORDER = ("T2I-Adapter", "ControlNet", "HumanSD", "GRPose", "SP-Ctrl")

REPORTED: Mapping[str, Mapping[str, tuple[float, float, float]]] = {
    "ap10k": {
        "T2I-Adapter": (48.16, 27.29, 25.52),
        "ControlNet": (44.25, 19.40, 24.77),
        "SP-Ctrl": (55.63, 18.52, 23.86),
    },
    "humanart": {
        "T2I-Adapter": (38.37, 40.01, 27.36),
        "ControlNet": (45.26, 26.69, 27.84),
        "HumanSD": (49.92, 35.18, 27.35),
        "GRPose": (50.93, 28.85, 27.95),
        "SP-Ctrl": (29.30, 25.94, 9.11),
    },
}
"""``PAPER_METRICS`` by dataset and method, as published on the validation split (REFERENCE section 12)."""
REPORTED_SPLIT = "val"

DOUBTFUL = {("humanart", "SP-Ctrl")}
"""Rows that look misprinted where they were published."""
AREA_METRICS = ("AP-M", "AP-L")
AREA_NOTE = "detections that match nothing count by the area of their keypoints' extent, not of their box"
FEW_NOTE = (
    f"FEW IMAGES (fewer than {FEW_IMAGES}, or than {MIN_IMAGES} of each species on average): neither such a number nor "
    f"its interval can be trusted; of fewer than {MIN_IMAGES} images there is no interval"
)
FID_NOTE = (
    "FID depends on the number of images: the interval is of FID at this number, not of the true FID; compare it only "
    "with FID of as many images"
)
KID_NOTES = {
    "paired": "KID leaves out the comparison of an image with the real one of its own pose, which would bias it, "
    "unlike torch-fidelity's, for independent sets",
    "independent": "KID is torch-fidelity's, for independent sets: too low here, where real and generated images are "
    "of the same poses",
}
SPECIES_NOTE = (
    "AP is a mean over {count} species; the fewer images of each, the higher it comes out (half a point at 20), which "
    "cancels in differences between methods"
)
FID_INFINITY_NOTE = (
    f"FID∞ is FID extrapolated to any number of images; with fewer than {FID_IMAGES_PER_FEATURE} images for each of "
    "the network's features a part of the bias may remain, and the interval may not hold the true FID"
)
NOTE_METRICS = {"F": "FID", "I": FID_INFINITY, "K": "KID", "M": "AP"}
"""Whose column a note is of."""
DOUBTFUL_NOTE = "as published in the README of SP-Ctrl, where this row looks misprinted"

SPLIT_IMAGES = {("ap10k", "train"): 7023, ("ap10k", "val"): 995, ("ap10k", "test"): 1997}
"""Images of a whole split, where that is known (REFERENCE section 1; each of AP-10K's three splits has as many)."""


@dataclass(frozen=True, kw_only=True)
class MethodScores:
    """What was measured of one method.

    Attributes:
        method: its name.
        scores: of all metrics, in their own scale.
        provenance: by metric, the path below the store of the file that says how the number was made.
        random: by metric, what had random weights: names of the method, the estimator or the network.
        num_images: images of the method that were measured.
        num_annotated: annotated images.
        detection_area: see ``eval.settings.PoseApSettings``.
        kid_estimator: see ``eval.settings.KidSettings``.
    """

    method: str
    scores: Sequence[Score]
    provenance: Mapping[str, str]
    random: Mapping[str, Sequence[str]]
    num_images: int
    num_annotated: int
    detection_area: DetectionArea = "bbox"
    kid_estimator: KidEstimator = "paired"


class Number(NamedTuple):
    """A cell.

    Attributes:
        value, low, high: in the printed scale; ``low`` and ``high`` are NaN of a reported number.
        marks: letters of the notes below the table.
        provenance: see ``MethodScores``; empty of a reported number.
        reason: why there is no value or no interval, where there could be one.
        images: that it is based on; None of a reported number.
    """

    value: float
    low: float
    high: float
    marks: str = ""
    provenance: str = ""
    reason: str = ""
    images: int | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """A benchmark's numbers.

    Attributes:
        name: of the benchmark.
        dataset, split: whose poses.
        title: the dataset's, as people write it.
        level: of the intervals.
        methods: the rows, in the paper's order, then as given.
        cells: by method, metric and source.
        notes: a sentence for each mark.
        measured: what the cells were made of.
        differences: between methods, in the printed scale.
    """

    name: str
    dataset: str
    split: str
    title: str
    level: float
    methods: tuple[str, ...]
    cells: Mapping[tuple[str, str, Source], Number]
    notes: Mapping[str, str]
    measured: Sequence[MethodScores]
    differences: Sequence[Difference] = field(default_factory=tuple)

    @property
    def columns(self) -> list[tuple[Metric, Source]]:
        """Metrics and sources of which there is a number, or a reason why there is none."""
        return [
            (metric, source)
            for metric in METRICS
            for source in SOURCES
            if any((method, metric.name, source) in self.cells for method in self.methods)
        ]

    def ranks(self) -> dict[tuple[str, str, Source], int]:
        """1 for the best and 2 for the second best printed number of each column that has different ones."""
        found: dict[tuple[str, str, Source], int] = {}
        for metric, source in self.columns:
            if metric.higher_is_better is None:
                continue
            printed = {
                method: round(cell.value, metric.decimals)
                for method in self.methods
                if (cell := self.cells.get((method, metric.name, source)))
                and not set(cell.marks) & set("RD")
                and not math.isnan(cell.value)
            }
            order = sorted(set(printed.values()), reverse=metric.higher_is_better)[:2]
            if len(order) > 1:
                found |= {
                    (method, metric.name, source): order.index(value) + 1
                    for method, value in printed.items()
                    if value in order
                }
        return found


def build_table(
    name: str,
    dataset: str,
    split: str,
    title: str,
    measured: Sequence[MethodScores],
    *,
    level: float,
    differences: Sequence[Difference] = (),
) -> Table:
    """The table of a benchmark: all measured methods, and the paper's rows where it is on the paper's split.

    Args:
        name: of the benchmark.
        dataset, split: ``ap10k`` or ``humanart``; ``train``, ``val`` or ``test``.
        title: the dataset's, as people write it.
        measured: by method.
        level: of the intervals.
        differences: between methods, in the metrics' own scale.
    """
    reported = REPORTED.get(dataset, {}) if split == REPORTED_SPLIT else {}
    alike = Counter(_plain(each.method) for each in measured)
    # Of two methods whose names differ in spelling only, neither takes the paper's row.
    published = {_plain(method): method for method in reported if alike[_plain(method)] < 2}
    measured = [_renamed(each, published.get(_plain(each.method), each.method)) for each in measured]
    cells: dict[tuple[str, str, Source], Number] = {}
    for method, values in reported.items():
        mark = "D" if (dataset, method) in DOUBTFUL else ""
        for metric, value in zip(PAPER_METRICS, values, strict=True):
            cells[method, metric, "reported"] = Number(value, math.nan, math.nan, mark)
    for each in measured:
        for score in each.scores:
            if not score.kind:
                cells[each.method, score.metric, "measured"] = _number(score, each, dataset, split)
    names = [*reported, *(each.method for each in measured)]
    order = {method: i for i, method in enumerate(PAPER_ORDER)}
    methods = sorted(dict.fromkeys(names), key=lambda method: order.get(method, len(order)))
    called = {
        each: published.get(_plain(each), each)
        for each in (d for x in differences for d in (x.method, x.other))
    }
    return Table(
        name=name,
        dataset=dataset,
        split=split,
        title=title,
        level=level,
        methods=tuple(methods),
        cells=cells,
        notes=_notes(measured, dataset, split, cells),
        measured=measured,
        differences=[
            each._replace(
                method=called[each.method],
                other=called[each.other],
                **{
                    name: METRIC[each.metric].scale * getattr(each, name) for name in ("value", "low", "high")
                },
            )
            for each in differences
        ],
    )


def _plain(method: str) -> str:
    """A method's name without what people spell in different ways."""
    return "".join(letter for letter in method.casefold() if letter.isalnum())


def _renamed(scores: MethodScores, method: str) -> MethodScores:
    return MethodScores(**{**vars(scores), "method": method})


def _number(score: Score, of: MethodScores, dataset: str, split: str) -> Number:
    marks = "R" * bool(of.random.get(score.metric)) + "P" * is_partial(of, dataset, split)
    marks += "S" * score.few
    marks += "A" * (score.metric in AREA_METRICS and of.detection_area == "keypoints")
    scale = METRIC[score.metric].scale
    low, high = scale * score.low, scale * score.high
    provenance = of.provenance[score.metric]
    return Number(scale * score.value, low, high, marks, provenance, score.reason, score.images)


def is_partial(of: MethodScores, dataset: str, split: str) -> bool:
    """Whether a method was measured on fewer images than the split has."""
    return of.num_images < SPLIT_IMAGES.get((dataset, split), of.num_annotated)


def _notes(
    measured: Sequence[MethodScores],
    dataset: str,
    split: str,
    cells: Mapping[tuple[str, str, Source], Number],
) -> dict[str, str]:
    notes = {}
    random = sorted({name for each in measured for names in each.random.values() for name in names})
    if random:
        notes["R"] = f"RANDOM WEIGHTS ({', '.join(random)}): this number means nothing"
    parts = [each for each in measured if is_partial(each, dataset, split)]
    if parts:
        whole = SPLIT_IMAGES.get((dataset, split))
        counts = "; ".join(
            f"{each.method}: {each.num_images:,} of {whole or each.num_annotated:,} images" for each in parts
        )
        notes["P"] = f"PART OF THE SPLIT ({counts}): not comparable with numbers of the whole split"
    if measured and (dataset, split) not in SPLIT_IMAGES:
        # A cut annotation file looks like a whole one then.
        annotated = ", ".join(f"{count:,}" for count in sorted({each.num_annotated for each in measured}))
        notes["N"] = f"the annotations have {annotated} images; see that these are the whole split"
    of_metrics = {score.metric for each in measured for score in each.scores}
    if "FID" in of_metrics:
        notes["F"] = FID_NOTE
    if FID_INFINITY in of_metrics:
        notes["I"] = FID_INFINITY_NOTE
    if "KID" in of_metrics:
        notes["K"] = "; ".join(
            KID_NOTES[each] for each in dict.fromkeys(each.kid_estimator for each in measured)
        )
    species = {score.group for each in measured for score in each.scores if score.kind == "species"}
    if len(species) > 1:
        notes["M"] = SPECIES_NOTE.format(count=len(species))
    of_cells = {"S": FEW_NOTE, "A": AREA_NOTE, "D": DOUBTFUL_NOTE}
    used = {mark for cell in cells.values() for mark in cell.marks}
    return notes | {mark: note for mark, note in of_cells.items() if mark in used}


# Printing


def printed(value: float, metric: Metric) -> str:
    """With the metric's decimals; a zero has no sign."""
    return NOTHING if math.isnan(value) else f"{round(value, metric.decimals) + 0.0:.{metric.decimals}f}"


def printed_number(number: Number, metric: Metric) -> str:
    """The value, or why there is none."""
    return f"{NOT_COMPUTED}: {number.reason}" if _is_missing(number) else printed(number.value, metric)


def _is_missing(number: Number) -> bool:
    """Whether it should have been measured, and has no value."""
    return math.isnan(number.value) and bool(number.reason)


def printed_interval(number: Number, metric: Metric) -> str:
    """``[low, high]``, or why there is none; empty where there is no value or it is a reported one."""
    if math.isnan(number.low):
        return "" if math.isnan(number.value) or not number.reason else f"[{number.reason}]"
    return f"[{printed(number.low, metric)}, {printed(number.high, metric)}]"


def provenance_link(number: Number, store: str) -> str:
    """URL of the file that says how a number was made; empty where there is none, or no path of the store."""
    return quote(f"{store}/{number.provenance}") if number.provenance and store else ""


def heading(metric: Metric, arrows: tuple[str, str] = ("↑", "↓")) -> str:
    """Title with an arrow to where it is better."""
    if metric.higher_is_better is None:
        return metric.title
    return f"{metric.title} {arrows[not metric.higher_is_better]}"


def to_markdown(table: Table, *, store: str = "", intervals: bool = True) -> str:
    """The table for people, each measured number with a link to how it was made.

    Args:
        table: to print.
        store: path of the store from where the file will lie; without it there are no links.
        intervals: print them.
    """
    columns = table.columns
    lines = [
        f"# {table.title}, {table.split}: {table.name}",
        "",
        _row(["method", *(f"{heading(metric)} {source}" for metric, source in columns)]),
        _row(["---", *("---:" for _ in columns)]),
    ]
    ranks = table.ranks()
    for method in table.methods:
        cells = [method]
        for metric, source in columns:
            key = method, metric.name, source
            cells.append(_markdown_cell(table.cells.get(key), metric, ranks.get(key), store, intervals))
        lines.append(_row(cells))
    lines += ["", "Best in bold, second best underlined."]
    if intervals:
        lines[-1] += f" In brackets: {100 * table.level:g} % intervals over images."
    lines += [f"\n**{mark}**: {note}." for mark, note in table.notes.items()]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _markdown_cell(
    number: Number | None, metric: Metric, rank: int | None, store: str, intervals: bool
) -> str:
    if number is None:
        return NOTHING
    text = printed_number(number, metric)
    if link := provenance_link(number, store):
        text = f"[{text}]({link})"
    text = {1: f"**{text}**", 2: f"<u>{text}</u>"}.get(rank or 0, text)
    text += f"<sup>{number.marks}</sup>" * bool(number.marks)
    between = printed_interval(number, metric) if intervals else ""
    return f"{text} {between}".rstrip()


_LATEX = str.maketrans(
    {
        **{letter: f"\\{letter}" for letter in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "\\": r"\textbackslash{}",
        "×": r"$\times$",
        "∞": r"$\infty$",
        "–": "--",
    }
)


def latex_text(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return text.translate(_LATEX)


def _latex_number(text: str) -> str:
    """With a minus instead of a hyphen."""
    return latex_text(text).replace("-", "$-$")


def _latex_label(name: str) -> str:
    """A name that labels may have: LaTeX reads some letters as commands there too."""
    return re.sub(r"[^A-Za-z0-9.:-]+", "-", name)


def to_latex(table: Table, *, metrics: Sequence[str] = PAPER_METRICS, intervals: bool = False) -> str:
    """A ``table`` environment with booktabs rules: ``\\usepackage{booktabs}``.

    Args:
        table: to print.
        metrics: its columns.
        intervals: print them, small, below the numbers' line.
    """
    columns = [(metric, source) for metric, source in table.columns if metric.name in metrics]
    groups: dict[str, list[tuple[Metric, Source]]] = {}
    for metric, source in columns:
        groups.setdefault(metric.name, []).append((metric, source))
    heads, rules, first = [], [], 2
    for group in groups.values():
        title = latex_text(group[0][0].title)
        if group[0][0].higher_is_better is not None:
            title += r" $\uparrow$" if group[0][0].higher_is_better else r" $\downarrow$"
        heads.append(rf"\multicolumn{{{len(group)}}}{{c}}{{{title}}}")
        rules.append(rf"\cmidrule(lr){{{first}-{first + len(group) - 1}}}")
        first += len(group)
    ranks = table.ranks()
    body = []
    for method in table.methods:
        keys = [(metric, (method, metric.name, source)) for metric, source in columns]
        cells = [_latex_cell(table.cells.get(key), metric, ranks.get(key), intervals) for metric, key in keys]
        body.append(" & ".join([latex_text(method), *cells]) + r" \\")
    notes = [
        rf"  \par\footnotesize\textsuperscript{{{mark}}} {latex_text(note)}."
        for mark, note in table.notes.items()
        if NOTE_METRICS.get(mark, metrics[0]) in metrics
    ]
    caption = f"{table.title}, {table.split} split."
    if intervals:
        caption += f" In brackets: {100 * table.level:g} % intervals over images."
    if "R" in table.notes:
        caption += " RANDOM WEIGHTS: these numbers mean nothing."
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{latex_text(caption)}}}",
        rf"  \label{{tab:{_latex_label(table.name)}}}",
        rf"  \begin{{tabular}}{{l{'r' * len(columns)}}}",
        r"    \toprule",
        f"    & {' & '.join(heads)} \\\\",
        f"    {' '.join(rules)}",
        f"    Method & {' & '.join(source for _, source in columns)} \\\\",
        r"    \midrule",
        *(f"    {line}" for line in body),
        r"    \bottomrule",
        r"  \end{tabular}",
        *notes,
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex_cell(number: Number | None, metric: Metric, rank: int | None, intervals: bool) -> str:
    if number is None:
        return "--"
    text = (
        latex_text(printed_number(number, metric))
        if _is_missing(number)
        else _latex_number(printed(number.value, metric))
    )
    text = {1: rf"\textbf{{{text}}}", 2: rf"\underline{{{text}}}"}.get(rank or 0, text)
    if number.marks:
        text += rf"\textsuperscript{{{number.marks}}}"
    between = printed_interval(number, metric) if intervals else ""
    return text + rf" {{\scriptsize {_latex_number(between)}}}" * bool(between)


# For programs

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", " ")

ROWS_SCHEMA = pa.schema(
    [
        ("benchmark", pa.string()),
        ("dataset", pa.string()),
        ("split", pa.string()),
        ("method", pa.string()),
        ("source", pa.string()),
        ("metric", pa.string()),
        ("kind", pa.string()),
        ("group", pa.string()),
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("level", pa.float64()),
        ("scale", pa.float64()),
        ("higher_is_better", pa.bool_()),
        ("images", pa.int64()),
        ("based_on", pa.int64()),
        ("weights", pa.string()),
        ("partial", pa.bool_()),
        ("note", pa.string()),
        ("provenance", pa.string()),
    ]
)
"""One row per number, also those of species, scenarios, keypoints and OKS thresholds (``kind``, ``group``).

``value``, ``low`` and ``high`` are in the printed scale, ``scale`` times the metric's own. ``images`` were measured,
and the number is ``based_on`` those that have what it is of. ``weights`` is ``random`` or ``real``, null for reported
numbers. ``note`` says what is wrong with the number. ``provenance`` is a path below the store. CSV has the same
columns.
"""


def to_rows(table: Table) -> list[dict[str, Any]]:
    """Rows of ``ROWS_SCHEMA``."""
    common = {"benchmark": table.name, "dataset": table.dataset, "split": table.split}
    rows = []
    for (method, name, source), cell in table.cells.items():
        if source == "reported":
            rows.append(
                {**common, **_of_metric(name), "method": method, "source": source, "kind": "", "group": "",
                 "value": cell.value, "note": table.notes.get(cell.marks)}
            )  # fmt: skip
    for each in table.measured:
        for score in each.scores:
            number = _number(score, each, table.dataset, table.split)
            rows.append(
                {**common, **_of_metric(score.metric), "method": each.method, "source": "measured",
                 "kind": score.kind, "group": score.group, "value": _or_none(number.value),
                 "low": _or_none(number.low), "high": _or_none(number.high), "level": table.level,
                 "images": each.num_images, "based_on": score.images,
                 "weights": "random" if "R" in number.marks else "real",
                 "partial": "P" in number.marks,
                 "note": "; ".join(_row_notes(table, number)) or None,
                 "provenance": number.provenance}
            )  # fmt: skip
    return rows


def _row_notes(table: Table, number: Number) -> Iterator[str]:
    if number.reason:
        yield f"{NOT_COMPUTED}: {number.reason}" if _is_missing(number) else number.reason
    yield from (FEW_NOTE if mark == "S" else table.notes[mark] for mark in number.marks)


def _of_metric(name: str) -> dict[str, Any]:
    metric = METRIC[name]
    return {"metric": name, "scale": metric.scale, "higher_is_better": metric.higher_is_better}


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def to_arrow(table: Table) -> pa.Table:
    """All numbers as a table of ``ROWS_SCHEMA``, for Parquet."""
    return pa.Table.from_pylist(to_rows(table), schema=ROWS_SCHEMA)


def to_csv(table: Table) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, ROWS_SCHEMA.names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in to_rows(table))
    return text.getvalue()


def _cell(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula gets an apostrophe: names of species come from annotations."""
    if not isinstance(value, str):
        return value
    text = value.replace("\r", " ")  # Python's writer does not quote it, and some readers end a row there
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


def to_json(table: Table) -> str:
    """All numbers, the notes, and the paired differences between methods."""
    content = {
        "benchmark": table.name,
        "dataset": table.dataset,
        "split": table.split,
        "level": table.level,
        "methods": table.methods,
        "notes": table.notes,
        "numbers": to_rows(table),
        "differences": [
            {name: _or_none(value) if isinstance(value, float) else value for name, value in row.items()}
            for row in ({**each._asdict(), "differ": each.differ} for each in table.differences)
        ],
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


FORMATS: Mapping[str, Callable[[Table], str]] = {
    "table.csv": to_csv,
    "table.json": to_json,
    "table.tex": to_latex,
    "table-intervals.tex": lambda table: to_latex(table, intervals=True),
    "table-all.tex": lambda table: to_latex(table, metrics=[metric.name for metric in METRICS]),
}
"""Files of text that need nothing but the table."""

"""The audit as one self-contained HTML page: numbers, distributions, leaks and a gallery; it loads nothing.

Captions, file names and messages come from annotation files and are not trusted: every text goes through the
template's escaping, and the page carries a policy that lets it load nothing but its own inline images.

Legend: H, W image size in pixels, K keypoints, S splits of one dataset, B histogram bins. Images are BGR, as
OpenCV has them.
"""

from __future__ import annotations

import base64
import colorsys
import hashlib
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import cv2
import jinja2
import numpy as np
import pyarrow.compute as pc

from spctrl.audit import (
    ASPECT_RATIO_EDGES,
    INSTANCE_SIZE_EDGES,
    INSTANCES_PER_IMAGE_EDGES,
    KEYPOINT_NAMES,
    LONG_SIDE_EDGES,
    find_leakage,
    primary_categories,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from spctrl.audit import GroupCount, Histogram, ImageRef, Leakage, LeakPair, SplitAudit, SplitTables

GALLERY_RECORDS: Final = 12
LEAK_PAIRS: Final = 12
THUMBNAIL_SIDE: Final = 320
LEAK_THUMBNAIL_SIDE: Final = 200
# Encoded bytes of all thumbnails together; base64 adds a third, so the page stays below 3 MB.
THUMBNAIL_BYTES: Final = 1_900_000
MAX_THUMBNAIL_BYTES: Final = 24_000
# Scale and WebP quality, tried in turn until a thumbnail fits its share of the page.
ENCODINGS: Final = ((1.0, 78), (1.0, 60), (0.8, 50), (0.6, 40), (0.4, 30), (0.3, 20))
ROWS_PER_COLUMN: Final = 24
MAX_CAPTION: Final = 220
MAX_MESSAGE: Final = 300
INDEX_MAP: Final = "spatext"
# Conditions of thin lines on black, which would fade when made small.
LINE_DRAWINGS: Final = (INDEX_MAP, "openpose")
NUM_LINKS: Final = 19
FIRST_LINK: Final = 51

_LONG_SIDE_TICKS: Final = (*((v, f"{v:,}") for v in (0, 500, 1000, 1500)), (2400, "2,400+"))
_ASPECT_TICKS: Final = ((0.25, "1:4"), (0.5, "1:2"), (1, "1:1"), (2, "2:1"), (4, "4:1"))
_INSTANCE_SIZE_TICKS: Final = ((0, "0"), (0.25, "0.25"), (0.5, "0.5"), (0.75, "0.75"), (1, "1"))
_PER_IMAGE_TICKS: Final = (*((n, str(n)) for n in range(8)), (8, "8+"))

TIMES: Final = "\N{MULTIPLICATION SIGN}"
DASH: Final = "\N{EN DASH}"

Rgb = tuple[int, int, int]


@dataclass(frozen=True)
class Fact:
    label: str
    value: str


@dataclass(frozen=True)
class Segment:
    """One split's part of a bar, in percent of the widest bar."""

    split: int
    width: float


@dataclass(frozen=True)
class BarRow:
    name: str
    segments: tuple[Segment, ...]
    values: tuple[int, ...]
    total: int
    other_total: int


@dataclass(frozen=True)
class BarTable:
    """Counts per name and split; the rows come in one or two columns of the page."""

    what: str
    unit: str
    other_unit: str
    num_names: int
    columns: tuple[tuple[BarRow, ...], ...]


@dataclass(frozen=True)
class KeypointRow:
    name: str
    shares: tuple[float | None, ...]


@dataclass(frozen=True)
class HistogramRow:
    """One split's histogram: bars as (x, height) in percent of the plot, and the numbers beside it.

    ``middle`` is the range of the middle 80 % of the values, ``span`` that of all of them.
    """

    split: int
    bars: tuple[tuple[float, float], ...]
    bar_width: float
    total: int
    median: str
    middle: str
    span: str


@dataclass(frozen=True)
class HistogramCard:
    title: str
    explanation: str
    rows: tuple[HistogramRow, ...]
    ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class SizeClassRow:
    split: int
    shares: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class RejectRow:
    stage: str
    code: str
    counts: tuple[int, ...]
    total: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Panel:
    """One picture of a record or a pair, or the reason why there is none."""

    label: str
    alt: str
    uri: str | None
    missing: str = ""


@dataclass(frozen=True)
class GalleryRecord:
    split: int
    image_id: int
    file_name: str
    size: str
    content: str
    caption: str
    credit: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class LeakCard:
    is_same: bool
    distance: int
    panels: tuple[Panel, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class LeakRow:
    splits: tuple[int, int]
    num_same: int
    num_near: int
    same: tuple[LeakCard, ...]
    near: tuple[LeakCard, ...]


@dataclass(frozen=True)
class LegendEntry:
    name: str
    colour: str


@dataclass(frozen=True)
class SplitSummary:
    split: int
    images: int
    on_disk: int
    captioned: int
    instances: int
    keypoints: int
    conditions: tuple[tuple[str, int | None], ...]
    rejects: int


@dataclass(frozen=True)
class DatasetView:
    anchor: str
    title: str
    name: str
    splits: tuple[str, ...]
    condition_names: tuple[str, ...]
    summaries: tuple[SplitSummary, ...]
    totals: SplitSummary
    categories: BarTable
    backgrounds: BarTable | None
    keypoints: tuple[KeypointRow, ...]
    histograms: tuple[HistogramCard, ...]
    size_classes: tuple[SizeClassRow, ...]
    rejects: tuple[RejectRow, ...]
    leakage: Leakage
    leaks: tuple[LeakRow, ...]
    num_same: int
    num_near: int
    gallery: tuple[GalleryRecord, ...]
    keypoint_legend: tuple[LegendEntry, ...]


class ThumbnailBudget:
    """Shares the page's bytes among its thumbnails: what simple pictures leave, detailed ones may use."""

    def __init__(self, num_thumbnails: int, total_bytes: int = THUMBNAIL_BYTES) -> None:
        self._remaining = num_thumbnails
        self._bytes = total_bytes

    def skip(self) -> None:
        """A thumbnail that was counted on will not come."""
        self._remaining -= 1

    def encode(self, image: NDArray[np.uint8], side: int = THUMBNAIL_SIDE) -> str:
        """WebP data URI of an (H, W, 3) BGR uint8 image, at most ``side`` pixels wide and high."""
        share = 1.5 * self._bytes / max(1, self._remaining)
        data = encode_thumbnail(image, side, max_bytes=int(min(share, MAX_THUMBNAIL_BYTES)))
        self._remaining -= 1
        self._bytes -= len(data)
        return f"data:image/webp;base64,{base64.b64encode(data).decode('ascii')}"


def render_report(
    splits: Sequence[SplitAudit], *, title: str, generated_at: str, notes: Sequence[str] = ()
) -> str:
    """The audit page.

    Args:
        splits: audits of one or more splits of one or more datasets, in the order in which they are shown.
        title: heading of the page.
        generated_at: when the page was made, in words; given, so that the same input gives the same page.
        notes: notices for the reader, shown near the top, such as which backend made the masks.

    Returns:
        A whole HTML document that loads nothing.

    Raises:
        ValueError: there is no split, or one comes twice, or a manifest cannot be audited.
    """
    if not splits:
        raise ValueError("expected the audit of at least one split, found none; build a dataset first")
    repeated = [
        key for key, count in Counter((a.tables.dataset, a.tables.split) for a in splits).items() if count > 1
    ]
    if repeated:
        raise ValueError(f"expected each split of a dataset once, found {repeated[0]} several times")
    datasets: dict[str, list[SplitAudit]] = {}
    for audit in splits:
        datasets.setdefault(audit.tables.dataset, []).append(audit)
    chosen = {name: choose_gallery_rows([a.tables for a in audits]) for name, audits in datasets.items()}
    leakages = {
        name: find_leakage([a.tables for a in audits], max_pairs=LEAK_PAIRS)
        for name, audits in datasets.items()
    }
    budget = ThumbnailBudget(
        sum(_num_panels(audits, chosen[name], leakages[name]) for name, audits in datasets.items())
    )
    views = [
        _dataset_view(number, audits, chosen[name], leakages[name], budget)
        for number, (name, audits) in enumerate(datasets.items(), start=1)
    ]
    template = _environment().get_template("report.html.j2")
    return template.render(
        title=title,
        generated_at=generated_at,
        notes=tuple(notes),
        headline=_headline(views),
        datasets=views,
    )


def choose_gallery_rows(
    splits: Sequence[SplitTables], num_records: int = GALLERY_RECORDS
) -> list[tuple[int, int]]:
    """Records to show of one dataset, as (index of the split, manifest row); the same ones each time.

    Splits take turns, each with a species or scenario that has been shown least, and of these one with an
    image on disk.
    """
    queues = [_rows_by_category(tables, num_records) for tables in splits]
    shown: Counter[str] = Counter()
    chosen: list[tuple[int, int]] = []
    while len(chosen) < num_records and any(queues):
        for number, by_category in enumerate(queues):
            if not by_category or len(chosen) == num_records:
                continue
            # The digest shuffles the species without chance: the alphabet would show antelopes to bears only.
            category = min(
                by_category, key=lambda name: (shown[name], not by_category[name][0][0], _digest(name))
            )
            chosen.append((number, by_category[category].popleft()[1]))
            shown[category] += 1
            if not by_category[category]:
                del by_category[category]
    return sorted(chosen)


def index_colours() -> NDArray[np.uint8]:
    """Fixed colours of the index map's 256 values; (256, 3) uint8, BGR.

    0 is near black, 1..17 keypoints are bright, 51..69 links are muted; any other value is white, since it
    should not occur.
    """
    table = np.full((256, 3), 255, dtype=np.uint8)
    table[0] = (24, 19, 16)
    for k in range(17):
        table[1 + k] = keypoint_colour(k)[::-1]
    for s in range(NUM_LINKS):
        table[FIRST_LINK + s] = link_colour(s)[::-1]
    return table


def keypoint_colour(k: int) -> Rgb:
    """Colour of the 0-based keypoint k in a colourised index map."""
    return _hsv((7 * k % 17) / 17, 0.62, 1.0)


def link_colour(s: int) -> Rgb:
    """Colour of the 0-based link s in a colourised index map."""
    return _hsv((7 * s % NUM_LINKS) / NUM_LINKS, 0.62, 0.66)


def colourise_index_map(index_map: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W) uint8 index map to (H, W, 3) uint8 BGR."""
    return index_colours()[index_map]


def overlay_index_map(image: NDArray[np.uint8], index_map: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The index map's drawing, thickened for a thumbnail, over the dimmed image.

    Args:
        image: (H, W, 3) uint8, BGR.
        index_map: (H, W) uint8.

    Returns:
        (H, W, 3) uint8, BGR.
    """
    dimmed = (image * np.float32(0.6)).astype(np.uint8)
    drawing = np.where((index_map > 0)[:, :, None], colourise_index_map(index_map), np.uint8(0))
    drawing = thicken_lines(drawing, THUMBNAIL_SIDE)
    return np.where(drawing.any(axis=2, keepdims=True), drawing, dimmed)


def thicken_lines(drawing: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """A drawing on black whose lines stay visible when it is made to fit ``side`` pixels; (H, W, 3) uint8."""
    size = round(max(drawing.shape[:2]) / side)
    if size <= 1:
        return drawing
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * (size // 2) + 1,) * 2)
    return np.asarray(cv2.dilate(drawing, kernel), dtype=np.uint8)


def encode_thumbnail(image: NDArray[np.uint8], side: int, *, max_bytes: int) -> bytes:
    """WebP of an (H, W, 3) BGR uint8 image that fits ``side`` pixels and, if it can, ``max_bytes``."""
    data = b""
    for scale, quality in ENCODINGS:
        small = _fit(image, max(1, int(side * scale)))
        data = cv2.imencode(".webp", small, [cv2.IMWRITE_WEBP_QUALITY, quality])[1].tobytes()
        if len(data) <= max_bytes:
            break
    return data


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spctrl"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    environment.filters["percent"] = _percent
    return environment


def _number(value: int | None) -> str:
    return DASH if value is None else f"{value:,}"


def _percent(share: float | None) -> str:
    return DASH if share is None else f"{100 * share:.1f}"


def _quantity(value: float | None) -> str:
    """A number with about three digits, for quantiles."""
    if value is None:
        return DASH
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2f}"


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _hsv(hue: float, saturation: float, value: float) -> Rgb:
    red, green, blue = (round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def _css(colour: Rgb) -> str:
    return f"rgb({colour[0]} {colour[1]} {colour[2]})"


def _rows_by_category(tables: SplitTables, num_rows: int) -> dict[str, deque[tuple[bool, int]]]:
    """Up to ``num_rows`` rows per species or scenario, as (has an image, row), in the order to show them."""
    manifest = tables.manifest
    names = pc.fill_null(primary_categories(manifest), "not given").to_pylist()
    has_image = pc.is_valid(manifest.column("image_path")).to_pylist()
    rows: dict[str, deque[tuple[bool, int]]] = {}
    for row in sorted(range(manifest.num_rows), key=lambda row: not has_image[row]):
        queue = rows.setdefault(names[row], deque())
        if len(queue) < num_rows:
            queue.append((has_image[row], row))
    return rows


def _num_panels(audits: Sequence[SplitAudit], chosen: Sequence[tuple[int, int]], leakage: Leakage) -> int:
    gallery = sum(_num_record_panels(audits[number].tables.conditions) for number, _ in chosen)
    return gallery + sum(len(same) + 2 * len(near) for same, near in _listed_pairs(leakage))


def _num_record_panels(conditions: Sequence[str]) -> int:
    return 1 + len(conditions) + (INDEX_MAP in conditions)


def _listed_pairs(leakage: Leakage) -> list[tuple[tuple[LeakPair, ...], tuple[LeakPair, ...]]]:
    """The same and the near pairs to show of each two splits: ``LEAK_PAIRS`` of each kind per dataset."""
    per_two_splits = LEAK_PAIRS // max(1, len(leakage.pairs)) or 1
    return [(pair.same[:per_two_splits], pair.near[:per_two_splits]) for pair in leakage.pairs]


def _headline(views: Sequence[DatasetView]) -> tuple[Fact, ...]:
    # A zero would claim that splits were compared where they were not.
    leaks = [view.leakage for view in views if view.leaks]
    same = any(leak.num_without_digest < leak.num_images for leak in leaks)
    near = any(leak.num_without_hash < leak.num_images for leak in leaks)
    return (
        Fact("images", _number(sum(view.totals.images for view in views))),
        Fact("instances", _number(sum(view.totals.instances for view in views))),
        Fact("labelled keypoints", _number(sum(view.totals.keypoints for view in views))),
        Fact(
            "condition maps",
            _number(sum(count or 0 for view in views for _, count in view.totals.conditions)),
        ),
        Fact("rejects", _number(sum(view.totals.rejects for view in views))),
        Fact(
            "images in two splits", _number(sum(view.num_same for view in views)) if same else "not compared"
        ),
        Fact(
            "near-duplicate pairs", _number(sum(view.num_near for view in views)) if near else "not compared"
        ),
    )


def _dataset_view(
    number: int,
    audits: Sequence[SplitAudit],
    chosen: Sequence[tuple[int, int]],
    leakage: Leakage,
    budget: ThumbnailBudget,
) -> DatasetView:
    first = audits[0].tables
    conditions = tuple(dict.fromkeys(name for audit in audits for name in audit.tables.conditions))
    summaries = tuple(_summary(split, audit, conditions) for split, audit in enumerate(audits))
    by_scenario = any(audit.grouping == "scenario" for audit in audits)
    gallery = tuple(_gallery_record(split, audits[split].tables, row, budget) for split, row in chosen)
    names = KEYPOINT_NAMES.get(first.dataset, ())
    return DatasetView(
        anchor=f"dataset-{number}",
        title=first.title,
        name=first.dataset,
        splits=tuple(audit.tables.split for audit in audits),
        condition_names=conditions,
        summaries=summaries,
        totals=_total(summaries, conditions),
        categories=_bar_table(
            "scenario" if by_scenario else "species",
            [audit.categories for audit in audits],
            by_images=by_scenario,
        ),
        backgrounds=_bar_table("background", [audit.backgrounds for audit in audits], by_images=True)
        if any(audit.backgrounds for audit in audits)
        else None,
        keypoints=_keypoint_rows(audits),
        histograms=_histogram_cards(audits),
        size_classes=tuple(_size_class_row(split, audit) for split, audit in enumerate(audits)),
        rejects=_reject_rows(audits),
        leakage=leakage,
        leaks=_leak_rows(audits, leakage, budget),
        num_same=sum(pair.num_same for pair in leakage.pairs),
        num_near=sum(pair.num_near for pair in leakage.pairs),
        gallery=gallery,
        keypoint_legend=tuple(
            LegendEntry(_words(name), _css(keypoint_colour(k))) for k, name in enumerate(names)
        ),
    )


def _summary(split: int, audit: SplitAudit, conditions: Sequence[str]) -> SplitSummary:
    counts = dict(audit.num_conditions)
    return SplitSummary(
        split=split,
        images=audit.num_images,
        on_disk=audit.num_images_on_disk,
        captioned=audit.num_captioned,
        instances=audit.num_instances,
        keypoints=audit.num_labelled_keypoints,
        conditions=tuple((name, counts.get(name)) for name in conditions),
        rejects=audit.num_rejects,
    )


def _total(summaries: Sequence[SplitSummary], conditions: Sequence[str]) -> SplitSummary:
    return SplitSummary(
        split=-1,
        images=sum(row.images for row in summaries),
        on_disk=sum(row.on_disk for row in summaries),
        captioned=sum(row.captioned for row in summaries),
        instances=sum(row.instances for row in summaries),
        keypoints=sum(row.keypoints for row in summaries),
        conditions=tuple(
            (name, sum(row.conditions[i][1] or 0 for row in summaries)) for i, name in enumerate(conditions)
        ),
        rejects=sum(row.rejects for row in summaries),
    )


def _bar_table(what: str, per_split: Sequence[Sequence[GroupCount]], *, by_images: bool) -> BarTable:
    images = [{count.name: count.num_images for count in counts} for counts in per_split]
    instances = [{count.name: count.num_instances for count in counts} for counts in per_split]
    main, other = (images, instances) if by_images else (instances, images)
    names = dict.fromkeys(count.name for counts in per_split for count in counts)
    totals = {name: sum(counts.get(name, 0) for counts in main) for name in names}
    widest = max(totals.values(), default=0) or 1
    rows = [
        BarRow(
            name=name,
            segments=tuple(
                Segment(split, 100 * counts[name] / widest)
                for split, counts in enumerate(main)
                if counts.get(name)
            ),
            values=tuple(counts.get(name, 0) for counts in main),
            total=totals[name],
            other_total=sum(counts.get(name, 0) for counts in other),
        )
        for name in sorted(names, key=lambda name: (-totals[name], name))
    ]
    per_column = len(rows) if len(rows) <= ROWS_PER_COLUMN else (len(rows) + 1) // 2
    units = ("images", "instances") if by_images else ("instances", "images")
    columns = tuple(
        tuple(rows[start : start + per_column]) for start in range(0, len(rows), max(1, per_column))
    )
    return BarTable(what, *units, len(rows), columns)


def _keypoint_rows(audits: Sequence[SplitAudit]) -> tuple[KeypointRow, ...]:
    # A split without instances of an unknown skeleton has no names; the others tell them.
    names = max((audit.visibility.names for audit in audits), key=len)
    shares = [audit.visibility.shares or (None,) * len(names) for audit in audits]
    return tuple(
        KeypointRow(_words(name), tuple(share[k] for share in shares)) for k, name in enumerate(names)
    )


def _words(name: str) -> str:
    return name.replace("_", " ")


def _histogram_cards(audits: Sequence[SplitAudit]) -> tuple[HistogramCard, ...]:
    def card(
        title: str,
        explanation: str,
        pick: Callable[[SplitAudit], Histogram],
        edges: Sequence[float],
        ticks: Iterable[tuple[float, str]],
    ) -> HistogramCard:
        rows = tuple(_histogram_row(split, pick(audit)) for split, audit in enumerate(audits))
        positions = np.linspace(0, 100, len(edges))
        return HistogramCard(
            title,
            explanation,
            rows,
            tuple((float(np.interp(v, edges, positions)), text) for v, text in ticks),
        )

    return (
        card(
            "Longer image side", "pixels, bins of 100", lambda a: a.long_side,
            LONG_SIDE_EDGES, _LONG_SIDE_TICKS,
        ),
        card(
            "Aspect ratio", "width : height, logarithmic", lambda a: a.aspect_ratio,
            ASPECT_RATIO_EDGES, _ASPECT_TICKS,
        ),
        card(
            "Instance size", "square root of box area over image area", lambda a: a.instance_size,
            INSTANCE_SIZE_EDGES, _INSTANCE_SIZE_TICKS,
        ),
        card(
            "Instances per image", "annotated instances", lambda a: a.instances_per_image,
            INSTANCES_PER_IMAGE_EDGES, _PER_IMAGE_TICKS,
        ),
    )  # fmt: skip


def _histogram_row(split: int, histogram: Histogram) -> HistogramRow:
    highest = max(histogram.counts, default=0) or 1
    width = 100 / len(histogram.counts)
    return HistogramRow(
        split=split,
        bars=tuple((i * width, 100 * count / highest) for i, count in enumerate(histogram.counts) if count),
        bar_width=width,
        total=histogram.total,
        median=_quantity(histogram.median),
        middle=f"{_quantity(histogram.p10)}{DASH}{_quantity(histogram.p90)}",
        span=f"{_quantity(histogram.minimum)}{DASH}{_quantity(histogram.maximum)}",
    )


def _size_class_row(split: int, audit: SplitAudit) -> SizeClassRow:
    counts = (audit.coco_sizes.small, audit.coco_sizes.medium, audit.coco_sizes.large)
    total = sum(counts) or 1
    return SizeClassRow(split, tuple(count / total for count in counts), counts)


def _reject_rows(audits: Sequence[SplitAudit]) -> tuple[RejectRow, ...]:
    stages = dict.fromkeys(group.stage for audit in audits for group in audit.rejects)
    groups = [{(group.stage, group.code): group for group in audit.rejects} for audit in audits]
    rows = []
    for stage, code in {key: None for by_key in groups for key in by_key}:
        counts = tuple(by_key[stage, code].count if (stage, code) in by_key else 0 for by_key in groups)
        examples = [
            example
            for by_key in groups
            if (stage, code) in by_key
            for example in by_key[stage, code].examples
        ]
        texts = tuple(
            _example_text(example.file_name, example.image_id, example.annotation_id, example.message)
            for example in examples[:3]
        )
        rows.append(RejectRow(stage, code, counts, sum(counts), texts))
    order = list(stages)
    return tuple(sorted(rows, key=lambda row: (order.index(row.stage), -row.total, row.code)))


def _example_text(
    file_name: str | None, image_id: int | None, annotation_id: int | None, message: str
) -> str:
    where = [file_name or ""]
    where.append(f"image {image_id}" if image_id is not None else "")
    where.append(f"annotation {annotation_id}" if annotation_id is not None else "")
    return _shorten(f"{', '.join(part for part in where if part) or 'whole file'}: {message}", MAX_MESSAGE)


def _leak_rows(
    audits: Sequence[SplitAudit], leakage: Leakage, budget: ThumbnailBudget
) -> tuple[LeakRow, ...]:
    split_of = {audit.tables.split: split for split, audit in enumerate(audits)}
    tables = {audit.tables.split: audit.tables for audit in audits}
    rows = []
    for pair, (same, near) in zip(leakage.pairs, _listed_pairs(leakage), strict=True):
        rows.append(
            LeakRow(
                splits=(split_of[pair.split_a], split_of[pair.split_b]),
                num_same=pair.num_same,
                num_near=pair.num_near,
                # Equal files look equal: one picture tells as much as two.
                same=tuple(_leak_card(leak, (leak.first,), tables, budget) for leak in same),
                near=tuple(_leak_card(leak, (leak.first, leak.second), tables, budget) for leak in near),
            )
        )
    return tuple(rows)


def _leak_card(
    leak: LeakPair, pictured: Sequence[ImageRef], tables: dict[str, SplitTables], budget: ThumbnailBudget
) -> LeakCard:
    names = tuple(f"{ref.split}: {ref.file_name}, image {ref.image_id}" for ref in (leak.first, leak.second))
    panels = tuple(
        _panel(ref.split, f"Image {ref.image_id} of {ref.split}",
               _decode(tables[ref.split].read_image(ref.row), cv2.IMREAD_COLOR), budget,
               missing="image not on disk or not readable", side=LEAK_THUMBNAIL_SIDE)
        for ref in pictured
    )  # fmt: skip
    return LeakCard(len(pictured) == 1, leak.distance, panels, names)


def _gallery_record(split: int, tables: SplitTables, row: int, budget: ThumbnailBudget) -> GalleryRecord:
    record: dict[str, Any] = tables.manifest.slice(row, 1).to_pylist()[0]
    what = f"image {record['image_id']} of {tables.title} {tables.split}"
    categories = Counter(instance["category"] or "not given" for instance in record["instances"] or ())
    species = ", ".join(
        name if count == 1 else f"{count} {TIMES} {name}" for name, count in categories.items()
    )
    captions = record["captions"] or [""]
    credit = ", ".join(part for part in (record["author"], record["licence"]) if part)
    return GalleryRecord(
        split=split,
        image_id=record["image_id"],
        file_name=record["file_name"] or "",
        size=f"{_number(record['width'])} {TIMES} {_number(record['height'])}",
        content=" · ".join(part for part in (_words(record["category"] or ""), species) if part)
        or "no instances",
        caption=_shorten(captions[0] or "", MAX_CAPTION),
        credit=_shorten(credit, MAX_CAPTION),
        panels=tuple(_record_panels(tables, row, what, budget)),
    )


def _record_panels(tables: SplitTables, row: int, what: str, budget: ThumbnailBudget) -> Iterable[Panel]:
    data = tables.read_image(row)
    image = _decode(data, cv2.IMREAD_COLOR)
    reason = "image not on disk" if data is None else "image cannot be decoded"
    yield _panel("image", f"The photograph or artwork, {what}", image, budget, missing=reason)
    for condition in tables.conditions:
        label = _words(condition)
        data = tables.read_condition(row, condition)
        reason = f"no {label} of this record" if data is None else f"{label} cannot be decoded"
        if condition != INDEX_MAP:
            picture = _decode(data, cv2.IMREAD_COLOR)
            if picture is not None and condition in LINE_DRAWINGS:
                picture = thicken_lines(picture, THUMBNAIL_SIDE)
            yield _panel(label, f"{label} of {what}", picture, budget, missing=reason)
            continue
        index_map = _decode_index_map(data)
        coloured = (
            None if index_map is None else thicken_lines(colourise_index_map(index_map), THUMBNAIL_SIDE)
        )
        yield _panel(label, f"Index map, colourised, of {what}", coloured, budget, missing=reason)
        if image is not None and index_map is not None and image.shape[:2] == index_map.shape:
            overlay = overlay_index_map(image, index_map)
            yield _panel("overlay", f"Index map drawn over the image, {what}", overlay, budget)
        else:
            # Without an image the first panel says so already; only a differing size is news.
            budget.skip()
            if image is not None and index_map is not None:
                (height, width), (map_height, map_width) = image.shape[:2], index_map.shape
                yield Panel(
                    "overlay",
                    "",
                    None,
                    f"map is {map_width} {TIMES} {map_height}, image {width} {TIMES} {height}",
                )


def _panel(
    label: str,
    alt: str,
    image: NDArray[np.uint8] | None,
    budget: ThumbnailBudget,
    *,
    missing: str = "",
    side: int = THUMBNAIL_SIDE,
) -> Panel:
    if image is None:
        budget.skip()
        return Panel(label, alt, None, missing)
    return Panel(label, alt, budget.encode(image, side))


def _decode(data: bytes | None, flags: int) -> NDArray[np.uint8] | None:
    """A decoded image, None where there is none or it is broken: the report must not fail on it."""
    if not data:
        return None
    try:
        image = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), flags)
    except cv2.error:
        return None
    return None if image is None else np.asarray(image, dtype=np.uint8)


def _decode_index_map(data: bytes | None) -> NDArray[np.uint8] | None:
    index_map = _decode(data, cv2.IMREAD_UNCHANGED)
    return index_map if index_map is None or index_map.ndim == 2 else index_map[:, :, 0]


def _fit(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)

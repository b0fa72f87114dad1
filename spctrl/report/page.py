"""The audit as one self-contained HTML page: numbers, distributions, leaks and a gallery; it loads nothing.

Captions, file names and messages come from annotation files and are not trusted: every text goes through the
template's escaping, and the page carries a policy that lets it load nothing but its own inline images.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jinja2

from spctrl.audit.leakage import NEAR_DISTANCE, find_leakage
from spctrl.report import text
from spctrl.report.charts import CHARTS, bar_table, keypoint_rows, reject_rows
from spctrl.report.gallery import choose_gallery_rows, gallery_record, leak_cards, num_thumbnails
from spctrl.report.pictures import INDEX_COLOURS, ThumbnailBudget

if TYPE_CHECKING:
    from collections.abc import Sequence

    from spctrl.audit.counts import SplitAudit
    from spctrl.audit.leakage import Leakage, SplitPairLeakage
    from spctrl.report.charts import BarTable, RejectRow
    from spctrl.report.gallery import GalleryRecord, LeakCard


@dataclass(frozen=True, kw_only=True)
class DatasetView:
    """What the template shows of one dataset beside the audits of its splits.

    Attributes:
        anchor: start of the ids of its headings.
        conditions: the same in all splits.
        backgrounds: None where the dataset has none.
        keypoints: names, each with its labelled share in each split.
        leaks: each two splits with the cards of what they share.
    """

    anchor: str
    title: str
    splits: tuple[str, ...]
    audits: tuple[SplitAudit, ...]
    conditions: tuple[str, ...]
    categories: BarTable
    backgrounds: BarTable | None
    keypoints: list[tuple[str, tuple[float | None, ...]]]
    rejects: list[RejectRow]
    leakage: Leakage
    gallery: tuple[GalleryRecord, ...]
    leaks: tuple[tuple[SplitPairLeakage, tuple[LeakCard, ...]], ...]


def render_report(
    splits: Sequence[SplitAudit], *, title: str, generated_at: str, notes: Sequence[str] = ()
) -> str:
    """The audit page.

    Args:
        splits: audits of one or more splits of one or more datasets, in the order in which they are shown.
            The splits of a dataset have the same conditions.
        title: heading of the page.
        generated_at: when the page was made, in words; given, so that the same input gives the same page.
        notes: notices for the reader, shown near the top, such as which backend made the masks.

    Returns:
        A whole HTML document that loads nothing.

    Raises:
        ValueError: there is no split, or one comes twice, or a manifest has a malformed hash.
    """
    if not splits:
        raise ValueError("expected the audit of at least one split, found none; build a dataset first")
    name, count = Counter(audit.tables.name for audit in splits).most_common(1)[0]
    if count > 1:
        raise ValueError(f"expected each split of a dataset once, found {name} several times")
    datasets: dict[str, list[SplitAudit]] = {}
    for audit in splits:
        datasets.setdefault(audit.tables.dataset, []).append(audit)
    tables = [[audit.tables for audit in audits] for audits in datasets.values()]
    chosen = [choose_gallery_rows(each) for each in tables]
    leakages = [find_leakage(each) for each in tables]
    budget = ThumbnailBudget(sum(map(num_thumbnails, tables, chosen, leakages)))
    views = [
        _dataset_view(number, audits, rows, leakage, budget)
        for number, (audits, rows, leakage) in enumerate(
            zip(datasets.values(), chosen, leakages, strict=True), start=1
        )
    ]
    template = _environment().get_template("report.html.j2")
    return template.render(
        title=title,
        generated_at=generated_at,
        notes=notes,
        headline=_headline(splits, leakages),
        datasets=views,
        charts=CHARTS,
        near_distance=NEAR_DISTANCE,
        index_colours=INDEX_COLOURS,
    )


def _dataset_view(
    number: int,
    audits: Sequence[SplitAudit],
    chosen: Sequence[tuple[int, int]],
    leakage: Leakage,
    budget: ThumbnailBudget,
) -> DatasetView:
    splits = [audit.tables for audit in audits]
    by_scenario = any(audit.grouping == "scenario" for audit in audits)
    backgrounds = bar_table("background", [audit.backgrounds for audit in audits], by_images=True)
    return DatasetView(
        anchor=f"dataset-{number}",
        title=splits[0].title,
        splits=tuple(tables.split for tables in splits),
        audits=tuple(audits),
        conditions=splits[0].conditions,
        categories=bar_table(
            "scenario" if by_scenario else "species",
            [audit.categories for audit in audits],
            by_images=by_scenario,
        ),
        backgrounds=backgrounds if backgrounds.num_names else None,
        keypoints=keypoint_rows(audits),
        rejects=reject_rows(audits),
        leakage=leakage,
        gallery=tuple(gallery_record(split, splits[split], row, budget) for split, row in chosen),
        leaks=tuple((pair, leak_cards(pair, splits, budget)) for pair in leakage.pairs),
    )


def _headline(audits: Sequence[SplitAudit], leakages: Sequence[Leakage]) -> list[tuple[str, str]]:
    """Names and values of the numbers at the top."""
    numbers = {
        "images": sum(audit.num_images for audit in audits),
        "instances": sum(audit.num_instances for audit in audits),
        "labelled keypoints": sum(audit.num_labelled_keypoints for audit in audits),
        "condition maps": sum(sum(audit.num_conditions.values()) for audit in audits),
        "rejects": sum(audit.num_rejects for audit in audits),
        "images in two splits": sum(leakage.num_same for leakage in leakages),
        "near-duplicate pairs": sum(leakage.num_near for leakage in leakages),
    }
    texts = {name: text.number(value) for name, value in numbers.items()}
    # A zero would claim that splits were compared where they were not.
    several = [leakage for leakage in leakages if leakage.pairs]
    if all(leakage.num_without_digest == leakage.num_images for leakage in several):
        texts["images in two splits"] = "not compared"
    if all(leakage.num_without_hash == leakage.num_images for leakage in several):
        texts["near-duplicate pairs"] = "not compared"
    return list(texts.items())


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("spctrl"),
        autoescape=True,
        finalize=text.visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for filter_ in (text.number, text.percent, text.quantity, text.words):
        environment.filters[filter_.__name__] = filter_
    return environment

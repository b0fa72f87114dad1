"""Records and leaks with their pictures: which to show, and what to write beside them."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spctrl.data.records import RecordError
from spctrl.report.pictures import colourise_index_map, decode, overlay_index_map, thicken_lines
from spctrl.report.text import number, shorten, words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from spctrl.audit.leakage import Leakage, SplitPairLeakage
    from spctrl.audit.tables import SplitTables
    from spctrl.report.pictures import ThumbnailBudget

GALLERY_RECORDS: Final = 12
LEAK_THUMBNAIL_SIDE: Final = 200
MAX_CAPTION: Final = 220
INDEX_MAP: Final = "spatext"
# Thin lines on black, which would fade when made small.
LINE_DRAWING: Final = "openpose"


@dataclass(frozen=True)
class Panel:
    """One picture of a record or a pair, as a data URI, or the reason why there is none."""

    label: str
    alt: str
    uri: str | None
    missing: str


@dataclass(frozen=True, kw_only=True)
class GalleryRecord:
    """One record; ``split`` is the position of its split on the page."""

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
    """Two images that are equal or nearly so."""

    heading: str
    names: tuple[str, ...]
    panels: tuple[Panel, ...]


def choose_gallery_rows(splits: Sequence[SplitTables]) -> list[tuple[int, int]]:
    """Records to show of one dataset, as (position of the split, manifest row); the same ones each time.

    Splits take turns, each with a species or scenario that has been shown least, and of these one with an
    image on disk.
    """
    queues = [_rows_by_category(tables.manifest) for tables in splits]
    shown: Counter[str] = Counter()
    chosen: list[tuple[int, int]] = []
    while len(chosen) < GALLERY_RECORDS and any(queues):
        for split, by_category in enumerate(queues):
            if not by_category or len(chosen) == GALLERY_RECORDS:
                continue
            # The digest shuffles the species without chance: the alphabet would show antelopes to bears only.
            category = min(
                by_category,
                key=lambda name: (
                    shown[name],
                    not by_category[name][0][0],
                    hashlib.sha256(name.encode()).digest(),
                ),
            )
            chosen.append((split, by_category[category].popleft()[1]))
            shown[category] += 1
            if not by_category[category]:
                del by_category[category]
    return sorted(chosen)


def primary_categories(manifest: pa.Table) -> pa.Array:
    """What each image shows: its scenario, else the species of its first instance, else null; one string each."""
    column = manifest.column("instances").combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    first = pa.array(np.cumsum(lengths) - lengths, mask=lengths == 0)
    species = pc.struct_field(pc.list_flatten(column), "category").take(first)
    return pc.coalesce(manifest.column("category").combine_chunks(), species)


def num_thumbnails(splits: Sequence[SplitTables], chosen: Sequence[tuple[int, int]], leakage: Leakage) -> int:
    """Thumbnails of one dataset's chosen records and listed leaks, if none is missing."""
    conditions = [splits[split].conditions for split, _ in chosen]
    # The image, its conditions, and the index map over the image.
    in_gallery = sum(1 + len(names) + (INDEX_MAP in names) for names in conditions)
    return in_gallery + sum(len(pair.same) + 2 * len(pair.near) for pair in leakage.pairs)


def gallery_record(split: int, tables: SplitTables, row: int, budget: ThumbnailBudget) -> GalleryRecord:
    record: dict[str, Any] = tables.manifest.slice(row, 1).to_pylist()[0]
    what = f"image {record['image_id']} of {tables.title} {tables.split}"
    categories = Counter(instance["category"] or "not given" for instance in record["instances"] or ())
    species = ", ".join(name if count == 1 else f"{count} × {name}" for name, count in categories.items())
    content = " · ".join(part for part in (words(record["category"] or ""), species) if part)
    captions = record["captions"] or [""]
    credit = ", ".join(part for part in (record["author"], record["licence"]) if part)
    return GalleryRecord(
        split=split,
        image_id=record["image_id"],
        file_name=record["file_name"] or "",
        size=f"{number(record['width'])} × {number(record['height'])}",
        content=content or "no instances",
        caption=shorten(captions[0] or "", MAX_CAPTION),
        credit=shorten(credit, MAX_CAPTION),
        panels=tuple(_record_panels(tables, row, what, budget)),
    )


def leak_cards(
    pair: SplitPairLeakage, splits: Sequence[SplitTables], budget: ThumbnailBudget
) -> tuple[LeakCard, ...]:
    """The listed equal files, then the listed near-duplicates, of two splits."""
    a, b = splits[pair.a], splits[pair.b]
    cards = []
    for leak in pair.same:
        names = (_image_name(a, leak.row_a), _image_name(b, leak.row_b))
        # Equal files look equal: one picture tells as much as two.
        cards.append(LeakCard("Same file", names, (_leak_panel(a, leak.row_a, budget),)))
    for leak in pair.near:
        names = (_image_name(a, leak.row_a), _image_name(b, leak.row_b))
        panels = (_leak_panel(a, leak.row_a, budget), _leak_panel(b, leak.row_b, budget))
        cards.append(LeakCard(f"Near-duplicate, {leak.distance} of 64 bits differ", names, panels))
    return tuple(cards)


def _rows_by_category(manifest: pa.Table) -> dict[str, deque[tuple[bool, int]]]:
    """Some rows per species or scenario, as (has an image, row), in the order to show them."""
    names = pc.fill_null(primary_categories(manifest), "not given").to_pylist()
    has_image = pc.is_valid(manifest.column("image_path")).to_pylist()
    rows: dict[str, deque[tuple[bool, int]]] = {}
    for row in sorted(range(manifest.num_rows), key=lambda row: not has_image[row]):
        queue = rows.setdefault(names[row], deque())
        if len(queue) < GALLERY_RECORDS:
            queue.append((has_image[row], row))
    return rows


def _record_panels(tables: SplitTables, row: int, what: str, budget: ThumbnailBudget) -> Iterator[Panel]:
    image, missing = _picture(lambda: tables.read_image(row), "image", "image not on disk")
    yield Panel("image", f"The photograph or artwork, {what}", budget.encode(image), missing)
    for condition in tables.conditions:
        label = words(condition)
        picture, missing = _picture(
            functools.partial(tables.read_condition, row, condition),
            label,
            f"no {label} of this record",
            gray=condition == INDEX_MAP,
        )
        if condition == INDEX_MAP:
            yield from _index_map_panels(picture, image, what, missing, budget)
            continue
        if picture is not None and condition == LINE_DRAWING:
            picture = thicken_lines(picture)
        yield Panel(label, f"{label} of {what}", budget.encode(picture), missing)


def _picture(
    read: Callable[[], bytes | None], what: str, absent: str, *, gray: bool = False
) -> tuple[NDArray[np.uint8] | None, str]:
    """A decoded picture, or None and the reason for the reader: one bad file costs one picture, not the report."""
    try:
        data = read()
    except RecordError:
        return None, f"{what} cannot be read"
    return decode(data, gray=gray), absent if data is None else f"{what} cannot be decoded"


def _index_map_panels(
    index_map: NDArray[np.uint8] | None,
    image: NDArray[np.uint8] | None,
    what: str,
    missing: str,
    budget: ThumbnailBudget,
) -> Iterator[Panel]:
    """The index map by itself, and over the image where both are there."""
    coloured = None if index_map is None else thicken_lines(colourise_index_map(index_map))
    yield Panel(INDEX_MAP, f"Index map, colourised, of {what}", budget.encode(coloured), missing)
    if image is None or index_map is None:
        budget.encode(None)  # the panels before say what is missing
        return
    (height, width), (map_height, map_width) = image.shape[:2], index_map.shape
    overlay = overlay_index_map(image, index_map) if image.shape[:2] == index_map.shape else None
    yield Panel(
        "overlay",
        f"Index map drawn over the image, {what}",
        budget.encode(overlay),
        f"map is {map_width} × {map_height}, image {width} × {height}",
    )


def _image_name(tables: SplitTables, row: int) -> str:
    image = tables.manifest.select(["image_id", "file_name"]).slice(row, 1).to_pylist()[0]
    return f"{tables.split}: {image['file_name'] or ''}, image {image['image_id']}"


def _leak_panel(tables: SplitTables, row: int, budget: ThumbnailBudget) -> Panel:
    image_id = tables.manifest.column("image_id")[row].as_py()
    picture, missing = _picture(lambda: tables.read_image(row), "image", "image not on disk")
    uri = budget.encode(picture, LEAK_THUMBNAIL_SIDE)
    return Panel(tables.split, f"Image {image_id} of {tables.split}", uri, missing)

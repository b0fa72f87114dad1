"""The triplet folders that existing loaders read: text files from raw annotations, and heatmaps."""

from __future__ import annotations

import io
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np

from spctrl.conditions.heatmaps import keypoint_heatmaps
from spctrl.data.annotations.decode import categories_by_id, read_document
from spctrl.data.annotations.entry_decoder import UNREADABLE, EntryDecoder
from spctrl.data.annotations.keypoint_order import KeypointOrderError, keypoint_order
from spctrl.errors import ExpectedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from spctrl.data.annotations.decode import Category
    from spctrl.data.datasets import Dataset
    from spctrl.data.records import Record
    from spctrl.export.layout import Layout

Fields = TypeVar("Fields")


class _Listed(msgspec.Struct):
    """An entry of ``images``, as far as a line needs it. Other fields may hold numbers that Python's types do not."""

    id: int
    file_name: str
    height: int
    width: int
    background: int | None = None
    picture_name: msgspec.Raw = msgspec.Raw(b"null")
    category: str | None = None
    description: str | None = None


class _Owned(msgspec.Struct):
    """An entry of ``annotations``, likewise."""

    id: int
    image_id: int
    category_id: int | None = None
    iscrowd: int = 0
    num_keypoints: int | None = None


def record_lines(annotation_path: Path, layout: Layout, image_ids: set[int]) -> Iterator[tuple[str, bytes]]:
    """File name and JSON line of each wanted image, in file order.

    Annotation objects are unchanged, to the digits of their numbers; only white space between tokens may differ. Two
    things that loaders rely on are put right: keypoints are in the skeleton's order, and ids and counts written as text
    or float are whole numbers.
    """
    document = read_document(annotation_path)
    categories = categories_by_id(annotation_path, document)
    orders: dict[int | None, Sequence[int] | None] = {
        key: _order_of(category, layout.dataset) for key, category in categories.items()
    }
    annotations: dict[int, list[msgspec.Raw]] = {}
    for owned, entry in _readable(document.annotations, _Owned):
        if owned.image_id in image_ids:
            ordered = _in_order(entry, orders.get(owned.category_id))
            annotations.setdefault(owned.image_id, []).append(ordered)
    for image, _ in _readable(document.images, _Listed):
        if image.id in image_ids:
            line = _record_line(image, annotations.get(image.id, []), layout)
            # Annotation files may be indented; a line must be one line.
            yield image.file_name, msgspec.json.format(msgspec.json.encode(line), indent=0)


def _readable(entries: list[msgspec.Raw], kind: type[Fields]) -> Iterator[tuple[Fields, msgspec.Raw]]:
    """Some fields of each entry, and the entry; those that do not decode have been rejected by the index."""
    decoder = EntryDecoder(kind)
    for entry in entries:
        with suppress(*UNREADABLE):
            yield decoder.decode(entry)


def _order_of(category: Category, dataset: Dataset) -> Sequence[int] | None:
    """Where the skeleton's keypoints stand in a category's list; None for other keypoints.

    The index refuses those in categories that have annotations; the rest concerns no line.
    """
    try:
        return keypoint_order(category.keypoints or (), dataset.skeleton)
    except KeypointOrderError:
        return None


def _in_order(annotation: msgspec.Raw, order: Sequence[int] | None) -> msgspec.Raw:
    """An annotation with its keypoints in the order of the skeleton."""
    if order is None or order == tuple(range(len(order))):
        return annotation
    fields = msgspec.json.decode(annotation, type=dict[str, msgspec.Raw])
    numbers = msgspec.json.decode(fields["keypoints"], type=list[msgspec.Raw])
    ordered = [number for i in order for number in numbers[3 * i : 3 * i + 3]]
    fields["keypoints"] = msgspec.Raw(msgspec.json.encode(ordered))
    return msgspec.Raw(msgspec.json.encode(fields))


def _record_line(image: _Listed, annotations: list[msgspec.Raw], layout: Layout) -> dict[str, Any]:
    is_ap10k = layout.dataset.name == "ap10k"
    line = {
        # Of AP-10K the path below data/, since there is no dirname: folders may repeat a name.
        "filename": image.file_name if is_ap10k else Path(image.file_name).name,
        "image_id": image.id,
        "height": image.height,
        "width": image.width,
        "anns": annotations,
    }
    if is_ap10k:
        return {**line, "background": image.background}
    return {
        **line,
        "dirname": layout.dirname(image.file_name),
        "picture_name": image.picture_name,
        "category": image.category,
        "caption": [image.description] if image.description else [],
    }


class ExportedCategory(msgspec.Struct):
    """An entry of ``categories.jsonl``; keypoint names have spaces, ``skeleton`` holds 1-based pairs."""

    id: int
    name: str
    supercategory: str
    keypoints: list[str]
    skeleton: list[list[int]]


def categories_json(annotation_path: Path, dataset: Dataset) -> bytes:
    """One JSON object, category id -> category, with keypoints in the order and under the names of the skeleton."""
    categories = categories_by_id(annotation_path, read_document(annotation_path))
    return msgspec.json.encode({str(key): _exported(each, dataset) for key, each in categories.items()})


def _exported(category: Category, dataset: Dataset) -> ExportedCategory:
    names, links = category.keypoints or [], category.skeleton or []
    if (order := _order_of(category, dataset)) is not None:
        names = [*dataset.skeleton.keypoint_names, *names[len(order) :]]
        place = {old + 1: new + 1 for new, old in enumerate(order)}
        links = [[place.get(end, end) for end in link] for link in links]
    return ExportedCategory(
        id=category.id,
        name=category.name,
        supercategory=category.supercategory or "",
        keypoints=[name.replace("_", " ") for name in names],
        skeleton=links,
    )


def merged_categories(parts: Mapping[str, bytes]) -> bytes:
    """The categories of all splits of a dataset, which share one file.

    Args:
        parts: ``categories_json`` by split; their order decides nothing, and damaged ones do not count. Where they
            describe a category in different ways, the description with most keypoints and links is taken.

    Raises:
        ExpectedError: an id stands for categories of different names.
    """
    merged: dict[str, tuple[str, ExportedCategory]] = {}
    for split in sorted(parts):
        with suppress(*UNREADABLE):
            for key, each in msgspec.json.decode(parts[split], type=dict[str, ExportedCategory]).items():
                first, known = merged.setdefault(key, (split, each))
                if known.name != each.name:
                    raise ExpectedError(
                        f"expected one category for each id in all splits, found {key} for {known.name!r} in {first} "
                        f"and for {each.name!r} in {split}. Give one of them another id; where both files were "
                        "changed, run again"
                    )
                merged[key] = first, max(known, each, key=_fullness)
    return msgspec.json.encode({key: each for key, (_, each) in merged.items()})


def _fullness(category: ExportedCategory) -> tuple[int, int, bytes]:
    """A ranking in which no two different descriptions are equal."""
    return len(category.keypoints), len(category.skeleton), msgspec.json.encode(category)


def heatmaps_npy(record: Record) -> bytes:
    """The record's keypoint heatmaps, (K, 64, 64) float64, as a NumPy file."""
    buffer = io.BytesIO()
    np.save(buffer, keypoint_heatmaps(record.keypoints, record.size_wh))
    return buffer.getvalue()

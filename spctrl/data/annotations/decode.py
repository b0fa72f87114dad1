"""Reading annotation files in COCO keypoint format: AP-10K's and HumanArt's.

A file of HumanArt's size holds 200 MB of JSON. It is decoded in one pass, in which each instance leaves its numbers
in an array as soon as it is decoded, so that memory never holds an object per number. A file in which something does
not decode or fit is read once more: cut into its entries, of which each is decoded on its own, so that a broken one
costs one record and gets a reason.

Legend: R images, M annotations of the whole file, K keypoints (17).
"""

from __future__ import annotations

import codecs
import itertools
import math
import re
import struct
from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from spctrl.data.annotations.areas import box_areas, segmentation_area
from spctrl.data.annotations.entry_decoder import UNREADABLE, EntryDecoder, whole_number_in
from spctrl.data.annotations.keypoint_order import KeypointOrderError, keypoint_order
from spctrl.data.boxes import keypoint_boxes
from spctrl.errors import ExpectedError
from spctrl.io.utf8 import location, utf8_fault

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from spctrl.data.datasets import Dataset

KEYPOINTS_21 = 21
"""Keypoints of HumanArt's longer list."""

MAX_FILE_NAME_BYTES = 230
"""Leaves room, in the 255 of common file systems, for a condition's suffix and a temporary file's prefix."""
MAX_PATH_CHARACTERS = 512
MAX_REJECTS, MAX_REJECT_CHARACTERS = 1_000_000, 10_000
"""A row of reasons takes half a kilobyte, and a faulty entry two bytes of the file."""
_LIKE_EXPORTED_FILES = (".png", ".json", ".npy", ".jpg")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\\]")
_WINDOWS_PATH, _URL = re.compile(r"[A-Za-z]:[/\\]"), re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_PLAIN_PATH = re.compile(r"(?:[\w-][\w -]{0,99}/){0,4}[\w-][\w. -]{0,99}", re.ASCII)
"""What nearly all paths look like, and no rule of ``unsafe_path`` forbids: one look instead of seven."""
_STRING_OR_NOT_FINITE = re.compile(rb'"(?:[^"\\]|\\.)*+"|-?(?:NaN|Infinity)', re.DOTALL)
_ABSENT = -(2**63)
"""Stands for ``num_keypoints`` where an annotation has none."""
_INT32 = range(-(2**31), 2**31)
FAR_AWAY_IN_SIZES = 1.0
"""How far outside the image a labelled keypoint may lie, in image widths and heights."""
UNASSIGNED, UNKNOWN_IMAGE = "unassigned_annotation", "unknown_image"
"""Reject codes of annotations of no image of the file: their ``image_id`` cannot be read, or is not listed."""

ADJUSTMENTS = {
    "unassigned": "{:,} annotations of no image of the file: left out, so that some image may lack an instance",
    "whole_numbers": "{:,} entries with ids, sizes or counts written as text, float or boolean: read as whole numbers",
    "areas_of_segmentations": "{:,} annotations without an area: taken from the segmentation",
    "areas_of_boxes": "{:,} annotations without an area: 0.53 of the box inside the image, as in mmpose",
    "boxes_of_keypoints": "{:,} annotations without a bbox: the extent of their labelled keypoints",
    "counted_keypoints": "{:,} annotations without num_keypoints: counted the labelled keypoints",
    "differing_counts": "{:,} annotations whose num_keypoints is not the number of labelled keypoints: used as stated",
    "sorted_keypoints": "{:,} annotations with keypoints in another order, as their categories state: reordered",
    "unannotated_images": "{:,} images without an annotation: left out, since they show no pose",
    "blank_maps": "{:,} images whose annotations have no labelled keypoint: their index maps are blank",
    "shared_names": "{:,} categories that share a name: kept apart by id, also in tables",
    "unnamed_keypoints": "{:,} categories that name no keypoints: read in the order of the dataset's skeleton",
}
"""What may be read in another way than the file states it: sentences to format with the number of cases."""


class AnnotationFileError(ExpectedError, ValueError):
    """An annotation file that cannot be used at all.

    Attributes:
        rejects: rows of ``REJECT_SCHEMA`` on the entries that were found faulty before.
    """

    def __init__(self, message: str, rejects: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(message)
        self.rejects = list(rejects)


class Category(msgspec.Struct):
    """An entry of ``categories``; ``skeleton`` holds 1-based pairs."""

    id: int
    name: str
    supercategory: str | None = None
    keypoints: list[str] | None = None
    skeleton: list[list[int]] | None = None


class ImageEntry(msgspec.Struct, gc=False):
    """An entry of ``images``, with the optional fields of both datasets."""

    id: int
    file_name: str
    width: int
    height: int
    background: int | None = None
    page_url: str | None = None
    author: str | None = None
    description: str | None = None
    category: str | None = None


class AnnotationEntry(msgspec.Struct, gc=False):
    """An entry of ``annotations``; bbox is x, y, width, height in pixels; keypoints are flat x, y, v triples.

    ``bbox``, ``area`` and ``num_keypoints`` are None where the file has none.
    """

    id: int
    image_id: int
    category_id: int
    keypoints: list[float]
    bbox: list[float] | None = None
    area: float | None = None
    iscrowd: int = 0
    num_keypoints: int | None = None
    keypoints_21: list[float] | None = None


class _SegmentedEntry(AnnotationEntry, gc=False):
    """The same with the segmentation, which is only looked at where there is no area."""

    segmentation: msgspec.Raw = msgspec.Raw(b"null")


class Document(msgspec.Struct):
    """An annotation file cut into entries that are not decoded yet."""

    images: list[msgspec.Raw]
    annotations: list[msgspec.Raw]
    categories: list[msgspec.Raw]


class _PackedEntry(AnnotationEntry, gc=False):
    """An annotation that goes into the rows in use as soon as it is decoded, and keeps none of its lists."""

    def __post_init__(self) -> None:
        _rows.get().add(self)
        self.bbox = self.keypoints = _GONE
        self.keypoints_21 = None


class _PackedDocument(msgspec.Struct):
    """A whole annotation file, its instances' numbers packed."""

    images: list[ImageEntry]
    annotations: list[_PackedEntry]
    categories: list[Category]


_GONE: list[float] = []
_NO_BBOX = (math.nan,) * 4


@dataclass(kw_only=True)
class Annotations:
    """An annotation file's usable images and its instances as columns, with what is wrong with the rest.

    Attributes:
        images: R usable entries in file order.
        order: (U,) int64, the rows of the instances of usable images, sorted by image and else in file order.
        image_of: (U,) int64, for each of ``order`` the position in ``images``.
        ids, image_ids, category_ids, num_keypoints: (M,) int64, as all columns below in file order.
        iscrowd: (M,) bool.
        areas: (M,) float64, square pixels.
        bboxes_xywh: (M, 4) float64, pixels.
        keypoints: (M, K, 3) float64: x, y in pixels and visibility.
        has_keypoints_21: (M,) bool.
        keypoints_21: (L, 21, 3) float64 of the L instances that have them, HumanArt's 17 + 4.
        categories: by id.
        rejects: rows of ``REJECT_SCHEMA``.
        images_in_file: usable or not.
        annotations_in_file: likewise.
        adjustments: number of cases by name of ``ADJUSTMENTS``.
    """

    images: list[ImageEntry]
    order: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    image_of: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    ids: NDArray[np.int64]
    image_ids: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    num_keypoints: NDArray[np.int64]
    iscrowd: NDArray[np.bool_]
    areas: NDArray[np.float64]
    bboxes_xywh: NDArray[np.float64]
    keypoints: NDArray[np.float64]
    has_keypoints_21: NDArray[np.bool_]
    keypoints_21: NDArray[np.float64]
    categories: dict[int, Category]
    rejects: list[dict[str, Any]] = field(default_factory=list)
    images_in_file: int = 0
    annotations_in_file: int = 0
    adjustments: Counter[str] = field(default_factory=Counter)


class _Rows:
    """Instances as bytes, a row each: the fastest way from Python's numbers to arrays."""

    def __init__(self, num_keypoints: int) -> None:
        self._shape = (num_keypoints, 3)
        # Packing checks counts and ranges as it goes.
        self._pack = struct.Struct(f"5q5d{3 * num_keypoints}d").pack
        self._pack_21 = struct.Struct(f"{3 * KEYPOINTS_21}d").pack
        self._rows, self._rows_21, self._has_21 = bytearray(), bytearray(), bytearray()

    def __len__(self) -> int:
        return len(self._has_21)

    def add(self, each: AnnotationEntry) -> None:
        """Pack an instance.

        Raises:
            struct.error: a list of the wrong length or a whole number beyond 64 bits; nothing is added.
        """
        bbox = each.bbox or _NO_BBOX
        row = self._pack(
            each.id, each.image_id, each.category_id,
            _ABSENT if each.num_keypoints is None else each.num_keypoints, each.iscrowd,
            math.nan if each.area is None else each.area, *bbox, *each.keypoints,
        )  # fmt: skip
        if len(bbox) != 4:
            raise struct.error("numbers that are too many in one list and lack in the other")
        if each.keypoints_21 is not None:
            self._rows_21 += self._pack_21(*each.keypoints_21)
        self._rows += row
        self._has_21.append(each.keypoints_21 is not None)

    def annotations(self, images: list[ImageEntry], categories: dict[int, Category]) -> Annotations:
        """The columns of all rows, without a copy; they may be written to."""
        table = np.frombuffer(
            self._rows,
            [("whole", "i8", 5), ("area", "f8"), ("bbox", "f8", 4), ("keypoints", "f8", self._shape)],
        )
        ids, image_ids, category_ids, num_keypoints, iscrowd = table["whole"].T
        return Annotations(
            images=images,
            ids=ids,
            image_ids=image_ids,
            category_ids=category_ids,
            num_keypoints=num_keypoints,
            iscrowd=iscrowd != 0,
            areas=table["area"],
            bboxes_xywh=table["bbox"],
            keypoints=table["keypoints"],
            keypoints_21=np.frombuffer(self._rows_21).reshape(-1, KEYPOINTS_21, 3),
            has_keypoints_21=np.frombuffer(self._has_21, bool),
            categories=categories,
        )


_rows: ContextVar[_Rows] = ContextVar("_rows")
"""Where ``_PackedEntry`` puts its numbers: decoding makes the entries and has no way to hand them anything."""


def read_document(path: Path) -> Document:
    """Cut an annotation file into its entries.

    Raises:
        AnnotationFileError: the file is not JSON or has no such section; names the file and the location.
    """
    return _cut(path, _read(path))


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise AnnotationFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    # msgspec looks at the text of known fields alone, and exports copy the others.
    if fault := utf8_fault(data):
        raise AnnotationFileError(f"{path}: {fault}")
    return data


def _cut(path: Path, data: bytes) -> Document:
    try:
        return msgspec.json.decode(data, type=Document)
    except UNREADABLE as error:
        if isinstance(error, msgspec.ValidationError):
            raise AnnotationFileError(_wrong_section(path, error)) from None
        if not (b"NaN" in data or b"Infinity" in data):
            raise AnnotationFileError(_not_json(path, data, error)) from None
    data = _finite(data)
    try:
        return msgspec.json.decode(data, type=Document)
    except msgspec.ValidationError as error:
        raise AnnotationFileError(_wrong_section(path, error)) from None
    except UNREADABLE as error:
        raise AnnotationFileError(_not_json(path, data, error)) from None


def _finite(data: bytes) -> bytes:
    """The text with null for NaN and Infinity, which Python's json writes although JSON has neither.

    So the entries that hold them are rejected one by one.
    """
    pieces, start = [], 0
    for match in _STRING_OR_NOT_FINITE.finditer(data):
        if data[match.start()] != ord('"'):
            pieces += [data[start : match.start()], b"null"]
            start = match.end()
    return b"".join([*pieces, data[start:]])


def _wrong_section(path: Path, error: Exception) -> str:
    return (
        f"{path}: expected an object with the lists images, annotations and categories (COCO keypoint format): "
        f"{error}. Is this one of the dataset's own annotation files, complete?"
    )


def _not_json(path: Path, data: bytes, error: Exception) -> str:
    message = str(error)
    place = f"after its last byte ({len(data):,} bytes)"
    if isinstance(error, RecursionError):
        place = "(too many brackets inside each other)"
    elif "(byte " in message:
        place = location(data, int(message.rsplit("(byte ", 1)[1].rstrip(")")))
    return (
        f"{path}: expected JSON, found a fault {place}: {message}. Was the file copied or downloaded whole?"
    )


def read_annotations(path: Path, dataset: Dataset, *, max_pixels: int) -> Annotations:
    """Read and check a whole annotation file.

    Args:
        path: the JSON file.
        dataset: whose rules apply (keypoint count, backgrounds, names of files).
        max_pixels: largest width x height of an image that is accepted.

    Raises:
        AnnotationFileError: the file is not JSON in UTF-8, or has no such section, usable image or pose. Its
            ``rejects`` are those found until then.
    """
    rejects = _Rejects(path)
    try:
        return _read_annotations(path, dataset, max_pixels, rejects)
    except AnnotationFileError as error:
        error.rejects = rejects.rows
        raise


def _read_annotations(path: Path, dataset: Dataset, max_pixels: int, rejects: _Rejects) -> Annotations:
    data = _read(path)
    annotations = _decode_whole(data, dataset)
    if annotations is not None:
        del data  # memory for what follows
        _check_images(annotations.images, dataset, max_pixels, rejects)
    else:
        document = _cut(path, data)
        del data
        annotations = _decode_entries(path, document, dataset, max_pixels, rejects)
    names = Counter(category.name for category in annotations.categories.values())
    annotations.adjustments["shared_names"] = sum(count for count in names.values() if count > 1)
    _sort_keypoints(path, annotations, dataset)
    positions = _image_positions(annotations.images, annotations.image_ids)
    _complete_numbers(annotations, positions)
    _check_numbers(annotations, positions, rejects)
    _keep_usable(annotations, positions, rejects.image_ids)
    annotations.rejects = rejects.rows
    annotations.adjustments["unassigned"] = _num_unassigned(rejects.rows)
    _check_some_pose(path, annotations, rejects)
    return annotations


def _check_some_pose(path: Path, annotations: Annotations, rejects: _Rejects) -> None:
    num_images, unannotated = len(annotations.images), annotations.adjustments["unannotated_images"]
    if not num_images:
        found = [f"{code}: {count:,}" for code, count in rejects.reasons()]
        found += [f"images without an annotation: {unannotated:,}"] if unannotated else []
        raise AnnotationFileError(
            f"{path}: expected at least one usable image, found none "
            f"({', '.join(found) or 'an empty list of images'})"
        )
    if annotations.adjustments["blank_maps"] == num_images:
        raise AnnotationFileError(
            f"{path}: expected keypoints with a visibility of 1 or 2, found 0 in all annotations of {num_images:,} "
            "images, which means not labelled. Was the visibility lost when the file was converted?"
        )


def _num_unassigned(rejects: list[dict[str, Any]]) -> int:
    """Annotations of no image of the file; those of images whose own entries are faulty have been lost with these."""
    faulty = {row["image_id"] for row in rejects if row["code"] == "bad_image_entry"} - {None}
    return sum(
        row["code"] in (UNASSIGNED, UNKNOWN_IMAGE) and row["image_id"] not in faulty for row in rejects
    )


class _Rejects:
    """Collects reject rows and the images that they take along.

    Raises:
        AnnotationFileError: there are too many of them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[dict[str, Any]] = []
        self.image_ids: set[int] = set()

    def add(
        self, code: str, message: str, image: ImageEntry | int | None, annotation_id: int | None = None
    ) -> None:
        if len(self.rows) == MAX_REJECTS:
            reasons = ", ".join(f"{each}: {count:,}" for each, count in self.reasons())
            raise AnnotationFileError(
                f"{self._path}: expected at most {MAX_REJECTS:,} faults, found more ({reasons}). Is this one of the "
                "dataset's own annotation files?"
            )
        image_id = image.id if isinstance(image, ImageEntry) else image
        self.rows.append(
            {
                "image_id": image_id,
                "annotation_id": annotation_id,
                "file_name": _shortened(image.file_name) if isinstance(image, ImageEntry) else None,
                "code": code,
                "message": _shortened(message),
            }
        )
        if image_id is not None:
            self.image_ids.add(image_id)

    def reasons(self) -> list[tuple[str, int]]:
        """The commonest codes."""
        return Counter(row["code"] for row in self.rows).most_common(3)


def _shortened(text: str) -> str:
    """Texts of a file that means harm may be as long as the file."""
    return text if len(text) <= MAX_REJECT_CHARACTERS else f"{text[:MAX_REJECT_CHARACTERS]}…"


def _decode_whole(data: bytes, dataset: Dataset) -> Annotations | None:
    """A file in which everything decodes and fits together; None for any other, which needs a closer look."""
    rows = _Rows(dataset.skeleton.num_keypoints)
    token = _rows.set(rows)
    try:
        document = msgspec.json.decode(data, type=_PackedDocument)
    except (*UNREADABLE, struct.error):
        return None
    finally:
        _rows.reset(token)
    if len(rows) != len(document.annotations):  # the section comes twice, and the last one counts
        return None
    categories = {category.id: category for category in document.categories}
    found = rows.annotations(document.images, categories)
    fits = all(map(_image_fits, found.images)) and all(map(_fits_int64, categories))
    if not (fits and _instances_fit(found)) or len(categories) != len(document.categories):
        return None
    if b'"segmentation"' in data and not (found.areas > 0).all():
        return None
    found.images_in_file, found.annotations_in_file = len(found.images), len(rows)
    return found


def _instances_fit(found: Annotations) -> bool:
    """Whether all instances' images and categories are in the file, and their counts in range."""
    return bool(
        np.isin(found.image_ids, [image.id for image in found.images]).all()
        and np.isin(found.category_ids, list(found.categories)).all()
        and (
            ((found.num_keypoints >= 0) & (found.num_keypoints < 2**31)) | (found.num_keypoints == _ABSENT)
        ).all()
    )


def _decode_entries(
    path: Path, document: Document, dataset: Dataset, max_pixels: int, rejects: _Rejects
) -> Annotations:
    """The entries that decode and fit; what is wrong with the others goes to ``rejects``."""
    adjustments: Counter[str] = Counter()
    categories = categories_by_id(path, document, adjustments)
    images_in_file, annotations_in_file = len(document.images), len(document.annotations)
    images = _decode_images(document.images, dataset, max_pixels, rejects, adjustments)
    found = _decode_annotations(document.annotations, images, dataset, categories, rejects, adjustments)
    return replace(
        found,
        images_in_file=images_in_file,
        annotations_in_file=annotations_in_file,
        adjustments=adjustments,
    )


def categories_by_id(
    path: Path, document: Document, adjustments: Counter[str] | None = None
) -> dict[int, Category]:
    """The categories of an annotation file; ``adjustments`` gets the number of those with converted numbers.

    Raises:
        AnnotationFileError: one cannot be read, or two share an id.
    """
    decoder = EntryDecoder(Category)
    categories: dict[int, Category] = {}
    for position, entry in enumerate(document.categories):
        try:
            category, _ = decoder.decode(entry)
        except UNREADABLE as error:
            raise AnnotationFileError(f"{path}: categories[{position}]: {error}") from None
        if category.id in categories:
            raise AnnotationFileError(
                f"{path}: expected each category id once, found {category.id} for "
                f"{categories[category.id].name!r} and {category.name!r}. Remove one, or give it and its annotations "
                "another id"
            )
        categories[category.id] = category
    if adjustments is not None:
        adjustments["whole_numbers"] += decoder.num_converted
    return categories


def _sort_keypoints(path: Path, flat: Annotations, dataset: Dataset) -> None:
    """Bring keypoints that a category lists in another order into the skeleton's.

    Raises:
        AnnotationFileError: a category with annotations names other keypoints than the skeleton; or 17 keypoints are
            in another order, and nothing states that of ``keypoints_21``.
    """
    used, category_of = np.unique(flat.category_ids, return_inverse=True)
    if not len(used):
        return
    categories = [flat.categories[key] for key in used.tolist()]
    orders = np.array([_order_of(path, category, dataset) for category in categories])
    flat.adjustments["unnamed_keypoints"] += sum(not category.keypoints for category in categories)
    is_other = (orders != np.arange(orders.shape[1])).any(axis=1)[category_of]
    if (is_other & flat.has_keypoints_21).any():
        raise AnnotationFileError(
            f"{path}: expected keypoints in the order of the skeleton where annotations have keypoints_21 too, found "
            "another in categories. Nothing states the order of keypoints_21: reorder the file, or remove them"
        )
    rows = np.flatnonzero(is_other)
    flat.keypoints[rows] = np.take_along_axis(
        flat.keypoints[rows], orders[category_of[rows], :, None], axis=1
    )
    flat.adjustments["sorted_keypoints"] += len(rows)


def _order_of(path: Path, category: Category, dataset: Dataset) -> tuple[int, ...]:
    try:
        return keypoint_order(category.keypoints or (), dataset.skeleton)
    except KeypointOrderError as error:
        raise AnnotationFileError(
            f"{path}: keypoints of category {category.id} ({category.name!r}), under {dataset.title}: {error}. Is "
            f"this an annotation file of {dataset.title}?"
        ) from None


def _complete_numbers(flat: Annotations, positions: NDArray[np.int64]) -> None:
    """Fill in counts, boxes and areas that the file does not state; an area of 0 or less counts as none."""
    counts = (flat.keypoints[:, :, 2] > 0).sum(axis=1)
    absent = flat.num_keypoints == _ABSENT
    flat.num_keypoints[absent] = counts[absent]
    flat.adjustments["counted_keypoints"] += int(absent.sum())
    flat.adjustments["differing_counts"] += int((flat.num_keypoints != counts).sum())
    absent = np.isnan(flat.bboxes_xywh).all(axis=1) & (counts > 0)
    flat.bboxes_xywh[absent] = keypoint_boxes(flat.keypoints[absent])
    flat.adjustments["boxes_of_keypoints"] += int(absent.sum())
    absent = ~(flat.areas > 0)
    if absent.any():
        sizes_wh = np.array([[image.width, image.height] for image in flat.images], np.float64)
        flat.areas[absent] = box_areas(flat.bboxes_xywh[absent], sizes_wh[positions[absent]])
        flat.adjustments["areas_of_boxes"] += int(absent.sum())


def _decode_images(
    entries: list[msgspec.Raw],
    dataset: Dataset,
    max_pixels: int,
    rejects: _Rejects,
    adjustments: Counter[str],
) -> list[ImageEntry]:
    """Every image that can be decoded; those that are wrong in themselves are marked in ``rejects``."""
    decoder = EntryDecoder(ImageEntry)
    images: list[ImageEntry] = []
    for position, entry in enumerate(entries):
        try:
            image, _ = decoder.decode(entry)
        except UNREADABLE as error:
            rejects.add(
                "bad_image_entry",
                f"images[{position}]: {error}",
                _int64_or_none(whole_number_in(entry, "id")),
            )
            continue
        if not _image_fits(image):
            message = f"images[{position}] holds a whole number that is out of range"
            rejects.add("bad_image_entry", message, _int64_or_none(image.id))
            continue
        images.append(image)
        if fault := _image_fault(image, dataset, max_pixels):
            rejects.add(*fault, image)
    entries.clear()
    adjustments["whole_numbers"] += decoder.num_converted
    _check_shared(images, dataset, rejects)
    return images


def _check_images(images: list[ImageEntry], dataset: Dataset, max_pixels: int, rejects: _Rejects) -> None:
    for image in images:
        if fault := _image_fault(image, dataset, max_pixels):
            rejects.add(*fault, image)
    _check_shared(images, dataset, rejects)


def _check_shared(images: list[ImageEntry], dataset: Dataset, rejects: _Rejects) -> None:
    """Ids and places of conditions that several images would share."""
    # Conditions are PNG files named after the image, so x.jpg and x.png would be one.
    stems = [dataset.artifact_stem(image.file_name) for image in images]
    for kind, values in (("id", [image.id for image in images]), ("file_name", stems)):
        if len(set(values)) == len(values):
            continue
        counts = Counter(values)
        for image, value in zip(images, values, strict=True):
            if counts[value] > 1:
                rejects.add(
                    f"duplicate_image_{kind}", f"{counts[value]} images share the {kind} {value!r}", image
                )


def _image_fault(image: ImageEntry, dataset: Dataset, max_pixels: int) -> tuple[str, str] | None:
    path = dataset.image_path(image.file_name)
    if fault := unsafe_path(image.file_name) or (unsafe_path(path) if path != image.file_name else None):
        return "unsafe_path", f"file_name {image.file_name!r} {fault}"
    if path.split("/", 1)[0] not in dataset.image_folders:
        known = " or ".join(f"{folder}/" for folder in dataset.image_folders)
        return "unsafe_path", f"expected file_name to lead into {known}, found {image.file_name!r}"
    width, height = image.width, image.height
    if not (0 < width in _INT32 and 0 < height in _INT32 and width * height <= max_pixels):
        return (
            "bad_size",
            f"expected a width and height above 0 and at most {max_pixels:,} pixels in all "
            f"(setting [index] max_pixels), found {width} x {height}",
        )
    if image.background is not None and image.background not in (dataset.backgrounds or _INT32):
        known = ", ".join(map(str, dataset.backgrounds)) or "whole numbers of 32 bits"
        return "unknown_background", f"expected a background id among {known}, found {image.background}"
    return None


def unsafe_path(path: str) -> str | None:
    """Why a relative path may not be joined to a folder, or None when it is harmless."""
    if _PLAIN_PATH.fullmatch(path):
        return None
    if path.startswith("/"):
        return "is absolute"
    if _WINDOWS_PATH.match(path):
        return "is an absolute path of Windows"
    if _URL.match(path):
        return "is a URL, where a path below the dataset was expected"
    parts = path.split("/")
    if ".." in parts:
        return "climbs out of the dataset"
    if "" in parts or "." in parts:
        return "names no file"
    if _UNPRINTABLE.search(path):
        return "holds a backslash or a control character"
    if any(part.endswith(_LIKE_EXPORTED_FILES) for part in parts[:-1]):
        return "has a folder that is named like a file"  # of an export, where the conditions of another image may be
    try:
        longest = max(map(len, parts)) if path.isascii() else max(len(part.encode()) for part in parts)
    except UnicodeEncodeError:
        return "is not valid Unicode"
    if longest > MAX_FILE_NAME_BYTES:
        return f"has a part longer than {MAX_FILE_NAME_BYTES} bytes"
    return f"is longer than {MAX_PATH_CHARACTERS} characters" if len(path) > MAX_PATH_CHARACTERS else None


def _decode_annotations(
    entries: list[msgspec.Raw],
    images: list[ImageEntry],
    dataset: Dataset,
    categories: dict[int, Category],
    rejects: _Rejects,
    adjustments: Counter[str],
) -> Annotations:
    """Decode, check and gather the instances of the images that remain."""
    decoder = EntryDecoder(_SegmentedEntry)
    known_images = {image.id: image for image in images}
    rows = _Rows(dataset.skeleton.num_keypoints)
    for position, entry in enumerate(entries):
        try:
            each, _ = decoder.decode(entry)
        except UNREADABLE as error:
            image_id, annotation_id = (
                _int64_or_none(whole_number_in(entry, name)) for name in ("image_id", "id")
            )
            where = (
                f"annotations[{position}]"
                if annotation_id is None
                else f"annotations[{position}] (id {annotation_id})"
            )
            if image_id is None:
                rejects.add(UNASSIGNED, f"{where}: its image cannot be known: {error}", None, annotation_id)
            else:
                image = known_images.get(image_id)
                rejects.add("bad_annotation_entry", f"{where}: {error}", image or image_id, annotation_id)
            continue
        image = known_images.get(each.image_id)
        if image and not (each.area or 0) > 0 and (area := _area_of(each.segmentation, image)) is not None:
            each.area = area
            adjustments["areas_of_segmentations"] += 1
        fits = image is not None and each.category_id in categories
        fits &= each.num_keypoints is None or 0 <= each.num_keypoints < 2**31
        try:
            if fits:
                rows.add(each)
        except struct.error:
            fits = False
        if not fits:
            fault = _annotation_fault(each, image, 3 * dataset.skeleton.num_keypoints, categories)
            rejects.add(*fault, image or _int64_or_none(each.image_id), _int64_or_none(each.id))
    entries.clear()  # with the last entry goes the file's text
    adjustments["whole_numbers"] += decoder.num_converted
    return rows.annotations(images, categories)


def _area_of(segmentation: msgspec.Raw, image: ImageEntry) -> float | None:
    try:
        return segmentation_area(msgspec.json.decode(segmentation), (image.width, image.height))
    except UNREADABLE:
        return None


def _int64_or_none(value: int | None) -> int | None:
    return value if value is not None and _fits_int64(value) else None


def _image_fits(image: ImageEntry) -> bool:
    return _fits_int64(image.id) and _fits_int64(image.width) and _fits_int64(image.height)


def _fits_int64(value: int) -> bool:
    return -(2**63) <= value < 2**63


def _annotation_fault(
    each: AnnotationEntry, image: ImageEntry | None, numbers: int, categories: dict[int, Category]
) -> tuple[str, str]:
    """Why an annotation cannot be used, given that it cannot."""
    if image is None:
        return (
            UNKNOWN_IMAGE,
            f"annotation {each.id} belongs to image {each.image_id}, which the file does not list or not readably",
        )
    if len(each.keypoints) != numbers:
        return (
            "keypoint_count",
            f"expected {numbers} numbers in keypoints of annotation {each.id}, found {len(each.keypoints)}",
        )
    if each.keypoints_21 is not None and len(each.keypoints_21) != 3 * KEYPOINTS_21:
        return (
            "keypoint_count",
            f"expected {3 * KEYPOINTS_21} numbers in keypoints_21 of annotation {each.id}, "
            f"found {len(each.keypoints_21)}",
        )
    if each.bbox and len(each.bbox) != 4:
        return "bad_bbox", f"expected x, y, width, height in bbox of annotation {each.id}, found {each.bbox}"
    if each.category_id not in categories:
        return (
            "unknown_category",
            f"annotation {each.id} has category {each.category_id}, which the file does not list",
        )
    if not 0 <= (each.num_keypoints or 0) < 2**31:
        return (
            "bad_annotation_entry",
            f"expected num_keypoints of 0 or more in annotation {each.id}, found {each.num_keypoints}",
        )
    return "bad_annotation_entry", f"annotation {each.id} holds a whole number that is out of range"


def _image_positions(images: list[ImageEntry], image_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """(M,) int64: where in ``images`` each id is, the last place of several; -1 where it is not there."""
    if not images:
        return np.full(len(image_ids), -1)
    known = np.array([image.id for image in images], np.int64)
    order = np.argsort(known, kind="stable")
    positions = order[np.searchsorted(known, image_ids, side="right", sorter=order) - 1]
    return np.where(known[positions] == image_ids, positions, -1)


def _check_numbers(flat: Annotations, positions: NDArray[np.int64], rejects: _Rejects) -> None:
    """The checks that run over whole columns: duplicates, coordinates, visibility, boxes."""
    unique, counts = np.unique(flat.ids, return_counts=True)
    duplicated = np.isin(flat.ids, unique[counts > 1])
    x, y, v = np.moveaxis(flat.keypoints, 2, 0)
    width = np.array([image.width for image in flat.images], np.float64)[positions, None]
    height = np.array([image.height for image in flat.images], np.float64)[positions, None]
    near = (x >= -FAR_AWAY_IN_SIZES * width) & (x <= (1 + FAR_AWAY_IN_SIZES) * width)
    near &= (y >= -FAR_AWAY_IN_SIZES * height) & (y <= (1 + FAR_AWAY_IN_SIZES) * height)
    finite = _whole_rows(np.isfinite(flat.keypoints)) & np.isfinite(flat.areas)
    finite[flat.has_keypoints_21] &= _whole_rows(np.isfinite(flat.keypoints_21))
    checks = (
        ("duplicate_annotation_id", duplicated, "several annotations share the id"),
        ("bad_coordinate", ~finite, "expected finite numbers in keypoints and area of annotation"),
        (
            "bad_visibility",
            ~_whole_rows((v == 0) | (v == 1) | (v == 2)),
            "expected visibility 0, 1 or 2 in keypoints of annotation",
        ),
        (
            "far_away_keypoint",
            ~_whole_rows(near | (v == 0)),
            "a labelled keypoint lies more than one image size outside the image, annotation",
        ),
        (
            "bad_bbox",
            ~(_whole_rows(np.isfinite(flat.bboxes_xywh)) & _whole_rows(flat.bboxes_xywh[:, 2:] >= 0)),
            "expected finite numbers and no negative size in bbox, or without bbox labelled keypoints, of annotation",
        ),
    )
    for code, wrong, message in checks:
        for row in np.flatnonzero(wrong).tolist():
            annotation_id = int(flat.ids[row])
            rejects.add(code, f"{message} {annotation_id}", flat.images[positions[row]], annotation_id)


def _whole_rows(good: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(M, ...) to (M,): which rows are good throughout. A look at all at once, mostly enough, costs a tenth."""
    if good.all():
        return np.ones(len(good), bool)
    return np.asarray(good.reshape(len(good), -1).all(axis=1))


def _keep_usable(flat: Annotations, positions: NDArray[np.int64], rejected_image_ids: set[int]) -> None:
    """Drop whole images: those with a fault, whose maps would be silently wrong, and those that show no pose."""
    usable = np.array([image.id not in rejected_image_ids for image in flat.images], bool)
    is_annotated, has_pose = np.zeros((2, len(usable)), bool)
    is_annotated[positions] = True
    has_pose[positions[(flat.keypoints[:, :, 2] > 0).any(axis=1)]] = True
    flat.adjustments["unannotated_images"] += int((usable & ~is_annotated).sum())
    flat.adjustments["blank_maps"] += int((usable & is_annotated & ~has_pose).sum())
    usable &= is_annotated
    flat.images = list(itertools.compress(flat.images, usable))
    image_of = np.where(usable, np.cumsum(usable) - 1, -1)[positions]
    order = np.argsort(image_of, kind="stable")
    flat.order = order[np.searchsorted(image_of[order], 0) :]
    flat.image_of = image_of[flat.order]

"""Annotated and predicted poses as flat arrays, from COCO files and dicts, our own tables, or arrays.

Legend: I images, G annotated instances, D predictions, C categories, K keypoints. Coordinates are pixels.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eval.files import read_json, read_numbers
from spctrl.data.annotations.areas import box_areas, segmentation_area
from spctrl.data.annotations.entry_decoder import whole_number
from spctrl.data.annotations.keypoint_order import KeypointOrderError, keypoint_order
from spctrl.data.boxes import clip_boxes, keypoint_boxes
from spctrl.data.records import KEYPOINTS_TYPE, NUM_KEYPOINTS
from spctrl.errors import ExpectedError

if TYPE_CHECKING:
    from spctrl.data.datasets import Dataset

T = TypeVar("T")
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

PREDICTION_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("annotation_id", pa.int64()),
        ("category_id", pa.int64()),
        ("bbox_xywh", pa.list_(pa.float64(), 4)),
        ("bbox_score", pa.float64()),
        ("keypoints", KEYPOINTS_TYPE),
    ]
)
"""What a pose estimator found, one row per box: a keypoint is x, y and its score; ``annotation_id`` is that of the box,
null for a detected one."""

NO_ANNOTATION = -1
_MAX_AREA = 1e300
"""Whole numbers of a file may be beyond what arrays hold."""


class InstancesError(ExpectedError, ValueError):
    """Annotations or predictions that cannot be evaluated."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GroundTruth:
    """The annotated instances of some images.

    Attributes:
        image_ids: (I,) int64, ascending; also those without instances.
        sizes_wh: (I, 2) float64, width and height; NaN where they are not known.
        scenarios: (I,) names of the images' own categories (HumanArt's scenarios; empty where there is none).
        category_ids: (C,) int64, ascending; those of the file, also without instances.
        category_names: C names, all different: those of several categories have the id behind them.
        image_of: (G,) int64, position in ``image_ids``.
        category_of: (G,) int64, position in ``category_ids``.
        annotation_ids: (G,) int64.
        keypoints: (G, K, 3) float64: x, y and visibility; 0 means not labelled.
        bboxes_xywh: (G, 4) float64.
        areas: (G,) float64, square pixels.
        crowd: (G,) bool.
        ignored: (G,) bool: crowds, and instances without a labelled keypoint.
    """

    image_ids: Integers
    sizes_wh: Floats
    scenarios: tuple[str, ...]
    category_ids: Integers
    category_names: tuple[str, ...]
    image_of: Integers
    category_of: Integers
    annotation_ids: Integers
    keypoints: Floats
    bboxes_xywh: Floats
    areas: Floats
    crowd: Booleans
    ignored: Booleans

    @functools.cached_property
    def clipped_bboxes_xywh(self) -> Floats:
        """(G, 4) the parts of the boxes inside their images, which pose estimators and their scores see."""
        return clip_boxes(self.bboxes_xywh, self.sizes_wh[self.image_of])

    @functools.cached_property
    def has_estimate(self) -> Booleans:
        """(G,) instances whose poses are estimated, as in mmpose: they count, and their clipped boxes have an area."""
        return np.asarray(~self.ignored & (self.clipped_bboxes_xywh[:, 2:] > 0).all(axis=1))

    def sizes_wh_of(self, image_ids: Integers) -> Floats:
        """(N, 2) sizes of images by id; NaN of those that are not known here."""
        rows = np.searchsorted(self.image_ids, image_ids).clip(max=len(self.image_ids) - 1)
        return np.where((self.image_ids[rows] == image_ids)[:, None], self.sizes_wh[rows], np.nan)


@dataclass(frozen=True, kw_only=True, eq=False)
class Poses:
    """What a pose estimator found in boxes, before it is scored.

    Attributes:
        image_ids, category_ids: (D,) int64.
        annotation_ids: (D,) int64, whose box it was; ``NO_ANNOTATION`` for a detected box.
        bboxes_xywh: (D, 4) float64.
        bbox_scores: (D,) float64 in [0, 1]; 1 for a ground-truth box.
        keypoints: (D, K, 2) float64.
        keypoint_scores: (D, K) float64, in [0, 1] or a little above.
    """

    image_ids: Integers
    category_ids: Integers
    annotation_ids: Integers
    bboxes_xywh: Floats
    bbox_scores: Floats
    keypoints: Floats
    keypoint_scores: Floats

    def __post_init__(self) -> None:
        """
        Raises:
            InstancesError: numbers that are not finite.
        """
        for name in ("bboxes_xywh", "bbox_scores", "keypoints", "keypoint_scores"):
            _check_finite("the poses", name, getattr(self, name))

    def __len__(self) -> int:
        return len(self.image_ids)


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """Scored predictions, as the COCO protocol ranks them.

    Attributes:
        image_ids, category_ids: (D,) int64.
        keypoints: (D, K, 2) float64.
        scores: (D,) float64.
        areas: (D,) float64, square pixels: an unmatched prediction counts against the area range that it is in.
    """

    image_ids: Integers
    category_ids: Integers
    keypoints: Floats
    scores: Floats
    areas: Floats

    def __post_init__(self) -> None:
        """
        Raises:
            InstancesError: numbers that are not finite.
        """
        for name in ("keypoints", "scores", "areas"):
            _check_finite("the predictions", name, getattr(self, name))

    def __len__(self) -> int:
        return len(self.image_ids)


# Ground truth


def read_ground_truth(
    source: Path | str | Mapping[str, Any] | pa.Table | GroundTruth, dataset: Dataset | None = None
) -> GroundTruth:
    """Ground truth from a COCO keypoint file or its content, or from a table of records (``RECORD_SCHEMA``).

    Annotations of images that are not listed are left out, as pycocotools does. Where a file has no area, it is that of
    the segmentation, else 0.53 of the box, as in mmpose; ``num_keypoints`` is counted, and an absent box is the extent
    of the labelled keypoints.

    Args:
        source: what is read.
        dataset: whose skeleton a file's keypoints must have, in order. Predictions are in that order, and only the file
            could say otherwise.

    Raises:
        InstancesError: it cannot be read or is incomplete, names an image or a category id twice, or states other
            keypoints.
    """
    if isinstance(source, GroundTruth):
        return source
    if isinstance(source, pa.Table):
        return _ground_truth_of_table(source)
    if isinstance(source, Mapping):
        return _ground_truth_of_coco(source, "the annotations", dataset)
    if not isinstance(source, Path | str):
        raise InstancesError(
            f"the annotations: expected a COCO file's path or content, found {type(source).__name__}"
        )
    content = _read(Path(source), "JSON", read_json)
    if not isinstance(content, Mapping):
        raise InstancesError(
            f"{source}: expected a COCO file (a JSON object), found {type(content).__name__}"
        )
    return _ground_truth_of_coco(content, str(source), dataset)


def _ground_truth_of_coco(content: Mapping[str, Any], where: str, dataset: Dataset | None) -> GroundTruth:
    missing = [name for name in ("images", "annotations") if name not in content]
    if missing:
        raise InstancesError(f"{where}: expected the section {missing[0]!r}, found {', '.join(content)}")
    image_ids = _column(content["images"], "id", np.int64, where)
    images = [content["images"][i] for i in np.argsort(image_ids)]
    listed = np.isin(_column(content["annotations"], "image_id", np.int64, where), image_ids)
    annotations = list(itertools.compress(content["annotations"], listed))
    categories = content.get("categories", ())
    names = _category_names(categories, where)
    keypoints = _keypoint_triplets(annotations, where)
    category_ids = _column(annotations, "category_id", np.int64, where)
    if dataset is not None:
        used = np.isin(np.array(list(names), np.int64), category_ids).tolist()
        _check_order(itertools.compress(categories, used), dataset, where)
    sizes_wh = _sizes_wh(images, where)
    bboxes_xywh = _boxes_or_extents(annotations, keypoints, where)
    owners = _column(annotations, "image_id", np.int64, where)
    order = np.argsort(image_ids)
    return _ground_truth(
        where,
        image_ids=image_ids[order],
        sizes_wh=sizes_wh,
        scenarios=tuple(str(image.get("category") or "") for image in images),
        names=names,
        instances_image_ids=owners,
        instances_category_ids=category_ids,
        annotation_ids=_column(annotations, "id", np.int64, where),
        keypoints=keypoints,
        bboxes_xywh=bboxes_xywh,
        areas=_areas(annotations, bboxes_xywh, sizes_wh[np.searchsorted(image_ids[order], owners)], where),
        crowd=_column([{"iscrowd": each.get("iscrowd")} for each in annotations], "iscrowd", np.int64, where)
        != 0,
        labelled=_num_labelled(annotations, keypoints, where),
    )


def _ground_truth_of_table(table: pa.Table) -> GroundTruth:
    table = table.sort_by("image_id").combine_chunks()
    image_ids = table.column("image_id").to_numpy().astype(np.int64)
    lists = table.column("instances").combine_chunks()
    counts = np.diff(lists.offsets.to_numpy())
    instances = lists.flatten()
    categories = instances.field("category").to_pylist()
    category_ids = instances.field("category_id").to_numpy().astype(np.int64)
    keypoints = instances.field("keypoints").flatten().flatten().to_numpy().reshape(len(instances), -1, 3)
    return _ground_truth(
        "the records",
        image_ids=image_ids,
        sizes_wh=np.stack([table.column(name).to_numpy() for name in ("width", "height")], axis=1).astype(
            np.float64
        ),
        scenarios=tuple(each or "" for each in table.column("category").to_pylist()),
        names=dict(zip(category_ids.tolist(), categories, strict=True)),
        instances_image_ids=np.repeat(image_ids, counts),
        instances_category_ids=category_ids,
        annotation_ids=instances.field("annotation_id").to_numpy().astype(np.int64),
        keypoints=keypoints.astype(np.float64),
        bboxes_xywh=instances.field("bbox_xywh").flatten().to_numpy().reshape(-1, 4).astype(np.float64),
        areas=instances.field("area").to_numpy().astype(np.float64),
        crowd=instances.field("iscrowd").to_numpy(zero_copy_only=False).astype(bool),
        labelled=instances.field("num_keypoints").to_numpy().astype(np.int64),
    )


def _ground_truth(
    where: str,
    *,
    image_ids: Integers,
    sizes_wh: Floats,
    scenarios: tuple[str, ...],
    names: Mapping[int, str],
    instances_image_ids: Integers,
    instances_category_ids: Integers,
    annotation_ids: Integers,
    keypoints: Floats,
    bboxes_xywh: Floats,
    areas: Floats,
    crowd: Booleans,
    labelled: Integers,
) -> GroundTruth:
    if not len(annotation_ids):
        raise InstancesError(f"{where}: expected annotated instances, found none")
    if (np.diff(image_ids) == 0).any():
        twice = image_ids[1:][np.diff(image_ids) == 0]
        raise InstancesError(f"{where}: expected each image once, found image {twice[0]} again")
    _check_finite(where, "keypoints", keypoints[..., :2][keypoints[..., 2] > 0])
    _check_finite(where, "area", areas)
    category_ids = np.unique(np.concatenate([instances_category_ids, np.array(list(names), np.int64)]))
    return GroundTruth(
        image_ids=image_ids,
        sizes_wh=sizes_wh,
        scenarios=scenarios,
        category_ids=category_ids,
        category_names=_told_apart(names, category_ids.tolist()),
        image_of=np.searchsorted(image_ids, instances_image_ids),
        category_of=np.searchsorted(category_ids, instances_category_ids),
        annotation_ids=annotation_ids,
        keypoints=keypoints,
        bboxes_xywh=bboxes_xywh,
        areas=areas,
        crowd=crowd,
        ignored=crowd | (labelled == 0),
    )


def _told_apart(names: Mapping[int, str], category_ids: Sequence[int]) -> tuple[str, ...]:
    """A name for each category, with its id where it has none of its own."""
    named = [names.get(each, str(each)) for each in category_ids]
    counts = Counter(named)
    return tuple(
        f"{name} ({each})" if counts[name] > 1 else name
        for name, each in zip(named, category_ids, strict=True)
    )


# Predictions


def read_poses(source: Path | str | pa.Table | Poses) -> Poses:
    """What a pose estimator found, from a table (``PREDICTION_SCHEMA``) or a Parquet file of one.

    Raises:
        InstancesError: it cannot be read or lacks something.
    """
    if isinstance(source, Poses):
        return source
    where = "the predictions" if isinstance(source, pa.Table) else str(source)
    table = source if isinstance(source, pa.Table) else _read(Path(source), "Parquet", _read_poses_file)
    missing = [name for name in PREDICTION_SCHEMA.names if name not in table.column_names]
    if missing:
        raise InstancesError(
            f"{where}: expected the columns {', '.join(PREDICTION_SCHEMA.names)}, found no {missing[0]!r}"
        )
    table = table.select(PREDICTION_SCHEMA.names).cast(PREDICTION_SCHEMA).combine_chunks()
    triplets = _flat(table, "keypoints").flatten().to_numpy()
    K = len(triplets) // (3 * len(table)) if len(table) else NUM_KEYPOINTS
    if len(triplets) != 3 * K * len(table):
        raise InstancesError(f"{where}: expected the same number of keypoints in each row")
    keypoints = triplets.reshape(len(table), K, 3)
    return Poses(
        image_ids=table.column("image_id").to_numpy(),
        category_ids=table.column("category_id").to_numpy(),
        annotation_ids=table.column("annotation_id").fill_null(NO_ANNOTATION).to_numpy(),
        bboxes_xywh=_flat(table, "bbox_xywh").to_numpy().reshape(-1, 4),
        bbox_scores=table.column("bbox_score").to_numpy(),
        keypoints=keypoints[..., :2],
        keypoint_scores=keypoints[..., 2],
    )


def poses_table(poses: Poses) -> pa.Table:
    """The same as a table of ``PREDICTION_SCHEMA``."""
    triplets = np.concatenate([poses.keypoints, poses.keypoint_scores[..., None]], axis=-1)
    D, K = triplets.shape[:2]
    points = pa.FixedSizeListArray.from_arrays(pa.array(triplets.reshape(-1)), 3)
    offsets = pa.array(np.arange(D + 1, dtype=np.int32) * K)
    return pa.Table.from_arrays(
        [
            pa.array(poses.image_ids),
            pa.array(poses.annotation_ids, mask=poses.annotation_ids == NO_ANNOTATION),
            pa.array(poses.category_ids),
            pa.FixedSizeListArray.from_arrays(pa.array(poses.bboxes_xywh.reshape(-1)), 4),
            pa.array(poses.bbox_scores),
            pa.ListArray.from_arrays(offsets, points),
        ],
        schema=PREDICTION_SCHEMA,
    )


def read_results(source: Path | str | Sequence[Mapping[str, Any]] | Predictions) -> Predictions:
    """Scored predictions from a COCO results list (``image_id, category_id, keypoints, score``) or its JSON file.

    Areas are those of the results' boxes where the first one has a ``bbox``, and else of the keypoints' extent, as
    pycocotools' ``loadRes`` takes them; it would also take those of a ``segmentation``, which poses do not have.

    Raises:
        InstancesError: it cannot be read or lacks something.
    """
    if isinstance(source, Predictions):
        return source
    where = str(source) if isinstance(source, Path | str) else "the predictions"
    results = _read(Path(source), "JSON", read_json) if isinstance(source, Path | str) else source
    if not isinstance(results, Sequence):
        raise InstancesError(
            f"{where}: expected a COCO results list (a JSON array), found {type(results).__name__}"
        )
    keypoints = _keypoint_triplets(results, where)[..., :2]
    if results and results[0].get("bbox"):
        areas = _boxes(results, where)[:, 2:].prod(axis=1)
    else:
        areas = keypoint_areas(keypoints)
    return Predictions(
        image_ids=_column(results, "image_id", np.int64, where),
        category_ids=_column(results, "category_id", np.int64, where),
        keypoints=keypoints,
        scores=_column(results, "score", np.float64, where),
        areas=areas,
    )


def keypoint_areas(keypoints: Floats) -> Floats:
    """(D,) areas of the smallest boxes around keypoints (D, K, 2), all of them, whatever their scores."""
    return np.asarray(np.ptp(keypoints, axis=1).prod(axis=-1))


def check_predictions(predictions: Predictions, truth: GroundTruth) -> None:
    """
    Raises:
        InstancesError: another number of keypoints, or images or categories that the ground truth does not have.
    """
    where = "the predictions"
    expected, found = truth.keypoints.shape[1], predictions.keypoints.shape[1]
    if len(predictions) and expected != found:
        raise InstancesError(f"{where}: expected {expected} keypoints an instance, found {found}")
    for what, known, used in (
        ("image", truth.image_ids, predictions.image_ids),
        ("category", truth.category_ids, predictions.category_ids),
    ):
        unknown = np.setdiff1d(used, known)
        if len(unknown):
            raise InstancesError(
                f"{where}: expected ids of the ground truth, found {len(unknown)} {what} ids that it does not have, "
                f"such as {unknown[0]}. Evaluate against the annotations that the predictions were made for."
            )


# Reading


def _read(path: Path, form: str, reader: Callable[[Path], T]) -> T:
    try:
        return reader(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = error.strerror or error if isinstance(error, OSError) else error
        kind = "" if isinstance(error, OSError) else f" as {form}"
        raise InstancesError(f"{path}: cannot be read{kind}: {reason}") from error


def _read_poses_file(path: Path) -> pa.Table:
    return read_numbers(path, PREDICTION_SCHEMA.names)


def _flat(table: pa.Table, name: str) -> pa.Array:
    return table.column(name).combine_chunks().flatten()


def _column(entries: Iterable[Mapping[str, Any]], name: str, dtype: type, where: str) -> NDArray[Any]:
    try:
        values = [each[name] for each in entries]
        if dtype is np.int64:
            values = [_whole(value, name) for value in values]
        return np.array(values, dtype)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        _refuse(name, error, where)


def _whole(value: Any, name: str) -> int:
    if (number := whole_number(value, name)) is None:
        raise ValueError(f"expected whole numbers, found {value!r}")
    return number


def _boxes(entries: Sequence[Mapping[str, Any]], where: str) -> Floats:
    """(N, 4)"""
    boxes = _column(entries, "bbox", np.float64, where)
    if boxes.shape[1:] != (4,) and len(boxes):
        raise InstancesError(
            f"{where}: 'bbox': expected x, y, width and height, found shape {boxes.shape[1:]}"
        )
    return boxes.reshape(-1, 4)


def _boxes_or_extents(annotations: Sequence[Mapping[str, Any]], keypoints: Floats, where: str) -> Floats:
    """(G, 4) stated boxes, and of annotations without one the extent of their labelled keypoints.

    Without these either, an instance is ignored, and its box is empty.
    """
    is_absent = np.array([not each.get("bbox") for each in annotations], bool)
    boxes = np.empty((len(annotations), 4))
    boxes[~is_absent] = _boxes(list(itertools.compress(annotations, ~is_absent)), where)
    _check_finite(where, "bbox", boxes[~is_absent])
    boxes[is_absent] = np.nan_to_num(keypoint_boxes(keypoints[is_absent]))
    return boxes


def _category_names(categories: Sequence[Mapping[str, Any]], where: str) -> dict[int, str]:
    """Names by id, in the order of the file."""
    ids = _column(categories, "id", np.int64, where).tolist()
    names = _column(categories, "name", object, where).tolist()
    if len(set(ids)) < len(ids):
        raise InstancesError(f"{where}: expected each category id once, found {ids}")
    return dict(zip(ids, names, strict=True))


def _sizes_wh(images: Sequence[Mapping[str, Any]], where: str) -> Floats:
    """(I, 2), NaN where the file has none."""
    sizes = [[image.get(name) or math.nan for name in ("width", "height")] for image in images]
    try:
        return np.array(sizes, np.float64).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError) as error:
        _refuse("width and height", error, where)


def _num_labelled(annotations: Sequence[Mapping[str, Any]], keypoints: Floats, where: str) -> Integers:
    """(G,) ``num_keypoints``, counted where the file has none."""
    counted = (keypoints[..., 2] > 0).sum(axis=1).tolist()
    stated = [each.get("num_keypoints") for each in annotations]
    values = [count if number is None else number for number, count in zip(stated, counted, strict=True)]
    return _column([{"num_keypoints": each} for each in values], "num_keypoints", np.int64, where)


def _areas(
    annotations: Sequence[Mapping[str, Any]], bboxes_xywh: Floats, sizes_wh: Floats, where: str
) -> Floats:
    """(G,) areas, never 0."""
    areas = box_areas(bboxes_xywh, sizes_wh)
    for i, each in enumerate(annotations):
        stated = each.get("area")
        if not (stated is None or type(stated) in (int, float)):
            _refuse("area", TypeError(f"expected a number, found {stated!r}"), where)
        if stated is not None and stated > 0:
            areas[i] = stated if stated < _MAX_AREA else math.inf
        elif (found := segmentation_area(each.get("segmentation"), tuple(sizes_wh[i]))) is not None:
            areas[i] = found
    return areas


def _check_order(categories: Iterable[Mapping[str, Any]], dataset: Dataset, where: str) -> None:
    skeleton = dataset.skeleton
    for each in categories:
        names = each.get("keypoints") or []
        if not (isinstance(names, Sequence) and all(isinstance(name, str) for name in names)):
            raise InstancesError(f"{where}: category {each['id']}: expected a list of names, found {names!r}")
        try:
            is_same = keypoint_order(names, skeleton) == tuple(range(skeleton.num_keypoints))
        except KeypointOrderError as error:
            raise InstancesError(f"{where}: category {each['id']}: {error}") from None
        if not is_same:
            raise InstancesError(
                f"{where}: category {each['id']}: expected the keypoints of {dataset.title} in the order "
                f"{', '.join(skeleton.keypoint_names)}, found {', '.join(names)}. BuildDataset reorders them"
            )


def _keypoint_triplets(entries: Sequence[Mapping[str, Any]], where: str) -> Floats:
    """(N, K, 3) of entries whose ``keypoints`` are flat lists of 3K numbers."""
    try:
        lengths = {len(each["keypoints"]) for each in entries}
        if len(lengths) > 1 or any(length % 3 for length in lengths):
            raise ValueError(f"expected 3K numbers, as many for each, found {sorted(lengths)}")
        flat = itertools.chain.from_iterable(each["keypoints"] for each in entries)
        # A flat iterator: numpy takes half as long again to look into a list of lists.
        K = max(lengths) // 3 if lengths else NUM_KEYPOINTS
        return np.fromiter(flat, np.float64).reshape(len(entries), K, 3)
    except (KeyError, TypeError, ValueError) as error:
        _refuse("keypoints", error, where)


def _refuse(name: str, error: Exception, where: str) -> NoReturn:
    problem = "an entry has none" if isinstance(error, KeyError) else str(error)
    raise InstancesError(f"{where}: {name!r} of all entries cannot be read: {problem}") from error


def _check_finite(where: str, what: str, values: Floats) -> None:
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise InstancesError(f"{where}: {what}: expected finite numbers, found {bad} that are not")

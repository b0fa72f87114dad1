"""The index: every usable record of an annotation file as Parquet, and the rejects with their reasons."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spctrl.data.annotations.decode import read_annotations
from spctrl.data.records import INSTANCE_TYPE, KEYPOINTS_TYPE, RECORD_SCHEMA, rejects_table

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from spctrl.data.annotations.decode import Annotations, ImageEntry
    from spctrl.data.datasets import Dataset

INDEX_SCHEMA = RECORD_SCHEMA.append(pa.field("drawing_digest", pa.string()))
"""``drawing_digest`` tells apart what a drawing depends on: the image's size and its instances' keypoints."""

DIGEST_BYTES = 16
ROWS_PER_GROUP = 4096


@dataclass(frozen=True)
class Index:
    """What became of an annotation file.

    Attributes:
        image_paths: of the usable images, below the dataset's root.
        rejects: rows of ``REJECT_SCHEMA``.
        images_in_file, annotations_in_file: usable or not.
        adjustments: number of cases by name of ``spctrl.data.annotations.decode.ADJUSTMENTS``.
    """

    image_paths: list[str]
    rejects: pa.Table
    images_in_file: int
    annotations_in_file: int
    adjustments: dict[str, int]


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Hundreds of thousands of new objects and no cycle among them: looking for cycles would take half the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def write_index(source: Path, dataset: Dataset, split: str, destination: Path, *, max_pixels: int) -> Index:
    """Check an annotation file and write its usable records as Parquet (``INDEX_SCHEMA``).

    Raises:
        spctrl.data.annotations.decode.AnnotationFileError: the file cannot be used at all.
    """
    with _no_garbage_collection():
        return _write_index(source, dataset, split, destination, max_pixels)


def _write_index(source: Path, dataset: Dataset, split: str, destination: Path, max_pixels: int) -> Index:
    annotations = read_annotations(source, dataset, max_pixels=max_pixels)
    # Not compressed: it would take as long as all other writing, to halve a file that only stages read.
    texts = [field.name for field in INDEX_SCHEMA if field.type in (pa.string(), pa.int32())]
    with (
        ThreadPoolExecutor(1) as writing,  # needs no interpreter, so it runs beside making the next batch
        pq.ParquetWriter(
            destination, INDEX_SCHEMA, compression="none", use_dictionary=texts, write_statistics=False
        ) as writer,
    ):
        written = None
        for batch in index_batches(annotations, dataset, split, rows_per_batch=ROWS_PER_GROUP):
            if written is not None:
                written.result()
            written = writing.submit(writer.write_batch, batch)
        if written is not None:
            written.result()
    return Index(
        image_paths=[dataset.image_path(image.file_name) for image in annotations.images],
        rejects=rejects_table(annotations.rejects),
        images_in_file=annotations.images_in_file,
        annotations_in_file=annotations.annotations_in_file,
        adjustments=dict(+annotations.adjustments),
    )


def index_batches(
    annotations: Annotations, dataset: Dataset, split: str, *, rows_per_batch: int
) -> Iterator[pa.RecordBatch]:
    """The records of an annotation file in file order, as batches of ``INDEX_SCHEMA``."""
    bounds = np.searchsorted(annotations.image_of, np.arange(len(annotations.images) + 1))
    rows_21 = np.cumsum(annotations.has_keypoints_21) - 1
    for start in range(0, len(annotations.images), rows_per_batch):
        stop = min(start + rows_per_batch, len(annotations.images))
        images = annotations.images[start:stop]
        offsets = (bounds[start : stop + 1] - bounds[start]).astype(np.int32)
        rows = annotations.order[bounds[start] : bounds[stop]]
        keypoints = _taken(annotations.keypoints, rows)
        instances = _instances(annotations, rows, rows_21, keypoints)
        columns = {
            "dataset": pa.repeat(dataset.name, stop - start),
            "split": pa.repeat(split, stop - start),
            "image_id": pa.array([image.id for image in images], pa.int64()),
            "file_name": pa.array([image.file_name for image in images]),
            "width": pa.array([image.width for image in images], pa.int32()),
            "height": pa.array([image.height for image in images], pa.int32()),
            "background": pa.array([image.background for image in images], pa.int32()),
            "background_name": pa.array(
                [dataset.backgrounds.get(image.background or 0) for image in images], pa.string()
            ),
            "category": pa.array([image.category for image in images], pa.string()),
            "captions": pa.array([_captions(image) for image in images], pa.list_(pa.string())),
            "instances": pa.ListArray.from_arrays(pa.array(offsets), instances),
            "licence": pa.repeat(dataset.licence, stop - start),
            "source_url": pa.array([_known(image.page_url) or dataset.source_url for image in images]),
            "author": pa.array([_known(image.author) for image in images], pa.string()),
            "drawing_digest": pa.array(_drawing_digests(images, offsets, keypoints)),
        }
        yield pa.RecordBatch.from_arrays([columns[name] for name in INDEX_SCHEMA.names], schema=INDEX_SCHEMA)


def _known(text: str | None) -> str | None:
    """HumanArt writes "None" where a picture's page or author is unknown."""
    return None if text in (None, "", "None") else text


def _captions(image: ImageEntry) -> list[str]:
    return [image.description] if image.description else []


def _drawing_digests(
    images: list[ImageEntry], offsets: NDArray[np.int32], keypoints: NDArray[np.float64]
) -> list[str]:
    data = keypoints.reshape(-1).view(np.uint8).data
    size = keypoints.itemsize * keypoints.shape[1] * keypoints.shape[2]
    bounds = (offsets.astype(np.int64) * size).tolist()
    return [
        blake2b(
            data[first:last],
            digest_size=DIGEST_BYTES,
            person=b"drawing",
            salt=image.width.to_bytes(8, "big") + image.height.to_bytes(8, "big"),
        ).hexdigest()
        for image, first, last in zip(images, bounds[:-1], bounds[1:], strict=True)
    ]


def _instances(
    annotations: Annotations,
    rows: NDArray[np.int64],
    rows_21: NDArray[np.int64],
    keypoints: NDArray[np.float64],
) -> pa.StructArray:
    """The instances at ``rows``; ``rows_21[i]`` is instance i's row among those that have 21 keypoints."""
    category_ids = annotations.category_ids[rows]
    has_21 = annotations.has_keypoints_21[rows]
    names = {key: category.name for key, category in annotations.categories.items()}
    columns = [
        pa.array(annotations.ids[rows]),
        pa.array(category_ids),
        pa.array([names[key] for key in category_ids.tolist()], pa.string()),
        _fixed_lists(annotations.bboxes_xywh[rows], 4),
        pa.array(annotations.areas[rows]),
        pa.array(annotations.iscrowd[rows]),
        pa.array(annotations.num_keypoints[rows].astype(np.int32)),
        _keypoint_lists(keypoints, np.ones(len(rows), bool)),
        _keypoint_lists(_taken(annotations.keypoints_21, rows_21[rows[has_21]]), has_21),
    ]
    return pa.StructArray.from_arrays(columns, fields=list(INSTANCE_TYPE))


def _taken(values: NDArray[np.float64], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """``values[rows]`` as one piece of memory: without a copy where it already is one."""
    if len(rows) and (np.diff(rows) == 1).all():
        return np.ascontiguousarray(values[rows[0] : rows[-1] + 1])
    return values[rows]


def _fixed_lists(values: NDArray[np.float64], size: int) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), size)


def _keypoint_lists(keypoints: NDArray[np.float64], present: NDArray[np.bool_]) -> pa.ListArray:
    """(M,) lists of x, y, v triples; null where ``present`` is False."""
    lengths = np.where(present, keypoints.shape[1], 0)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    mask = None if present.all() else pa.array(~present)
    return pa.ListArray.from_arrays(
        pa.array(offsets), _fixed_lists(keypoints, 3), type=KEYPOINTS_TYPE, mask=mask
    )

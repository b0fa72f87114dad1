"""The record: one image with its annotated instances. One type goes through every stage.

Legend: R records, N instances of one record, K keypoints (17), M instances of all records together.
Coordinates are pixels of the annotated image, float64, exactly as the annotation file gives them: drawing
truncates them to integers, and float32 would move some pixels.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

NUM_KEYPOINTS = 17
"""K of both datasets."""

KEYPOINTS_TYPE = pa.list_(pa.list_(pa.float64(), 3))

INSTANCE_TYPE = pa.struct(
    [
        ("annotation_id", pa.int64()),
        ("category_id", pa.int64()),
        ("category", pa.string()),
        ("bbox_xywh", pa.list_(pa.float64(), 4)),
        ("area", pa.float64()),
        ("iscrowd", pa.bool_()),
        ("num_keypoints", pa.int32()),
        ("keypoints", KEYPOINTS_TYPE),
        ("keypoints_21", KEYPOINTS_TYPE),
    ]
)

RECORD_SCHEMA = pa.schema(
    [
        ("dataset", pa.string()),
        ("split", pa.string()),
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("background", pa.int32()),
        ("background_name", pa.string()),
        ("category", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("instances", pa.list_(INSTANCE_TYPE)),
        ("licence", pa.string()),
        ("source_url", pa.string()),
        ("author", pa.string()),
    ]
)

COLUMNS_OF_RECORD = ("image_id", "file_name", "width", "height", "instances")
"""What ``records_from_table`` reads."""

REJECT_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("annotation_id", pa.int64()),
        ("file_name", pa.string()),
        ("code", pa.string()),
        ("message", pa.string()),
        ("key", pa.string()),
    ]
)
"""``key`` is the record's key in the stage that rejected it, where it had one."""


class RecordError(ValueError):
    """A record that cannot be used, with a reason code for counting and a sentence for the reader."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


@dataclass(frozen=True, slots=True)
class Record:
    """What a stage sees of one image.

    Attributes:
        image_id: id of the image in its annotation file.
        file_name: the image's path as annotated.
        size_wh: width and height in pixels.
        keypoints: (N, K, 3) float64; x, y in pixels and visibility v in {0, 1, 2}; v = 0 means not labelled.
        bboxes_xywh: (N, 4) float64, pixels.
    """

    image_id: int
    file_name: str
    size_wh: tuple[int, int]
    keypoints: NDArray[np.float64]
    bboxes_xywh: NDArray[np.float64]


def records_from_table(table: pa.Table | pa.RecordBatch) -> list[Record]:
    """Records of an index table (``RECORD_SCHEMA``), without a Python object per coordinate."""
    instances = _one_chunk(table.column("instances"))
    offsets = instances.offsets.to_numpy()
    flat = instances.values
    keypoints_column = flat.field("keypoints")
    per_instance = keypoints_column.offsets.to_numpy()
    keypoints = keypoints_column.values.values.to_numpy().reshape(-1, 3)
    bboxes_xywh = flat.field("bbox_xywh").values.to_numpy().reshape(-1, 4)
    counts: set[int] = set(np.diff(per_instance[offsets[0] : offsets[-1] + 1]).tolist())
    if len(counts) > 1:
        raise ValueError(f"expected one number of keypoints for all instances, found {sorted(counts)}")
    num_keypoints = counts.pop() if counts else NUM_KEYPOINTS
    return [
        Record(
            image_id=image_id,
            file_name=file_name,
            size_wh=(width, height),
            keypoints=keypoints[per_instance[first] : per_instance[last]].reshape(
                last - first, num_keypoints, 3
            ),
            bboxes_xywh=bboxes_xywh[first:last],
        )
        for image_id, file_name, width, height, first, last in zip(
            table.column("image_id").to_pylist(),
            table.column("file_name").to_pylist(),
            table.column("width").to_pylist(),
            table.column("height").to_pylist(),
            offsets[:-1].tolist(),
            offsets[1:].tolist(),
            strict=True,
        )
    ]


def instance_categories(table: pa.Table | pa.RecordBatch) -> list[list[str]]:
    """Names of the instances' categories, for each row of an index table."""
    instances = _one_chunk(table.column("instances"))
    offsets = instances.offsets.to_pylist()
    first, last = offsets[0], offsets[-1]
    names = instances.values.field("category")[first:last].to_pylist()
    return [names[a - first : b - first] for a, b in itertools.pairwise(offsets)]


def _one_chunk(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    if isinstance(column, pa.ChunkedArray):
        return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    return column


def rejects_table(rejects: Sequence[dict[str, object]]) -> pa.Table:
    """Rows of ``REJECT_SCHEMA`` as a table; what a row does not name is null."""
    return pa.Table.from_pylist(list(rejects), schema=REJECT_SCHEMA)

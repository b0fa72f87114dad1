"""The manifest: one row per image with its labels, captions, and the paths and digests of its conditions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from spctrl.data.records import RECORD_SCHEMA

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from spctrl.export.layout import Layout


INSTANCE_MASK_TYPE = pa.struct(
    [
        ("annotation_index", pa.int32()),
        ("size", pa.list_(pa.int32(), 2)),
        ("counts", pa.string()),
        ("area", pa.int64()),
        ("predicted_iou", pa.float32()),
    ]
)
"""An instance's mask as COCO run lengths (``size`` is height, width), with its place among the record's instances."""


class ImageFacts(NamedTuple):
    """What is known of a raw image file: SHA-256 and perceptual hash, in hex, and its EXIF orientation tag."""

    digest: str
    phash: str
    orientation: int


class ConditionFacts(NamedTuple):
    """A condition's key in the store and the SHA-256 of its file, in hex."""

    key: str
    digest: str


def manifest_schema(conditions: Sequence[str]) -> pa.Schema:
    """Columns of a manifest: ``RECORD_SCHEMA``, the image's, four for each condition, and the instances' masks."""
    texts = ["image_path", "image_digest", "image_phash"]
    texts += [
        f"{condition}_{what}" for condition in conditions for what in ("path", "digest", "key", "weights")
    ]
    masks = [pa.field("mask_instances", pa.list_(INSTANCE_MASK_TYPE))] if "mask" in conditions else []
    fields = [pa.field(name, pa.string()) for name in texts]
    fields.insert(texts.index("image_phash") + 1, pa.field("image_orientation", pa.int32()))
    return pa.schema([*RECORD_SCHEMA, *fields, *masks])


def manifest_batch(
    rows: pa.RecordBatch,
    layout: Layout,
    images: Mapping[int, ImageFacts],
    conditions: Mapping[str, Mapping[int, ConditionFacts]],
    rejected: set[int],
    weights: Mapping[str, str | None],
    instance_masks: Mapping[int, list[dict[str, Any]]],
) -> pa.RecordBatch:
    """Join a batch of the index with what the stages made of it.

    Args:
        rows: index rows.
        layout: where exported files go; paths are relative to the dataset's export folder.
        images: by image id; an image that is not on disk is not there, and its ``image_path`` is null.
        conditions: by name and image id.
        rejected: ids of images that some stage could not use; they are left out.
        weights: of the model that made each condition: ``random``, a digest, or None where no model did.
        instance_masks: rows of ``INSTANCE_MASK_TYPE`` by image id, where a model made them.
    """
    keep = [image_id not in rejected for image_id in rows.column("image_id").to_pylist()]
    rows = rows.filter(pa.array(keep))
    ids = rows.column("image_id").to_pylist()
    file_names = rows.column("file_name").to_pylist()
    schema = manifest_schema(list(conditions))
    columns: dict[str, pa.Array] = {name: rows.column(name) for name in RECORD_SCHEMA.names}
    facts = [images.get(image_id) for image_id in ids]
    texts: dict[str, list[str | None]] = {
        "image_path": [
            layout.image(name) if fact else None for name, fact in zip(file_names, facts, strict=True)
        ],
        "image_digest": [fact.digest if fact else None for fact in facts],
        "image_phash": [fact.phash if fact else None for fact in facts],
    }
    for condition, made in conditions.items():
        texts[f"{condition}_path"] = [layout.condition(condition, name) for name in file_names]
        texts[f"{condition}_digest"] = [made[image_id].digest for image_id in ids]
        texts[f"{condition}_key"] = [made[image_id].key for image_id in ids]
        texts[f"{condition}_weights"] = [weights[condition]] * len(ids)
    columns |= {name: pa.array(values, pa.string()) for name, values in texts.items()}
    orientations = [fact.orientation if fact else None for fact in facts]
    columns["image_orientation"] = pa.array(orientations, pa.int32())
    if "mask_instances" in schema.names:
        columns["mask_instances"] = pa.array(
            [instance_masks.get(image_id) for image_id in ids], schema.field("mask_instances").type
        )
    return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


def count_instances(table: pa.Table | pa.RecordBatch) -> int:
    """Instances of all rows."""
    return pc.sum(pc.list_value_length(table.column("instances"))).as_py() or 0

"""Manifests and stores without a build, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from spctrl.data.datasets import Dataset
from spctrl.data.manifest import ConditionFacts, ImageFacts, manifest_batch
from spctrl.export.layout import Layout
from spctrl.store.store import Store

Artifacts = Mapping[str, Mapping[int, bytes]]
"""By stage and image id."""


def write_manifest(
    folder: Path, dataset: Dataset, index: pa.Table, artifacts: Artifacts, *, images: bool = True
) -> Path:
    """A manifest of all rows of an index, and ``folder/store`` with the packs of its artifacts."""
    store = Store(folder / "store")
    made = {}
    for stage, of_stage in artifacts.items():
        keys = {image_id: f"{image_id:032x}" for image_id in of_stage}
        suffix = ".safetensors" if stage == "latents" else ".png"
        store.write_pack(stage, suffix, [(keys[image_id], data) for image_id, data in of_stage.items()])
        made[stage] = {image_id: ConditionFacts(key, "") for image_id, key in keys.items()}
    layout = Layout(dataset=dataset, split="train", split_id="1", names="readme", openpose_style="openpose")
    ids = index.column("image_id").to_pylist()
    facts = {image_id: ImageFacts("", "", 1) for image_id in ids} if images else {}
    (rows,) = index.combine_chunks().to_batches()
    batch = manifest_batch(rows, layout, facts, made, set(), dict.fromkeys(made), {})
    path = folder / "manifest.parquet"
    with pq.ParquetWriter(path, batch.schema) as writer:
        writer.write_batch(batch)
    return path

"""All that a stage's packs hold, and runs to commit, for stores as small as a test's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from spctrl.store.pack_index import Location
from spctrl.store.runs import Run
from spctrl.store.store import Store
from tasks.stage.tables import FORMS

FACTS: dict[str, Any] = {
    "stage": "mask",
    "part": "ap10k-train",
    "code": {"spctrl.conditions.masks:mask": "0" * 32},
    "libraries": {"pillow": "12.0"},
    "code_version": "1" * 32,
    "parameters": {"dataset": "ap10k", "size": [64, 64], "factor": 0.5, "scale": None},
    "inputs": {"index": "2" * 32},
    "counts": {"records": 3, "made": 2, "rejected": 1},
    "started_at": "2026-01-01T00:00:00.000Z",
    "finished_at": "2026-01-01T00:00:01.500Z",
    "duration_s": 1.5,
    "made_by": {"spctrl": "0.1.0", "python": "3.11.7", "platform": "Linux"},
}
"""What every stage's provenance says besides files and packs."""


def table_of(stage: str) -> str:
    """The table of a run of a stage that has records, artifacts or a manifest."""
    return {"index": "records.parquet", "manifest": "manifest.parquet"}.get(stage, "artifacts.parquet")


def commit(run: Run, packs: Iterable[str] = (), **changes: Any) -> None:
    """Commit a run with the tables that its readers expect, empty where they are not there."""
    for name in {table_of(run.stage), "rejects.parquet"} - run.files().keys():
        form = FORMS.get((run.stage, name))
        run.write_table(name, (form().schema if form else pa.schema([])).empty_table())
    counts = FACTS["counts"] | {"instances": 0, "images_on_disk": 0}
    run.commit(packs, FACTS | {"stage": run.stage, "part": run.part, "counts": counts} | changes)


def locations(store: Store, stage: str) -> dict[str, Location]:
    """Where each artifact lies, or why there is none, by key; as a build that asks for all keys finds them."""
    keys = [key for pack in store.packs(stage) for key in store.pack_locations(stage, pack)]
    found: dict[str, Location] = {}
    for row in store.results(stage, pa.chunked_array([keys], pa.string())).to_pylist():
        found.setdefault(row.pop("key"), Location(**row))
    return found

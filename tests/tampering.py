"""Changing what a store says of itself so that all its digests fit, as whoever made it could."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from conftest import sha256

Rows = list[dict[str, Any]]


def run_folder(store: Path, stage: str) -> Path:
    """The folder of a stage's latest run."""
    found = store.glob(f"runs/{stage}/*/*/provenance.json")
    return max(found, key=lambda path: path.stat().st_mtime_ns).parent


def tamper(store: Path, stage: str, name: str, change: Callable[[Rows], None]) -> None:
    """Change the rows of a table of a stage's latest run, and what its provenance says of the file."""
    path = run_folder(store, stage) / name
    table = pq.read_table(path, partitioning=None)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    correct_provenance(path)


def correct_provenance(path: Path) -> None:
    """Have the provenance beside a file state its size and digest."""
    provenance_path = path.with_name("provenance.json")
    provenance = json.loads(provenance_path.read_bytes())
    provenance["files"][path.name] = {"size": path.stat().st_size, "digest": sha256(path)}
    provenance_path.write_text(json.dumps(provenance))

"""Files of poses from any writer are read; those made to exhaust memory are refused before they are expanded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval import files
from eval.instances import PREDICTION_SCHEMA, InstancesError, read_poses, read_results

ROW: dict[str, Any] = {
    "image_id": 1,
    "annotation_id": None,
    "category_id": 1,
    "bbox_xywh": [0.0, 0.0, 4.0, 4.0],
    "bbox_score": 0.5,
    "keypoints": [[1.0, 2.0, 0.5]] * 17,
}


def table(rows: int = 3) -> pa.Table:
    return pa.Table.from_pylist([ROW] * rows, schema=PREDICTION_SCHEMA)


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
@pytest.mark.parametrize("encoding", ["PLAIN", "DELTA_BINARY_PACKED"])
def test_tables_of_any_options_are_read(compression: str, encoding: str, tmp_path: Path) -> None:
    delta = (
        {} if encoding == "PLAIN" else {"use_dictionary": False, "column_encoding": {"image_id": encoding}}
    )
    with_more = table(1000).append_column("note", pa.array(["text"] * 1000))
    pq.write_table(with_more, tmp_path / "a.parquet", compression=compression, **delta)
    assert len(read_poses(tmp_path / "a.parquet")) == 1000


@pytest.mark.parametrize("module", ["pandas", "duckdb"])
def test_tables_of_other_writers_are_read(module: str, tmp_path: Path) -> None:
    library, path, source = pytest.importorskip(module), tmp_path / "a.parquet", tmp_path / "source.parquet"
    pq.write_table(table(), source)
    if module == "pandas":
        library.read_parquet(source).to_parquet(path)
    else:
        library.sql(f"copy (from '{source}') to '{path}' (format parquet)")
    assert len(read_poses(path)) == 3


def test_tables_that_expand_too_far_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FREE_BYTES", 2**16)
    path, rows = tmp_path / "a.parquet", 10**6
    score = pa.array([0.5]).take(pa.array([0] * rows))
    pq.write_table(pa.table({"bbox_score": score}), path)
    with pytest.raises(InstancesError, match="expected it to expand to at most"):
        read_poses(path)


@pytest.mark.parametrize(
    ("column", "fault"),
    [
        (pa.array(["a" * 1000]), "expected numbers, found string"),
        (pa.array([None], pa.list_(pa.float64(), 10**6)), "expected lists of at most 4"),
    ],
)
def test_columns_that_hold_something_else_are_refused(column: pa.Array, fault: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"bbox_xywh": column}), tmp_path / "a.parquet")
    with pytest.raises(InstancesError, match=fault):
        read_poses(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "text",
    [b"[" * 10**5, b'{"a":' * 60_000, b"[" * 5000 + b"NaN" + b"]" * 5000, b"[[]" + b",[]" * 3 * 10**5 + b"]"],
    ids=["lists", "objects", "NaN", "flat"],
)
def test_documents_of_too_many_lists_are_refused(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(InstancesError, match=r"a\.json: cannot be read as JSON"):
        read_results(tmp_path / "a.json")


def test_what_is_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    for reader in (read_results, read_poses):
        for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
            with pytest.raises(InstancesError, match="expected a file, found something else"):
                reader(path)
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 3)
    (tmp_path / "a.json").write_bytes(b"[ ] ")
    with pytest.raises(InstancesError, match="expected at most 3 bytes, found more"):
        read_results(tmp_path / "a.json")

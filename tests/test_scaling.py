"""Many records: what is kept of each in memory, what is looked up, and what becomes of files that change meanwhile."""

from __future__ import annotations

import os
import random
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import luigi
import pyarrow as pa
import pytest

from spctrl.store.artifacts import Artifacts, InOrder, artifact_schema, artifacts_in_order
from spctrl.store.digests import FILES_AT_ONCE, DigestCache
from spctrl.store.store import Store
from tasks.dataset.images import Images
from tasks.stage import record_plan

if TYPE_CHECKING:
    from conftest import Workspace

    from spctrl.store.runs import Run
    from tasks.stage.record_plan import Prepared

STAGE = "spatext"
FEW_AND_MANY = (1_000, 4_000)
LARGEST_RECORD_BYTES = 450
"""About 310 here; with an object for each record it would be 1,500 or more."""


def keys(count: int, seed: int) -> list[str]:
    return [f"{each:032x}" for each in (random.Random(seed).getrandbits(128) for _ in range(count))]


def artifact_run(store: Store, rows: list[dict[str, Any]]) -> Run:
    run = store.run(STAGE, "ap10k-train", "f" * 32)
    run.write_table("artifacts.parquet", pa.Table.from_pylist(rows, schema=artifact_schema()))
    return run


def artifact_row(image_id: int) -> dict[str, Any]:
    pack = f"{image_id // 10}.tar"
    return {
        "image_id": image_id,
        "key": f"{image_id:032x}",
        "pack": pack,
        "offset": image_id,
        "size": 1,
        "digest": "d",
    }


# The store


def test_results_of_a_few_keys_leave_the_rest_of_the_stage_alone(tmp_path: Path) -> None:
    store, mine, others = Store(tmp_path), keys(500, seed=1), keys(20_000, seed=2)
    written = store.write_pack(STAGE, ".png", [(key, b"mine") for key in mine])
    for start in range(0, len(others), 5_000):
        store.write_pack(STAGE, ".png", [(key, b"another's") for key in others[start : start + 5_000]])
    found = store.results(STAGE, pa.chunked_array([mine[:200], mine[200:], [None, *keys(100, seed=3)]]))
    assert dict(zip(found["key"].to_pylist(), found["offset"].to_pylist(), strict=True)) == {
        key: place.offset for key, place in written.items()
    }


def test_of_packs_with_the_same_key_the_last_name_comes_first(tmp_path: Path) -> None:
    store, (shared, *more) = Store(tmp_path), keys(4, seed=1)
    packs = {store.write_pack(STAGE, ".png", [(shared, b"it"), (key, b"another")])[key].pack for key in more}
    found = store.results(STAGE, pa.chunked_array([[shared]]))
    assert found["pack"].to_pylist() == sorted(packs, reverse=True)


# Artifacts


def test_artifacts_are_found_by_image_in_any_order(tmp_path: Path) -> None:
    ids = [7, 3, 30, 12]
    artifacts = Artifacts(artifact_run(Store(tmp_path), [artifact_row(each) for each in ids]))
    assert sorted(artifacts) == sorted(ids)
    assert {each: place.offset for each, place in artifacts.items()} == {each: each for each in ids}
    assert [place and place.pack for place in artifacts.at([30, 4, 3, 99])] == ["3.tar", None, "0.tar", None]
    assert artifacts[30] == artifacts.at([30])[0]
    for missing in (1, 4, 99):
        assert artifacts.get(missing) is None


def test_a_run_without_artifacts_holds_none(tmp_path: Path) -> None:
    artifacts = Artifacts(artifact_run(Store(tmp_path), []))
    assert not artifacts
    assert artifacts.at([0, 1, 2]) == [None, None, None]


def test_rows_in_the_order_of_the_index_come_with_their_images(tmp_path: Path) -> None:
    """Some images have no row, others several."""
    rows = [artifact_row(each) for each in (9, 2, 2, 5, 1, 1, 8)]
    reader = InOrder(artifact_run(Store(tmp_path), rows).path("artifacts.parquet"))
    stretches = [[9, 7], [6], [2, 4, 5], [1], [3, 8, 10]]
    found = [[row["image_id"] for row in reader.of(set(stretch))] for stretch in stretches]
    assert found == [[9], [], [2, 2, 5], [1, 1], [8]]
    assert reader.is_at_end


def test_rows_in_another_order_are_left_over(tmp_path: Path) -> None:
    reader = InOrder(
        artifact_run(Store(tmp_path), [artifact_row(1), artifact_row(2)]).path("artifacts.parquet")
    )
    assert list(reader.of({2})) == []
    assert [row["image_id"] for row in reader.of({1})] == [1]
    assert not reader.is_at_end


def test_artifacts_come_in_the_order_of_the_index(tmp_path: Path) -> None:
    ids = [30, 4, 12]
    run = artifact_run(Store(tmp_path), [artifact_row(each) for each in ids])
    assert list(artifacts_in_order(run)) == [(each, Artifacts(run)[each]) for each in ids]


# Digests of files


def test_a_few_files_among_many_known_ones_are_looked_up_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scan of all rows for each stretch of files would take the square of their number."""
    cache = DigestCache(tmp_path / "cache.sqlite")
    known = [(f"/data/{i:06}.jpg", 1, 1, i, "d") for i in range(5_000)]
    cache._execute("INSERT INTO files VALUES (?, ?, ?, ?, ?)", known)
    fetched = 0
    real = cache._execute

    def count(*arguments: Any) -> list[tuple[Any, ...]]:
        nonlocal fetched
        found = real(*arguments)
        fetched += len(found)
        return found

    monkeypatch.setattr(cache, "_execute", count)
    cache.file_digests([path for path, *_ in known[100:700]])
    assert fetched <= 601


def test_a_list_longer_than_one_look_has_the_digest_of_its_files(tmp_path: Path) -> None:
    """Of the same list in two folders, of one that lacks a file far behind, and of one with its names shifted."""
    names = [f"{i:05}" for i in range(FILES_AT_ONCE + 10)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder in ("a", "b"):
        (tmp_path / folder / names[-1]).write_bytes(b"the last")
    found = [
        DigestCache(tmp_path / f"{folder}.sqlite").list_digest(str(tmp_path / folder), names)
        for folder in ("a", "b")
    ]
    assert found[0] == found[1]
    last = tmp_path / "b" / names[-1]
    last.write_bytes(b"another")
    os.utime(last, (1, 1))  # what changed just now is read in any case
    cache = DigestCache(tmp_path / "b.sqlite")
    assert cache.list_digest(str(tmp_path / "b"), names, max_read_bytes=3) is None
    assert cache.list_digest(str(tmp_path / "b"), names) != found[0]


# Builds


@pytest.mark.slow
def test_memory_for_each_record_that_is_known_already(
    make_workspace: Callable[..., Workspace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a rebuild keeps while it compares keys and writes the run; packs have one size at both counts."""
    monkeypatch.setattr(record_plan, "ROWS_AT_ONCE", 256)
    peaks = [_peak_of_rebuild(make_workspace, tmp_path, records) for records in FEW_AND_MANY]
    growth = (peaks[1] - peaks[0]) / (FEW_AND_MANY[1] - FEW_AND_MANY[0])
    assert 36 < growth <= LARGEST_RECORD_BYTES


def _peak_of_rebuild(make_workspace: Callable[..., Workspace], folder: Path, records: int) -> int:
    """Bytes of Python and Arrow together, at most, beyond those before."""
    from conftest import _luigi_settings

    from benchmarks.scaling import write_dataset
    from tasks.dataset.conditions import Spatext

    data = folder / f"data-{records}"
    write_dataset(data, records)
    workspace = make_workspace(f"build-{records}", data)
    workspace.configure("ap10k", root=data)
    with _luigi_settings(workspace.settings_file()):
        task = Spatext(dataset="ap10k", split="train")
        assert luigi.build([task], local_scheduler=True, log_level="ERROR")
        task.finished_run().uncommit()
        arrow, usual = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
        pa.set_memory_pool(arrow)
        tracemalloc.start()
        try:
            assert luigi.build([task], local_scheduler=True, log_level="ERROR")
            peak = tracemalloc.get_traced_memory()[1] + arrow.max_memory()
        finally:
            tracemalloc.stop()
            pa.set_memory_pool(usual)
        expected = {"records": records, "made": 0, "artifacts": records, "rejected": 0}
        assert task.finished_run().provenance()["counts"] == expected
    return peak


def test_an_image_that_changes_between_two_looks_stops_the_stage(
    make_workspace: Callable[..., Workspace], sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its key would stand for what it was before."""
    data = shutil.copytree(sample, tmp_path / "data")
    workspace = make_workspace("build", data)
    workspace.configure("build", datasets=["ap10k"], splits=["train"])
    image = min(data.glob("AP-10K/data/*.jpg"))
    real = Images.prepare
    looks = 0

    def prepare(self: Images, rows: pa.RecordBatch) -> list[Prepared]:
        nonlocal looks
        looks += 1
        if looks == 2:
            image.write_bytes(image.read_bytes() + b"!")
        return real(self, rows)

    monkeypatch.setattr(Images, "prepare", prepare)
    build = workspace.build()
    assert any("changed while it was at work" in error for error in build.errors)
    assert "images" not in build.stages
    assert workspace.build().succeeded
    assert workspace.faults() == []

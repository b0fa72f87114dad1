"""A run's table that a reader could not use is damage: refused before it is read, struck out, and made again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stores import table_of
from tampering import correct_provenance, run_folder

from spctrl.store.provenance import FORMS_BY_STAGE
from spctrl.store.store import Store
from tasks.maintenance import verify
from tasks.stage.tables import FORMS, TableForm

if TYPE_CHECKING:
    from conftest import Workspace

Change = Callable[[pa.Table], pa.Table]


def without(name: str) -> Change:
    return lambda table: table.drop_columns([name])


def retyped(name: str, kind: pa.DataType) -> Change:
    def change(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index(name)
        return table.set_column(at, name, pa.nulls(len(table), kind))

    return change


def with_null(name: str) -> Change:
    """The same table with a null in the last row of a column."""

    def change(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index(name)
        values = [*table.column(name).to_pylist()[:-1], None]
        return table.set_column(at, name, pa.array(values, table.schema.field(name).type))

    return change


def shortened(count: int) -> Change:
    return lambda table: table.slice(0, count)


def of_another_image(table: pa.Table) -> pa.Table:
    """The same table with an image id in the last row that no image has."""
    at = table.schema.get_field_index("image_id")
    ids = [*table.column("image_id").to_pylist()[:-1], 7]
    return table.set_column(at, "image_id", pa.array(ids, pa.int64()))


def with_texts_as(kind: pa.DataType) -> Change:
    def change(table: pa.Table) -> pa.Table:
        columns = [
            column.cast(kind) if pa.types.is_string(column.type) else column for column in table.columns
        ]
        return pa.table(columns, table.column_names)

    return change


def with_null_within(field: str) -> Change:
    def change(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        rows[-1]["instances"][-1][field] = None
        return pa.Table.from_pylist(rows, schema=table.schema)

    return change


DAMAGES: list[tuple[str, str, Change, str]] = [
    ("spatext", "artifacts.parquet", without("digest"), "expected one column digest, found 0"),
    ("spatext", "artifacts.parquet", with_null("offset"), "expected no nulls in offset"),
    ("images", "rejects.parquet", without("message"), "expected one column message, found 0"),
    ("index", "records.parquet", with_null("file_name"), "expected no nulls in file_name"),
    ("index", "records.parquet", with_null_within("keypoints"), "expected no nulls in instances.keypoints"),
    ("manifest", "manifest.parquet", retyped("width", pa.string()), "expected int32 in the column width"),
    ("spatext", "artifacts.parquet", shortened(0), "expected 8 rows, found 0"),
    ("images", "artifacts.parquet", shortened(5), "expected 8 rows, found 5"),
    ("index", "records.parquet", shortened(7), "expected 8 rows, found 7"),
    ("manifest", "manifest.parquet", shortened(0), "expected 8 rows, found 0"),
    ("spatext", "artifacts.parquet", with_texts_as(pa.large_string()), "expected string in the column key"),
]


def damage(store: Path, stage: str, name: str, change: Change) -> None:
    path = run_folder(store, stage) / name
    pq.write_table(change(pq.read_table(path, partitioning=None)), path)
    correct_provenance(path)


@pytest.mark.slow
def test_a_table_that_no_reader_can_use_is_struck_out_and_made_again(workspace: Workspace) -> None:
    workspace.configure("build", datasets=["ap10k"], splits=["val"], conditions=["spatext"])
    assert workspace.build().succeeded
    before = workspace.exported()
    for stage, name, change, why in DAMAGES:
        table = run_folder(workspace.store, stage) / name
        whole = {path: path.read_bytes() for path in (table, table.with_name("provenance.json"))}
        damage(workspace.store, stage, name, change)
        (found,) = verify(Store(workspace.store), workspace.exports, repair=False)
        assert f"{name} is damaged: {why}" in found.fault
        for path, data in whole.items():
            path.write_bytes(data)
    damage(workspace.store, *DAMAGES[0][:3])
    assert len(verify(Store(workspace.store), workspace.exports, repair=True)) == 1
    assert workspace.build().succeeded
    assert workspace.exported() == before


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "name", "change", "why"), [*DAMAGES[:6:2], *DAMAGES[6:8]])
def test_a_build_says_what_is_damaged_and_the_next_one_succeeds(
    workspace: Workspace, stage: str, name: str, change: Change, why: str
) -> None:
    workspace.configure("build", datasets=["ap10k"], splits=["val"], conditions=["spatext"])
    assert workspace.build().succeeded
    before = workspace.exported()
    damage(workspace.store, stage, name, change)
    for folder in ("manifest", "export"):  # whatever reads it runs again
        if folder != stage:
            run_folder(workspace.store, folder).joinpath("provenance.json").unlink()
    done = workspace.build()
    assert not done.succeeded
    assert any(f"{name} is damaged: {why}" in each for each in done.errors), done.errors
    assert workspace.build().succeeded
    assert workspace.exported() == before


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["spatext", "manifest", "index"])
@pytest.mark.parametrize("output_format", ["folders", "parquet"])
def test_tables_of_different_images_are_one_error_and_made_again(
    workspace: Workspace, stage: str, output_format: str
) -> None:
    workspace.configure("build", datasets=["ap10k"], splits=["val"], conditions=["spatext"])
    workspace.configure("export", format=output_format)
    assert workspace.build().succeeded
    before = workspace.exported()
    damage(workspace.store, stage, table_of(stage), of_another_image)
    shutil.rmtree(workspace.exports)
    if stage != "manifest":
        run_folder(workspace.store, "manifest").joinpath("provenance.json").unlink()
    done = workspace.build()
    assert not done.succeeded
    assert any("StoreError" in each and "build again" in each for each in done.errors), done.errors
    assert not any("KeyError" in each for each in done.errors)
    assert workspace.build().succeeded
    assert workspace.exported() == before


@pytest.mark.parametrize("kind", [pa.dictionary(pa.int32(), pa.string()), pa.large_string()])
def test_verify_and_a_build_refuse_the_same_texts(workspace: Workspace, kind: pa.DataType) -> None:
    workspace.configure("build", datasets=["ap10k"], splits=["val"], conditions=["spatext"])
    assert workspace.build().succeeded
    damage(workspace.store, "spatext", "artifacts.parquet", with_texts_as(kind))
    (found,) = verify(Store(workspace.store), workspace.exports, repair=False)
    run_folder(workspace.store, "manifest").joinpath("provenance.json").unlink()
    assert any(found.fault in each for each in workspace.build().errors)


@pytest.mark.parametrize("change", [with_texts_as(pa.dictionary(pa.int32(), pa.string())), without("digest")])
def test_an_index_that_a_build_passes_over_is_damage(tmp_path: Path, change: Change) -> None:
    store = Store(tmp_path / "store")
    store.write_pack("mask", ".png", [("1" * 32, b"a"), ("2" * 32, b"b")])
    assert not verify(store, tmp_path / "exports", repair=True)
    (path,) = tmp_path.glob("store/packs/mask/*.parquet")
    pq.write_table(change(pq.read_table(path, partitioning=None)), path)
    for repair in (False, True):
        (found,) = verify(store, tmp_path / "exports", repair=repair)
        assert (found.place, found.fault) == (str(path), "the pack's index is damaged")
    assert not verify(store, tmp_path / "exports", repair=False)


def test_no_run_is_committed_whose_table_has_another_form(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = TableForm(pa.schema([("later", pa.string())]), ())
    monkeypatch.setitem(FORMS, ("index", "records.parquet"), lambda: form)
    done = workspace.build(dataset=("ap10k",), split=("val",))
    assert [each for each in done.errors if "expected one column later, found 0" in each]
    assert not done.committed


def test_every_table_that_a_provenance_must_name_has_a_form() -> None:
    """But those that only people read."""
    free = {("tables", "table.parquet")}
    for stage, form in FORMS_BY_STAGE.items():
        for fault in form({"files": {}, "counts": {}, "random": []}, ""):
            name = fault.removeprefix("expected files.").partition(", found")[0]
            assert not name.endswith(".parquet") or (stage, name) in FORMS.keys() | free

"""A run's table that a reader could not use is damage: refused before it is read, struck out, and made again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tampering import correct_provenance, run_folder

from tasks.provenance import FORMS_BY_STAGE
from tasks.store import Store
from tasks.tables import FORMS, TableForm
from tasks.upkeep import verify

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


def with_null_within(field: str) -> Change:
    def change(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        rows[-1]["instances"][-1][field] = None
        return pa.Table.from_pylist(rows, schema=table.schema)

    return change


DAMAGES: list[tuple[str, str, Change, str]] = [
    ("spatext", "manifest.parquet", without("digest"), "expected one column digest, found 0"),
    ("spatext", "manifest.parquet", with_null("offset"), "expected no nulls in offset"),
    ("images", "rejects.parquet", without("message"), "expected one column message, found 0"),
    ("index", "manifest.parquet", with_null("file_name"), "expected no nulls in file_name"),
    ("index", "manifest.parquet", with_null_within("keypoints"), "expected no nulls in instances.keypoints"),
    ("manifest", "manifest.parquet", retyped("width", pa.string()), "expected int32 in the column width"),
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
@pytest.mark.parametrize(("stage", "name", "change", "why"), DAMAGES[::2])
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


def test_no_run_is_committed_whose_table_has_another_form(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = TableForm(pa.schema([("later", pa.string())]), ())
    monkeypatch.setitem(FORMS, ("index", "manifest.parquet"), lambda: form)
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

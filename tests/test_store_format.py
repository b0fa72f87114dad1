"""Stores of other formats: what is accepted, what is written again, what is refused, and the messages that say so."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Workspace
from stores import commit, table_of

from spctrl.storage import StoreError
from spctrl.store.code_version import copy_code
from spctrl.store.format import FORMAT, FORMAT_FILE, read_format, upgrade_format
from spctrl.store.provenance import ARTIFACT_STAGES
from spctrl.store.store import Store
from tasks.maintenance import collect, verify

RENAMED = ("index", *ARTIFACT_STAGES)
NOTICE = "an earlier version of spctrl wrote this store (format 1, now 2)"


@pytest.fixture
def built(make_workspace: Callable[..., Workspace], sample: Path) -> Workspace:
    workspace = make_workspace("built", sample)
    workspace.configure(
        "build", datasets=["ap10k"], splits=["val"], conditions=["spatext", "openpose", "mask"]
    )
    assert workspace.build().succeeded
    return workspace


def runs(workspace: Workspace) -> Iterator[Path]:
    yield from (path.parent for path in sorted(workspace.store.glob("runs/*/*/*/provenance.json")))


def to_first_format(workspace: Workspace) -> None:
    """Have a store look as one of format 1 does."""
    (workspace.store / FORMAT_FILE).unlink()
    for folder in runs(workspace):
        provenance = json.loads((folder / "provenance.json").read_bytes())
        del provenance["format"]
        if (stage := provenance["stage"]) in RENAMED:
            (folder / table_of(stage)).rename(folder / "manifest.parquet")
            provenance["files"]["manifest.parquet"] = provenance["files"].pop(table_of(stage))
        (folder / "provenance.json").write_text(json.dumps(provenance))


def test_a_build_says_its_format(built: Workspace) -> None:
    assert json.loads((built.store / FORMAT_FILE).read_bytes()) == {"format": FORMAT}
    formats = {json.loads((folder / "provenance.json").read_bytes())["format"] for folder in runs(built)}
    assert formats == {FORMAT}


def test_a_store_of_the_first_format_is_built_again_without_its_artifacts(
    built: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    exported, packs = built.exported(), built.packs("spatext", "openpose", "mask")
    to_first_format(built)
    capfd.readouterr()
    again = built.build()
    assert again.succeeded, again.errors
    assert again.worked == {}
    # The manifest, its export and its report are as before: they need not run.
    assert again.stages == {"index", "images", "spatext", "openpose", "mask"}
    assert capfd.readouterr().err.count(NOTICE) == 1
    assert built.packs("spatext", "openpose", "mask") == packs
    assert built.exported() == exported
    assert built.faults() == []
    tables = {
        path.parts[-4]: path.name
        for path in built.store.glob("runs/*/*/*/*.parquet")
        if "rej" not in path.name
    }
    assert tables["index"] == "records.parquet"
    assert {tables[stage] for stage in ("images", "spatext", "openpose", "mask")} == {"artifacts.parquet"}
    assert built.build().stages == set()
    assert NOTICE not in capfd.readouterr().err


def test_nothing_of_a_store_of_the_first_format_counts_as_damaged_or_unused(built: Workspace) -> None:
    to_first_format(built)
    before = {path: path.read_bytes() for path in built.store.rglob("*") if path.is_file()}
    store = Store(built.store)
    assert verify(store, built.exports, repair=True) == []
    waste = collect(store, [], keep=1, grace_s=0, dry_run=False)
    assert (waste.runs, waste.packs, waste.repacked) == ([], [], [])
    assert {path: path.read_bytes() for path in built.store.rglob("*") if path.is_file()} == before
    status = " ".join(built.spctrl("status").stdout.split())
    assert "its tables have the form of an earlier version of spctrl" in status
    assert "never built" not in status


@pytest.fixture
def upgraded(built: Workspace, tmp_path: Path) -> Workspace:
    """A store of the first format, and code that has changed since."""
    to_first_format(built)
    copy_code(tmp_path / "code")
    built.code = tmp_path / "code"
    module = built.code / "spctrl/store/code_version.py"
    # Every digest of code becomes another one, as after moves of modules.
    module.write_text(
        module.read_text().replace('"\\n".join([*map(_normalised', '"\\n\\n".join([*map(_normalised')
    )
    return built


def test_accepted_outputs_of_the_first_format_are_not_made_again(upgraded: Workspace) -> None:
    packs, exported = upgraded.packs("spatext", "openpose", "mask"), upgraded.exported()
    status = " ".join(upgraded.spctrl("status").stdout.split())
    # Also of stages whose inputs are not known before the index is there.
    for code in ("spctrl.conditions.masks:", "spctrl.data.images:"):
        assert f"code {code}" in status
    assert "up to date" not in status
    done = upgraded.spctrl("accept", "--all", "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("outputs of the earlier code count as current") == 8
    again = upgraded.run()
    assert again.succeeded, again.output
    assert NOTICE in " ".join(again.output.split())
    assert again.worked == {}
    assert upgraded.packs("spatext", "openpose", "mask") == packs
    assert upgraded.exported() == exported
    assert upgraded.run().stages == set()


def test_outputs_can_be_accepted_after_a_build_of_the_upgrade_has_begun(upgraded: Workspace) -> None:
    assert upgraded.run("--dataset", "ap10k", "--split", "val", family="Index").succeeded
    rest = upgraded.spctrl("accept", "--all", "--yes")
    assert rest.returncode == 0, rest.stdout + rest.stderr
    assert "index: the code is that of the latest run already" in rest.stdout
    named = upgraded.spctrl("accept", "index", "--yes")
    assert "index: outputs of the earlier code count as current" in named.stdout, named.stderr
    accepted = (upgraded.store / "accepted.json").read_bytes()
    for again in (["--all"], ["index", "mask"]):
        assert upgraded.spctrl("accept", *again, "--yes").returncode == 0
    assert (upgraded.store / "accepted.json").read_bytes() == accepted
    # Status asks every stage, of which some read runs that are still of the first format.
    assert upgraded.spctrl("status").returncode == 0
    done = upgraded.run()
    assert done.succeeded, done.output
    assert done.worked == {}
    assert "report" not in done.stages


def test_without_acceptance_artifacts_are_made_again(upgraded: Workspace) -> None:
    again = upgraded.run()
    assert again.succeeded, again.output
    assert again.worked["spatext"] == again.worked["mask"] == 8


def test_a_wrong_name_accepts_nothing(upgraded: Workspace) -> None:
    for wrong in (["mask", "sketch"], [], ["--all", "mask"]):
        assert upgraded.spctrl("accept", *wrong, "--yes").returncode == 2
    upgraded.configure("paths", store=upgraded.folder / "elsewhere")
    for nothing in (["--all"], ["mask"]):
        done = upgraded.spctrl("accept", *nothing, "--yes")
        assert done.returncode == 2
        assert "never built" in done.stderr
    assert not (upgraded.store / "accepted.json").exists()


@pytest.mark.parametrize("accepted", [False, True])
def test_gc_keeps_the_artifacts_of_a_store_that_waits_for_its_first_build(
    upgraded: Workspace, accepted: bool
) -> None:
    if accepted:
        assert upgraded.spctrl("accept", "--all", "--yes").returncode == 0
    packs = upgraded.packs("images", "spatext", "openpose", "mask")
    done = upgraded.spctrl("gc", "--keep", "0", "--grace-hours", "0")
    assert done.returncode == 0, done.stderr
    assert upgraded.packs("images", "spatext", "openpose", "mask") == packs
    if not accepted:
        assert upgraded.spctrl("accept", "--all", "--yes").returncode == 0
    assert upgraded.run().worked == {}


def test_a_damaged_artifact_of_the_first_format_costs_no_other_artifact(built: Workspace) -> None:
    to_first_format(built)
    store = Store(built.store)
    (pack,) = store.packs("mask")
    key, place = next(iter(store.pack_locations("mask", pack).items()))
    path = store.pack_path("mask", pack)
    data = bytearray(path.read_bytes())
    data[place.offset] ^= 0xFF
    path.write_bytes(data)
    (damage,) = verify(store, built.exports, repair=True)
    assert key in damage.place
    assert not collect(store, [], keep=3, grace_s=0, dry_run=False).packs
    again = built.build()
    assert again.succeeded, again.errors
    assert again.worked == {"mask": 1}


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"PAR1")])
def test_a_harmed_table_of_the_first_format_costs_no_artifact(
    built: Workspace, harm: Callable[[Path], object]
) -> None:
    to_first_format(built)
    (table,) = built.store.glob("runs/mask/*/*/manifest.parquet")
    harm(table)
    store = Store(built.store)
    assert verify(store, built.exports, repair=True) == []
    assert not collect(store, [], keep=0, grace_s=0, dry_run=False).packs
    assert built.build().worked == {}


def test_gc_removes_the_first_format_once_its_stages_were_built_again(built: Workspace) -> None:
    to_first_format(built)
    built.configure("spatext", keypoint_radius_px=3)
    assert built.build().succeeded
    store = Store(built.store)
    assert [len(store.runs(stage)) for stage in ("spatext", "mask")] == [2, 1]
    (earlier,) = (run for run in store.runs("spatext") if "format" not in run.history())
    current = [run for run in store.runs() if "format" in run.history()]
    assert earlier not in collect(store, current, keep=2, grace_s=0, dry_run=True).runs
    waste = collect(store, current, keep=1, grace_s=0, dry_run=False)
    assert earlier in waste.runs
    assert [stage for stage, _ in waste.packs] == ["spatext"]
    assert built.build().stages == set()


def test_the_earlier_table_goes_once_the_run_is_committed(tmp_path: Path) -> None:
    run = Store(tmp_path).run("mask", "ap10k-val", "f" * 32)
    run.write("manifest.parquet", b"of format 1")
    run.write("artifacts.parquet", b"of format 2")
    with pytest.raises(StoreError, match="was removed while the build used it"):
        commit(run, ["gone.tar"])
    assert {"manifest.parquet", "artifacts.parquet"} <= set(run.files())
    commit(run)
    assert set(run.files()) == {"artifacts.parquet", "rejects.parquet", "provenance.json"}
    manifest = Store(tmp_path).run("manifest", "ap10k-val", "f" * 32)
    manifest.write("manifest.parquet", b"of users")
    commit(manifest)
    assert "manifest.parquet" in manifest.files()


def test_a_run_of_a_later_format_is_not_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    run = store.run("features", "ap10k-val", "f" * 32)
    run.write("features.npz", b"")
    commit(run)
    path = run.path("provenance.json")
    path.write_text(path.read_text().replace(f'"format": {FORMAT}', f'"format": {FORMAT + 1}'))
    assert not run.is_whole()
    assert run.provenance() == {}
    assert run.history()["format"] == FORMAT + 1
    assert verify(store, tmp_path / "exports", repair=True) == []


@pytest.mark.parametrize("command", [["status"], ["gc"], ["verify"], ["accept", "mask", "--yes"]])
def test_a_store_of_a_later_format_is_refused(built: Workspace, command: list[str]) -> None:
    before = {path: path.read_bytes() for path in built.store.rglob("*") if path.is_file()}
    (built.store / FORMAT_FILE).write_text(json.dumps({"format": FORMAT + 1}))
    done = built.spctrl(*command)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"expected a store of format {FORMAT} or earlier at {built.store}, found format 3")
    (built.store / FORMAT_FILE).write_text(json.dumps({"format": FORMAT}))
    assert {path: path.read_bytes() for path in built.store.rglob("*") if path.is_file()} == before


def test_a_build_refuses_a_store_of_a_later_format(built: Workspace) -> None:
    (built.store / FORMAT_FILE).write_text(json.dumps({"format": FORMAT + 5, "more": "facts"}))
    done = built.run()
    assert not done.succeeded
    assert done.committed == {}
    assert f"found format {FORMAT + 5}, which a later version of spctrl wrote" in " ".join(
        done.output.split()
    )
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 0}', '{"format": "2"}', '{"format": true}', "[" * 999]
)
def test_what_is_no_format_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / FORMAT_FILE).write_text(content)
    with pytest.raises(
        StoreError, match=r"format.json: expected .* found .*\. Restore the file, or remove it"
    ):
        read_format(Store(tmp_path))


def test_a_new_store_is_no_upgrade(tmp_path: Path) -> None:
    upgrade_format(Store(tmp_path / "new"), pytest.fail)
    assert read_format(Store(tmp_path / "new")) == FORMAT

"""The form of a provenance: one that no build wrote counts as none, to every reader, and ``verify`` says why."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Workspace, _luigi_settings
from stores import FACTS, commit

from spctrl.io.documents import MAX_DOCUMENT_BYTES, parse_document
from spctrl.store.format import FORMAT
from spctrl.store.provenance import ProvenanceError, parse_provenance
from spctrl.store.runs import PROVENANCE, Run
from spctrl.store.store import Store
from tasks.maintenance import collect, verify

Change = Callable[[dict[str, Any]], object]

SHA = "0" * 64
WRONG: dict[str, tuple[Any, ...]] = {
    "stage": (None, 7, ["mask"]),
    "part": (None, {}),
    "code": (None, [], {"a": 1}, {"a": None}),
    "libraries": (None, "torch", {"torch": 2.1}),
    "code_version": (None, 0),
    "parameters": (None, [], "x"),
    "inputs": (None, [], {"index": None}, {"index": {"index": "x"}}),
    "counts": (
        None,
        [],
        "x",
        {},
        {"records": 1},
        {"made": 1},
        *({"records": each, "made": 1} for each in (None, "1", -1, True, 1.0, 10**400, [1], {})),
        {"records": 1, "made": 1, "rejected": None},
        {"records": 1, "made": 1, "unknown": "x"},
    ),
    "started_at": (None, 0),
    "finished_at": (None, 2026, ["2026"]),
    "duration_s": (None, "1", True, float("nan"), float("inf"), 10**400),
    "made_by": (None, "x", {"python": 3.11}),
    "files": (
        None,
        [],
        {},
        {"x": 1},
        *({"x": {"size": each, "digest": SHA}} for each in (None, "1", -1, True, 1.5, 2**70)),
        *({"x": {"size": 1, "digest": each}} for each in (None, "../../x", SHA.upper() + "A", 0)),
        {"../../x": {"size": 1, "digest": SHA}},
        {"/x": {"size": 1, "digest": SHA}},
        {"\ud800": {"size": 1, "digest": SHA}},
    ),
    "packs": (None, [], {"x.tar": "1"}, {"x.tar": -1}, {"x.tar": False}, {"../x.tar": 1}, {"a\0": 1}),
    "fingerprint": (None, 1),
    "weights": (None, 1),
    "adjustments": (None, [], {"clipped": "1"}, {"clipped": -1}, {"clipped": None}),
    "random": (None, 0, "yes", True, [7]),
    "warnings": (None, "x", [1]),
    "git_commit": (1, ["x"]),
}
"""By name: values that no build writes there."""
NEST = "[" * 100_000 + "]" * 100_000
DEEP = "[" * 200 + "]" * 200
TEXTS = {
    "empty": "",
    "a list": "[]",
    "a number": "7",
    "nothing": "{}",
    "brackets": "[" * 100_000,
    "nested": NEST,
}


def changes() -> Iterator[tuple[str, Change]]:
    for name in (*FACTS, "files", "packs"):
        yield f"no {name}", lambda found, name=name: found.pop(name)  # type: ignore[misc]
    for name, values in WRONG.items():
        for value in values:
            text = f"{name} = {json.dumps(value)}"[:50]
            yield text, lambda found, name=name, value=value: found.update({name: value})  # type: ignore[misc]
    yield "deep parameters", lambda found: found.update(parameters={"x": json.loads(DEEP)})
    yield "deep and unread", lambda found: found.update(unread=json.loads(DEEP))


CHANGES = dict(changes())
OF_STAGES: list[tuple[str, Change]] = [
    ("index", lambda found: found["files"].pop("records.parquet")),
    ("mask", lambda found: found["files"].pop("artifacts.parquet")),
    ("mask", lambda found: found["files"].pop("rejects.parquet")),
    ("manifest", lambda found: found["counts"].pop("instances")),
    ("manifest", lambda found: found["counts"].pop("images_on_disk")),
    ("manifest", lambda found: found["counts"].pop("rejected")),
    ("report", lambda found: found["files"].pop("report.html")),
    ("pose_ap", lambda found: found.pop("random")),
    ("evaluated_images", lambda found: found["counts"].pop("annotated")),
    ("evaluated_images", lambda found: found["counts"].pop("poses")),
]
"""What only the readers of some stages take for granted."""
FILES = (
    "records.parquet", "artifacts.parquet", "manifest.parquet", "rejects.parquet", "report.html", "scores.parquet",
    "samples.npz", "images.parquet"
)  # fmt: skip
SOUND: dict[str, Any] = {
    **FACTS,
    "format": FORMAT,
    "counts": dict.fromkeys(
        ("records", "made", "rejected", "instances", "images_on_disk", "poses", "annotated"), 1
    ),
    "random": ["vitpose"],
    "files": {name: {"size": 1, "digest": SHA} for name in FILES},
    "packs": {"a.tar": 10_240},
}


def written(provenance: Any) -> bytes:
    return json.dumps(provenance).encode()


def changed(provenance: dict[str, Any], change: Change) -> bytes:
    found = copy.deepcopy(provenance)
    change(found)
    return written(found)


@pytest.mark.parametrize(
    "addition",
    [
        {},
        {"weights": "random", "git_commit": None, "warnings": ["few images"], "random": []},
        {"adjustments": {"a kind that only a later version knows": 3}, "fingerprint": "f"},
        {"duration_s": -3.5},  # the clock was set back
        {"duration_s": 2, "what nobody reads": [None]},
    ],
    ids=str,
)
def test_what_builds_write_and_wrote_is_sound(addition: dict[str, Any]) -> None:
    for stage in ("index", "mask", "manifest", "report", "pose_ap", "evaluated_images", "export", "of old"):
        assert parse_provenance(stage, written(SOUND | addition)) == SOUND | addition


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_no_build_writes_is_unsound(change: Change) -> None:
    with pytest.raises(ProvenanceError, match=r"^expected .*found") as caught:
        parse_provenance("mask", changed(SOUND, change))
    assert len(str(caught.value)) < 250
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(("stage", "change"), OF_STAGES)
def test_what_the_readers_of_a_stage_need_must_be_there(stage: str, change: Change) -> None:
    with pytest.raises(ProvenanceError, match=r"expected [a-z_.]+, found none"):
        parse_provenance(stage, changed(SOUND, change))
    parse_provenance("export", changed(SOUND, change))


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_an_unsound_provenance_is_absent(text: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    run = store.run("mask", "ap10k-train", "f")
    commit(run)
    assert run.is_whole()
    run.write(PROVENANCE, text.encode())
    assert run.provenance() == {}
    assert not run.is_whole()
    assert store.runs() == []
    assert store.runs(damaged=True) == [run]
    (damage,) = verify(store, tmp_path / "exports", repair=True)
    assert damage.fault.startswith("provenance.json is damaged: expected ")
    assert verify(store, tmp_path / "exports", repair=False) == []


def test_a_provenance_as_large_as_a_disk_is_refused_unread(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    run = store.run("mask", "ap10k-train", "f")
    commit(run)
    with run.path(PROVENANCE).open("r+b") as file:
        file.truncate(40 * 10**9)
    assert run.provenance() == {}
    assert store.runs() == []
    (damage,) = verify(store, tmp_path / "exports", repair=False)
    assert f"expected at most {MAX_DOCUMENT_BYTES:,} bytes" in damage.fault


def test_gc_leaves_the_artifacts_of_a_run_whose_provenance_is_damaged(tmp_path: Path) -> None:
    """The next build makes the run again from them."""
    import pyarrow as pa

    from spctrl.store.artifacts import artifact_schema

    store = Store(tmp_path)
    made = store.write_pack("mask", ".png", [("0" * 32, b"days of work"), ("1" * 32, b"dead" * 999)])
    (location, *_) = made.values()
    run = store.run("mask", "ap10k-train", "f")
    row = dict(zip(artifact_schema().names, (1, "0" * 32, *location[:4]), strict=True))
    run.write_table("artifacts.parquet", pa.Table.from_pylist([row], schema=artifact_schema()))
    commit(run, [location.pack])
    run.write(PROVENANCE, b'{"files": {}, "packs": {}}')
    waste = collect(store, [run], keep=0, grace_s=0, dry_run=False)
    assert waste.repacked == [("mask", location.pack)]
    assert run.provenance() == {}
    ((key, kept),) = store.pack_locations("mask", next(iter(store.packs("mask")))).items()
    assert (key, store.read("mask", kept)) == ("0" * 32, b"days of work")


# Builds


@pytest.fixture(scope="module")
def built(sample: Path, code: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("provenance") / "built", sample, code)
    workspace.configure("build", datasets=["ap10k"], splits=["val"])
    assert workspace.build().succeeded
    return workspace


ROUNDS = 3


@pytest.mark.slow
@pytest.mark.parametrize("part", range(ROUNDS))
def test_runs_with_unsound_provenances_are_made_again(built: Workspace, part: int) -> None:
    """Each run of the store with another fault at once; all faults would take hundreds of builds."""
    from pipelines import BuildDataset
    from tasks.stage.status import statuses

    names = sorted(CHANGES)[part :: len(CHANGES) // 40]
    exported, store = built.exported(), Store(built.store)
    runs = store.runs()
    harm(runs, [CHANGES[name] for name in names])
    damages = {damage.place: damage.fault for damage in verify(store, built.exports, repair=False)}
    assert {run.place() for run in runs} == damages.keys()
    assert all(fault.startswith("provenance.json is damaged: expected ") for fault in damages.values())
    with _luigi_settings(built.settings_file()):
        assert all(each.reasons for each in statuses(BuildDataset()))
    assert collect(store, runs, keep=1, grace_s=0, dry_run=True).runs == []
    again = built.build()
    assert again.succeeded, again.errors
    assert again.stages == {run.stage for run in runs}
    assert again.worked == {}  # from the packs
    assert built.exported() == exported
    assert built.faults() == []
    assert verify(store, built.exports, repair=False) == []


def harm(runs: list[Run], some: list[Change]) -> None:
    for run, change in zip(runs, some, strict=False):
        run.write(PROVENANCE, changed(run.provenance(), change))


def test_every_stage_writes_a_sound_provenance(built: Workspace) -> None:
    found = [(run.stage, run.read_provenance()) for run in Store(built.store).runs(damaged=True)]
    assert {stage for stage, _ in found} >= {"index", "images", "spatext", "manifest", "export", "report"}


@pytest.mark.slow
def test_commands_and_builds_go_on_after_an_unsound_provenance(
    sample: Path, make_workspace: Callable[..., Workspace]
) -> None:
    workspace = make_workspace("commands", sample)
    workspace.configure("build", datasets=["ap10k"], splits=["val"])
    assert workspace.build().succeeded
    (path,) = workspace.store.glob("runs/spatext/*/*/provenance.json")
    path.write_text('{"files": {}, "packs": {}}')
    status = workspace.spctrl("status")
    assert (status.returncode, status.stderr) == (0, "")
    found = workspace.spctrl("verify")
    assert found.returncode == 1
    assert "provenance.json is damaged: expected stage, found none" in found.stdout
    assert not path.exists()
    again = workspace.run("--local-scheduler")
    assert again.exit_code == 0, again.output
    assert "Traceback" not in again.output
    assert "spatext" in again.stages


@pytest.mark.parametrize(
    "data", [b'{"a": "\xed\xa0\x80"}', '{"a": "b"}'.encode("utf-16"), b'{"a": "\\ud800"}']
)
def test_a_document_of_other_bytes_than_utf_8_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="codec can't"):
        parse_document(data)


@pytest.mark.parametrize("filling", [b"[],", b"{},", b"[{}],"])
def test_a_document_of_many_lists_is_refused_before_it_is_read(filling: bytes) -> None:
    with pytest.raises(ValueError, match="expected at most 65,536 lists and objects, found"):
        parse_document(b"[" + filling * 66_000 + b"0]")

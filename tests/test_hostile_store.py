"""Stores and exports that mean harm: whatever their files claim, reading them takes memory that is bounded."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Workspace, _luigi_settings
from memory import MIB, memory_of

from spctrl.errors import ExpectedError
from spctrl.storage import FileTooLargeError, StoreError, files_at
from spctrl.storage.files import file_digest
from spctrl.store.packs import suffix_in
from spctrl.store.runs import PROVENANCE
from spctrl.store.store import Store
from tasks.maintenance import collect, verify

MOST_MEMORY = 600 * MIB
"""Of a whole step; what is not refused took from 10 GB to all that there is."""
HUGE = 40 * 10**9
ROWS = 80_000_000
VALUES = 480_000_000
"""Of all columns together: to write more would take the time of a build."""


@pytest.fixture(scope="module")
def original(sample: Path, code: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("hostile") / "built", sample, code)
    workspace.configure("build", datasets=["ap10k"], splits=["val"])
    assert workspace.build().succeeded
    return workspace


def lengthen(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(HUGE)


def many_rows(path: Path) -> None:
    """A table of the same columns whose rows are all null, and which has no more bytes for them."""
    schema = pq.read_schema(path)
    rows = min(ROWS, VALUES // len(schema)) // 80
    some = pa.table([pa.nulls(rows, field.type) for field in schema], names=schema.names)
    with pq.ParquetWriter(path, some.schema, compression="zstd") as writer:
        for _ in range(80):
            writer.write_table(some)


def long_messages(path: Path) -> None:
    """A reason of 100 MB for each of 100,000 rejects."""
    table = pq.read_table(path)
    count = 100_000
    message = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), ["x" * 10**8])
    keys = [hashlib.blake2b(str(i).encode(), digest_size=16).hexdigest() for i in range(count)]
    columns = {"key": pa.array(keys), "offset": np.zeros(count, np.int64), "size": np.zeros(count, np.int64)}
    texts = {"digest": pa.array([""] * count), "code": pa.array(["bad"] * count), "message": message}
    pq.write_table(pa.table({**columns, **texts}).select(table.column_names), path, compression="zstd")


def fitting_index(path: Path) -> None:
    """A pack as large as a disk, and an index that says that it holds one artifact, which is in a hole."""
    pack = path.with_suffix(".tar")
    size = HUGE // tarfile.RECORDSIZE * tarfile.RECORDSIZE
    with pack.open("r+b") as file:
        file.truncate(size)
    row = pq.read_table(path).slice(0, 1).to_pylist()[0]
    row |= {"offset": size - 2 * tarfile.RECORDSIZE, "size": tarfile.RECORDSIZE}
    pq.write_table(pa.Table.from_pylist([row], schema=pq.read_schema(path)), path)


def recommit(path: Path) -> None:
    """Let the run's provenance state what its file is now."""
    provenance = path.with_name(PROVENANCE)
    content = json.loads(provenance.read_bytes())
    content["files"][path.name] = {"size": path.stat().st_size, "digest": file_digest(path)}
    provenance.write_text(json.dumps(content))


def many_rows_committed(path: Path) -> None:
    many_rows(path)
    recommit(path)


ATTACKS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "index of many rows": ("store/packs/spatext/[!.]*.parquet", many_rows),
    "index of long messages": ("store/packs/spatext/[!.]*.parquet", long_messages),
    "sparse index": ("store/packs/spatext/[!.]*.parquet", lengthen),
    "sparse pack": ("store/packs/spatext/*.tar", lengthen),
    "sparse pack that fits its index": ("store/packs/spatext/[!.]*.parquet", fitting_index),
    "sparse provenance": ("store/runs/spatext/*/*/provenance.json", lengthen),
    "manifest of many rows": ("store/runs/spatext/*/*/artifacts.parquet", many_rows_committed),
    "index of images of many rows": ("store/runs/index/*/*/records.parquet", many_rows_committed),
    "rejects of many rows": ("store/runs/images/*/*/rejects.parquet", many_rows_committed),
    "sparse image paths": ("store/runs/index/*/*/images.txt", lengthen),
    "sparse code versions": ("store/accepted.json", lengthen),
    "sparse ledger": ("exports/AP-10K_triplet/.spctrl/val_split1.json", lengthen),
    "sparse list of files": ("exports/AP-10K_triplet/.spctrl/val_split1.parquet", lengthen),
    "list of many files": ("exports/AP-10K_triplet/.spctrl/val_split1.parquet", many_rows),
}
STAYS_AN_ERROR = {"sparse code versions"}
"""What only its user can tell to be dispensable."""


@pytest.fixture
def attacked(original: Workspace, tmp_path: Path) -> Workspace:
    """A copy of a workspace; the folder's name is part of an export's fingerprint, so it is exported again."""
    workspace = Workspace(tmp_path / "copy", original.data, original.code)
    workspace.configure("build", datasets=["ap10k"], splits=["val"])
    shutil.copytree(original.store, workspace.store)
    assert workspace.build().succeeded
    (workspace.store / "accepted.json").write_text("{}")
    return workspace


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
def test_every_step_takes_bounded_memory(attack: str, attacked: Workspace, original: Workspace) -> None:
    """And after a repair the next build makes again what was there."""
    pattern, harm = ATTACKS[attack]
    (path, *_) = attacked.folder.glob(pattern)
    assert memory_of(lambda: harm(path)) >= 0  # in another process: it takes memory to make
    if "packs" in pattern:
        for provenance in attacked.store.glob("runs/spatext/*/*/provenance.json"):
            provenance.unlink()  # a build looks into packs for what has no run
    for step in (status, clean_up, build, repair):
        assert memory_of(lambda step=step: step(attacked)) < MOST_MEMORY  # type: ignore[misc]
    again = attacked.build()
    assert again.succeeded != (attack in STAYS_AN_ERROR), again.errors
    if again.succeeded:
        assert attacked.exported() == original.exported()
        assert attacked.faults() == []
        assert verify(Store(attacked.store), attacked.exports, repair=False) == []


def explained(step: Callable[[], Any]) -> None:
    """Do what may end with a sentence."""
    try:
        step()
    except ExpectedError as error:
        assert len(str(error)) < 1000


def status(workspace: Workspace) -> None:
    from pipelines import BuildDataset
    from tasks.stage.status import statuses

    with _luigi_settings(workspace.settings_file()):
        explained(lambda: list(statuses(BuildDataset())))


def clean_up(workspace: Workspace) -> None:
    store = Store(workspace.store)
    explained(lambda: collect(store, store.runs(), keep=1, grace_s=0, dry_run=True))


def repair(workspace: Workspace) -> None:
    explained(lambda: verify(Store(workspace.store), workspace.exports, repair=True))


def build(workspace: Workspace) -> None:
    done = workspace.build()
    assert all("Traceback" not in error for error in done.errors)


# The pieces


def test_a_file_is_read_up_to_a_bound(tmp_path: Path) -> None:
    files = files_at(tmp_path)
    files.write("x", bytes(100))
    assert files.read("x", max_bytes=100) == bytes(100)
    with pytest.raises(FileTooLargeError, match=r"x: expected at most 99 bytes.*found a file of 100"):
        files.read("x", max_bytes=99)
    elsewhere = files_at("memory://bounded")
    elsewhere.write("x", bytes(100))
    assert elsewhere.read("x", max_bytes=100) == bytes(100)
    with pytest.raises(FileTooLargeError):
        elsewhere.read("x", max_bytes=99)
    with pytest.raises(FileNotFoundError):
        elsewhere.read("y", max_bytes=99)


def test_a_hole_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate(10**9)
        file.write(b"{}")
    with pytest.raises(FileTooLargeError, match="no hole"):
        files_at(tmp_path).read("x", max_bytes=10**10)


def test_an_artifact_is_read_within_its_pack(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (place,) = store.write_pack("mask", ".png", [("0" * 32, b"image")]).values()
    lengthen(tmp_path / "packs/mask" / place.pack)
    for size, offset in ((2**61, 512), (2**31, 512), (HUGE, 0), (-1, 0), (5, -1), (5, 2**63)):
        with pytest.raises(StoreError, match=f"expected {size} bytes at {offset}"):
            store.read("mask", place._replace(size=size, offset=offset))
    assert store.read("mask", place) == b"image"


def test_artifacts_that_overlap_count_as_none(tmp_path: Path) -> None:
    """A thousand of half a gigabyte each would take an hour to digest."""
    store = Store(tmp_path)
    (place,) = store.write_pack("mask", ".png", [("0" * 32, b"image" * 99)]).values()
    keys = [f"{i:032x}" for i in range(3)]
    store.write_pack_index("mask", place.pack, dict.fromkeys(keys[:1], place))
    assert len(store.pack_locations("mask", place.pack)) == 1
    store.write_pack_index("mask", place.pack, dict.fromkeys(keys, place))
    assert store.pack_locations("mask", place.pack) == {}


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_the_suffix_of_a_pack_is_found_without_its_long_names(kind: bytes, tmp_path: Path) -> None:
    member = tarfile.TarInfo("name.png")
    member.type, member.size = kind, 2**33 - 512
    path = tmp_path / "x.tar"
    path.write_bytes(member.tobuf(tarfile.USTAR_FORMAT))
    lengthen(path)
    assert suffix_in(path) == ".png"
    path.write_bytes(b"\xff" * 512)
    assert suffix_in(path) == ""

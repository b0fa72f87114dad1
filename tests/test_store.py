"""The store: packs that any tool reads, writes that are whole or absent, runs that count only while all is there."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stores import FACTS, commit, locations

from spctrl.errors import ExpectedError
from spctrl.io.parquet import parquet_bytes
from spctrl.storage import StoreError, files_at
from spctrl.storage.files import TEMPORARY, file_digest, write_atomic
from spctrl.store.digests import content_digest, digest, digests
from spctrl.store.pack_index import Location, index_name, pack_name
from spctrl.store.provenance import ProvenanceError
from spctrl.store.runs import PROVENANCE, Run
from spctrl.store.store import Store

STAGE = "spatext"
Results = list[tuple[str, bytes | tuple[str, str]]]


def key(number: int) -> str:
    return f"{number:032x}"


RESULTS: Results = [
    (key(1), b"first"),
    (key(2), ("bad_image", "it cannot be decoded — 壊れた")),
    (key(3), b""),
    (key(4), bytes(range(256)) * 5),
    (key(5), b"x" * 512),
]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def names_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def fail_with(code: int) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


# Digests


def test_a_digest_depends_on_the_borders_of_its_parts() -> None:
    digests = [
        digest("ab", "c"),
        digest("a", "bc"),
        digest("abc"),
        digest("abc", ""),
        digest("", "abc"),
        digest(),
    ]
    assert len(set(digests)) == len(digests)
    assert all(len(each) == 32 for each in digests)
    assert digest("é") == digest("é".encode())


def test_digests_of_many_that_begin_alike_are_those_of_each() -> None:
    assert list(digests("salt", ["one", None, "", "größer"])) == [
        digest("salt", "one"),
        None,
        digest("salt", ""),
        digest("salt", "größer"),
    ]


def test_content_digests_are_those_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    expected = hashlib.sha256(b"content").hexdigest()
    assert content_digest(b"content") == file_digest(tmp_path / "file") == expected


# Packs


def test_a_pack_is_a_tar_file_with_its_members_where_the_locations_say(store: Store) -> None:
    places = store.write_pack(STAGE, ".png", RESULTS)
    assert list(places) == [name for name, _ in RESULTS]
    pack = places[key(1)].pack
    with tarfile.open(store.pack_path(STAGE, pack)) as tar:
        members = {member.name: tar.extractfile(member) for member in tar.getmembers()}
        contents = {name: file.read() for name, file in members.items() if file is not None}
    assert contents == {f"{name}.png": data for name, data in RESULTS if isinstance(data, bytes)}
    raw = store.pack_path(STAGE, pack).read_bytes()
    for name, data in RESULTS:
        found = places[name]
        if isinstance(data, bytes):
            assert raw[found.offset : found.offset + found.size] == data
            assert found == Location(pack, found.offset, len(data), hashlib.sha256(data).hexdigest())
            assert store.read(STAGE, found) == data


def test_what_was_written_is_found_again(store: Store) -> None:
    written = store.write_pack(STAGE, ".png", RESULTS)
    written |= store.write_pack(STAGE, ".png", [(key(9), b"another pack")])
    assert locations(Store(str(store.home)), STAGE) == written
    assert locations(store, "openpose") == {}
    assert store.stages() == [STAGE]


def test_rejects_are_kept_with_their_reasons(store: Store) -> None:
    store.write_pack(STAGE, ".png", RESULTS)
    found = locations(store, STAGE)[key(2)]
    assert (found.code, found.message) == RESULTS[1][1]
    assert (found.size, found.digest) == (0, "")
    assert [name for name, each in locations(store, STAGE).items() if each.code] == [key(2)]


@pytest.mark.parametrize("results", [[(key(1), ("code", "why"))], []], ids=["rejects alone", "nothing"])
def test_a_pack_without_members_is_a_pack(store: Store, results: Results) -> None:
    places = store.write_pack(STAGE, ".png", results)
    assert locations(store, STAGE) == places
    (path,) = (store.home / "packs" / STAGE).glob("*.tar")
    with tarfile.open(path) as tar:
        assert tar.getmembers() == []


def test_packs_of_the_same_results_are_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = [Store(tmp_path / name) for name in "ab"]
    stores[0].write_pack(STAGE, ".png", RESULTS)
    later = time.time() + 10_000
    monkeypatch.setattr(time, "time", lambda: later)
    stores[1].write_pack(STAGE, ".png", RESULTS)
    names = names_below(stores[0].home)
    assert len(names) == 2
    assert names == names_below(stores[1].home)
    assert all((stores[0].home / name).read_bytes() == (stores[1].home / name).read_bytes() for name in names)


def test_a_pack_is_named_after_its_contents(store: Store) -> None:
    name = store.write_pack(STAGE, ".png", RESULTS)[key(1)].pack
    assert store.write_pack(STAGE, ".png", RESULTS[:-1])[key(1)].pack != name
    assert store.write_pack(STAGE, ".png", RESULTS[::-1])[key(1)].pack != name
    assert store.write_pack(STAGE, ".png", RESULTS)[key(1)].pack == name


def test_builds_that_make_other_bytes_of_the_same_keys_leave_each_others_packs_alone(store: Store) -> None:
    """As two builds on GPUs do, side by side."""
    first = store.write_pack(STAGE, ".png", [(key(1), b"by the first"), (key(2), ("bad_image", "no image"))])
    second = store.write_pack(
        STAGE, ".png", [(key(1), b"by the second"), (key(2), ("bad_image", "no image"))]
    )
    assert store.read(STAGE, first[key(1)]) == b"by the first"
    assert store.read(STAGE, second[key(1)]) == b"by the second"
    assert locations(store, STAGE)[key(1)] in (first[key(1)], second[key(1)])


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    "damage", [truncated, lambda data: b"", lambda data: b"garbage", lambda data: data[:-4]]
)
def test_a_damaged_index_holds_nothing_and_hides_no_other(
    store: Store, damage: Callable[[bytes], bytes]
) -> None:
    pack = store.write_pack(STAGE, ".png", RESULTS)[key(1)].pack
    other = store.write_pack(STAGE, ".png", [(key(9), b"another pack")])
    path = store.home / index_name(STAGE, pack)
    path.write_bytes(damage(path.read_bytes()))
    assert locations(store, STAGE) == other
    store.write_pack(STAGE, ".png", RESULTS)
    assert key(1) in locations(store, STAGE)


@pytest.mark.parametrize("half", [pack_name, index_name])
def test_half_a_pack_does_not_count(store: Store, half: Callable[[str, str], str]) -> None:
    pack = store.write_pack(STAGE, ".png", RESULTS)[key(1)].pack
    (store.home / half(STAGE, pack)).unlink()
    assert locations(store, STAGE) == {}


@pytest.mark.parametrize("size", [0, 100, 3000])
def test_a_cut_pack_does_not_count(store: Store, size: int) -> None:
    pack = store.write_pack(STAGE, ".png", RESULTS)[key(1)].pack
    with store.pack_path(STAGE, pack).open("r+b") as file:
        file.truncate(size)
    assert locations(store, STAGE) == {}


@pytest.mark.parametrize("count", [0, 1, 2, 19, 20, 21, 60])
def test_packs_of_every_size_count(store: Store, count: int) -> None:
    written = store.write_pack(STAGE, ".png", [(key(number), b"x" * number * 37) for number in range(count)])
    assert locations(store, STAGE) == written


def test_reading_what_is_not_there_names_the_pack_and_what_to_do(store: Store) -> None:
    places = store.write_pack(STAGE, ".png", RESULTS)
    last = places[key(5)]
    with pytest.raises(StoreError, match=r"expected 99999 bytes at .* `spctrl verify`") as caught:
        store.read(STAGE, last._replace(size=99_999))
    assert str(store.pack_path(STAGE, last.pack)) in str(caught.value)
    with pytest.raises(
        StoreError, match=r"cannot read .*missing.tar: No such file or directory.*`spctrl verify`"
    ):
        store.read(STAGE, last._replace(pack="missing.tar"))


# Writing


def test_a_file_is_written_with_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "a/b/file"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert names_below(tmp_path) == ["a/b/file"]


def test_a_file_may_be_written_under_a_name_elsewhere_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    write_atomic(tmp_path / "a/file", b"one", temporary=elsewhere)
    assert names_below(tmp_path) == ["a/file"]
    monkeypatch.setattr(Path, "replace", fail_with(errno.EIO))
    with pytest.raises(StoreError):
        write_atomic(tmp_path / "a/file", b"two", temporary=elsewhere)
    assert names_below(tmp_path) == ["a/file"]


@pytest.mark.parametrize("step", ["write_bytes", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with monkeypatch.context() as patched:
        patched.setattr(Path, step, fail_with(code))
        with pytest.raises(StoreError, match="make room or fix the permissions") as caught:
            write_atomic(path, b"new")
    assert str(path) in str(caught.value)
    assert os.strerror(code) in str(caught.value)
    assert isinstance(caught.value, ExpectedError)
    assert path.read_bytes() == b"old"
    assert names_below(tmp_path) == ["file"]


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_half(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", write_half)
        with pytest.raises(StoreError, match="No space left on device"):
            write_atomic(tmp_path / "file", b"new content")
    assert names_below(tmp_path) == []


def test_a_file_in_place_of_a_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    with pytest.raises(StoreError, match="cannot write") as caught:
        Store(tmp_path / "store").write_pack(STAGE, ".png", RESULTS)
    assert str(tmp_path / "store") in str(caught.value)


def test_a_pack_on_a_full_disk_is_not_half_there(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    before = store.write_pack(STAGE, ".png", [(key(9), b"finished")])
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", fail_with(errno.ENOSPC))
        with pytest.raises(StoreError):
            store.write_pack(STAGE, ".png", RESULTS)
    assert locations(store, STAGE) == before
    assert len(names_below(store.home)) == 2


def test_temporaries_that_a_killed_writer_left_are_found_once_they_are_old(tmp_path: Path) -> None:
    old, new, file = tmp_path / f"a/{TEMPORARY}1-x", tmp_path / f"{TEMPORARY}2-y", tmp_path / "a/file"
    old.parent.mkdir()
    for path in (old, new, file):
        path.write_bytes(b"")
    hour_ago = time.time() - 3600
    os.utime(old, (hour_ago, hour_ago))
    os.utime(file, (hour_ago, hour_ago))
    assert list(files_at(tmp_path).leftovers(older_than_s=60)) == [f"a/{TEMPORARY}1-x"]


# Runs


@pytest.fixture
def run(store: Store) -> Run:
    """A committed run with a file and two packs."""
    first = store.write_pack(STAGE, ".png", RESULTS)[key(1)].pack
    second = store.write_pack(STAGE, ".png", [(key(9), b"another pack")])[key(9)].pack
    found = store.run(STAGE, "ap10k-train", "f" * 32)
    found.write("artifacts.parquet", b"the manifest")
    found.write("rejects.parquet", b"")
    commit(found, [first, second, first])
    return found


def test_a_committed_run_says_what_it_holds(run: Run) -> None:
    provenance = run.provenance()
    assert run.is_whole()
    assert provenance["stage"] == STAGE
    assert provenance["files"]["artifacts.parquet"] == {
        "size": 12,
        "digest": hashlib.sha256(b"the manifest").hexdigest(),
    }
    assert list(provenance["packs"]) == sorted(provenance["packs"])
    assert len(provenance["packs"]) == 2
    assert all(
        run.store.pack_path(STAGE, pack).stat().st_size == size for pack, size in provenance["packs"].items()
    )
    assert run.folder == run.store.home / "runs" / STAGE / "ap10k-train" / ("f" * 32)


def test_a_run_without_its_provenance_is_none(store: Store) -> None:
    run = store.run(STAGE, "ap10k-train", "0" * 32)
    assert run.provenance() == {}
    assert not run.is_whole()
    run.write("artifacts.parquet", b"")
    assert not run.is_whole()
    assert store.runs() == []


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


@pytest.mark.parametrize("change", [Path.unlink, shorten, lengthen])
@pytest.mark.parametrize("what", ["file", "pack"])
def test_a_run_that_lacks_something_is_not_whole(run: Run, change: Callable[[Path], None], what: str) -> None:
    pack = next(iter(run.provenance()["packs"]))
    change(run.path("artifacts.parquet") if what == "file" else run.store.pack_path(STAGE, pack))
    assert not run.is_whole()
    assert run.provenance()  # what it was is still known


@pytest.mark.parametrize("content", [b"", b"{", b'{"files": ', b"\xff\xfe", b"not json"])
def test_a_damaged_provenance_is_that_of_no_run(run: Run, content: bytes) -> None:
    run.path(PROVENANCE).write_bytes(content)
    assert run.provenance() == {}
    assert not run.is_whole()


def test_a_commit_that_fails_leaves_no_run(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run = store.run(STAGE, "ap10k-train", "0" * 32)
    for name in ("artifacts.parquet", "rejects.parquet"):
        run.write(name, b"")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", fail_with(errno.ENOSPC))
        with pytest.raises(StoreError):
            run.commit([], FACTS)
    assert not run.is_whole()
    assert names_below(run.folder) == ["artifacts.parquet", "rejects.parquet"]


def test_what_readers_would_take_for_damaged_is_not_committed(store: Store) -> None:
    run = store.run(STAGE, "ap10k-train", "0" * 32)
    for name in ("artifacts.parquet", "rejects.parquet"):
        run.write(name, b"")
    with pytest.raises(ProvenanceError, match="expected a list of texts as random, found true"):
        run.commit([], {**FACTS, "random": True})
    assert names_below(run.folder) == ["artifacts.parquet", "rejects.parquet"]


def test_a_large_file_gets_its_name_at_the_end(run: Run) -> None:
    with run.create("table.parquet") as path:
        path.write_bytes(b"table")
        assert not run.path("table.parquet").exists()
    assert run.path("table.parquet").read_bytes() == b"table"
    assert names_below(run.folder) == ["artifacts.parquet", PROVENANCE, "rejects.parquet", "table.parquet"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("bad"), KeyboardInterrupt()]
)
def test_a_large_file_that_fails_leaves_nothing(run: Run, error: BaseException) -> None:
    expected = StoreError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected), run.create("table.parquet") as path:
        path.write_bytes(b"half")
        raise error
    assert names_below(run.folder) == ["artifacts.parquet", PROVENANCE, "rejects.parquet"]


def test_an_uncommitted_run_runs_again_and_a_removed_one_is_gone(run: Run) -> None:
    run.uncommit()
    assert not run.is_whole()
    assert run.path("artifacts.parquet").exists()
    run.uncommit()
    run.remove()
    assert not run.folder.exists()
    run.remove()
    assert locations(run.store, STAGE)


def test_runs_are_listed_latest_first(store: Store) -> None:
    for fingerprint, stage, part, finished_at in (
        ("1" * 32, "index", "ap10k-train", "2026-01-02"),
        ("2" * 32, "index", "ap10k-train", "2026-01-03"),
        ("3" * 32, "index", "ap10k-val", "2026-01-01"),
        ("4" * 32, "manifest", "ap10k-train", "2026-01-04"),
    ):
        commit(store.run(stage, part, fingerprint), finished_at=finished_at)
    assert [run.fingerprint[0] for run in store.runs()] == ["4", "2", "1", "3"]
    assert [run.fingerprint[0] for run in store.runs("index")] == ["2", "1", "3"]
    assert [run.fingerprint[0] for run in store.runs(part="ap10k-train")] == ["4", "2", "1"]
    assert [run.fingerprint[0] for run in store.runs("index", "ap10k-val")] == ["3"]
    assert store.stages() == ["index", "manifest"]


# Accepted code versions


def test_an_accepted_version_counts_as_the_earlier_one(store: Store) -> None:
    assert store.accepted() == {}
    store.accept("new", "old")
    assert Store(store.home).accepted() == {"new": "old"}


def test_acceptance_follows_the_chain_to_the_first(store: Store) -> None:
    store.accept("second", "first")
    store.accept("third", "second")
    store.accept("other", "else")
    assert store.accepted() == {"second": "first", "third": "first", "other": "else"}


def test_a_damaged_list_of_accepted_versions_is_an_error_that_names_it(store: Store) -> None:
    store.accept("new", "old")
    (store.home / "accepted.json").write_text("{")
    with pytest.raises(StoreError, match=r"accepted\.json: expected a JSON object"):
        store.accepted()


def test_parquet_bytes_are_a_parquet_file() -> None:
    table = pa.table({"a": [1, 2], "b": ["x", None]})
    data = parquet_bytes(table)
    assert pq.read_table(io.BytesIO(data)) == table
    assert pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0).column(0).compression == "ZSTD"

"""The files of a store or an export: on a disk, in an S3 object store, and in another file system of fsspec."""

from __future__ import annotations

import errno
import hashlib
import itertools
import pickle
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from object_store import (
    CUT_ANSWERS,
    KEYS_PER_LISTING,
    Bucket,
    Fault,
    always,
    impatient,
    once,
)
from stores import commit, locations

from spctrl.storage import Files, StoreError, files_at
from spctrl.store.store import Store

KINDS = ("folder", "s3", "memory")
NAMES = {
    "plain": "packs/spatext/0f.tar",
    "top": "report.html",
    "spaces": "a folder/ a file .png",
    "unicode": "été/日本語 🐈.json",
    "percent": "100%/a%20b%2F+c.txt",
    "glob": "a[b]*?/{c},[d].tar",
    "url": "a#b/c=d&e;f:g@h.txt",
    "quotes": """it's/"quoted"\\.txt""",
    "dots": ".hidden/..x/...",
    "long": "/".join(["x" * 200] * 4),
    "newline": "a\nb/c\r\n.txt",
}
SERVER_CANNOT = {"newline"}
"""Names that the S3 server of the tests does not take."""

numbers = itertools.count()


class Place:
    """Somewhere to keep files, which tests can also reach behind the back of ``files``."""

    def __init__(self, kind: str, folder: Path, bucket: Bucket | None) -> None:
        self.kind = kind
        self.bucket = bucket
        self.copies = folder / "copies"
        roots = {"folder": str(folder / "place"), "memory": f"memory://place-{next(numbers)}"}
        self.root = f"{bucket.url}/a prefix" if bucket is not None else roots[kind]

    @property
    def files(self) -> Files:
        """As another process has it."""
        return files_at(self.root)

    def contents(self) -> dict[str, bytes]:
        """All that is there, by name."""
        if self.bucket is not None:
            found = self.bucket.objects("a prefix/")
            return {name.removeprefix("a prefix/"): data for name, data in found.items()}
        if self.kind == "memory":
            import fsspec

            system, top = fsspec.core.url_to_fs(self.root)
            return {name.removeprefix(f"{top}/"): system.cat_file(name) for name in system.find(top)}
        root = Path(self.root)
        return {
            path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
        }


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    kind: str = request.param
    if kind == "memory":
        pytest.importorskip("fsspec", reason="fsspec is not installed")
    return Place(kind, tmp_path, request.getfixturevalue("bucket") if kind == "s3" else None)


@pytest.fixture
def remote(bucket: Bucket, tmp_path: Path) -> Place:
    return Place("s3", tmp_path, bucket)


everywhere = pytest.mark.parametrize("place", KINDS, indirect=True)


# What is promised of every kind


@everywhere
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_file_of_any_name_is_written_read_listed_and_removed(place: Place, name: str) -> None:
    if place.kind == "s3" and any(name == NAMES[each] for each in SERVER_CANNOT):
        pytest.skip("the S3 server does not take such a name")
    files, data, other = place.files, b"contents of some length", f"other/{name}"
    files.write(name, data)
    with files.create(other) as path:
        path.write_bytes(data * 2)
    assert place.contents() == {name: data, other: data * 2}
    assert files.read(name) == data
    assert files.read_many([name, other]) == {name: data, other: data * 2}
    assert files.sizes([name, other]) == {name: len(data), other: 2 * len(data)}
    assert set(files.listing("")) == {name, other}
    assert set(files.listing("other")) == {other}
    assert files.exists(name)
    assert files.digest(name) == hashlib.sha256(data).hexdigest()
    copy = files.fetch(other, place.copies)
    assert (copy.name, copy.read_bytes()) == (Path(other).name, data * 2)
    files.remove([name])
    assert place.contents() == {other: data * 2}
    assert files.sizes([name, other]) == {other: 2 * len(data)}


@everywhere
def test_what_is_not_there_is_missing_and_no_fault(place: Place) -> None:
    files = place.files
    assert files.listing("") == files.listing("no/folder") == {}
    assert files.sizes(["no/folder/x"]) == {}
    files.write("folder/there", b"1")
    for read in (
        files.read,
        files.digest,
        files.version,
        lambda name: files.fetch(name, place.copies).read_bytes(),
    ):
        with pytest.raises(FileNotFoundError):
            read("folder/gone")
    assert files.read_many(["folder/gone", "folder/there"]) == {"folder/there": b"1"}
    assert files.sizes(["folder/gone", "folder/there"]) == {"folder/there": 1}
    assert not files.exists("folder/gone")
    files.write("folder/old", b"2")
    files.remove(["folder/gone", "folder/old", "nowhere"])
    files.remove([])
    assert (files.read_many([]), files.sizes([])) == ({}, {})
    assert place.contents() == {"folder/there": b"1"}


@everywhere
def test_an_empty_file_is_there(place: Place) -> None:
    place.files.write("folder/empty", b"")
    with place.files.create("folder/also empty") as path:
        path.write_bytes(b"")
    assert place.files.sizes(["folder/empty", "folder/also empty"]) == {
        "folder/empty": 0,
        "folder/also empty": 0,
    }
    assert place.files.read("folder/empty") == b""
    assert place.files.fetch("folder/empty", place.copies).read_bytes() == b""


@everywhere
def test_a_listing_is_of_a_folder_and_all_below_it(place: Place) -> None:
    files = place.files
    for name in ("packs/mask/1", "packs/mask/deep/2", "packs/mask-2/3", "packs/mas/4", "packs/mask.txt"):
        files.write(name, name.encode())
    listed = files.listing("packs/mask")
    assert {name: info.size for name, info in listed.items()} == {"packs/mask/1": 12, "packs/mask/deep/2": 17}
    assert set(files.listing("packs")) == set(files.listing("")) == set(place.contents())
    assert set(files.sizes(["packs/mask/1", "packs/mask-2/3", "packs/mask/deep/2"])) == {
        "packs/mask/1",
        "packs/mask-2/3",
        "packs/mask/deep/2",
    }


@everywhere
def test_a_file_that_is_written_anew_is_whole_at_any_moment(place: Place) -> None:
    versions = [bytes([letter]) * 50_000 for letter in b"ab"]
    place.files.write("file", versions[0])
    done = threading.Event()

    def write() -> None:
        for number in range(20):
            place.files.write("file", versions[number % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    read = set()
    while not done.is_set():
        read.add(place.files.read("file"))
        assert set(place.files.listing("")) == {"file"}
    writer.join()
    assert read <= set(versions)


@everywhere
def test_a_file_whose_writer_fails_is_not_there(place: Place) -> None:
    files = place.files
    files.write("old", b"old")
    for name in ("old", "folder/new"):
        with pytest.raises(ZeroDivisionError), files.create(name) as path:
            path.write_bytes(b"half")
            raise ZeroDivisionError
        with pytest.raises(StoreError, match=Path(name).name), files.create(name) as path:
            raise OSError(28, "No space left on device")
    assert place.contents() == {"old": b"old"}
    assert files.leftovers(older_than_s=-1) == {}


@everywhere
def test_another_version_of_a_file_is_noticed_also_when_its_size_is_the_same(place: Place) -> None:
    place.files.write("file", b"one")
    before = place.files.version("file")
    assert place.files.version("file") == before
    place.files.write("file", b"two")
    assert place.files.version("file") != before


@everywhere
def test_a_run_gives_the_present_version_of_its_files(place: Place) -> None:
    store = Store(place.root, place.copies)
    run = store.run("mask", "ap10k-train", "f" * 32)
    for contents in (b"one", b"two"):
        run.write("artifacts.parquet", contents)
        assert run.path("artifacts.parquet").read_bytes() == contents
        commit(run)
        assert run.path("artifacts.parquet").read_bytes() == contents
        assert (run.folder / "artifacts.parquet").read_bytes() == contents
    run.uncommit()
    assert run.path("artifacts.parquet").read_bytes() == b"two"


@everywhere
@pytest.mark.parametrize("name", ["../outside", "folder/../../outside", "/outside"])
def test_a_name_that_leads_out_is_refused(place: Place, name: str, tmp_path: Path) -> None:
    files = place.files
    uses: list[Callable[[], Any]] = [
        lambda: files.read(name),
        lambda: files.read_many([name]),
        lambda: files.write(name, b""),
        lambda: files.fetch(name, place.copies),
        lambda: files.remove([name]),
        lambda: files.create(name).__enter__(),
    ]
    for use in uses:
        with pytest.raises(StoreError, match="below"):
            use()
    assert not list(tmp_path.rglob("outside"))


@everywhere
def test_a_store_travels_to_other_processes(place: Place) -> None:
    store = Store(place.root, place.copies)
    store.write_pack("mask", ".png", [("0a", b"image"), ("0b", ("broken", "why"))])
    found = locations(pickle.loads(pickle.dumps(store)), "mask")
    assert set(found) == {"0a", "0b"}
    assert Store(place.root, place.copies / "other").read("mask", found["0a"]) == b"image"


# What an object store costs


def test_a_listing_costs_one_request_a_page_and_asks_for_no_single_object(remote: Place) -> None:
    bucket = remote.bucket
    assert bucket is not None
    count = 2 * KEYS_PER_LISTING + KEYS_PER_LISTING // 2
    for number in range(count):
        bucket.write(f"a prefix/packs/{number:04}", b"1")
    bucket.proxy.forget()
    assert len(remote.files.listing("packs")) == count
    assert bucket.proxy.count("LIST") == len(bucket.proxy.seen) == 3
    bucket.proxy.forget()
    wanted = [f"packs/{number:04}" for number in range(0, count, 5)]
    assert remote.files.sizes([*wanted, "packs/gone"]) == dict.fromkeys(wanted, 1)
    assert len(bucket.proxy.seen) == 3


def test_a_run_of_many_packs_is_looked_at_in_few_requests(remote: Place) -> None:
    bucket, store = remote.bucket, Store(remote.root, remote.copies)
    assert bucket is not None
    packs = [
        store.write_pack("mask", ".png", [(f"{number:02}", b"image")])[f"{number:02}"].pack
        for number in range(20)
    ]
    run = store.run("mask", "ap10k-train", "f" * 32)
    run.write("artifacts.parquet", b"rows")
    commit(run, packs)
    bucket.proxy.forget()
    assert Store(remote.root, remote.copies).run("mask", "ap10k-train", "f" * 32).is_whole()
    # The run's folder and the packs'; no single file but the provenance.
    assert bucket.proxy.count("LIST") == 2
    assert {each.key.rpartition("/")[2] for each in bucket.proxy.seen} == {"", "provenance.json"}
    bucket.proxy.forget()
    bucket.remove(f"a prefix/packs/mask/{packs[7]}")
    run.forget()
    assert not run.is_whole()


def test_an_unchanged_file_of_a_run_is_fetched_once_a_machine(remote: Place) -> None:
    bucket = remote.bucket
    assert bucket is not None
    run = Store(remote.root, remote.copies).run("mask", "ap10k-train", "f" * 32)
    run.write("artifacts.parquet", b"rows")
    for machine, committed, fetched in (("copies", False, 1), ("copies", True, 0), ("other", True, 1)):
        if committed:
            commit(run)
        bucket.proxy.forget()
        for _ in range(3):
            store = Store(remote.root, remote.copies.with_name(machine))
            again = store.run("mask", "ap10k-train", "f" * 32)
            assert again.path("artifacts.parquet").read_bytes() == b"rows"
        assert bucket.proxy.count("GET", key="*/artifacts.parquet") == fetched


def test_a_pack_is_fetched_once_a_machine(remote: Place) -> None:
    bucket = remote.bucket
    assert bucket is not None
    (place,) = Store(remote.root, remote.copies).write_pack("mask", ".png", [("0a", b"image")]).values()
    bucket.proxy.forget()
    for machine, fetched in (("copies", 0), ("other", 1), ("other", 1)):
        store = Store(remote.root, remote.copies.with_name(machine))
        assert store.read("mask", place) == b"image"
        assert len(bucket.proxy.seen) <= 2 * fetched
        assert bucket.proxy.count("GET", key="*.tar") == fetched


def test_a_copy_of_a_pack_that_was_made_again_with_other_bytes_is_fetched_anew(tmp_path: Path) -> None:
    url = f"memory://place-{next(numbers)}"
    mine, other = Store(url, tmp_path / "mine"), Store(url, tmp_path / "other")
    mine.write_pack("mask", ".png", [("0a", b"an image"), ("0b", b"mine")])
    there = other.write_pack("mask", ".png", [("0a", b"larger" * 999), ("0b", b"others")])
    assert mine.read("mask", there["0b"]) == b"others"
    with pytest.raises(StoreError, match="found 6 with another"):
        mine.read("mask", there["0b"]._replace(digest="0" * 64))


def test_what_browsers_of_buckets_leave_for_folders_is_no_file(remote: Place) -> None:
    store, bucket = Store(remote.root, remote.copies), remote.bucket
    assert bucket is not None
    ((_, place),) = store.write_pack("mask", ".png", [("0a", b"image")]).items()
    for folder in ("packs/", "packs/mask/", "runs/"):
        bucket.write(f"a prefix/{folder}", b"")
    assert store.stages() == ["mask"]
    assert store.packs("mask").keys() == {place.pack}
    assert store.files.listing("runs") == {}


def test_a_folder_that_is_begun_while_it_is_listed_is_no_file(
    remote: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """s3fs asks what an empty listing is of, and by then another build may have written there."""
    s3fs = pytest.importorskip("s3fs")
    remote.files.write("runs/mask/all/12/provenance.json", b"{}")

    async def list_nothing_yet(*_: object, **__: object) -> list[object]:
        return []

    with monkeypatch.context() as patch:
        patch.setattr(s3fs.S3FileSystem, "_lsdir", list_nothing_yet)
        assert remote.files.listing("runs/mask/all/12") == {}
    assert remote.files.listing("runs/mask/all/12").keys() == {"runs/mask/all/12/provenance.json"}


# What goes wrong with a disk


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or gc would remove what the runs in it need."""
    files = files_at(tmp_path)
    files.write("runs/mask/provenance.json", b"{}")

    def refuse(path: str | Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(StoreError, match=r"cannot read .*runs: Permission denied"):
        files.listing("runs")
    monkeypatch.setattr("spctrl.storage.files.Path.stat", refuse)
    with pytest.raises(StoreError, match=r"provenance.json: Permission denied"):
        files.sizes(["runs/mask/provenance.json"])


def test_files_of_processes_with_the_same_id_do_not_meet_before_they_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids of processes are the same on several machines, and nearly always in containers."""
    monkeypatch.setattr("os.getpid", lambda: 7)
    files, others = files_at(tmp_path), files_at(tmp_path)
    with files.create("a/file") as mine:
        mine.write_bytes(b"half")
        with others.create("a/file") as theirs:
            theirs.write_bytes(b"whole")
        assert mine.read_bytes() == b"half"
        assert files.read("a/file") == b"whole"


# What goes wrong with an object store
OF_READING = [Fault.ERROR, Fault.SLOW_DOWN, Fault.DROPPED, Fault.STALLED, *CUT_ANSWERS]
OF_WRITING = [Fault.ERROR, Fault.SLOW_DOWN, Fault.DROPPED, Fault.LOST, Fault.STALLED_AFTER, Fault.CUT_UPLOAD]
KNOWN_BY_THEIR_FORMAT = ("read", "read_many")
"""What is read so is JSON or Parquet, half of which is neither."""


def outcome(use: Callable[..., Any], *arguments: Any) -> Any:
    """What it gives, or the error of the store."""
    try:
        return use(*arguments)
    except StoreError as error:
        return error


DATA = bytes(range(256)) * 100
DIGEST = hashlib.sha256(DATA).hexdigest()
USES: dict[str, Callable[[Files, Path], Any]] = {
    "read": lambda files, folder: files.read("folder/file"),
    "read_many": lambda files, folder: files.read_many(["folder/file", "folder/gone"]),
    "fetch": lambda files, folder: files.fetch("folder/file", folder).read_bytes(),
    "fetch with digest": lambda files, folder: files.fetch("folder/file", folder, digest=DIGEST).read_bytes(),
    "listing": lambda files, folder: {name: info.size for name, info in files.listing("").items()},
    "digest": lambda files, folder: files.digest("folder/file"),
    "version": lambda files, folder: files.version("folder/file"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", OF_READING, ids=lambda fault: fault.name)
def test_what_is_read_through_a_fault_is_right_or_an_error(
    remote: Place, fault: Fault, tmp_path: Path
) -> None:
    bucket = remote.bucket
    assert bucket is not None
    remote.files.write("folder/file", DATA)
    injected = 0
    with impatient():
        for name, use in USES.items():
            expected = use(remote.files, tmp_path / f"sound {name}")
            folder = tmp_path / name
            bucket.proxy.choose = once(fault)
            found = outcome(use, remote.files, folder)
            injected += bucket.proxy.injected[fault]
            bucket.proxy.forget()
            if isinstance(found, StoreError):
                assert remote.root in str(found), name
            elif not (fault is Fault.SHORT_UNCHECKED and name in KNOWN_BY_THEIR_FORMAT):
                assert found == expected, name
            # Nothing of the fault is kept.
            assert use(remote.files, folder) == expected, name
    assert injected >= len(USES) - 1  # the version comes without a body that could be cut


def test_what_can_never_be_read_is_a_clear_error(remote: Place, tmp_path: Path) -> None:
    bucket = remote.bucket
    assert bucket is not None
    remote.files.write("folder/file", DATA)
    with impatient(retries=0):
        bucket.proxy.choose = always(Fault.ERROR)
        for name, use in USES.items():
            with pytest.raises(StoreError, match=r"cannot (read|list) s3://.*/a prefix.*: .*run again"):
                use(remote.files, tmp_path / name)


@pytest.mark.slow
@pytest.mark.parametrize("fault", OF_WRITING, ids=lambda fault: fault.name)
def test_what_is_written_through_a_fault_is_there_or_the_error_says_that_it_may_not_be(
    remote: Place, fault: Fault
) -> None:
    bucket = remote.bucket
    assert bucket is not None

    def create(data: bytes) -> None:
        with remote.files.create("folder/large") as path:
            path.write_bytes(data)

    writes = {"folder/small": lambda data: remote.files.write("folder/small", data), "folder/large": create}
    old, new = b"old" * 1000, b"new" * 1000
    with impatient():
        for name, write in writes.items():
            write(old)
            bucket.proxy.choose = once(fault)
            found = outcome(write, new)
            assert bucket.proxy.injected[fault] == 1
            bucket.proxy.forget()
            there = remote.contents()[name]
            assert there == new or (isinstance(found, StoreError) and there == old)
    assert set(remote.contents()) == set(writes)
    assert bucket.unfinished_uploads() == []


def test_a_write_that_never_gets_through_is_a_clear_error_and_leaves_what_was_there(remote: Place) -> None:
    bucket = remote.bucket
    assert bucket is not None
    remote.files.write("file", b"old")
    with impatient(retries=0):
        bucket.proxy.choose = always(Fault.CUT_UPLOAD, "PUT")
        with pytest.raises(StoreError, match=r"cannot write s3://.*/a prefix/file: .*run again"):
            remote.files.write("file", b"newer")
    bucket.proxy.forget()
    assert remote.contents() == {"file": b"old"}


def test_a_bucket_that_is_not_there_is_a_clear_error(bucket: Bucket) -> None:
    with pytest.raises(StoreError, match=r"cannot write s3://no-such-bucket/store/file: .*run again"):
        files_at("s3://no-such-bucket/store").write("file", b"")


def test_a_url_of_an_unknown_kind_is_a_clear_error() -> None:
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    with pytest.raises(StoreError, match=r"cannot reach nonsense://x/y.*Expected a folder or a URL"):
        files_at("nonsense://x/y").listing("")


def test_an_object_store_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fsspec", "s3fs"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(StoreError, match=r"pip install 'spctrl\[s3\]'$"):
        files_at("s3://bucket/prefix").listing("")


def test_an_object_store_in_which_nothing_answers_is_a_clear_error(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # taken, but nobody listens
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        with impatient(), pytest.raises(StoreError, match=r"cannot list s3://"):
            files_at(bucket.url).listing("")

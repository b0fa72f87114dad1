"""Digests of input files: they follow contents, cost a stat while nothing changes, and survive what disks do."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import spctrl.store.digests
from spctrl.store.digests import MISSING, TOO_LARGE, DigestCache, digest_cache
from spctrl.store.store import Store

LONG_AGO_NS = time.time_ns() - 3_600_000_000_000


class Reads:
    """Which files were opened, in no order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[Path] = []
        original = spctrl.store.digests.file_digest

        def counted(path: Path) -> str:
            self.paths.append(path)
            return original(path)

        monkeypatch.setattr(spctrl.store.digests, "file_digest", counted)

    def taken(self) -> list[str]:
        names = sorted(path.name for path in self.paths)
        self.paths.clear()
        return names


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


@pytest.fixture
def cache(tmp_path: Path) -> DigestCache:
    return DigestCache(tmp_path / "store/cache.sqlite")


def put(path: Path, content: str, mtime_ns: int = LONG_AGO_NS) -> Path:
    """Write a file that looks as if it had been at rest for long."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    os.utime(path, ns=(mtime_ns, mtime_ns))
    return path


def sha256(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b", "deep/c"):
        put(tmp_path / "data" / name, name)
    return tmp_path / "data"


NAMES = ["a", "b", "deep/c"]


# One file


def test_a_digest_is_the_sha256_of_the_content(cache: DigestCache, folder: Path) -> None:
    assert cache.file_digest(folder / "a") == sha256("a")
    assert cache.file_digests([f"{folder}/{name}" for name in NAMES]) == [sha256(name) for name in NAMES]
    assert cache.file_digests([]) == []


def test_a_file_that_did_not_change_is_not_opened_again(
    cache: DigestCache, folder: Path, reads: Reads
) -> None:
    first = cache.file_digest(folder / "a")
    assert reads.taken() == ["a"]
    assert cache.file_digest(folder / "a") == first
    assert reads.taken() == []


def test_another_process_later_does_not_open_it_either(tmp_path: Path, folder: Path, reads: Reads) -> None:
    first = DigestCache(tmp_path / "cache.sqlite").file_digest(folder / "a")
    reads.taken()
    assert DigestCache(tmp_path / "cache.sqlite").file_digest(folder / "a") == first
    assert reads.taken() == []


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda path: put(path, "longer"), id="size"),
        pytest.param(lambda path: put(path, "z", LONG_AGO_NS + 1), id="time, one nanosecond later"),
        pytest.param(lambda path: put(path, "z", LONG_AGO_NS - 10**9), id="time, earlier"),
        pytest.param(lambda path: put(path.with_name("z"), "z").replace(path), id="inode"),
    ],
)
def test_a_changed_file_is_read_again(
    cache: DigestCache, folder: Path, reads: Reads, change: Callable[[Path], object]
) -> None:
    before = cache.file_digest(folder / "a")
    reads.taken()
    change(folder / "a")
    after = cache.file_digest(folder / "a")
    assert reads.taken() == ["a"]
    assert after == sha256((folder / "a").read_text()) != before


def test_only_the_changed_files_of_many_are_read(cache: DigestCache, tmp_path: Path, reads: Reads) -> None:
    paths = [str(put(tmp_path / f"many/{number}", str(number))) for number in range(700)]
    cache.file_digests(paths)
    assert len(reads.taken()) == 700
    put(Path(paths[42]), "changed")
    found = cache.file_digests(paths)
    assert reads.taken() == ["42"]
    assert found == [sha256("changed" if number == 42 else str(number)) for number in range(700)]


@pytest.mark.parametrize("age_s", [0.0, 1.5, -3600.0], ids=["now", "just now", "in the future"])
def test_a_file_that_changed_just_now_is_read_again(
    cache: DigestCache, folder: Path, reads: Reads, age_s: float
) -> None:
    changed_ns = time.time_ns() - int(age_s * 1e9)
    put(folder / "a", "x", changed_ns)
    assert cache.file_digest(folder / "a") == sha256("x")
    put(folder / "a", "y", changed_ns)  # the same size and time: only reading can tell
    assert cache.file_digest(folder / "a") == sha256("y")
    assert reads.taken() == ["a", "a"]


def test_a_file_is_not_read_again_once_it_has_come_to_rest(
    cache: DigestCache, folder: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder / "a", "x", time.time_ns())
    cache.file_digest(folder / "a")
    later_ns = time.time_ns() + spctrl.store.digests.RACY_NS + 1
    monkeypatch.setattr(time, "time_ns", lambda: later_ns)
    cache.file_digest(folder / "a")
    reads.taken()
    cache.file_digest(folder / "a")
    assert reads.taken() == []


# What is no readable file


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_nothing(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)


NO_FILES = {
    "missing": make_nothing,
    "folder": Path.mkdir,
    "FIFO": make_fifo,
    "dangling link": lambda path: path.symlink_to(path.with_name("nowhere")),
    "link to itself": lambda path: path.symlink_to(path),
    "link to a folder": lambda path: path.symlink_to(path.parent),
    "below a file": lambda path: put(path.with_name("x"), "").replace(path),
}


@pytest.mark.parametrize("make", NO_FILES.values(), ids=NO_FILES.keys())
def test_what_is_no_file_counts_as_missing(
    cache: DigestCache, folder: Path, make: Callable[[Path], object]
) -> None:
    path = folder / "odd"
    make(path)
    if path.is_file():
        path = path / "below"
    assert cache.file_digests([str(folder / "a"), str(path)]) == [sha256("a"), MISSING]
    assert cache.list_digest(str(folder), ["a", path.name]) == cache.list_digest(
        str(folder), ["a", path.name]
    )


@pytest.mark.parametrize("name", ["\x00", "x" * 5000, "a\ud800"])
def test_a_name_that_no_file_can_have_counts_as_missing(cache: DigestCache, folder: Path, name: str) -> None:
    assert cache.file_digests([f"{folder}/{name}"]) == [MISSING]


def test_a_file_that_claims_to_be_larger_than_any_image_is_not_read(cache: DigestCache, folder: Path) -> None:
    with (folder / "b").open("wb") as file:
        file.truncate(2**40)  # nothing but holes
    paths = [str(folder / "a"), str(folder / "b")]
    assert cache.file_digests(paths, largest_bytes=2**30) == [sha256("a"), TOO_LARGE]
    before = cache.list_digest(str(folder), NAMES, max_read_bytes=2**20, largest_bytes=2**30)
    assert before is not None
    (folder / "b").write_bytes(b"small")
    assert cache.list_digest(str(folder), NAMES, largest_bytes=2**30) != before


def test_a_link_to_a_file_is_that_file(cache: DigestCache, folder: Path) -> None:
    (folder / "link").symlink_to("a")
    assert cache.file_digest(folder / "link") == sha256("a")


def test_a_file_that_appears_is_found(cache: DigestCache, folder: Path) -> None:
    assert cache.file_digest(folder / "new") == MISSING
    put(folder / "new", "new")
    assert cache.file_digest(folder / "new") == sha256("new")
    (folder / "new").unlink()
    assert cache.file_digest(folder / "new") == MISSING


def test_a_file_that_can_be_read_only_later_is_read_then(
    cache: DigestCache, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(spctrl.store.digests, "file_digest", unreadable)
        assert cache.file_digest(folder / "a") == MISSING
        without = cache.list_digest(str(folder), NAMES)
    assert cache.file_digest(folder / "a") == sha256("a")
    assert cache.list_digest(str(folder), NAMES) != without


def test_a_folder_whose_name_is_not_utf8_works(cache: DigestCache, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path / "data-") + b"\xff"))
    try:
        put(folder / "a", "a")
    except OSError:
        pytest.skip("this file system has no such names")
    assert cache.file_digest(folder / "a") == sha256("a")
    assert cache.list_digest(str(folder), ["a"]) == cache.list_digest(str(folder), ["a"])
    put(tmp_path / "b", "b")
    assert cache.file_digest(tmp_path / "b") == sha256("b")


# Lists


def test_a_list_digest_depends_on_names_contents_and_what_is_missing(
    cache: DigestCache, folder: Path
) -> None:
    found = {
        cache.list_digest(str(folder), names)
        for names in (NAMES, NAMES[:2], NAMES[::-1], [], [*NAMES, "gone"])
    }
    put(folder / "a", "changed")
    found.add(cache.list_digest(str(folder), NAMES))
    (folder / "a").unlink()
    found.add(cache.list_digest(str(folder), NAMES))
    assert len(found) == 7
    assert None not in found


def test_a_list_digest_does_not_depend_on_where_the_folder_is(cache: DigestCache, folder: Path) -> None:
    before = cache.list_digest(str(folder), NAMES)
    moved = folder.rename(folder.with_name("moved"))
    assert cache.list_digest(str(moved), NAMES) == before


def test_a_list_that_did_not_change_is_not_opened_again(
    cache: DigestCache, folder: Path, reads: Reads
) -> None:
    before = cache.list_digest(str(folder), NAMES)
    assert reads.taken() == ["a", "b", "c"]
    assert cache.list_digest(str(folder), NAMES) == before
    assert reads.taken() == []


def test_touched_files_give_the_same_list_digest(cache: DigestCache, folder: Path, reads: Reads) -> None:
    before = cache.list_digest(str(folder), NAMES)
    reads.taken()
    os.utime(folder / "a", ns=(LONG_AGO_NS + 5, LONG_AGO_NS + 5))
    assert cache.list_digest(str(folder), NAMES) == before
    assert reads.taken() == ["a"]
    os.utime(folder / "a")  # just now
    assert cache.list_digest(str(folder), NAMES) == before


def test_a_list_with_a_file_that_changed_just_now_is_not_remembered(cache: DigestCache, folder: Path) -> None:
    now_ns = time.time_ns()
    put(folder / "a", "x", now_ns)
    before = cache.list_digest(str(folder), NAMES)
    put(folder / "a", "y", now_ns)
    assert cache.list_digest(str(folder), NAMES) != before


def test_a_list_that_would_take_long_to_read_gives_nothing(
    cache: DigestCache, folder: Path, reads: Reads
) -> None:
    put(folder / "a", "x" * 100)
    assert cache.list_digest(str(folder), NAMES, max_read_bytes=50) is None
    assert reads.taken() == []
    whole = cache.list_digest(str(folder), NAMES, max_read_bytes=1000)
    assert whole == cache.list_digest(str(folder), NAMES, max_read_bytes=0)  # known by now
    assert whole is not None
    put(folder / "b", "xy")
    assert cache.list_digest(str(folder), NAMES, max_read_bytes=1) is None
    assert cache.list_digest(str(folder), NAMES, max_read_bytes=2) is not None


# Facts


def test_facts_are_kept_as_json(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, "é"], "b": {}}
    DigestCache(tmp_path / "cache.sqlite").keep_fact("key", value)
    again = DigestCache(tmp_path / "cache.sqlite")
    assert again.fact("key") == value
    assert again.fact("other") is None
    again.keep_fact("key", [])
    assert again.fact("key") == []


# A cache that fails


def broken_by_garbage(path: Path) -> None:
    path.write_bytes(b"not a database" * 1000)


def broken_by_a_folder(path: Path) -> None:
    path.mkdir()


def broken_by_a_file_above(path: Path) -> None:
    path.parent.rmdir()
    path.parent.write_text("a file")


@pytest.mark.parametrize("break_it", [broken_by_garbage, broken_by_a_folder, broken_by_a_file_above])
def test_a_cache_that_cannot_be_opened_is_done_without(
    tmp_path: Path, folder: Path, break_it: Callable[[Path], None]
) -> None:
    path = tmp_path / "store/cache.sqlite"
    path.parent.mkdir()
    break_it(path)
    cache = DigestCache(path)
    assert cache.file_digest(folder / "a") == sha256("a")
    assert cache.list_digest(str(folder), NAMES) == DigestCache(tmp_path / "other.sqlite").list_digest(
        str(folder), NAMES
    )
    cache.keep_fact("key", 1)
    assert cache.fact("key") is None


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, folder: Path, reads: Reads) -> None:
    path = tmp_path / "cache.sqlite"
    DigestCache(path).file_digest(folder / "a")
    reads.taken()
    cache = DigestCache(path)
    assert cache._database is not None
    cache._database.execute("PRAGMA query_only = ON")
    assert cache.file_digest(folder / "a") == sha256("a")
    assert reads.taken() == []  # what is known is still known
    assert cache.file_digest(folder / "b") == sha256("b")
    cache.keep_fact("key", 1)
    assert cache.fact("key") is None


def test_a_full_disk_leaves_no_transaction_behind(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "cache.sqlite"
    cache = DigestCache(path)
    assert cache._database is not None
    pages = cache._database.execute("PRAGMA page_count").fetchone()[0]
    cache._database.execute(f"PRAGMA max_page_count = {pages}")
    cache.keep_fact("large", "x" * 100_000)  # does not fit
    assert cache.fact("large") is None
    assert not cache._database.in_transaction
    other = sqlite3.connect(path, timeout=0, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")  # would fail if the first still held the lock
    other.execute("ROLLBACK")
    assert cache.file_digest(folder / "a") == sha256("a")


def test_an_interrupted_write_leaves_no_transaction_behind(cache: DigestCache) -> None:
    cache._execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", [("a", "1"), ("too", "many", "values")])
    cache.keep_fact("b", 2)
    assert (cache.fact("a"), cache.fact("b")) == (None, 2)


# Several processes


def look_often(
    path: Path, folder: Path, number: int, answers: multiprocessing.SimpleQueue[list[str]]
) -> None:
    try:
        cache = DigestCache(path)
        found = []
        for turn in range(20):
            cache.keep_fact(f"{number} {turn}", turn)
            found += cache.file_digests([f"{folder}/{name}" for name in NAMES])
            found.append(str(cache.list_digest(str(folder), NAMES)))
        found.append(str(sum(cache.fact(f"{number} {turn}") for turn in range(20))))
        answers.put(found)
    except BaseException as error:
        answers.put([repr(error)])


def test_several_processes_share_one_cache(tmp_path: Path, folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    path = tmp_path / "cache.sqlite"
    answers: multiprocessing.SimpleQueue[list[str]] = context.SimpleQueue()
    processes = [
        context.Process(target=look_often, args=(path, folder, number, answers)) for number in range(4)
    ]
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    expected = DigestCache(tmp_path / "other.sqlite").list_digest(str(folder), NAMES)
    for each in found:
        assert each == [*[sha256(name) for name in NAMES], expected] * 20 + [str(sum(range(20)))]
    database = sqlite3.connect(path)
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert database.execute("SELECT count(*) FROM facts WHERE key NOT LIKE 'list%'").fetchone() == (80,)


def look_in_a_fork(
    store: Store, folder: Path, parents: int, answers: multiprocessing.SimpleQueue[list[object]]
) -> None:
    cache = digest_cache(store)
    cache.keep_fact("child", 1)
    answers.put([id(cache) != parents, cache.fact("parent"), cache.file_digest(folder / "a")])


def test_a_forked_process_opens_its_own_connection(tmp_path: Path, folder: Path) -> None:
    store = Store(tmp_path / "store")
    cache = digest_cache(store)
    assert digest_cache(store) is cache
    cache.keep_fact("parent", 7)
    context = multiprocessing.get_context("fork")
    answers: multiprocessing.SimpleQueue[list[object]] = context.SimpleQueue()
    process = context.Process(target=look_in_a_fork, args=(store, folder, id(cache), answers))
    process.start()
    assert answers.get() == [True, 7, sha256("a")]
    process.join()
    assert process.exitcode == 0
    assert cache.fact("child") == 1
    cache.keep_fact("parent", 8)
    assert cache.fact("parent") == 8


def test_digests_lie_in_the_cache_where_one_is_set(tmp_path: Path, folder: Path) -> None:
    caches = [tmp_path / name for name in ("one", "other")]
    stores = [Store(tmp_path / "store", cache) for cache in caches]
    assert [digest_cache(store).file_digest(folder / "a") for store in stores] == [sha256("a")] * 2
    assert [len(list(cache.glob("*/cache.sqlite"))) for cache in caches] == [1, 1]
    assert not (tmp_path / "store").exists()
    assert digest_cache(Store(tmp_path / "store")).file_digest(folder / "a") == sha256("a")
    assert (tmp_path / "store" / "cache.sqlite").is_file()

"""Digests of texts, by which the store names what it holds, and of files, at the price of a stat.

A file's digest is kept under its path, size, modification time and inode; a list of files' digest under all
of theirs. A file changed so recently that its time stamp might not move with the next change is read again
(git calls such entries racy).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sqlite3
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from spctrl.errors import ExpectedError
from spctrl.storage import Files, Folder, StoreError
from spctrl.storage.files import file_digest

if TYPE_CHECKING:
    from spctrl.store.store import Store

KEY_BYTES = 16
RACY_NS = 2_000_000_000
HASHING_THREADS = 8
MISSING, TOO_LARGE = "missing", "too-large"
EMPTY = hashlib.sha256().hexdigest()
FILES_AT_ONCE = 16_384
TABLES = (
    "files (path TEXT PRIMARY KEY, size INT, mtime_ns INT, inode INT, digest TEXT)",
    "facts (key TEXT PRIMARY KEY, value TEXT)",
)
IS_DIGEST = "typeof(digest) = 'text' AND length(digest) = 64"
MAX_FACT = 2**24
"""Characters; the largest are of the code of a stage, some hundred thousand."""
SQLITE_SUFFIXES = ("journal", "wal", "shm")
"""Of files that SQLite keeps beside a database."""
LOOK_UPS_TO_A_SCAN = 4
"""How many rows are scanned in the time that one takes to look up."""

Stat = tuple[int, int, int]
"""Size in bytes, modification time in nanoseconds, inode."""


def digest(*parts: str | bytes) -> str:
    """Hex digest of a sequence of texts; the parts' borders count."""
    return digest_of(parts)


def digest_of(parts: Iterable[str | bytes]) -> str:
    """The same of as many as there may be."""
    return _state_of(parts).hexdigest()


def digests(first: str, others: Iterable[str | None]) -> Iterator[str | None]:
    """``digest(first, other)`` of each other, where there is one: millions of keys begin alike."""
    start = _state_of([first])
    for other in others:
        if other is None:
            yield None
        else:
            state, data = start.copy(), other.encode()
            state.update(len(data).to_bytes(8, "big") + data)
            yield state.hexdigest()


def _state_of(parts: Iterable[str | bytes]) -> hashlib.blake2b:
    state = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "big"))
        state.update(data)
    return state


def content_digest(data: bytes | memoryview) -> str:
    """SHA-256 in hex, as ``sha256sum`` prints it."""
    return hashlib.sha256(data).hexdigest()


class _Digests(NamedTuple):
    digests: list[str]
    read_bytes: int


class InputChangedError(ExpectedError):
    """A file changed while a build was reading it."""


class DigestCache:
    """Digests of files and other facts, in an SQLite file that several processes may share.

    A cache that cannot be opened or written (read-only disk) is done without.

    Raises:
        StoreError: the file is a link, which SQLite would write through, or another database.
    """

    def __init__(self, path: Path) -> None:
        self._database: sqlite3.Connection | None = None
        for each in (path, *(path.with_name(f"{path.name}-{suffix}") for suffix in SQLITE_SUFFIXES)):
            if each.is_symlink():
                raise StoreError(
                    f"expected a database at {each}, found a symbolic link. Remove it; [paths] cache says where the "
                    "database goes"
                )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=30, isolation_level=None)
            self._database.execute("PRAGMA synchronous = OFF")
            for table in TABLES:
                self._database.execute(f"CREATE TABLE IF NOT EXISTS {table}")
            found = self._database.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
        except (OSError, sqlite3.Error):
            self._database = None
            return
        if sorted(sql for (sql,) in found) != sorted(f"CREATE TABLE {table}" for table in TABLES):
            self._database.close()  # views and triggers could do anything
            raise StoreError(
                f"expected the digests of files in {path}, found another database. Remove it; builds make it again"
            )

    def fact(self, key: str) -> Any:
        """A JSON value kept earlier, or None."""
        rows = self._execute(
            f"SELECT value FROM facts WHERE key = ? AND typeof(value) = 'text' AND length(value) < {MAX_FACT}",
            [(key,)],
        )
        try:
            return json.loads(rows[0][0]) if rows else None
        except (ValueError, RecursionError):  # damaged
            return None

    def keep_fact(self, key: str, value: Any) -> None:
        self._execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", [(key, json.dumps(value))])

    def file_digest(self, path: Path) -> str:
        """SHA-256 of a file, read only when its stat changed."""
        return self.file_digests([str(path)])[0]

    def digest_at(self, files: Files, name: str) -> str:
        """SHA-256 of a file wherever it lies, ``"missing"`` where there is none; objects are known by their ETags."""
        if isinstance(files, Folder):
            return self.file_digest(files.path / name)
        try:
            key = f"object {files.place(name)} {files.version(name)}"
            if (known := self.fact(key)) is None:
                known = files.digest(name)
                self.keep_fact(key, known)
        except FileNotFoundError:
            return MISSING
        return str(known)

    def file_digests(self, paths: Sequence[str], *, largest_bytes: float = float("inf")) -> list[str]:
        """SHA-256 of each file, ``"missing"`` where there is none; changed ones are read by a few threads.

        One larger than ``largest_bytes`` is ``"too-large"``, and not read: a file may claim any size.
        """
        found = self._digests(paths, [_stat(path) for path in paths], largest_bytes=largest_bytes)
        return found.digests if found else []

    def list_digest(
        self,
        root: str,
        names: Sequence[str],
        max_read_bytes: int | None = None,
        *,
        largest_bytes: float = float("inf"),
    ) -> str | None:
        """One digest for a list of files below a folder: their names and contents, and which are missing.

        Costs one stat a file while nothing changes. Where more than ``max_read_bytes`` would have to be read, not
        counting racy files, gives None. Of files larger than ``largest_bytes`` their names count.
        """
        state = hashlib.blake2b(digest_size=16)
        for _ in _look(root, names, state):
            pass
        fact = f"list {largest_bytes} {state.hexdigest()}"
        if (known := self.fact(fact)) is not None:
            return str(known)
        state = hashlib.blake2b(digest_size=16)
        digests: list[str] = []  # many in one text, which takes half as much memory
        may_read, may_be_kept = float("inf") if max_read_bytes is None else max_read_bytes, True
        for paths, stats in _look(root, names, state):
            if (found := self._digests(paths, stats, may_read, largest_bytes)) is None:
                return None
            may_read -= found.read_bytes
            digests.append(" ".join(found.digests))
            there = [
                (each, read) for each, read in zip(stats, found.digests, strict=True) if each is not None
            ]
            # A file that is there but cannot be read may be readable another time, with the same stat.
            may_be_kept &= not any(_is_racy(each) or read == MISSING for each, read in there)
        whole = digest_of(chain(names, chain.from_iterable(map(str.split, digests))))
        if may_be_kept:
            self.keep_fact(f"list {largest_bytes} {state.hexdigest()}", whole)
        return whole

    def _digests(
        self,
        paths: Sequence[str],
        stats: Sequence[Stat | None],
        may_read: float = float("inf"),
        largest_bytes: float = float("inf"),
    ) -> _Digests | None:
        """Digests of files; None, and nothing is read, where more than ``may_read`` bytes of files that are not racy
        would have to be.
        """
        known = self._known(paths)
        wanted = [
            (path, each)
            for path, each in zip(paths, stats, strict=True)
            if each is not None and each[0] <= largest_bytes and known.get(path, (None,))[0] != each
        ]
        # Racy files are not kept, so they are read each time, and would be too much each time.
        read_bytes = sum(each[0] for _, each in wanted if not _is_racy(each))
        if read_bytes > may_read:
            return None
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            fresh = dict(zip((path for path, _ in wanted), pool.map(_digest_or_missing, wanted), strict=True))
        self._execute(
            "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)",
            [
                (path, *each, fresh[path])
                for path, each in wanted
                if fresh[path] != MISSING and not _is_racy(each)
            ],
        )
        digests = [
            MISSING
            if each is None
            else TOO_LARGE
            if each[0] > largest_bytes
            else fresh[path]
            if path in fresh
            else known[path][1]
            for path, each in zip(paths, stats, strict=True)
        ]
        return _Digests(digests, read_bytes)

    def _known(self, paths: Sequence[str]) -> dict[str, tuple[Stat, str]]:
        """All rows when most are asked for, since one scan is cheaper than many look-ups."""
        (newest,) = self._execute("SELECT max(rowid) FROM files", [()]) or [(None,)]
        if len(paths) * LOOK_UPS_TO_A_SCAN > (newest[0] or 0):
            rows = self._execute(f"SELECT * FROM files WHERE {IS_DIGEST}", [()])
        else:
            rows = self._execute(
                f"SELECT * FROM files WHERE path = ? AND {IS_DIGEST}", [(path,) for path in paths]
            )
        return {path: ((size, mtime_ns, inode), kept) for path, size, mtime_ns, inode, kept in rows}

    def _execute(self, statement: str, parameters: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        if self._database is None:
            return []
        try:
            if statement.startswith("INSERT"):
                self._database.execute("BEGIN IMMEDIATE")
                self._database.executemany(statement, parameters)
                self._database.execute("COMMIT")
                return []
            return [row for each in parameters for row in self._database.execute(statement, each)]
        except (sqlite3.Error, UnicodeEncodeError):  # the latter for a path that is not UTF-8
            with suppress(sqlite3.Error):  # a transaction that a full disk left open would lock everyone out
                self._database.rollback()
            return []


def _look(
    root: str, names: Sequence[str], state: hashlib.blake2b
) -> Iterator[tuple[list[str], list[Stat | None]]]:
    """Paths and stats of a list of files, some at a time; all of it goes into ``state``."""
    state.update(os.fsencode(f"{root}\0"))
    for start in range(0, len(names), FILES_AT_ONCE):
        some = names[start : start + FILES_AT_ONCE]
        paths = [f"{root}/{name}" for name in some]
        stats = [_stat(path) for path in paths]
        state.update("\0".join([*some, repr(stats), ""]).encode())
        yield paths, stats


def _stat(path: str) -> Stat | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - a Path for each of 60,000 files costs more than the stat
    except (OSError, ValueError):
        return None
    return (found.st_size, found.st_mtime_ns, found.st_ino) if stat.S_ISREG(found.st_mode) else None


def _is_racy(found: Stat) -> bool:
    return time.time_ns() - found[1] < RACY_NS


def _digest_or_missing(wanted: tuple[str, Stat]) -> str:
    if wanted[1][0] == 0:
        return EMPTY  # not opened: files of /proc, to which a link may lead, say so too, and some of them never end
    try:
        return file_digest(Path(wanted[0]))
    except OSError:
        return MISSING


def digest_cache(store: Store) -> DigestCache:
    """This process's connection to the store's cache; a forked process opens its own."""
    return _digest_cache(store.cache_folder.resolve(), os.getpid())


@functools.cache
def _digest_cache(folder: Path, pid: int) -> DigestCache:
    return DigestCache(folder / "cache.sqlite")

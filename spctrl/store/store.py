"""The store: artifacts in tar packs, and the runs of stages that refer to them, in a folder or an object store.

    packs/<stage>/<name>.tar        members <key><suffix>; latents: <name>.safetensors
    packs/<stage>/<name>.parquet    key -> place in the tar, or why the record was rejected
    runs/<stage>/<part>/<fingerprint>/manifest.parquet, rejects.parquet, ..., provenance.json
    accepted.json                   code versions that a user declared equal

What only one machine needs is in ``[paths] cache``, which may be the store's own folder:

    cache.sqlite                    digests of files, by path and stat (spctrl/store/digests.py)
    packs/, copies/, training/      of a store in object storage: what was fetched of it, and checkpoints

Every file is whole or absent (spctrl/store/storage.py). A pack counts once its Parquet index is there, a run once its
provenance is there: each is written last. Names come from contents, so two builds that write the same thing write
the same bytes to the same place.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from spctrl.io.documents import MAX_DOCUMENT_BYTES
from spctrl.output.secrets import without_secrets
from spctrl.store.packs import (
    MAX_ARTIFACT_BYTES,
    SAFETENSORS,
    TAR,
    container_of,
    container_size,
    write_container,
)
from spctrl.store.provenance import ProvenanceError, parse_provenance
from spctrl.store.storage import (
    Files,
    FileTooLargeError,
    Info,
    StoreError,
    cannot_read,
    files_at,
    is_url,
    write_atomic,
)

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from numpy.typing import NDArray

KEY_BYTES = 16
PROVENANCE = "provenance.json"
ACCEPTED = "accepted.json"
CACHE = "~/.cache/spctrl"
COPIES = "copies"
INDICES_AT_ONCE, DOCUMENTS_AT_ONCE = 64, 16
"""Files that are read in one go, which object stores answer together."""
MAX_INDEX_BYTES, MAX_INDEX_ROWS, FREE_INDEX_BYTES = 2**23, 2**16, 2**26
"""Of a pack's index, which has some ten thousand rows at most; the last is what it may expand to whatever its size."""
LARGEST_OFFSET = 2**62
ODD_NUMBER, LARGEST_NUMBER = 0x9E3779B97F4A7C15, 2**64 - 1


class Location(NamedTuple):
    """Where an artifact lies, or why there is none (``code`` and ``message``)."""

    pack: str
    offset: int
    size: int
    digest: str
    code: str | None = None
    message: str | None = None


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


@dataclass(frozen=True)
class Store:
    """All that was ever computed, below one folder or URL.

    Attributes:
        root: the folder or URL.
        cache: folder on this machine for digests of files and for copies; by default the store itself, or ``CACHE``
            where that is elsewhere.
    """

    root: str | Path
    cache: str | Path = ""

    @functools.cached_property
    def files(self) -> Files:
        return files_at(self.root)

    @property
    def home(self) -> Path:
        """The folder on this machine: the store itself, or what belongs to one that is elsewhere."""
        return self.cache_folder if is_url(self.root) else Path(self.root)

    @property
    def cache_folder(self) -> Path:
        """The folder for what only this machine needs: databases do not go well with network disks."""
        if not self.cache and not is_url(self.root):
            return Path(self.root)
        address = without_secrets(self.files.address)
        name = re.sub(r"\W+", "-", address)[-60:].strip("-")
        return Path(self.cache or CACHE).expanduser() / f"{name}-{digest(address)[:8]}"

    def absolute(self) -> Store:
        """The same store, wherever a process works."""
        return Store(self.files.address, self.cache)

    def stages(self) -> list[str]:
        """Names of the stages that left packs or runs."""
        return sorted({name.split("/")[1] for top in ("packs", "runs") for name in self.files.listing(top)})

    # Packs

    def packs(self, stage: str) -> dict[str, Info]:
        """File names of a stage's packs, with sizes and ages; also of those that lack an index."""
        return _packs_in(self.files.listing(f"packs/{stage}"))

    def pack_path(self, stage: str, pack: str) -> Path:
        """A pack on this machine, fetched where the store is elsewhere."""
        return self.files.fetch(pack_name(stage, pack), self.home)

    def write_pack(
        self, stage: str, suffix: str, results: Sequence[tuple[str, bytes | tuple[str, str]]]
    ) -> dict[str, Location]:
        """Keep artifacts, and the reasons of records that gave none, as one pack.

        Args:
            stage: whose.
            suffix: of the members' names, such as ``.png``.
            results: (key, the artifact's bytes) or (key, (reject code, message)).

        Returns:
            Where each went.
        """
        artifacts = [(key, result) for key, result in results if isinstance(result, bytes)]
        digests = {key: content_digest(artifact) for key, artifact in artifacts}
        # By content, since a GPU may make other bytes of the same input: two builds must not write one pack.
        contents = (
            digests[key] if isinstance(result, bytes) else " ".join(result) for key, result in results
        )
        name = digest(*(key for key, _ in results), *contents) + container_of(suffix)
        data, places = write_container(suffix, artifacts)
        found = {
            key: Location(name, offset, size, digests[key])
            for (key, _), (offset, size) in zip(artifacts, places, strict=True)
        }
        locations = {
            key: Location(name, 0, 0, "", *result) if isinstance(result, tuple) else found[key]
            for key, result in results
        }
        self.files.write(pack_name(stage, name), data)
        if is_url(self.root):
            write_atomic(self.home / pack_name(stage, name), data)  # the next stage reads it here
        self.write_pack_index(stage, name, locations)
        return locations

    def write_pack_index(self, stage: str, pack: str, locations: Mapping[str, Location]) -> None:
        table = results_table(locations).drop_columns("pack")
        self.files.write(index_name(stage, pack), parquet_bytes(table))

    def results(self, stage: str, keys: pa.ChunkedArray) -> pa.Table:
        """What the stage's packs hold of some keys, as ``results_table``; a cut pack holds nothing.

        Rows of a few other keys may be among them. Of a key that several packs hold the first row counts.
        """
        import numpy as np
        import pyarrow as pa

        listing = self.files.listing(f"packs/{stage}")
        packs = _packs_in(listing)
        names = [name for name in sorted(packs, reverse=True) if _has_index(stage, name, listing)]
        wanted = np.sort(np.concatenate([*map(_numbers, keys.chunks), [LARGEST_NUMBER]]))
        found = [results_table({})]
        for start in range(0, len(names), INDICES_AT_ONCE):
            some = names[start : start + INDICES_AT_ONCE]
            indices = self.files.read_many([index_name(stage, pack) for pack in some])
            for pack in some:
                index = indices.get(index_name(stage, pack), b"")
                found.append(_results(pack, packs[pack].size, index, wanted))
        return pa.concat_tables(found)

    def pack_locations(self, stage: str, pack: str) -> dict[str, Location]:
        """What one pack holds, by key; an index that cannot be read holds nothing."""
        try:
            index = self.files.read(index_name(stage, pack), max_bytes=MAX_INDEX_BYTES)
        except (FileNotFoundError, FileTooLargeError):
            return {}
        return _locations(pack, index) or {}

    def has_damaged_index(self, stage: str, pack: str) -> bool:
        """Whether a pack has an index that a build cannot read, and so passes over."""
        try:
            index = self.files.read(index_name(stage, pack), max_bytes=MAX_INDEX_BYTES)
        except FileNotFoundError:
            return False
        except FileTooLargeError:
            return True
        return _locations(pack, index) is None

    def read(self, stage: str, place: Location) -> bytes:
        """An artifact's bytes.

        Raises:
            StoreError: the pack cannot be read, or does not hold there what the digest says.
        """
        data = self._read(stage, place)
        if is_url(self.root) and content_digest(data) != place.digest:
            # The copy may be damaged, or of a pack that an earlier version wrote again under the same name.
            self.pack_path(stage, place.pack).unlink(missing_ok=True)
            data = self._read(stage, place)
        if content_digest(data) != place.digest:
            raise StoreError(
                f"{self.files.place(pack_name(stage, place.pack))}: expected {place.size} bytes at {place.offset} with "
                f"the digest {place.digest}, found {len(data)} with another. `spctrl verify` drops what is damaged, "
                "the next build makes it again"
            )
        return data

    def _read(self, stage: str, place: Location) -> bytes:
        try:
            with self.pack_path(stage, place.pack).open("rb") as file:
                there = os.fstat(file.fileno()).st_size - place.offset
                if not (place.offset >= 0 and 0 <= place.size <= min(there, MAX_ARTIFACT_BYTES)):
                    return b""  # nothing that could have the digest
                file.seek(place.offset)
                return file.read(place.size)
        except OSError as error:
            raise cannot_read(self.files.place(pack_name(stage, place.pack)), error) from error

    # Runs

    def run(self, stage: str, part: str, fingerprint: str) -> Run:
        return Run(self, stage, part, fingerprint)

    def runs(self, stage: str = "*", part: str = "*", *, damaged: bool = False) -> list[Run]:
        """Committed runs, latest first.

        Args:
            stage: whose; by default of all.
            part: of the data; by default all.
            damaged: whether those without a sound provenance are listed too, at the end.
        """
        listing = self.files.listing("runs" if stage == "*" else f"runs/{stage}")
        parts = [name.split("/")[1:] for name in listing if name.endswith(f"/{PROVENANCE}")]
        found = [Run(self, *each[:3]) for each in parts if len(each) == 4 and part in ("*", each[1])]
        names = [run.name(PROVENANCE) for run in found]
        times: dict[Run, str | None] = {}
        for start in range(0, len(found), DOCUMENTS_AT_ONCE):
            some = names[start : start + DOCUMENTS_AT_ONCE]
            contents = self.files.read_many(
                [name for name in some if listing[name].size <= MAX_DOCUMENT_BYTES]
            )
            for run, name in zip(found[start:], some, strict=False):
                times[run] = _provenance(run.stage, contents.get(name, b"")).get("finished_at")
        listed = [run for run in found if damaged or times[run] is not None]
        return sorted(listed, key=lambda run: times[run] or "", reverse=True)

    # Code versions that were declared equal

    def accepted(self) -> dict[str, str]:
        """``{code version: the earlier one that it counts as}``; of an object store, as this process found it first."""
        if self in _accepted_elsewhere:
            return _accepted_elsewhere[self]
        found = self._read_accepted()
        if is_url(self.root):
            _accepted_elsewhere[self] = found
        return found

    def _read_accepted(self) -> dict[str, str]:
        try:
            found = self.files.read_json(ACCEPTED)
        except FileNotFoundError:
            return {}
        except (FileTooLargeError, ValueError) as error:
            raise self._accepted_error(f"JSON object, found a fault: {error}") from error
        if not isinstance(found, dict) or not all(isinstance(each, str) for each in found.values()):
            raise self._accepted_error("JSON object of texts, found something else")
        return found

    def _accepted_error(self, expected: str) -> StoreError:
        return StoreError(
            f"{self.files.place(ACCEPTED)}: expected a {expected}. Restore the file, or remove it: what it declared "
            "equal is then rebuilt"
        )

    def accept(self, code_version: str, as_version: str) -> None:
        _accepted_elsewhere.pop(self, None)
        versions = self._read_accepted()
        versions[code_version] = versions.get(as_version, as_version)
        self.files.write(ACCEPTED, json.dumps(versions, indent=1, sort_keys=True).encode())


@dataclass(frozen=True)
class Run:
    """One stage's result for one part (a dataset's split, or all), made from what its fingerprint stands for."""

    store: Store = field(repr=False)
    stage: str
    part: str
    fingerprint: str

    @property
    def prefix(self) -> str:
        return f"runs/{self.stage}/{self.part}/{self.fingerprint}"

    def name(self, name: str) -> str:
        """A file's name in the store."""
        return f"{self.prefix}/{name}"

    def place(self, name: str = "") -> str:
        """The place of a file, or of all of them, for people."""
        return self.store.files.place(self.name(name).rstrip("/"))

    def path(self, name: str) -> Path:
        """A file on this machine, fetched where the store is elsewhere."""
        files, copies = self.store.files, self.store.home / COPIES
        if not is_url(self.store.root):
            return files.fetch(self.name(name), copies)
        # Of a run that is being made anew, the provenance that is there may speak of other contents.
        known = _whole_elsewhere.get(self, {}).get("files", {}).get(name)
        if known is None:
            return files.fetch(self.name(name), copies / files.version(self.name(name)))
        return files.fetch(self.name(name), copies / known["digest"][:16], digest=known["digest"])

    @property
    def folder(self) -> Path:
        """All files in a folder on this machine, fetched where the store is elsewhere."""
        if not is_url(self.store.root):
            return self.store.home / self.prefix
        top = self.path(PROVENANCE).parents[len(PurePosixPath(self.prefix).parts)]
        for name, entry in self.provenance()["files"].items():
            self.store.files.fetch(self.name(name), top, digest=entry["digest"])
        return top / self.prefix

    def files(self) -> dict[str, Info]:
        """Names of the files that are there, committed or not, with sizes and ages."""
        listing = self.store.files.listing(self.prefix)
        return {name.removeprefix(f"{self.prefix}/"): info for name, info in sorted(listing.items())}

    def provenance(self) -> dict[str, Any]:
        """What the run was made of and what it made; empty when it is not committed, or its file is damaged."""
        if self in _whole_elsewhere:
            return _whole_elsewhere[self]
        try:
            return self.read_provenance()
        except (FileNotFoundError, FileTooLargeError, ProvenanceError):
            return {}

    def read_provenance(self) -> dict[str, Any]:
        """The same from its file.

        Raises:
            FileNotFoundError: the run is not committed.
            FileTooLargeError, ProvenanceError: it is damaged; the message says how.
        """
        data = self.store.files.read(self.name(PROVENANCE), max_bytes=MAX_DOCUMENT_BYTES)
        return parse_provenance(self.stage, data)

    def is_whole(self) -> bool:
        """Committed, and the files and packs that it names are there in their sizes.

        A run in an object store that was found whole once counts as whole for as long as the process lives: a build
        asks again and again, and each look takes several requests.
        """
        if self in _whole_elsewhere:
            return True
        provenance = self.provenance()
        sizes = {self.name(name): entry["size"] for name, entry in provenance.get("files", {}).items()}
        sizes |= {pack_name(self.stage, pack): size for pack, size in provenance.get("packs", {}).items()}
        is_whole = bool(provenance) and self.store.files.sizes(sizes) == sizes
        if is_whole and is_url(self.store.root):
            _whole_elsewhere[self] = provenance
        return is_whole

    def forget(self) -> None:
        """Look at it again, also where it was found whole in an object store."""
        _whole_elsewhere.pop(self, None)

    def write(self, name: str, data: bytes) -> None:
        self.forget()
        self.store.files.write(self.name(name), data)

    def create(self, name: str) -> AbstractContextManager[Path]:
        """A temporary path to write a large file to, which gets its name at the end."""
        self.forget()
        return self.store.files.create(self.name(name))

    def add(self, path: Path, *, link: bool = False) -> set[str]:
        """Copy a file, or a folder with all that is in it, into the run; returns the names there.

        Args:
            path: of the file or folder.
            link: hard-link files where the file system can; for files that nobody writes to again.
        """
        files = [each for each in (sorted(path.rglob("*")) if path.is_dir() else [path]) if each.is_file()]
        names = {each.relative_to(path.parent).as_posix(): each for each in files}
        for name, each in names.items():
            with self.create(name) as destination:
                if not (link and _is_linked(each, destination)):
                    shutil.copyfile(each, destination)
        return set(names)

    def keep_only(self, names: Set[str]) -> None:
        """Remove all other files, such as those of a killed build."""
        self.store.files.remove([self.name(name) for name in self.files().keys() - names])

    def commit(self, packs: Iterable[str], provenance: Mapping[str, Any]) -> None:
        """Declare the run done: name its files and packs, then what it was made of.

        Raises:
            ProvenanceError: readers would take it for damaged; nothing was written.
            StoreError: a pack is gone, or the file cannot be written.
        """
        files = {
            name: {"size": info.size, "digest": self.store.files.digest(self.name(name))}
            for name, info in self.files().items()
            if name != PROVENANCE
        }
        names = {pack: pack_name(self.stage, pack) for pack in sorted(set(packs))}
        sizes = self.store.files.sizes(names.values())
        if gone := set(names.values()) - sizes.keys():
            raise StoreError(
                f"{self.store.files.place(min(gone))} was removed while the build used it, and {len(gone) - 1:,} more. "
                "Run again"
            )
        content = {**provenance, "files": files, "packs": {pack: sizes[name] for pack, name in names.items()}}
        data = json.dumps(content, indent=1, ensure_ascii=False).encode()
        parse_provenance(self.stage, data)  # or the stage would be built again and again
        self.write(PROVENANCE, data)

    def uncommit(self) -> None:
        """Make the stage run again; artifacts stay and are found again."""
        self.forget()
        self.store.files.remove([self.name(PROVENANCE)])

    def remove(self) -> None:
        self.uncommit()
        self.store.files.remove([self.name(name) for name in self.files()])


def _is_linked(source: Path, destination: Path) -> bool:
    """Hard-link a file, if that can be done."""
    try:
        destination.hardlink_to(source)
    except OSError:  # another file system, or one without hard links
        return False
    return True


_accepted_elsewhere: dict[Store, dict[str, str]] = {}
_whole_elsewhere: dict[Run, dict[str, Any]] = {}
"""Runs in object stores that this process found whole, with their provenance."""


def forget_what_was_found() -> None:
    """Look at object stores again: other machines may have changed them."""
    _accepted_elsewhere.clear()
    _whole_elsewhere.clear()


def pack_name(stage: str, pack: str) -> str:
    """A pack's name in the store."""
    return f"packs/{stage}/{pack}"


def index_name(stage: str, pack: str) -> str:
    """The name of a pack's index."""
    return f"packs/{stage}/{PurePosixPath(pack).stem}.parquet"


def results_table(locations: Mapping[str, Location]) -> pa.Table:
    """Results by key as columns: a row takes a hundred bytes, where an object takes a thousand."""
    import pyarrow as pa

    columns = list(zip(*locations.values(), strict=True)) or [()] * len(Location._fields)
    pack = pa.field("pack", pa.dictionary(pa.int32(), pa.string()))
    return pa.table([list(locations), *columns], schema=_index_schema().insert(1, pack))


def _packs_in(listing: Mapping[str, Info]) -> dict[str, Info]:
    names = sorted(name for name in listing if name.endswith((TAR, SAFETENSORS)))
    return {PurePosixPath(name).name: listing[name] for name in names}


def _has_index(stage: str, pack: str, listing: Mapping[str, Info]) -> bool:
    """Whether a pack has an index of a size that can be read."""
    found = listing.get(index_name(stage, pack))
    return found is not None and found.size <= MAX_INDEX_BYTES


def _results(pack: str, size: int, index: bytes, wanted: NDArray[np.uint64]) -> pa.Table:
    """Rows of a pack's index whose keys have a wanted number; none where the pack or its index is damaged."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    nothing = results_table({})
    try:
        # Most packs hold nothing that is wanted: their other columns are not even looked at.
        keys = _open_index(index, ["key"]).read(["key"], use_threads=False).column("key").cast(pa.string())
        numbers = _numbers(keys)
        is_wanted = wanted[np.searchsorted(wanted, numbers)] == numbers
        table = _index_table(_open_index(index)) if is_wanted.any() else None
    except (OSError, ValueError, KeyError, pa.ArrowException):  # ValueError: keys that are not ASCII
        return nothing
    if table is None:
        return nothing
    end = pc.max(pc.add(table.column("offset"), table.column("size"))).as_py()
    if size != container_size(PurePosixPath(pack).suffix, [(0, end)]):
        return nothing
    rows = table.filter(pa.array(is_wanted))
    return rows.add_column(1, nothing.field("pack"), pa.array([pack] * len(rows)).dictionary_encode())


def _numbers(keys: pa.Array | pa.ChunkedArray) -> NDArray[np.uint64]:
    """A number for each key. Two keys that share one would be found together, which does no harm."""
    import numpy as np

    words = np.array(keys.to_pylist(), f"S{2 * KEY_BYTES}").view(np.uint64).reshape(-1, KEY_BYTES // 4)
    return words[:, 0] * ODD_NUMBER + words[:, 1]


def _locations(pack: str, index: bytes) -> dict[str, Location] | None:
    """What an index lists, by key; None where it is damaged."""
    import pyarrow as pa

    try:
        table = _index_table(_open_index(index))
    except (OSError, ValueError, pa.ArrowException):
        table = None
    if table is None:
        return None
    columns = (column.to_pylist() for column in table.columns)
    return {key: Location(pack, *row) for key, *row in zip(*columns, strict=True)}


def _open_index(index: bytes, columns: Sequence[str] | None = None) -> pq.ParquetFile:
    """A pack's index, or some of its columns, before it is decoded.

    Raises:
        OSError, ValueError, pa.ArrowException: it is damaged.
    """
    from spctrl.io.parquet import open_table

    file = open_table(index, columns, free_bytes=FREE_INDEX_BYTES)
    rows = file.metadata.num_rows
    # Every row has a key of its own, and keys are digests, which cannot be compressed.
    if rows > min(len(index) // KEY_BYTES, MAX_INDEX_ROWS):
        raise ValueError(
            f"expected a pack's index of {len(index):,} bytes to have fewer rows, found {rows:,}"
        )
    return file


def _index_table(file: pq.ParquetFile) -> pa.Table | None:
    """A pack's index; None where it is damaged."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        table = file.read(use_threads=False).select(_index_schema().names).cast(_index_schema())
        table.validate(full=True)
    except (OSError, ValueError, KeyError, pa.ArrowException):  # ValueError: names that are no UTF-8
        return None
    if any(table.column(name).null_count for name in ("key", "offset", "size", "digest")):
        return None
    if len(table) == 0:
        return table
    offsets, sizes = table.column("offset"), table.column("size")
    lowest = min(pc.min(offsets).as_py(), pc.min(sizes).as_py())
    if lowest < 0 or pc.max(offsets).as_py() >= LARGEST_OFFSET or pc.max(sizes).as_py() > MAX_ARTIFACT_BYTES:
        return None
    # Artifacts do not overlap; those that did would take any time to read.
    return table if pc.sum(sizes).as_py() <= pc.max(pc.add(offsets, sizes)).as_py() else None


def _index_schema() -> pa.Schema:
    """Columns of a pack's index."""
    import pyarrow as pa

    texts = {name: pa.string() for name in ("key", "digest", "code", "message")}
    numbers = {name: pa.int64() for name in ("offset", "size")}
    order = ("key", "offset", "size", "digest", "code", "message")
    return pa.schema([(name, {**texts, **numbers}[name]) for name in order])


def _provenance(stage: str, data: bytes) -> dict[str, Any]:
    """A damaged one is as good as none: the stage runs again."""
    try:
        return parse_provenance(stage, data)
    except ProvenanceError:
        return {}


def parquet_bytes(table: Any) -> bytes:
    """A small table as a Parquet file (zstd)."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()

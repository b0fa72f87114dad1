"""The store: artifacts in tar packs, and the runs of stages that refer to them, in a folder or an object store.

    packs/<stage>/<name>.tar        members <key><suffix>; latents: <name>.safetensors
    packs/<stage>/<name>.parquet    key -> place in the tar, or why the record was rejected
    runs/<stage>/<part>/<fingerprint>/artifacts.parquet, rejects.parquet, ..., provenance.json
    format.json                     the format of all that (spctrl/store/format.py)
    accepted.json                   code versions that a user declared equal

What only one machine needs is in ``[paths] cache``, which may be the store's own folder:

    cache.sqlite                    digests of files, by path and stat (spctrl/store/digests.py)
    packs/, copies/, training/      of a store in object storage: what was fetched of it, and checkpoints

Every file is whole or absent (spctrl/storage). A pack counts once its Parquet index is there, a run once its
provenance is there: each is written last. Names come from contents, so two builds that write the same thing write
the same bytes to the same place.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spctrl.io.documents import MAX_DOCUMENT_BYTES
from spctrl.output.secrets import without_secrets
from spctrl.storage import Files, FileTooLargeError, Info, StoreError, files_at, is_url
from spctrl.storage.files import cannot_read, write_atomic
from spctrl.store.digests import content_digest, digest
from spctrl.store.format import refuse_later_format
from spctrl.store.pack_index import (
    MAX_INDEX_BYTES,
    Location,
    has_index,
    index_name,
    locations_in,
    matching_results,
    pack_name,
    packs_in,
    results_table,
)
from spctrl.store.packs import (
    MAX_ARTIFACT_BYTES,
    container_of,
    write_container,
)
from spctrl.store.runs import PROVENANCE, Run, known_whole, provenance_or_empty

if TYPE_CHECKING:
    import pyarrow as pa

ACCEPTED = "accepted.json"
CACHE = "~/.cache/spctrl"
INDICES_AT_ONCE, DOCUMENTS_AT_ONCE = 64, 16
"""Files that are read in one go, which object stores answer together."""


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
        return packs_in(self.files.listing(f"packs/{stage}"))

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
        from spctrl.io.parquet import parquet_bytes

        table = results_table(locations).drop_columns("pack")
        self.files.write(index_name(stage, pack), parquet_bytes(table))

    def results(self, stage: str, keys: pa.ChunkedArray) -> pa.Table:
        """What the stage's packs hold of some keys, as ``results_table``; a cut pack holds nothing.

        Rows of a few other keys may be among them. Of a key that several packs hold the first row counts.
        """
        return matching_results(self._indices(stage), keys)

    def _indices(self, stage: str) -> Iterator[tuple[str, int, bytes]]:
        """Of each pack of a stage that has an index, latest name first: its name, its size, and the index."""
        listing = self.files.listing(f"packs/{stage}")
        packs = packs_in(listing)
        names = [name for name in sorted(packs, reverse=True) if has_index(stage, name, listing)]
        for start in range(0, len(names), INDICES_AT_ONCE):
            some = names[start : start + INDICES_AT_ONCE]
            indices = self.files.read_many([index_name(stage, pack) for pack in some])
            for pack in some:
                yield pack, packs[pack].size, indices.get(index_name(stage, pack), b"")

    def pack_locations(self, stage: str, pack: str) -> dict[str, Location]:
        """What one pack holds, by key; an index that cannot be read holds nothing."""
        try:
            index = self.files.read(index_name(stage, pack), max_bytes=MAX_INDEX_BYTES)
        except (FileNotFoundError, FileTooLargeError):
            return {}
        return locations_in(pack, index) or {}

    def has_damaged_index(self, stage: str, pack: str) -> bool:
        """Whether a pack has an index that a build cannot read, and so passes over."""
        try:
            index = self.files.read(index_name(stage, pack), max_bytes=MAX_INDEX_BYTES)
        except FileNotFoundError:
            return False
        except FileTooLargeError:
            return True
        return locations_in(pack, index) is None

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
        """Committed runs of all formats, latest first.

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
                times[run] = provenance_or_empty(run.stage, contents.get(name, b"")).get("finished_at")
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


_accepted_elsewhere: dict[Store, dict[str, str]] = {}


def forget_what_was_found() -> None:
    """Look at object stores again: other machines may have changed them."""
    _accepted_elsewhere.clear()
    known_whole.clear()
    refuse_later_format.cache_clear()

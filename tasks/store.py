"""The store: artifacts in tar packs, and the runs of stages that refer to them.

    packs/<stage>/<name>.tar        members <key><suffix>; latents: <name>.safetensors
    packs/<stage>/<name>.parquet    key -> place in the tar, or why the record was rejected
    runs/<stage>/<part>/<fingerprint>/manifest.parquet, rejects.parquet, ..., provenance.json
    accepted.json                   code versions that a user declared equal
    cache.sqlite                    digests of files, by path and stat (tasks/inputs.py)

Every file is written under a temporary name and renamed, so it is whole or absent. A pack counts once its
Parquet index is
there, a run once its provenance is there: each is written last. Names come from contents, so two builds that
write the same thing write the same bytes to the same place.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from spctrl.errors import ExpectedError
from tasks.packs import SAFETENSORS, TAR, container_of, container_size, write_container

KEY_BYTES = 16
PROVENANCE = "provenance.json"
TEMPORARY = ".tmp-"


class StoreError(ExpectedError):
    """The store cannot be read or written; the message names the place."""


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
    state = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "big"))
        state.update(data)
    return state.hexdigest()


def content_digest(data: bytes | memoryview) -> str:
    """SHA-256 in hex, as ``sha256sum`` prints it."""
    return hashlib.sha256(data).hexdigest()


def write_atomic(path: Path, data: bytes, *, temporary: Path | None = None) -> None:
    """Write a file whole or not at all.

    Args:
        path: of the file; its folder is made.
        data: its content.
        temporary: a free name on the same disk to write to first; by default one beside the file.

    Raises:
        StoreError: it cannot be written (full or read-only disk, no permission).
    """
    temporary = temporary or path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> StoreError:
    """The error for a file that cannot be written."""
    return StoreError(
        f"cannot write {path}: {error.strerror or error}. What was finished before stays; make room or fix the "
        "permissions ([paths] in luigi.cfg says where things go), then run again"
    )


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a lock file, which the system gives up for a process that dies; waits for whoever holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise cannot_write(path, error) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Store:
    """All that was ever computed, below one folder."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def packs_folder(self, stage: str) -> Path:
        return self.root / "packs" / stage

    def pack_path(self, stage: str, pack: str) -> Path:
        return self.packs_folder(stage) / pack

    def pack_index_path(self, stage: str, pack: str) -> Path:
        return self.packs_folder(stage) / f"{Path(pack).stem}.parquet"

    def stages(self) -> list[str]:
        """Names of the stages that left packs or runs."""
        folders = [*self.root.glob("packs/*/"), *self.root.glob("runs/*/")]
        return sorted({folder.name for folder in folders})

    # Packs

    def packs(self, stage: str) -> list[str]:
        """File names of a stage's packs; also of those that lack an index."""
        folder = self.packs_folder(stage)
        return sorted(
            path.name
            for kind in (TAR, SAFETENSORS)
            for path in folder.glob(f"*{kind}")
            if path.name[0] != "."
        )

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
        name = digest(*(key for key, _ in results)) + container_of(suffix)
        artifacts = [(key, result) for key, result in results if isinstance(result, bytes)]
        data, places = write_container(suffix, artifacts)
        found = {
            key: Location(name, offset, size, content_digest(artifact))
            for (key, artifact), (offset, size) in zip(artifacts, places, strict=True)
        }
        locations = {
            key: Location(name, 0, 0, "", *result) if isinstance(result, tuple) else found[key]
            for key, result in results
        }
        write_atomic(self.pack_path(stage, name), data)
        self.write_pack_index(stage, name, locations)
        return locations

    def write_pack_index(self, stage: str, pack: str, locations: Mapping[str, Location]) -> None:
        import pyarrow as pa

        columns = list(zip(*locations.values(), strict=True)) or [()] * len(Location._fields)
        schema = pa.schema(
            [
                ("key", pa.string()),
                ("offset", pa.int64()),
                ("size", pa.int64()),
                ("digest", pa.string()),
                ("code", pa.string()),
                ("message", pa.string()),
            ]
        )
        table = pa.table([list(locations), *columns[1:]], schema=schema)
        write_atomic(self.pack_index_path(stage, pack), parquet_bytes(table))

    def locations(self, stage: str) -> dict[str, Location]:
        """Every artifact and every reject that the stage's packs hold, by key; a cut pack holds nothing."""
        found: dict[str, Location] = {}
        for pack in self.packs(stage):
            locations = self.pack_locations(stage, pack)
            path = self.pack_path(stage, pack)
            places = [(location.offset, location.size) for location in locations.values()]
            if _size(path) == container_size(path.suffix, places):
                found |= locations
        return found

    def pack_locations(self, stage: str, pack: str) -> dict[str, Location]:
        """What one pack holds, by key; an index that cannot be read holds nothing."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            columns = pq.read_table(self.pack_index_path(stage, pack), partitioning=None).to_pydict()
            rows = zip(
                *(columns[name] for name in ("offset", "size", "digest", "code", "message")), strict=True
            )
        except (OSError, pa.ArrowException, KeyError):
            return {}
        return {key: Location(pack, *row) for key, row in zip(columns["key"], rows, strict=True)}

    def read(self, stage: str, pack: str, offset: int, size: int) -> bytes:
        """An artifact's bytes."""
        path = self.pack_path(stage, pack)
        try:
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise StoreError(
                f"cannot read {path}: {error.strerror}. `spctrl verify` drops what is damaged"
            ) from error
        if len(data) < size:
            raise StoreError(
                f"{path}: expected {size} bytes at {offset}, found {len(data)}. `spctrl verify` drops what is damaged, "
                "the next build makes it again"
            )
        return data

    # Runs

    def run(self, stage: str, part: str, fingerprint: str) -> Run:
        return Run(self, stage, part, fingerprint)

    def runs(self, stage: str = "*", part: str = "*") -> list[Run]:
        """Committed runs, latest first."""
        found = [
            Run(self, path.parts[-4], path.parts[-3], path.parts[-2])
            for path in self.root.glob(f"runs/{stage}/{part}/*/{PROVENANCE}")
        ]
        return sorted(found, key=lambda run: run.provenance().get("finished_at", ""), reverse=True)

    # Code versions that were declared equal

    def accepted(self) -> dict[str, str]:
        """``{code version: the earlier one that it counts as}``."""
        try:
            return dict(json.loads((self.root / "accepted.json").read_bytes()))
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError) as error:
            raise StoreError(
                f"{self.root / 'accepted.json'}: expected a JSON object, found a fault: {error}"
            ) from error

    def accept(self, code_version: str, as_version: str) -> None:
        versions = self.accepted()
        versions[code_version] = versions.get(as_version, as_version)
        write_atomic(self.root / "accepted.json", json.dumps(versions, indent=1, sort_keys=True).encode())


@dataclass(frozen=True)
class Run:
    """One stage's result for one part (a dataset's split, or all), made from what its fingerprint stands for."""

    store: Store = field(repr=False)
    stage: str
    part: str
    fingerprint: str

    @property
    def folder(self) -> Path:
        return self.store.root / "runs" / self.stage / self.part / self.fingerprint

    def path(self, name: str) -> Path:
        return self.folder / name

    def provenance(self) -> dict[str, Any]:
        """What the run was made of and what it made; empty when it is not committed."""
        try:
            return dict(json.loads(self.path(PROVENANCE).read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            return {}  # a damaged one is as good as none: the stage runs again

    def is_whole(self) -> bool:
        """Committed, and the files and packs that it names are there in their sizes."""
        provenance = self.provenance()
        sizes = {self.path(name): entry["size"] for name, entry in provenance.get("files", {}).items()}
        sizes |= {
            self.store.pack_path(self.stage, pack): size for pack, size in provenance.get("packs", {}).items()
        }
        return bool(provenance) and all(_size(path) == size for path, size in sizes.items())

    def write(self, name: str, data: bytes) -> None:
        write_atomic(self.path(name), data)

    @contextmanager
    def create(self, name: str) -> Iterator[Path]:
        """A temporary path to write a large file to, which gets its name at the end."""
        path = self.path(name)
        temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.replace(path)
        except OSError as error:
            raise cannot_write(path, error) from error
        finally:
            temporary.unlink(missing_ok=True)

    def commit(self, names: Iterable[str], packs: Iterable[str], provenance: Mapping[str, Any]) -> None:
        """Declare the run done: name its files and packs, then what it was made of."""
        files = {
            name: {"size": self.path(name).stat().st_size, "digest": file_digest(self.path(name))}
            for name in names
        }
        sizes = {pack: self.store.pack_path(self.stage, pack).stat().st_size for pack in sorted(set(packs))}
        content = {**provenance, "files": files, "packs": sizes}
        write_atomic(self.path(PROVENANCE), json.dumps(content, indent=1, ensure_ascii=False).encode())

    def uncommit(self) -> None:
        """Make the stage run again; artifacts stay and are found again."""
        self.path(PROVENANCE).unlink(missing_ok=True)

    def remove(self) -> None:
        self.uncommit()
        shutil.rmtree(self.folder, ignore_errors=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def file_digest(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parquet_bytes(table: Any) -> bytes:
    """A small table as a Parquet file (zstd)."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def stale_temporaries(folder: Path, older_than_s: float) -> Iterator[Path]:
    """Files that a killed writer left behind."""
    now = time.time()
    for path in folder.rglob(f"{TEMPORARY}*"):
        if now - path.stat().st_mtime > older_than_s:
            yield path

"""A stage's run: the files of one result, committed by its provenance."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from spctrl.io.documents import MAX_DOCUMENT_BYTES
from spctrl.storage import FileTooLargeError, Info, StoreError, is_url
from spctrl.store.format import FORMAT
from spctrl.store.pack_index import pack_name
from spctrl.store.provenance import EARLIER_FILES, ProvenanceError, is_readable, parse_provenance

if TYPE_CHECKING:
    import pyarrow as pa

    from spctrl.store.store import Store

PROVENANCE = "provenance.json"
COPIES = "copies"


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
        # While a run is rebuilt, the provenance that is there may describe other contents.
        known = known_whole.get(self, {}).get("files", {}).get(name)
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
        """What the run was made of and what it made; empty when no stage can read it.

        That is when it is not committed, its provenance is damaged, or it has another format (spctrl.store.format).
        """
        if self in known_whole:
            return known_whole[self]
        found = self.history()
        return found if is_readable(self.stage, found) else {}

    def history(self) -> dict[str, Any]:
        """The provenance of a run of any format, to compare and to explain; empty when there is no sound one."""
        try:
            return self.read_provenance()
        except (FileNotFoundError, FileTooLargeError, ProvenanceError):
            return {}

    def read_provenance(self) -> dict[str, Any]:
        """The provenance of a run of any format, from its file.

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
        if self in known_whole:
            return True
        provenance = self.provenance()
        sizes = {self.name(name): entry["size"] for name, entry in provenance.get("files", {}).items()}
        sizes |= {pack_name(self.stage, pack): size for pack, size in provenance.get("packs", {}).items()}
        is_whole = bool(provenance) and self.store.files.sizes(sizes) == sizes
        if is_whole and is_url(self.store.root):
            known_whole[self] = provenance
        return is_whole

    def forget(self) -> None:
        """Look at it again, also where it was found whole in an object store."""
        known_whole.pop(self, None)

    def write(self, name: str, data: bytes) -> None:
        self.forget()
        self.store.files.write(self.name(name), data)

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a small table as a Parquet file."""
        from spctrl.io.parquet import parquet_bytes

        self.write(name, parquet_bytes(table))

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
        """Declare the run done: write its provenance, with the names of its files and packs.

        Files that only earlier formats have are removed at the end.

        Raises:
            ProvenanceError: readers would take it for damaged; nothing was written.
            StoreError: a pack is gone, or the file cannot be written.
        """
        there = self.files()
        earlier = EARLIER_FILES.get(self.stage, frozenset()) & there.keys()
        files = {
            name: {"size": info.size, "digest": self.store.files.digest(self.name(name))}
            for name, info in there.items()
            if name not in {PROVENANCE, *earlier}
        }
        names = {pack: pack_name(self.stage, pack) for pack in sorted(set(packs))}
        sizes = self.store.files.sizes(names.values())
        if gone := set(names.values()) - sizes.keys():
            raise StoreError(
                f"{self.store.files.place(min(gone))} was removed while the build used it, and {len(gone) - 1:,} more. "
                "Run again"
            )
        content = {
            **provenance,
            "format": FORMAT,
            "files": files,
            "packs": {pack: sizes[name] for pack, name in names.items()},
        }
        data = json.dumps(content, indent=1, ensure_ascii=False).encode()
        parse_provenance(self.stage, data)  # or the stage would be built again and again
        self.write(PROVENANCE, data)
        self.store.files.remove(self.name(name) for name in earlier)

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


known_whole: dict[Run, dict[str, Any]] = {}
"""Runs in object stores that this process found whole, with their provenance."""


def provenance_or_empty(stage: str, data: bytes) -> dict[str, Any]:
    """A damaged one is as good as none: the stage runs again."""
    try:
        return parse_provenance(stage, data)
    except ProvenanceError:
        return {}


def struck_out(runs: Iterable[Run], fault: str) -> StoreError:
    """Strike out runs, the first of which has a fault that any of them may have caused; returns what to raise."""
    first, *others = dict.fromkeys(runs)
    for run in (first, *others):
        run.uncommit()
    beside = f", nor do {len(others)} that may be at fault" if others else ""
    return StoreError(
        f"{first.place()}: {fault}. The run no longer counts as finished{beside}: build again, which makes it again"
    )

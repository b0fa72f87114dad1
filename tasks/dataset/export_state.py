"""What an export holds: the files that were written for a fingerprint, listed in the export itself."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import NamedTuple

from spctrl.paths import is_safe_relative_path
from spctrl.storage import Files, FileTooLargeError, StoreError
from tasks.settings import LEDGERS

MAX_LIST_BYTES = 2**30
"""Of a ledger's list, which has some 50 bytes for each file of an export."""


class Entry(NamedTuple):
    """A file of an export: the fingerprint of its inputs, and its SHA-256."""

    made_from: str
    digest: str


TEXT = "text"
UNFINISHED = Entry("", "")
"""Of a file that is about to be written."""


@dataclass
class Ledger:
    """The files that one split wrote into an export folder.

    Attributes:
        place: where exports go.
        name: of the ledger's own JSON file; beside it, with the suffix ``.parquet``, lies the list of files.
        fingerprint: of the export run that they belong to; empty while it is under way.
        files: by path below the export folder.
    """

    place: Files
    name: str
    fingerprint: str = ""
    files: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def read(cls, place: Files, name: str) -> Ledger:
        """The ledger of a name; an empty one where there is none, or half of one.

        An export may come from somewhere else: what its ledger lists outside of it, or in the ledgers' own folder, is
        not taken for a file of the export, and so never removed.
        """
        import pyarrow as pa

        from spctrl.io.parquet import read_table

        try:
            listed = (
                read_table(place.read(_list_name(name), max_bytes=MAX_LIST_BYTES)).drop_null().to_pydict()
            )
            rows = zip(*(listed[column] for column in ("path", *Entry._fields)), strict=True)
        except (OSError, FileTooLargeError, ValueError, KeyError, pa.ArrowException):  # ValueError: no UTF-8
            return cls(place, name)
        files = {path: Entry(*entry) for path, *entry in rows if may_be_exported(path)}
        return cls(place, name, fingerprint_at(place, name), files)

    def write(self) -> None:
        """The list first, so that a fingerprint never speaks for files that are not listed."""
        import pyarrow as pa

        from spctrl.io.parquet import parquet_bytes

        columns = [
            list(self.files),
            *([entry[i] for entry in self.files.values()] for i in range(len(Entry._fields))),
        ]
        schema = pa.schema([(name, pa.string()) for name in ("path", *Entry._fields)])
        if not self.fingerprint:
            self._write_fingerprint()
        self.place.write(_list_name(self.name), parquet_bytes(pa.table(columns, schema=schema)))
        self._write_fingerprint()

    def _write_fingerprint(self) -> None:
        self.place.write(self.name, json.dumps({"fingerprint": self.fingerprint}).encode())


def may_be_exported(path: object) -> bool:
    """Whether a ledger's entry is a path below the export folder."""
    if not isinstance(path, str) or not is_safe_relative_path(path):
        return False
    return not {"", ".", LEDGERS} & set(path.split("/"))


def _list_name(ledger: str) -> str:
    return f"{ledger.removesuffix('.json')}.parquet"


def fingerprint_at(place: Files, ledger: str) -> str:
    """The fingerprint of a ledger alone, without loading anything heavy."""
    try:
        return str(place.read_json(ledger)["fingerprint"])
    except (FileNotFoundError, FileTooLargeError, ValueError, KeyError, TypeError):
        return ""


def damaged_files(ledger: Ledger) -> list[str]:
    """Paths, below an export folder, that are missing or do not hold what the ledger says."""

    def is_damaged(path: str, entry: Entry) -> bool:
        try:
            return ledger.place.digest(path) != entry.digest
        except (OSError, StoreError):
            return True

    return [path for path, entry in ledger.files.items() if is_damaged(path, entry)]

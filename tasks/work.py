"""What a worker does: one library function over the records of a batch, its results into one pack."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from spctrl.errors import ExpectedError
from spctrl.records import RecordError
from tasks.inputs import InputChangedError
from tasks.store import Location, Store, content_digest

if TYPE_CHECKING:
    from spctrl.records import Record


class FileSource(NamedTuple):
    """An input file and the digest that its record's key was made from."""

    path: str
    digest: str


class ArtifactSource(NamedTuple):
    """An artifact of an earlier stage."""

    stage: str
    location: Location


Source = FileSource | ArtifactSource


@dataclass(frozen=True)
class Batch:
    """Records to be worked on, with their keys and sources, and what to do with them.

    Attributes:
        function: ``"module:name"``, called as ``function(record, *source bytes, **parameters)``; gives the
            artifact's bytes.
    """

    function: str
    parameters: Mapping[str, Any]
    store_root: Path
    stage: str
    suffix: str
    keys: Sequence[str]
    records: Sequence[Record]
    sources: Sequence[tuple[Source, ...]]


def make_pack(batch: Batch) -> dict[str, Location]:
    """Work through a batch and keep the results; a record that cannot be used is kept with its reason.

    Raises:
        RuntimeError: the function failed in a way that is not the record's fault; names the record.
    """
    store = Store(batch.store_root)
    function = resolve(batch.function)
    results: list[tuple[str, bytes | tuple[str, str]]] = []
    for key, record, sources in zip(batch.keys, batch.records, batch.sources, strict=True):
        try:
            data = [_read(store, source) for source in sources]
            results.append((key, function(record, *data, **batch.parameters)))
        except RecordError as error:
            results.append((key, (error.code, error.message)))
        except (OSError, ExpectedError):
            raise
        except Exception as error:
            raise RuntimeError(
                f"stage {batch.stage} failed at image {record.image_id} ({record.file_name}): "
                f"{type(error).__name__}: {error}"
            ) from error
    return store.write_pack(batch.stage, batch.suffix, results)


def resolve(function: str) -> Callable[..., Any]:
    """Import what ``"module:name"`` names."""
    module, _, name = function.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def _read(store: Store, source: Source) -> bytes:
    if isinstance(source, ArtifactSource):
        return store.read(source.stage, source.location.pack, source.location.offset, source.location.size)
    data = Path(source.path).read_bytes()
    if content_digest(data) != source.digest:
        raise InputChangedError(
            f"{source.path} changed while it was being read; run again when it is at rest"
        )
    return data

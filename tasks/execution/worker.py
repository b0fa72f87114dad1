"""What a worker does: one library function over the records of a batch, its results into one pack."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from spctrl.data.records import RecordError, records_from_table
from spctrl.errors import ExpectedError
from spctrl.store.digests import InputChangedError, content_digest
from spctrl.store.pack_index import Location
from spctrl.store.store import Store

if TYPE_CHECKING:
    import pyarrow as pa


FITTING_BATCH = {"cuda": 8, "cpu": 4}
"""Images in one pass, by device: a CPU gains nothing from more, and its caches lose."""


class FileSource(NamedTuple):
    """An input file and the digest that its record's key was made from."""

    path: str
    digest: str


class ArtifactSource(NamedTuple):
    """An artifact of an earlier stage."""

    stage: str
    location: Location


class TextSource(NamedTuple):
    """A text that is the input itself."""

    text: str


Source = FileSource | ArtifactSource | TextSource


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Records to be worked on, with their keys and sources, and what to do with them.

    Attributes:
        rows: the records as the index has them, which travel faster than objects.
        function: ``"module:name"``, called as ``function(record, *source bytes, **parameters)``; gives the
            artifact's bytes.
    """

    function: str
    parameters: Mapping[str, Any]
    store: Store
    stage: str
    suffix: str
    keys: Sequence[str]
    rows: pa.Table
    sources: Sequence[tuple[Source, ...]]


@dataclass(frozen=True, kw_only=True)
class ModelBatch(Batch):
    """Records for an image model.

    Attributes:
        function: loads the model: ``function(**parameters, **loading)``.
        loading: what its loading needs and its output does not depend on: where the weights are, the device.
        batch_size: images in one pass; 0 for what suits the device.
    """

    loading: Mapping[str, Any]
    batch_size: int


def make_pack(batch: Batch) -> dict[str, Location]:
    """Work through a batch and keep the results; a record that cannot be used is kept with its reason.

    Raises:
        RuntimeError: the function failed in a way that is not the record's fault; names the record.
    """
    function = resolve(batch.function)
    results: list[tuple[str, bytes | tuple[str, str]]] = []
    records = records_from_table(batch.rows)
    for key, record, sources in zip(batch.keys, records, batch.sources, strict=True):
        try:
            data = [read_source(batch.store, source) for source in sources]
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
    return batch.store.write_pack(batch.stage, batch.suffix, results)


def make_model_pack(batch: ModelBatch) -> dict[str, Location]:
    """The same with an image model, which this process loads once."""
    from spctrl.image_models.base import choose_device, run_model

    model = _loaded_model(batch.function, tuple(sorted({**batch.parameters, **batch.loading}.items())))
    work: Iterator[tuple[Any, ...]] = (
        (record, *(read_source(batch.store, source) for source in sources))
        for record, sources in zip(records_from_table(batch.rows), batch.sources, strict=True)
    )
    fitting = FITTING_BATCH[choose_device(batch.loading["device"]).type]
    results = run_model(model, work, batch_size=batch.batch_size or fitting)
    return batch.store.write_pack(batch.stage, batch.suffix, list(zip(batch.keys, results, strict=True)))


@functools.cache
def _loaded_model(function: str, arguments: tuple[tuple[str, Any], ...]) -> Any:
    return resolve(function)(**dict(arguments))


def resolve(function: str) -> Callable[..., Any]:
    """Import what ``"module:name"`` names."""
    module, _, name = function.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def read_source(store: Store, source: Source) -> bytes:
    """A source's bytes.

    Raises:
        InputChangedError: a file is not what it was when its digest was taken.
        OSError: it cannot be read.
        StoreError: an artifact cannot be read.
    """
    if isinstance(source, ArtifactSource):
        return store.read(source.stage, source.location)
    if isinstance(source, TextSource):
        return source.text.encode()
    with Path(source.path).open("rb") as file:
        data = file.read(os.fstat(file.fileno()).st_size + 1)  # not to its end, which may move away
    if content_digest(data) != source.digest:
        raise InputChangedError(
            f"{source.path} changed while it was being read; run again when it is at rest"
        )
    return data

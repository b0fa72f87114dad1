"""Reading artifacts: by image id from a run's table, by key from the packs, or in the order of the index."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spctrl.errors import ExpectedError
from spctrl.storage.files import StoreError, cannot_read
from spctrl.store.digests import content_digest
from spctrl.store.pack_index import MAX_INDEX_BYTES, Location, matching_results
from spctrl.store.packs import SAFETENSORS, TAR
from spctrl.store.provenance import ARTIFACTS
from spctrl.store.runs import Run, struck_out

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray


DECODED_AT_ONCE = 4096
"""Rows that are Python objects at one time."""
PLACE = ("pack", "offset", "size", "digest")
"""Columns that say where an artifact lies, in the order of ``Location``."""


def artifact_schema() -> pa.Schema:
    """Columns of a run's table of artifacts."""
    import pyarrow as pa

    texts = {name: pa.string() for name in ("key", "pack", "digest")}
    numbers = {name: pa.int64() for name in ("image_id", "offset", "size")}
    order = ("image_id", "key", "pack", "offset", "size", "digest")
    return pa.schema([(name, {**texts, **numbers}[name]) for name in order])


def rows_in(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file, few of them in memory at a time."""
    from spctrl.io.parquet import open_table

    for batch in open_table(path).iter_batches(DECODED_AT_ONCE):
        yield from batch.to_pylist()


def location_of(row: Mapping[str, Any]) -> Location:
    """Where the artifact of a row of ``artifact_schema`` lies."""
    return Location(*(row[name] for name in PLACE))


def artifacts_in_order(run: Run) -> Iterator[tuple[int, Location]]:
    """Image ids and places of a record stage's artifacts, in the order of the index."""
    return ((row["image_id"], location_of(row)) for row in rows_in(run.path(ARTIFACTS)))


class InOrder:
    """Rows of a run's file in the order of the index, for as many records at a time as one likes.

    Attributes:
        is_at_end: whether all rows were given: false after the last record where they are in another order.
    """

    def __init__(self, path: Path) -> None:
        self._rows = rows_in(path)
        self._next = next(self._rows, None)

    @property
    def is_at_end(self) -> bool:
        return self._next is None

    def of(self, image_ids: Container[int]) -> Iterator[dict[str, Any]]:
        """The next rows, as long as they are of these images."""
        while self._next is not None and self._next["image_id"] in image_ids:
            yield self._next
            self._next = next(self._rows, None)


class Artifacts(Mapping[int, Location]):
    """Places of the artifacts of a record stage's run, by image id; in columns, since they may be millions."""

    def __init__(self, run: Run) -> None:
        from spctrl.io.parquet import read_table

        self._run = run
        path, columns = run.path(ARTIFACTS), ["image_id", *PLACE]
        table = read_table(path, columns)
        packs = table.column("pack").dictionary_encode()
        table = table.set_column(1, "pack", packs).sort_by("image_id").unify_dictionaries()
        self._ids = table.column("image_id").to_numpy()
        self._columns = [table.column(name).combine_chunks() for name in columns[1:]]

    def at(self, image_ids: Sequence[int]) -> list[Location | None]:
        """The place for each of many images; None where there is none."""
        import numpy as np
        import pyarrow as pa

        asked = np.asarray(image_ids, np.int64)
        rows = np.searchsorted(self._ids, asked)
        is_there = rows < len(self._ids)
        is_there[is_there] = self._ids[rows[is_there]] == asked[is_there]
        found = [column.take(pa.array(rows, mask=~is_there)).to_pylist() for column in self._columns]
        return [None if place[0] is None else Location(*place) for place in zip(*found, strict=True)]

    def listed(self, image_id: int, by: Run) -> Location:
        """Where the artifact of an image lies that another run lists.

        Raises:
            StoreError: there is none; both runs were struck out.
        """
        if (found := self.get(image_id)) is None:
            raise struck_out(
                [self._run, by],
                f"expected an artifact of image {image_id}, which {by.place()} lists, found none",
            )
        return found

    def __getitem__(self, image_id: int) -> Location:
        row = int(self._ids.searchsorted(image_id))
        if row == len(self._ids) or self._ids[row] != image_id:
            raise KeyError(image_id)
        return Location(*(column[row].as_py() for column in self._columns))

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids.tolist())

    def __len__(self) -> int:
        return len(self._ids)


class StoredArtifacts:
    """One artifact of a stage for each of many keys, in their order. Nothing is read before it is asked for.

    It reads a folder by itself, without ``Store``: whatever it reaches counts as code of training, which should not run
    again because the store's other functions change.

    Attributes:
        sizes: (keys,) int64, bytes.
    """

    def __init__(self, store: Path, stage: str, keys: pa.Array) -> None:
        """Find the artifacts of ``keys`` (strings) in the packs of a store in a folder.

        Raises:
            ExpectedError: some are not there; says how many, and which stage makes them.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        self._folder = store / "packs" / stage
        keys = pc.if_else(pc.string_is_ascii(keys), keys, None)  # no key has other characters
        results = matching_results(_indices_in(self._folder), pa.chunked_array([keys.drop_null()]))
        made = results.filter(pc.is_null(results.column("code")))
        rows = pc.index_in(keys, value_set=made.column("key").combine_chunks())
        if rows.null_count:
            raise ExpectedError(missing_artifacts(stage, rows.null_count, len(keys), f"the packs of {store}"))
        found = made.take(rows).unify_dictionaries()
        self._packs, self._digests = (found.column(name).combine_chunks() for name in ("pack", "digest"))
        self._offsets: NDArray[np.int64] = found.column("offset").to_numpy()
        self.sizes: NDArray[np.int64] = found.column("size").to_numpy()

    def read(self, i: int) -> bytes:
        """The bytes of the artifact of key i.

        Raises:
            StoreError: the pack cannot be read, or does not hold there what its index says.
        """
        path, size = self._folder / self._packs[i].as_py(), int(self.sizes[i])
        try:
            with path.open("rb") as file:
                file.seek(int(self._offsets[i]))
                data: bytes = file.read(size)
        except OSError as error:
            raise cannot_read(path, error) from error
        if content_digest(data) != self._digests[i].as_py():
            raise StoreError(
                f"{path}: expected {size} bytes at {self._offsets[i]} with another digest, found {len(data)}. "
                "`spctrl verify` drops what is damaged, the next build makes it again"
            )
        return data


def _indices_in(folder: Path) -> Iterator[tuple[str, int, bytes]]:
    """Of each pack in a folder that has an index: its name, its size in bytes, and the index."""
    for pack in sorted(folder.glob("[!.]*"), reverse=True):
        index = pack.with_suffix(".parquet")
        try:
            if pack.suffix in (TAR, SAFETENSORS) and index.stat().st_size <= MAX_INDEX_BYTES:
                yield pack.name, pack.stat().st_size, index.read_bytes()
        except FileNotFoundError:
            continue  # a pack counts once its index is there
        except OSError as error:
            raise cannot_read(index, error) from error


def missing_artifacts(stage: str, missing: int, total: int, where: str) -> str:
    """The message for records that a stage has not made an artifact of."""
    return (
        f"expected {stage} of all {total:,} records in {where}, found none of {missing:,}. The stage {stage} makes "
        f"them: build with {stage} among [build] conditions (luigi --module pipelines BuildDataset)"
    )

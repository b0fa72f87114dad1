"""Which records of a stage still need an artifact, and the result of each record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from spctrl.store.artifacts import artifact_schema
from spctrl.store.digests import InputChangedError, digests
from spctrl.store.pack_index import Location, results_table
from spctrl.store.provenance import ARTIFACTS, RECORDS, REJECTS
from spctrl.store.runs import Run

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from numpy.typing import NDArray

    from tasks.execution.worker import Batch, Source
    from tasks.stage.record_stage import RecordStage

ROWS_AT_ONCE = 2**16
"""Of a run's table of artifacts, as one group of its Parquet file."""


class Prepared(NamedTuple):
    """A record before its artifact is made.

    Attributes:
        identity: what tells the record's inputs apart; None where there is nothing to work on.
        sources: what the function reads besides the record.
        code: why the record cannot be used, where it cannot.
        message: the same in a sentence.
    """

    identity: str | None
    sources: tuple[Source, ...] = ()
    code: str = ""
    message: str = ""


NOTHING = Prepared(None)
"""For a record that has nothing to be made from, and need not have."""


class _Work(NamedTuple):
    """Rows of the index that something is to be made from, with the key and the sources of each."""

    rows: pa.Table
    keys: list[str]
    sources: list[tuple[Source, ...]]


class RecordPlan:
    """Which records still need an artifact, and the result of each record.

    Records may be millions, so what is known of them is kept in columns, and their sources are found again when
    their turn comes.

    Attributes:
        total: the number of records.
    """

    def __init__(self, task: RecordStage) -> None:
        import pyarrow as pa

        from spctrl.io.parquet import open_table

        records_run = task.records_run()
        assert records_run is not None
        self._task = task
        self._index: pq.ParquetFile = open_table(records_run.path(RECORDS))
        self._salt = task.salt()
        self.total: int = self._index.metadata.num_rows
        self._per_pack = task.records_per_pack(self.total)
        self._faults: dict[int, Prepared] = {}
        keys = [pa.array([], pa.string())]
        start = 0
        for rows in self._index.iter_batches(self._per_pack):
            prepared = task.prepare(rows)
            self._faults |= {start + i: each for i, each in enumerate(prepared) if each.code}
            keys.append(self._keys_of(prepared))
            start += len(rows)
        self._keys: pa.ChunkedArray = pa.chunked_array(keys)
        self._results: list[pa.Table] = [task.store.results(task.stage, self._keys)]
        self._is_missing = _first_of_each(self._keys, self._results[0].column("key"))

    def count_missing(self) -> int:
        return int(self._is_missing.sum())

    def add(self, locations: Mapping[str, Location]) -> None:
        """Note what was made."""
        self._results.append(results_table(locations))

    def batches(self, advance: Callable[[int], None]) -> Iterator[Batch]:
        """Records without a known result, in packs.

        A stretch of the index that is missing as a whole becomes one pack, so that an interrupted build,
        continued, makes the packs of an uninterrupted one. Scattered records are gathered.
        """
        scattered: list[_Work] = []
        start = count = 0
        for rows in self._index.iter_batches(self._per_pack):
            is_missing = self._is_missing[start : start + len(rows)]
            found = int(is_missing.sum())
            work = self._work(rows, self._keys.slice(start, len(rows)), is_missing) if found else None
            start += len(rows)
            advance(len(rows) - found)
            if work is None:
                continue
            if found == len(rows):
                yield self._batch([work])
                continue
            if count + found > self._per_pack:
                yield self._batch(scattered)
                scattered, count = [], 0
            scattered.append(work)
            count += found
        if scattered:
            yield self._batch(scattered)

    def write_results(self, run: Run) -> dict[str, int]:
        """Write the run's tables of artifacts and rejects; returns the numbers of their rows."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        from spctrl.data.records import rejects_table

        results = pa.concat_tables(self._results)
        places = pc.index_in(self._keys, value_set=results.column("key"))
        if places.null_count != self._keys.null_count:
            raise RuntimeError(f"{self._task.stage}: some records that were worked on have no result")
        schema, names = artifact_schema(), ["image_id", "file_name"]
        rejects: list[dict[str, Any]] = []
        start = artifacts = 0
        with (
            run.create(ARTIFACTS) as destination,
            pq.ParquetWriter(destination, schema, compression="zstd") as writer,
        ):
            for rows in self._index.iter_batches(ROWS_AT_ONCE, columns=names):
                found = results.take(places.slice(start, len(rows)))
                for name in names:
                    found = found.append_column(name, rows.column(name))
                rejects += self._rejects(start, found)
                is_made = pc.and_(pc.is_valid(found.column("key")), pc.is_null(found.column("code")))
                made = found.select(schema.names).filter(is_made)
                writer.write_table(made.cast(schema).combine_chunks())
                artifacts += len(made)
                start += len(rows)
        run.write_table(REJECTS, rejects_table(rejects))
        return {"artifacts": artifacts, "rejected": len(rejects)}

    def _rejects(self, start: int, found: pa.Table) -> Iterator[dict[str, Any]]:
        """Rows of ``REJECT_SCHEMA`` for what was found of the records from ``start`` on."""
        for i, code in enumerate(found.column("code").to_pylist()):
            fault = self._faults.get(start + i)
            if fault is not None or code is not None:
                (row,) = (
                    found.select(["image_id", "file_name", "key", "code", "message"]).slice(i, 1).to_pylist()
                )
                yield {**row, "code": fault.code, "message": fault.message} if fault else row

    def _keys_of(self, prepared: Sequence[Prepared]) -> pa.Array:
        """A key for each record; null where there is nothing to work on."""
        import pyarrow as pa

        return pa.array(digests(self._salt, (each.identity for each in prepared)), pa.string())

    def _work(self, rows: pa.RecordBatch, keys: pa.ChunkedArray, is_missing: NDArray[np.bool_]) -> _Work:
        """The missing ones of some rows.

        Raises:
            InputChangedError: their sources are no longer what their keys were made from.
        """
        import pyarrow as pa

        from spctrl.data.records import COLUMNS_OF_RECORD

        missing = pa.array(is_missing)
        rows, keys = rows.filter(missing), keys.filter(missing)
        prepared = self._task.prepare(rows)
        if self._keys_of(prepared) != keys.combine_chunks():
            raise InputChangedError(
                f"files that {self._task.stage} reads changed while it was at work; run again when they are at rest"
            )
        table = pa.Table.from_batches([rows.select(COLUMNS_OF_RECORD)])
        return _Work(table, keys.to_pylist(), [each.sources for each in prepared])

    def _batch(self, work: Sequence[_Work]) -> Batch:
        import pyarrow as pa

        return self._task.batch(
            rows=pa.concat_tables(each.rows for each in work),
            keys=[key for each in work for key in each.keys],
            sources=[sources for each in work for sources in each.sources],
        )


def _first_of_each(keys: pa.ChunkedArray, known: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Where keys that are not known come for the first time."""
    import numpy as np
    import pyarrow.compute as pc

    is_new = pc.and_(pc.is_valid(keys), pc.invert(pc.is_in(keys, value_set=known)))
    rows = np.flatnonzero(is_new.to_numpy())
    codes = keys.filter(is_new).combine_chunks().dictionary_encode().indices.to_numpy()
    first = np.zeros(len(keys), bool)
    first[rows[np.unique(codes, return_index=True)[1]]] = True
    return first

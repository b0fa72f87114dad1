"""Stages that make one artifact for each record, and only those that the packs do not hold yet."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

from spctrl.store.digests import InputChangedError, digest, digests
from spctrl.store.pack_index import Location, results_table
from spctrl.store.runs import Run, struck_out
from tasks import settings
from tasks.execution.executor import run_jobs, warm_up
from tasks.execution.progress import progress
from tasks.stage.base import MANIFEST, REJECTS, StageTask

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from numpy.typing import NDArray

    from tasks.execution.ray_executor import Cluster
    from tasks.execution.worker import Batch, Source

SMALLEST_PACK, LARGEST_PACK, PACKS_PER_SPLIT = 256, 8192, 32
"""Records a pack: few packs for many records, and for few records enough of them to share out among workers."""
ROWS_AT_ONCE = 2**16
"""Of a run's manifest, as one group of its Parquet file."""
DECODED_AT_ONCE = 4096
"""Rows that are Python objects at one time."""
PLACE = ("pack", "offset", "size", "digest")
"""Columns that say where an artifact lies, in the order of ``Location``."""


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


class RecordStage(StageTask):
    """A stage that makes one artifact for each record of the index that it requires first.

    Its function is ``function(record, *source bytes, **arguments) -> bytes``.
    """

    suffix: ClassVar[str] = ".png"
    also_reaches: ClassVar[Sequence[str]] = ("spctrl.data.records:records_from_table",)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the function, which count in every record's key; by default all parameters."""
        return self.parameters()

    def prepare(self, rows: pa.RecordBatch) -> list[Prepared]:
        """What tells the inputs of each index row apart, and what the function reads of it."""
        raise NotImplementedError

    def records_run(self) -> Run | None:
        """The run whose manifest lists the records; it need not be there yet."""
        return cast("StageTask", self.requires()[0]).current_run()

    def salt(self) -> str:
        """What the keys of all records share."""
        return digest(json.dumps([self.made_from().code_version, self.arguments()], sort_keys=True))

    def work_through(self, batches: Iterator[Batch]) -> Iterator[dict[str, Location]]:
        """Results of batches, by key, in order of completion."""
        from tasks.execution.worker import make_pack

        executor = settings.executor()
        if executor.kind == "ray":
            from tasks.execution.ray_executor import run_batches

            return run_batches(make_pack, batches, self.cluster(), executor.workers)
        warm_up(executor.workers)
        return run_jobs(make_pack, batches, executor.workers)

    def cluster(self) -> Cluster:
        """Where Ray does the work, and what it needs there."""
        from tasks.execution.ray_executor import Cluster

        return Cluster(settings.executor().address, self.store, self.made_from().libraries)

    def batch(self, **work: Any) -> Batch:
        """What a worker is given: ``work`` holds its rows, keys and sources."""
        from tasks.execution.worker import Batch

        return Batch(
            function=self.function,
            parameters=self.arguments(),
            store=self.store,
            stage=self.stage,
            suffix=self.suffix,
            **work,
        )

    def records_per_pack(self, total: int) -> int:
        return min(max(total // PACKS_PER_SPLIT, SMALLEST_PACK), LARGEST_PACK)

    def make(self, run: Run) -> dict[str, int]:
        plan = _Plan(self)
        made = 0
        with progress(f"{self.stage} {self.part}", plan.total, self.set_progress_percentage) as advance:
            for locations in self.work_through(plan.batches(advance)):
                plan.add(locations)
                made += sum(location.code is None for location in locations.values())
                advance(len(locations))
        return {"records": plan.total, "made": made, **plan.write_results(run)}

    def missing_records(self) -> int | None:
        """How many artifacts a run would have to make; None before there is an index."""
        records_run = self.records_run()
        if records_run is None or not records_run.provenance() or self.ingredients() is None:
            return None
        return _Plan(self).count_missing()

    def packs_of(self, run: Run) -> Sequence[str]:
        from spctrl.io.parquet import read_table

        packs = read_table(run.path(MANIFEST), columns=["pack"]).column(0)
        return sorted(packs.unique().to_pylist())


class _Plan:
    """Which records are still to be worked on, and in the end what became of each.

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
        self._index: pq.ParquetFile = open_table(records_run.path(MANIFEST))
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
        continued, makes the packs of an undisturbed one. Scattered records are gathered.
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
        """Write the run's manifest and rejects; returns the numbers of their rows."""
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
            run.create(MANIFEST) as destination,
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


def artifact_schema() -> pa.Schema:
    """Columns of a record stage's manifest."""
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
    return ((row["image_id"], location_of(row)) for row in rows_in(run.path(MANIFEST)))


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
        path, columns = run.path(MANIFEST), ["image_id", *PLACE]
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

"""Stages that make one artifact for each record, and only those that the packs do not hold yet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

from tasks import settings
from tasks.base import MANIFEST, REJECTS, StageTask
from tasks.executor import run_jobs, warm_up
from tasks.progress import progress
from tasks.store import Location, Run, digest, parquet_bytes

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from spctrl.records import Record
    from tasks.ray_executor import Cluster
    from tasks.work import Batch, Source

SMALLEST_PACK, LARGEST_PACK, PACKS_PER_SPLIT = 256, 8192, 32
"""Records a pack: few packs for many records, and for few records enough of them to share out among workers."""


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


class RecordStage(StageTask):
    """A stage that makes one artifact for each record of the index that it requires first.

    Its function is ``function(record, *source bytes, **arguments) -> bytes``.
    """

    suffix: ClassVar[str] = ".png"
    also_reaches: ClassVar[Sequence[str]] = ("spctrl.records:records_from_table",)

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
        from tasks.work import make_pack

        executor = settings.executor()
        if executor.kind == "ray":
            from tasks.ray_executor import run_batches

            return run_batches(make_pack, batches, self.cluster(), executor.workers)
        warm_up(executor.workers)
        return run_jobs(make_pack, batches, executor.workers)

    def cluster(self) -> Cluster:
        """Where Ray does the work, and what it needs there."""
        from tasks.ray_executor import Cluster

        return Cluster(settings.executor().address, self.store, self.made_from().libraries)

    def batch(self, **work: Any) -> Batch:
        """What a worker is given: ``work`` holds its keys, records and sources."""
        from tasks.work import Batch

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
                plan.known |= locations
                made += sum(location.code is None for location in locations.values())
                advance(len(locations))
        rejected = plan.write_results(run)
        return {"records": plan.total, "made": made, "rejected": rejected}

    def missing_records(self) -> int | None:
        """How many artifacts a run would have to make; None before there is an index."""
        records_run = self.records_run()
        if records_run is None or not records_run.provenance() or self.ingredients() is None:
            return None
        return _Plan(self).count_missing()

    def packs_of(self, run: Run) -> Sequence[str]:
        import pyarrow.parquet as pq

        packs = pq.read_table(run.path(MANIFEST), columns=["pack"], partitioning=None).column(0)
        return sorted(packs.unique().to_pylist())


class _Plan:
    """Which records are still to be worked on, and in the end what became of each.

    Attributes:
        known: results by key, those of earlier builds at first.
        total: the number of records.
    """

    def __init__(self, task: RecordStage) -> None:
        import pyarrow.parquet as pq

        records_run = task.records_run()
        assert records_run is not None
        self._task = task
        self._index: pq.ParquetFile = pq.ParquetFile(records_run.path(MANIFEST))
        self._salt = task.salt()
        self._outcomes: list[tuple[str | None, Prepared]] = []
        self.known: dict[str, Location] = task.store.locations(task.stage)
        self.total: int = self._index.metadata.num_rows

    def count_missing(self) -> int:
        return len({key for _, missing in self._missing() for _, key, _ in missing})

    def batches(self, advance: Callable[[int], None]) -> Iterator[Batch]:
        """Records without a known result, in packs.

        A stretch of the index that is missing as a whole becomes one pack, so that an interrupted build,
        continued, makes the packs of an undisturbed one. Scattered records are gathered.
        """
        import pyarrow as pa

        from spctrl.records import records_from_table

        per_pack = self._task.records_per_pack(self.total)
        scattered: list[tuple[str, Record, tuple[Source, ...]]] = []
        for rows, missing in self._missing():
            advance(len(rows) - len(missing))
            if not missing:
                continue
            positions = pa.array([position for position, _, _ in missing])
            records = records_from_table(rows.take(positions))
            work = [(key, record, found) for (_, key, found), record in zip(missing, records, strict=True)]
            if len(work) == len(rows):
                yield self._batch(work)
            elif len(scattered) + len(work) > per_pack:
                yield self._batch(scattered)
                scattered = work
            else:
                scattered += work
        if scattered:
            yield self._batch(scattered)

    def write_results(self, run: Run) -> int:
        """Write the run's manifest and rejects; returns the number of rejects."""
        import pyarrow as pa

        from spctrl.records import rejects_table

        names = self._index.read(columns=["image_id", "file_name"]).to_pydict()
        rows: list[tuple[Any, ...]] = []
        rejects: list[dict[str, Any]] = []
        for (key, prepared), image_id, file_name in zip(
            self._outcomes, names["image_id"], names["file_name"], strict=True
        ):
            found = (
                self.known[key] if key else Location("", 0, 0, "", prepared.code or None, prepared.message)
            )
            if found.code:
                reject = {"image_id": image_id, "file_name": file_name, "key": key}
                rejects.append({**reject, "code": found.code, "message": found.message})
            elif key:
                rows.append((image_id, key, found.pack, found.offset, found.size, found.digest))
        schema = artifact_schema()
        columns = list(zip(*rows, strict=True)) or [()] * len(schema)
        run.write(MANIFEST, parquet_bytes(pa.table(columns, schema=schema)))
        run.write(REJECTS, parquet_bytes(rejects_table(rejects)))
        return len(rejects)

    def _missing(self) -> Iterator[tuple[pa.RecordBatch, list[tuple[int, str, tuple[Source, ...]]]]]:
        """Stretches of the index with the position, key and sources of each row whose result is not known."""
        planned: set[str] = set()
        self._outcomes = []
        for rows in self._index.iter_batches(self._task.records_per_pack(self.total)):
            missing: list[tuple[int, str, tuple[Source, ...]]] = []
            for position, prepared in enumerate(self._task.prepare(rows)):
                key = None if prepared.identity is None else digest(self._salt, prepared.identity)
                self._outcomes.append((key, prepared))
                if key is not None and key not in self.known and key not in planned:
                    planned.add(key)
                    missing.append((position, key, prepared.sources))
            yield rows, missing

    def _batch(self, work: list[tuple[str, Record, tuple[Source, ...]]]) -> Batch:
        keys, records, sources = zip(*work, strict=True)
        return self._task.batch(keys=keys, records=records, sources=sources)


def artifact_schema() -> pa.Schema:
    """Columns of a record stage's manifest."""
    import pyarrow as pa

    texts = {name: pa.string() for name in ("key", "pack", "digest")}
    numbers = {name: pa.int64() for name in ("image_id", "offset", "size")}
    order = ("image_id", "key", "pack", "offset", "size", "digest")
    return pa.schema([(name, {**texts, **numbers}[name]) for name in order])


def artifact_keys(run: Run) -> dict[int, tuple[str, Location]]:
    """Key and place of each artifact of a record stage's run, by image id."""
    import pyarrow.parquet as pq

    columns = pq.read_table(run.path(MANIFEST), partitioning=None).to_pydict()
    places = zip(*(columns[name] for name in ("pack", "offset", "size", "digest")), strict=True)
    return {
        image_id: (key, Location(*place))
        for image_id, key, place in zip(columns["image_id"], columns["key"], places, strict=True)
    }


def artifact_locations(run: Run) -> dict[int, Location]:
    """Place of each artifact of a record stage's run, by image id."""
    return {image_id: found for image_id, (_, found) in artifact_keys(run).items()}

"""Stages that make one artifact for each record, and only those that the packs do not hold yet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from spctrl.store.digests import digest
from spctrl.store.pack_index import Location
from spctrl.store.provenance import ARTIFACTS
from spctrl.store.runs import Run
from tasks import settings
from tasks.execution.executor import run_jobs, warm_up
from tasks.execution.progress import progress
from tasks.stage.base import StageTask
from tasks.stage.record_plan import Prepared, RecordPlan

if TYPE_CHECKING:
    import pyarrow as pa

    from tasks.execution.ray.cluster import Cluster
    from tasks.execution.worker import Batch

SMALLEST_PACK, LARGEST_PACK, PACKS_PER_SPLIT = 256, 8192, 32
"""Records a pack: few packs for many records, and for few records enough of them to share out among workers."""


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
        """The run whose table lists the records; it need not be there yet."""
        return cast("StageTask", self.requires()[0]).current_run()

    def salt(self) -> str:
        """What the keys of all records share."""
        return digest(json.dumps([self.made_from().code_version, self.arguments()], sort_keys=True))

    def work_through(self, batches: Iterator[Batch]) -> Iterator[dict[str, Location]]:
        """Results of batches, by key, in order of completion."""
        from tasks.execution.worker import make_pack

        executor = settings.executor()
        if executor.kind == "ray":
            from tasks.execution.ray.executor import run_batches

            return run_batches(make_pack, batches, self.cluster(), executor.workers)
        warm_up(executor.workers)
        return run_jobs(make_pack, batches, executor.workers)

    def cluster(self) -> Cluster:
        """Where Ray does the work, and what it needs there."""
        from tasks.execution.ray.cluster import Cluster

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
        plan = RecordPlan(self)
        made = 0
        with progress(f"{self.stage} {self.part}", plan.total, self.set_progress_percentage) as advance:
            for locations in self.work_through(plan.batches(advance)):
                plan.add(locations)
                made += sum(location.code is None for location in locations.values())
                advance(len(locations))
        return {"records": plan.total, "made": made, **plan.write_results(run)}

    def missing_records(self) -> int | None:
        """How many artifacts a run would have to make; None before the stages that it reads have run."""
        upstream = (task for task in self.requires() if isinstance(task, StageTask))
        if self.ingredients() is None or not all(task.is_made() for task in upstream):
            return None
        return RecordPlan(self).count_missing()

    def packs_of(self, run: Run) -> Sequence[str]:
        from spctrl.io.parquet import read_table

        packs = read_table(run.path(ARTIFACTS), columns=["pack"]).column(0)
        return sorted(packs.unique().to_pylist())

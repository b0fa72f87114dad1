"""The manifest stage: one row per image, of everything that the stages before it know and made."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import luigi

from spctrl.errors import ExpectedError
from spctrl.store.artifacts import InOrder, location_of
from spctrl.store.provenance import ARTIFACTS, MANIFEST, RECORDS, REJECTS
from spctrl.store.runs import Run, struck_out
from tasks import settings
from tasks.dataset.conditions import CONDITIONS, INSTANCES, Segments, condition_class
from tasks.dataset.images import Images
from tasks.dataset.index import DatasetStage
from tasks.execution.progress import progress
from tasks.parameters import NamesParameter
from tasks.stage.base import StageTask
from tasks.stage.rejects import reject_examples

if TYPE_CHECKING:
    import pyarrow as pa

    from spctrl.data.manifest import ImageFacts
    from spctrl.export.layout import Layout
    from spctrl.storage import StoreError


class Manifest(DatasetStage):
    """One row per image that every stage could use: labels, captions, paths and digests."""

    stage = "manifest"
    function = "spctrl.data.manifest:manifest_batch"
    also_reaches: ClassVar[Sequence[str]] = (
        "spctrl.export.layout:Layout",
        "spctrl.data.datasets:DATASETS",
    )

    images = luigi.ChoiceParameter(default="required", choices=["required", "optional"])
    conditions = NamesParameter(default=("spatext", "openpose"), choices=CONDITIONS)

    def requires(self) -> list[StageTask]:
        return [
            self.index_task(),
            self.clone(Images),
            *self.condition_tasks().values(),
        ]

    def condition_tasks(self) -> dict[str, StageTask]:
        return {name: self.clone(condition_class(name)) for name in self.conditions}

    @functools.cached_property
    def layout(self) -> Layout:
        from spctrl.export.layout import Layout

        return Layout(
            dataset=self.spec,
            split=self.split,
            split_id=settings.split_id(self.dataset),
            names=settings.export().names,
            openpose_style=settings.openpose().style,
        )

    def parameters(self) -> dict[str, Any]:
        return {
            "conditions": self.conditions,
            "images": self.images,
            "split_name": self.layout.split_name,
            "names": self.layout.names,
            "openpose_style": self.layout.openpose_style,
        }

    def make(self, run: Run) -> dict[str, int]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        from spctrl.data.manifest import ConditionFacts, count_instances, manifest_batch, manifest_schema
        from spctrl.data.records import REJECT_SCHEMA
        from spctrl.io.parquet import open_table

        tasks = self.condition_tasks()
        weights = {name: task.weights_note() for name, task in tasks.items()}
        artifacts = {name: InOrder(task.finished_run().path(ARTIFACTS)) for name, task in tasks.items()}
        probes = InOrder(self.clone(Images).finished_run().path(ARTIFACTS))
        segments = self._segments()
        index = open_table(self.index_task().finished_run().path(RECORDS))
        rejects = self._gather_rejects()
        rejected = set(rejects.column("image_id").to_pylist())
        rows = instances = images_on_disk = 0
        total = index.metadata.num_rows
        with (
            progress(f"{self.stage} {self.part}", total, self.set_progress_percentage) as advance,
            run.create(MANIFEST) as destination,
            pq.ParquetWriter(destination, manifest_schema(self.conditions), compression="zstd") as writer,
        ):
            for batch in index.iter_batches():
                ids = set(batch.column("image_id").to_pylist())
                made = {
                    name: {row["image_id"]: ConditionFacts(row["key"], row["digest"]) for row in each.of(ids)}
                    for name, each in artifacts.items()
                }
                for name, facts in made.items():
                    if absent := ids - rejected - facts.keys():
                        raise self._disagreement(f"expected {name} of image {min(absent)}, found none")
                images = {row["image_id"]: self._image_facts(row) for row in probes.of(ids)}
                masks: dict[int, list[dict[str, Any]]] = {}
                for row in segments.of(ids) if segments else ():
                    masks.setdefault(row.pop("image_id"), []).append(row)
                written = manifest_batch(batch, self.layout, images, made, rejected, weights, masks)
                writer.write_batch(written)
                rows, instances = rows + len(written), instances + count_instances(written)
                images_on_disk += len(images)
                advance(len(batch))
        readers = {**artifacts, Images.stage: probes, **({Segments.stage: segments} if segments else {})}
        if unread := [name for name, each in readers.items() if not each.is_at_end]:
            raise self._disagreement(
                f"expected its images and their order in {', '.join(unread)}, found others"
            )
        schema = pa.schema([pa.field("stage", pa.string()), *REJECT_SCHEMA])
        run.write_table(REJECTS, rejects.select(schema.names).cast(schema))
        if not rows:
            raise ExpectedError(
                f"{self.part}: expected at least one usable record, found none{reject_examples(run)}"
            )
        listed = self.index_task().finished_run().provenance()["counts"]["records"]
        return {
            "records": listed,
            "made": rows,
            "instances": instances,
            "images_on_disk": images_on_disk,
            "rejected": listed - rows,
        }

    def _disagreement(self, fault: str) -> StoreError:
        """Any run that the manifest is made from may be the one that is wrong."""
        return struck_out((task.finished_run() for task in self._stages_before()), fault)

    def _gather_rejects(self) -> pa.Table:
        """The rejects of all stages before this one, with the stage's name."""
        import pyarrow as pa

        from spctrl.io.parquet import read_table

        tables = []
        for task in self._stages_before():
            table = read_table(task.finished_run().path(REJECTS))
            tables.append(table.append_column("stage", pa.repeat(task.stage, len(table))))
        return pa.concat_tables(tables)

    def _stages_before(self) -> list[StageTask]:
        """Every stage that a record goes through before the manifest."""
        found: dict[str, StageTask] = {}
        waiting: list[luigi.Task] = list(self.requires())
        while waiting:
            task = waiting.pop(0)
            if isinstance(task, StageTask) and task.task_id not in found:
                found[task.task_id] = task
                waiting += task.requires()
        return list(found.values())

    def _segments(self) -> InOrder | None:
        """Masks of single instances, where a model made the masks."""
        if any(task.stage == Segments.stage for task in self._stages_before()):
            return InOrder(self.clone(Segments).finished_run().path(INSTANCES))
        return None

    def _image_facts(self, artifact: dict[str, Any]) -> ImageFacts:
        from spctrl.data.manifest import ImageFacts

        probe = json.loads(self.store.read(Images.stage, location_of(artifact)))
        return ImageFacts(probe["sha256"], probe["phash"], probe["orientation"])

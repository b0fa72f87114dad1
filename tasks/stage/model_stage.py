"""Record stages whose function loads a model, on one device for each process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from tasks import settings
from tasks.execution.devices import devices_of_workers
from tasks.execution.executor import run_jobs
from tasks.stage.record_stage import RecordStage

if TYPE_CHECKING:
    from spctrl.store.pack_index import Location
    from tasks.execution.worker import Batch, ModelBatch

RECORDS_PER_PACK = 64
"""What a killed build may lose: inference is dear, so its results are kept soon."""


class OnDevice(RecordStage):
    """A record stage whose function loads a model, which one process runs on the device.

    ``function(**model_parameters, **model_paths, device=...)`` gives an ``ImageModel``.
    """

    section: ClassVar[type[Any]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if settings.executor().device != "cpu":
            self.resources = {"gpu": 1}

    def model_parameters(self) -> dict[str, Any]:
        """What decides the model's output; hashable values."""
        raise NotImplementedError

    def model_paths(self) -> dict[str, Path]:
        """Where its weights are."""
        raise NotImplementedError

    def records_per_pack(self, total: int) -> int:
        return RECORDS_PER_PACK

    def work_through(self, batches: Iterator[Batch]) -> Iterator[dict[str, Location]]:
        from tasks.execution.worker import make_model_pack

        model_batches = cast("Iterator[ModelBatch]", batches)
        executor = settings.executor()
        if executor.kind == "ray":
            from tasks.execution.ray.executor import run_model_batches

            return run_model_batches(
                make_model_pack, model_batches, self.cluster(), executor.workers, executor.device
            )
        # A process for each device, which it has to itself, and which CUDA's faults cannot take the build along with.
        devices = devices_of_workers(executor.device)
        return run_jobs(
            make_model_pack,
            (replace(each, loading={**each.loading, "device": devices.device}) for each in model_batches),
            workers=len(devices.environments),
            start_method="spawn",
            environments=devices.environments,
        )

    def batch(self, **work: Any) -> Batch:
        from tasks.execution.worker import ModelBatch

        return ModelBatch(
            function=self.function,
            parameters=self.model_parameters(),
            loading=self.model_paths(),
            batch_size=self.section().batch_size,
            store=self.store,
            stage=self.stage,
            suffix=self.suffix,
            **work,
        )

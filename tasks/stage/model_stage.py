"""Stages that run an image model over the images: loaded once a process, in batches, keyed by its weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import luigi

from spctrl.store.digests import MISSING, digest
from spctrl.store.store import Store
from tasks import settings
from tasks.dataset.images import ImageFiles
from tasks.execution.devices import devices_of_workers
from tasks.execution.executor import run_jobs
from tasks.stage.base import OfSettings, digest_cache
from tasks.stage.record_stage import RecordStage

if TYPE_CHECKING:
    from spctrl.store.pack_index import Location
    from spctrl.weights import KnownWeights
    from tasks.execution.worker import Batch, ModelBatch

RECORDS_PER_PACK = 64
"""What a killed build may lose: inference is dear, so its results are kept soon."""


class Weights(OfSettings, luigi.ExternalTask):
    """A weight file or folder, which the user puts in place."""

    name = luigi.Parameter(description="entry of weights.yaml")
    path = luigi.Parameter()

    def output(self) -> luigi.LocalTarget:
        return luigi.LocalTarget(self.path)

    def complete(self) -> bool:
        from spctrl.weights import known_weights

        entry = known_weights()[self.name]
        if Path(self.path).exists():
            return self._is_genuine(entry)
        luigi.task.logger.error(
            "expected weights at %s, found none. They are %s, for %s: get %s from %s (licence: %s), put it there, or "
            "name another place in those settings",
            self.path, entry.what, entry.setting, Path(entry.file).name, entry.publisher, entry.licence,
        )  # fmt: skip
        return False

    def _is_genuine(self, entry: KnownWeights) -> bool:
        """Whether a file under its publisher's name is its publisher's; one under another name may be anything."""
        from spctrl.weights import are_random

        path = Path(self.path)
        if entry.sha256 is None or path.name != Path(entry.file).name or are_random(path):
            return True
        found = digest_cache(settings.store()).file_digest(path)
        if found.startswith(entry.sha256):
            return True
        luigi.task.logger.error(
            "expected a file whose SHA-256 begins with %s at %s (weights.yaml, %s), found %s. It may be cut "
            "short: get it again from %s. Weights of your own need another file name",
            entry.sha256, path, self.name, found, entry.publisher,
        )  # fmt: skip
        return False


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
            from tasks.execution.ray_executor import run_model_batches

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


class ModelStage(OnDevice, ImageFiles):
    """A stage that runs an image model over the images."""

    def weights_name(self) -> str:
        """Entry of weights.yaml."""
        raise NotImplementedError

    @functools.cached_property
    def weights_path(self) -> Path:
        return weights_at(self.section().weights or self.weights_name())

    @functools.cached_property
    def weights_digest(self) -> str:
        return weights_digest(self.store, self.weights_path)

    def requires(self) -> list[luigi.Task]:
        return [self.index_task(), Weights(name=self.weights_name(), path=str(self.weights_path))]

    def inputs(self) -> dict[str, str] | None:
        return None if self.weights_digest == MISSING else super().inputs()

    def weights_note(self) -> str | None:
        from spctrl.weights import are_random

        return "random" if are_random(self.weights_path) else self.weights_digest

    def model_parameters(self) -> dict[str, Any]:
        return {name: value for name, value in self.arguments().items() if name != "weights_digest"}

    def model_paths(self) -> dict[str, Path]:
        return {"weights": self.weights_path}


def weights_at(name: str) -> Path:
    """Where weights lie: an entry of weights.yaml, below ``[paths] weights``; or else the path itself."""
    from spctrl.weights import known_weights

    known = known_weights()
    return Path(settings.paths().weights) / known[name].file if name in known else Path(name)


def weights_digest(store: Store, path: Path) -> str:
    """Digest of weights' contents, wherever they lie; ``MISSING`` where there are none."""
    cache = digest_cache(store)
    if not path.is_dir():
        # The sizes of a model that is not one of the known ones.
        beside = path.with_name(f"{path.name}.json")
        if path.exists() and beside.exists():
            return digest(cache.file_digest(path), cache.file_digest(beside))
        return cache.file_digest(path)
    names = sorted(str(each.relative_to(path)) for each in path.rglob("*") if each.is_file())
    return cache.list_digest(str(path), names) or MISSING

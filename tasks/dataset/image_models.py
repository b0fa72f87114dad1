"""Stages that run an image model over the images: loaded once a process, in batches, keyed by its weights."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import luigi

from spctrl.store.digests import MISSING
from tasks.dataset.images import ImageFiles
from tasks.stage.model_stage import OnDevice
from tasks.stage.weights import Weights, weights_at, weights_digest


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

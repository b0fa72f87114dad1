"""The Luigi graph that a benchmark runs: index, map and render of every record of AP-10K's train and val, no more."""

from __future__ import annotations

import luigi

import pipelines  # noqa: F401 - sets up Luigi's command
from tasks.dataset.conditions import Openpose, Spatext
from tasks.stage.base import StageTask

SPLITS = ("train", "val")


class Drawings(luigi.WrapperTask):
    """Map and render of every record."""

    def requires(self) -> list[StageTask]:
        return [stage(dataset="ap10k", split=split) for split in SPLITS for stage in (Spatext, Openpose)]

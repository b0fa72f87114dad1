"""Images of poses, by one or more methods."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import luigi

from spctrl.output.terminal import say
from tasks.experiment.generate.images import GeneratedImages
from tasks.experiment.generate.samples import method_json
from tasks.parameters import PathParameter
from tasks.stage.rejects import MeetsBadRecords

if TYPE_CHECKING:
    from spctrl.inference.methods import Generation


class Generate(MeetsBadRecords, luigi.WrapperTask):
    """Images of the poses of a split by the methods of a file; only those that are not there yet are drawn.

    ``luigi --module pipelines Generate --config configs/generate/ap10k.yaml``
    """

    config = PathParameter(description="a file of configs/generate/")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.generation = _read(Path(self.config))

    def requires(self) -> list[GeneratedImages]:
        where = {"dataset": self.generation.dataset, "split": self.generation.split}
        return [
            self.clone(GeneratedImages, **where, method=method_json(method))
            for method in self.generation.methods
        ]

    def run(self) -> None:
        for task in self.requires():
            counts = task.finished_run().provenance()["counts"]
            say(f"{task.how.name}: {counts['made']:,} of {counts['records']:,} images in {task.folder}")


def _read(path: Path) -> Generation:
    from spctrl.configuration import read_config
    from spctrl.inference.methods import Generation

    return read_config(path, Generation)

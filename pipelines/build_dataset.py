"""The target that builds datasets. Only wiring: what a stage does is in ``tasks``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import luigi

from spctrl.errors import ExpectedError
from tasks import settings
from tasks.dataset.conditions import CONDITIONS
from tasks.dataset.export import FOLDERS, Export
from tasks.dataset.report import Report, print_summary
from tasks.parameters import NamesParameter
from tasks.stage.rejects import MeetsBadRecords


class BuildDataset(MeetsBadRecords, luigi.WrapperTask):
    """Raw annotations to triplet folders, Parquet manifests and a report; only what changed is done again.

    ``luigi --module pipelines BuildDataset``
    """

    dataset = NamesParameter(
        default=("ap10k", "humanart"),
        choices=("ap10k", "humanart"),
        config_path={"section": "build", "name": "datasets"},
        description="datasets to build",
    )
    split = NamesParameter(
        default=("train", "val"),
        choices=("train", "val", "test"),
        config_path={"section": "build", "name": "splits"},
        description="splits to build",
    )
    conditions = NamesParameter(
        default=("spatext", "openpose"),
        choices=CONDITIONS,
        config_path={"section": "build", "name": "conditions"},
        description="conditioning images to make",
    )
    images = luigi.ChoiceParameter(
        default="required",
        choices=["required", "optional"],
        config_path={"section": "build", "name": "images"},
        description="optional: records without an image file are built all the same",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not list(self.exports()):
            raise ExpectedError(
                f"expected a split that {' or '.join(self.dataset)} has, found {', '.join(self.split)}"
            )
        if FOLDERS in settings.export().format:
            settings.export_folder("[export] format = folders (webdataset and parquet do not)")

    def exports(self) -> Iterator[Export]:
        """One task for each split that a dataset has."""
        for dataset in self.dataset:
            for split in self.split:
                if split in settings.dataset_of(dataset).split_words:
                    yield self.clone(Export, dataset=dataset, split=split)

    def requires(self) -> list[luigi.Task]:
        return [*self.exports(), self.clone(Report)]

    def run(self) -> None:
        print_summary(self.exports())

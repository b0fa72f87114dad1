"""The stage of prompts: the one prompt of each image, for whatever is generated and compared."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import luigi

from spctrl.errors import ExpectedError
from spctrl.store.digests import digest_cache
from spctrl.store.provenance import RECORDS, REJECTS
from spctrl.store.runs import Run
from tasks.dataset.index import DatasetStage

if TYPE_CHECKING:
    from spctrl.prompts import KeypointWords

PROMPTS = "prompts.parquet"


class Prompts(DatasetStage):
    """The one prompt of each image, for whatever is generated and compared."""

    stage = "prompts"
    function = "spctrl.prompts:evaluation_prompt"
    also_reaches: ClassVar[Sequence[str]] = (
        "spctrl.prompts:load_templates",
        "spctrl.prompts:subjects_from_table",
    )

    keypoint_words = luigi.ChoiceParameter(
        default="", choices=["", "tokens", "names"], description="how prompts name the labelled keypoints"
    )
    templates = luigi.Parameter(
        default="", description="file of prompt templates; default: prompts/<dataset>.yaml"
    )

    def requires(self) -> list[luigi.Task]:
        return [self.index_task()]

    @functools.cached_property
    def templates_path(self) -> Path:
        from spctrl.prompts import templates_path

        return Path(self.templates or templates_path(self.dataset))

    def parameters(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "keypoint_words": self.keypoint_words}

    def inputs(self) -> dict[str, str] | None:
        found = super().inputs()
        return found and {
            **found,
            "templates": digest_cache(self.store).file_digest(self.templates_path),
        }

    def make(self, run: Run) -> dict[str, int]:
        import pyarrow as pa

        from spctrl.data.records import rejects_table
        from spctrl.io.parquet import read_table
        from spctrl.prompts import evaluation_prompt, load_templates, subjects_from_table

        words: KeypointWords | None = self.keypoint_words or None  # type: ignore[assignment]
        templates = load_templates(self.templates_path, self.dataset)
        table = read_table(self.index_task().finished_run().path(RECORDS))
        prompts: dict[int, str] = {}
        rejects: list[dict[str, object]] = []
        for subject in subjects_from_table(table):
            try:
                prompt = evaluation_prompt(subject, templates, self.dataset, keypoints=words)
            except ExpectedError as error:
                rejects.append({"image_id": subject.image_id, "code": "no_prompt", "message": str(error)})
                continue
            prompts[subject.image_id] = prompt.text
        schema = pa.schema([("image_id", pa.int64()), ("prompt", pa.string())])
        run.write_table(PROMPTS, pa.table([list(prompts), list(prompts.values())], schema=schema))
        run.write_table(REJECTS, rejects_table(rejects))
        return {"records": len(table), "made": len(prompts), "rejected": len(rejects)}


def prompts_of(run: Run) -> dict[int, str]:
    """Prompts of a run of ``Prompts``, by image id."""
    from spctrl.io.parquet import read_table

    columns = read_table(run.path(PROMPTS)).to_pydict()
    return dict(zip(columns["image_id"], columns["prompt"], strict=True))

"""The index stage: an annotation file's usable records, and the base of all stages that stand on it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import luigi

from spctrl.paths import listed_files, refuse_unsafe_paths
from spctrl.storage.files import file_digest, read_bounded
from spctrl.store.digests import MISSING, InputChangedError, digest_cache
from spctrl.store.provenance import RECORDS, REJECTS
from spctrl.store.runs import Run
from tasks import settings
from tasks.execution.executor import warm_up
from tasks.execution.progress import progress
from tasks.settings import OfSettings
from tasks.stage.base import StageTask
from tasks.stage.rejects import reject_examples

if TYPE_CHECKING:
    from spctrl.data.datasets import Dataset
    from spctrl.data.index import Index as WrittenIndex

IMAGE_PATHS = "images.txt"
"""Lists the images of the index, for stages that ask after their files without loading Parquet."""
MAX_PATHS_BYTES = 2**28
"""Of that list: paths of several million images."""


class AnnotationFile(OfSettings, luigi.ExternalTask):
    """A raw annotation file, which the user puts in place."""

    dataset = luigi.Parameter()
    split = luigi.Parameter()

    @property
    def path(self) -> Path:
        dataset = settings.dataset_of(self.dataset)
        variant = settings.dataset_variant(self.dataset)
        return settings.dataset_root(self.dataset) / dataset.annotation_path(self.split, variant)

    def output(self) -> luigi.LocalTarget:
        return luigi.LocalTarget(self.path)

    def complete(self) -> bool:
        if self.path.is_file():
            return True
        dataset = settings.dataset_of(self.dataset)
        luigi.task.logger.error(
            "%s: expected the annotation file %s, found none. Get the dataset from %s, or say where it is "
            "(--%s-root, or [%s] root in luigi.cfg)",
            dataset.title, self.path, dataset.source_url, self.dataset, self.dataset,
        )  # fmt: skip
        return False


class DatasetStage(StageTask):
    """A stage of one split of one dataset."""

    dataset = luigi.Parameter(description="ap10k or humanart")
    split = luigi.Parameter(description="train, val or test")

    @property
    def part(self) -> str:
        return f"{self.dataset}-{self.split}"

    @functools.cached_property
    def spec(self) -> Dataset:
        return settings.dataset_of(self.dataset)

    @functools.cached_property
    def root(self) -> Path:
        return settings.dataset_root(self.dataset)

    def image_files(self, file_names: Sequence[str]) -> list[Path]:
        """The image files of records, by ``file_name``.

        Raises:
            UnsafePathError: one of them leads out of the dataset, which the index stage lets no name do.
        """
        return listed_files(self.root, [self.spec.image_path(name) for name in file_names])

    def index_task(self) -> Index:
        return Index(**self.common_parameters())

    def common_parameters(self) -> dict[str, Any]:
        """What every stage of a split is given."""
        return {name: getattr(self, name) for name, _ in DatasetStage.get_params()}

    def image_paths(self) -> list[str] | None:
        """Paths of the index's images below the dataset's root; None before there is an index."""
        run = self.index_task().current_run()
        if run is None or not run.is_whole():
            return None
        paths = read_image_paths(run)
        refuse_unsafe_paths(self.root, paths, table=run.place(IMAGE_PATHS))
        return paths


class Index(DatasetStage):
    """Validated records of an annotation file (Parquet), and rejects with reasons."""

    stage = "index"
    function = "spctrl.data.index:write_index"
    also_reaches: ClassVar[Sequence[str]] = ("spctrl.data.datasets:DATASETS",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._adjustments: dict[str, int] = {}

    def requires(self) -> list[luigi.Task]:
        return [self._file()]

    def _file(self) -> AnnotationFile:
        return AnnotationFile(dataset=self.dataset, split=self.split)

    def parameters(self) -> dict[str, Any]:
        return {
            "dataset": self.dataset,
            "split": self.split,
            "max_pixels": settings.index().max_pixels,
            "keypoints": self.spec.skeleton.num_keypoints,
        }

    def inputs(self) -> dict[str, str] | None:
        found = digest_cache(self.store).file_digest(self._file().path)
        return None if found == MISSING else {"annotations": found}

    def make(self, run: Run) -> dict[str, int]:
        if settings.executor().kind == "local":
            warm_up(settings.executor().workers)
        path = self._file().path
        with progress(f"{self.stage} {self.part}", 1, self.set_progress_percentage) as advance:
            with run.create(RECORDS) as destination:
                index = self._write_index(run, path, destination)
            run.write_table(REJECTS, index.rejects)
            run.write(IMAGE_PATHS, "".join(f"{each}\n" for each in index.image_paths).encode())
            advance(1)
        if file_digest(path) != self.made_from().inputs["annotations"]:
            raise InputChangedError(f"{path} changed while it was being read; run again when it is at rest")
        self._adjustments = index.adjustments
        for sentence in adjustment_notes(self.part, index.adjustments):
            luigi.task.logger.warning("%s", sentence)
        annotated = index.images_in_file - index.adjustments.get("unannotated_images", 0)
        return {
            "records": annotated,
            "made": len(index.image_paths),
            "rejected": annotated - len(index.image_paths),
            "annotations": index.annotations_in_file,
            "unassigned": index.adjustments.get("unassigned", 0),
        }

    def _write_index(self, run: Run, path: Path, destination: Path) -> WrittenIndex:
        from spctrl.data.annotations.decode import AnnotationFileError
        from spctrl.data.index import write_index
        from spctrl.data.records import rejects_table

        try:
            return write_index(
                path, self.spec, self.split, destination, max_pixels=settings.index().max_pixels
            )
        except AnnotationFileError as error:
            if not error.rejects:
                raise
            run.write_table(REJECTS, rejects_table(error.rejects))
            raise AnnotationFileError(f"{error}{reject_examples(run)}", error.rejects) from None

    def notes(self) -> dict[str, Any]:
        return {"adjustments": self._adjustments}

    def reject_fault(self, counts: Mapping[str, int]) -> str | None:
        unassigned, annotations = counts.get("unassigned", 0), counts.get("annotations", 0)
        allowed = 0.0 if self.on_bad_record == "fail" else self.max_unassigned_share
        if unassigned > allowed * annotations:
            return (
                f"{unassigned:,} of {annotations:,} annotations belong to no image of the file, so that some image may "
                f"lack an instance; [build] max_unassigned_share = {self.max_unassigned_share:g}, on_bad_record = "
                f"{self.on_bad_record}"
            )
        return super().reject_fault(counts)


def read_image_paths(run: Run) -> list[str]:
    """What an index run says of its images' paths.

    Raises:
        FileTooLargeError: it is damaged.
    """
    path = run.path(IMAGE_PATHS)
    with path.open("rb") as file:
        return read_bounded(file, str(path), MAX_PATHS_BYTES).decode().split("\n")[:-1]


def adjustment_notes(part: str, adjustments: Mapping[str, int]) -> Iterator[str]:
    """Sentences on what was read in another way than an annotation file states it."""
    from spctrl.data.annotations.decode import ADJUSTMENTS

    for name, count in adjustments.items():
        if name in ADJUSTMENTS:  # another version may know others
            yield f"{part}: {ADJUSTMENTS[name].format(count)}"

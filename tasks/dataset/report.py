"""The report stage: the audit of everything built, as one HTML page."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

import luigi

from spctrl.paths import listed_files, refuse_unsafe_paths
from spctrl.store.artifacts import Artifacts
from spctrl.store.code_version import ROOT
from spctrl.store.digests import digest_cache
from spctrl.store.provenance import MANIFEST, REJECTS
from spctrl.store.runs import Run
from tasks import settings
from tasks.dataset.conditions import CONDITIONS
from tasks.dataset.export import LOCK, Export
from tasks.dataset.index import adjustment_notes
from tasks.dataset.manifest import Manifest
from tasks.dataset.views import RenderedView, ViewStage
from tasks.execution import logs
from tasks.execution.progress import progress
from tasks.parameters import NamesParameter
from tasks.settings import LEDGERS

if TYPE_CHECKING:
    from spctrl.audit import SplitTables

PAGE = "report.html"
MASKS_COMPARED = 200
"""At most about so many images of a split are compared with known masks."""
TEMPLATES = ("spctrl/templates/report.html.j2", "spctrl/templates/style.css.j2")


class Report(ViewStage):
    """Counts, visibility, sizes, rejects, leakage between splits and a gallery, over all datasets and splits."""

    stage = "report"
    function = "spctrl.report.page:render_report"
    reads_several_parts = True
    also_reaches: ClassVar[Sequence[str]] = ("spctrl.audit.counts:audit_split",)
    libraries: ClassVar[Sequence[str]] = ("jinja2", "opencv-python-headless")

    dataset = NamesParameter(choices=("ap10k", "humanart"))
    split = NamesParameter(choices=("train", "val", "test"))
    images = luigi.ChoiceParameter(default="required", choices=["required", "optional"])
    conditions = NamesParameter(default=("spatext", "openpose"), choices=CONDITIONS)

    @property
    def part(self) -> str:
        return "all"

    def requires(self) -> list[Manifest]:
        return [
            self.clone(Manifest, dataset=dataset, split=split)
            for dataset in self.dataset
            for split in self.split
            if split in settings.dataset_of(dataset).split_words
        ]

    @property
    def view_address(self) -> str:
        return settings.export_files().place(PAGE)

    def view_lock(self) -> AbstractContextManager[None]:
        return settings.export_files().exclusive(LOCK, "writing the report", logs.notify)

    @property
    def _view(self) -> RenderedView:
        return RenderedView(settings.export_files(), f"{LEDGERS}/report.json")

    def has_view(self, run: Run) -> bool:
        return self._view.is_of(run, digest_cache(self.store))

    def write_view(self, run: Run) -> None:
        self._view.write(run, {PAGE: self._page})

    def parameters(self) -> dict[str, Any]:
        """The page's templates count like code."""
        return {"templates": digest_cache(self.store).file_digests([str(ROOT / each) for each in TEMPLATES])}

    def make(self, run: Run) -> dict[str, int]:
        run.write(PAGE, self._page)
        return {"records": 1, "made": 1}

    @functools.cached_property
    def _page(self) -> bytes:
        from spctrl.audit import audit_split
        from spctrl.report import render_report

        tasks = self.requires()
        with progress(self.stage, len(tasks), self.set_progress_percentage) as advance:
            splits = []
            for task in tasks:
                splits.append(audit_split(split_tables(task)))
                advance(1)
            written_at = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
            kinds = (adjusted_notes, orientation_notes, weights_notes, truth_notes)
            notes = [note for task in tasks for notes_of in kinds for note in notes_of(task)]
            title = "Pose dataset report"
            return render_report(splits, title=title, generated_at=written_at, notes=notes).encode()


def adjusted_notes(task: Manifest) -> Iterator[str]:
    """What the index read in another way than the annotation file states it."""
    adjustments = task.index_task().finished_run().provenance().get("adjustments", {})
    return adjustment_notes(f"{task.spec.title} {task.split}", adjustments)


def weights_notes(task: Manifest) -> Iterator[str]:
    """What to say of conditions that a model made, above all of a model with random weights."""
    for name, condition in task.condition_tasks().items():
        if (weights := condition.weights_note()) is not None:
            yield f"{task.spec.title} {task.split}, {name}: weights: {weights}"


def truth_notes(task: Manifest) -> Iterator[str]:
    """How well masks agree with a folder of known ones ([mask] folder), where there is such a folder.

    Nothing is made from these files, so one that cannot be compared is left out, and said to be.
    """
    from spctrl.conditions.masks import mask_iou
    from spctrl.conditions.png_folder import PngFolder
    from spctrl.data.images import read_image_file
    from spctrl.data.records import RecordError
    from spctrl.io.parquet import read_table

    if "mask" not in task.conditions:
        return
    truth = settings.condition_folder(settings.mask, task.dataset)
    if not truth.is_dir():
        return
    known_masks = PngFolder(truth)
    columns = ["image_id", "file_name", "width", "height"]
    images = read_table(task.finished_run().path(MANIFEST), columns=columns)
    rows = images.to_pylist()[:: max(images.num_rows // MASKS_COMPARED, 1)]
    made = Artifacts(task.condition_tasks()["mask"].finished_run())
    ious, faults = [], []
    for row in rows:
        if (found := made.get(row["image_id"])) is None:  # an image that is not on disk
            continue
        stem = task.spec.artifact_stem(row["file_name"])
        refuse_unsafe_paths(truth, [stem])
        path = truth / known_masks.path_of(stem)
        try:
            known = read_image_file(path)  # first: most stores have no folder of known masks
            ious.append(mask_iou(task.store.read("mask", found), known, (row["width"], row["height"])))
        except FileNotFoundError:
            continue
        except RecordError as error:
            faults.append(f"{path}: {error.message}")
    about = f"{task.spec.title} {task.split}, masks by {settings.mask().backend}"
    if ious:
        mean = sum(ious) / len(ious)
        yield f"{about}: mean IoU {mean:.3f} against {truth} ({len(ious):,} images)"
    if faults:
        yield f"{about}: {len(faults):,} files of {truth} are left out of the mean IoU, such as {faults[0]}"


def orientation_notes(task: Manifest) -> Iterator[str]:
    """How many images have an EXIF orientation tag that other readers apply."""
    import pyarrow.compute as pc

    from spctrl.io.parquet import read_table

    table = read_table(task.finished_run().path(MANIFEST), columns=["image_orientation"])
    if count := pc.sum(pc.not_equal(table.column(0), 1)).as_py():
        images = "image has" if count == 1 else "images have"
        yield (
            f"{task.spec.title} {task.split}: {count:,} {images} an EXIF orientation tag; spctrl uses the stored "
            "pixels, as annotated, and exported copies have the tag set to 1"
        )


def split_tables(task: Manifest) -> SplitTables:
    """What the audit reads of one split."""
    from spctrl.audit import SplitTables
    from spctrl.data.images import read_image_file
    from spctrl.io.parquet import read_table

    run, store = task.finished_run(), task.store
    manifest = read_table(run.path(MANIFEST))
    ids = manifest.column("image_id").to_pylist()
    locations = {name: Artifacts(each.finished_run()) for name, each in task.condition_tasks().items()}
    image_paths = manifest.column("image_path").to_pylist()

    def read_image(row: int) -> bytes | None:
        if image_paths[row] is None:
            return None
        try:
            return read_image_file(*listed_files(task.root, [image_paths[row]]))
        except FileNotFoundError:
            return None  # gone since the build looked: the page says that there is no image

    def read_condition(row: int, condition: str) -> bytes | None:
        found = locations[condition].get(ids[row])
        return None if found is None else store.read(condition, found)

    return SplitTables(
        dataset=task.dataset,
        title=task.spec.title,
        split=task.split,
        manifest=manifest,
        rejects=read_table(run.path(REJECTS)),
        conditions=tuple(name for name in task.conditions if name != "latents"),  # nothing to look at
        read_image=read_image,
        read_condition=read_condition,
    )


def print_summary(exports: Iterable[Export]) -> None:
    """A table of what is there now, and where to look; the same as log lines, where they are for machines."""
    tasks = list(exports)
    if logs.are_json():
        for task in tasks:
            counts = task.clone(Manifest).finished_run().provenance()["counts"]
            logs.event("built", dataset=task.dataset, split=task.split, folder=task.place.root, **counts)
        return
    from spctrl.output.console import FoldedTable, PlainConsole

    table = FoldedTable(title="Built", title_justify="left")
    for column in ("dataset", "split"):
        table.add_column(column)
    for column in ("images", "instances", "on disk", "rejected"):
        table.add_column(column, justify="right")
    for task in tasks:
        counts = task.clone(Manifest).finished_run().provenance()["counts"]
        numbers = (counts["made"], counts["instances"], counts["images_on_disk"], counts["rejected"])
        table.add_row(task.spec.title, task.split, *(f"{number:,}" for number in numbers))
    console = PlainConsole(stderr=True)
    console.print(table)
    for place in (*dict.fromkeys(task.place.root for task in tasks), settings.export_files().place(PAGE)):
        console.say(place)

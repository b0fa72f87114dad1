"""The stage of generated images: the folder that shows the samples of a method."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import luigi

from spctrl.errors import ExpectedError
from spctrl.paths import listed_files
from spctrl.storage import Files
from spctrl.store.artifacts import Artifacts
from spctrl.store.digests import MISSING, InputChangedError, content_digest, digest_cache
from spctrl.store.provenance import RECORDS, REJECTS
from spctrl.store.runs import Run
from tasks import settings
from tasks.dataset.export import LOCK
from tasks.dataset.export_state import UNFINISHED, Entry, Ledger, fingerprint_at
from tasks.dataset.views import ViewStage
from tasks.execution import logs
from tasks.execution.progress import progress
from tasks.experiment.generate.prompts import prompts_of
from tasks.experiment.generate.samples import MethodStage, Samples
from tasks.settings import LEDGERS
from tasks.stage.rejects import reject_examples

IMAGES = "images.parquet"
DISPLAY_EVERY = 16


class GeneratedImages(ViewStage, MethodStage):
    """A method's images of a split, as a folder: ``<image name>/<i>.jpg``, with prompts and seeds in images.parquet.

    The run's own ``images.parquet`` lists the images (``spctrl.inference.folders.GENERATED_SCHEMA``); their paths are
    relative to ``folder``, which is the view. That of an external method is the user's and only read: its images count
    by their paths in it and their contents, wherever it lies.
    """

    stage = "generate"
    function = "spctrl.inference.folders:generated_table"
    also_reaches: ClassVar[Sequence[str]] = (
        "spctrl.inference.folders:generated_path",
        "spctrl.inference.folders:find_images",
        "spctrl.inference.methods:image_seed",
        "spctrl.data.datasets:DATASETS",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Splits share the folder of a method, so Luigi's workers take turns at it.
        self.resources = {f"generated {self.how.name}": 1}

    @property
    def is_external(self) -> bool:
        return self.how.kind == "external"

    def samples_tasks(self) -> list[Samples]:
        """One task for each image of a pose."""
        count = 0 if self.is_external else self.how.images_per_pose
        return [self.clone(Samples, index=index) for index in range(count)]

    def requires(self) -> list[luigi.Task]:
        return [self.index_task(), self.prompts_task(), *self.samples_tasks()]

    @property
    def folder(self) -> Path:
        """The folder of the images."""
        return Path(self.how.folder) if self.is_external else self._view / self._split_folder

    @property
    def _view(self) -> Path:
        """What all splits of a method share, beside the triplet folders."""
        return settings.export_folder("Generate") / f"generated-{self.how.name}"

    @property
    def _place(self) -> Files:
        return settings.export_files(f"generated-{self.how.name}")

    @property
    def _split_folder(self) -> str:
        return f"{self.dataset}-{self.split}"

    @property
    def _ledger_name(self) -> str:
        return f"{LEDGERS}/{self._split_folder}.json"

    def parameters(self) -> dict[str, Any]:
        return {"images_per_pose": self.how.images_per_pose, "seed": self.how.seed}

    def inputs(self) -> dict[str, str] | None:
        found = {}
        for name, task in (
            ("index", self.index_task()),
            ("prompts", self.prompts_task()),
            *((f"samples-{task.index}", task) for task in self.samples_tasks()),
        ):
            if (ingredients := task.ingredients()) is None:
                return None
            found[name] = ingredients.fingerprint
        if self.is_external:
            if not self.folder.is_dir():
                return None
            found["files"] = self._external_digest()
        return found

    def _external_digest(self) -> str:
        from spctrl.inference.folders import list_images

        return digest_cache(self.store).list_digest(str(self.folder), list_images(self.folder)) or MISSING

    def fill_cache(self) -> None:
        if self.is_external and not self.folder.is_dir():
            raise ExpectedError(
                f"{self.how.name}: expected a folder of images at {self.folder}, found none. Say where it is in "
                "the method's `folder`"
            )

    @property
    def view_address(self) -> str:
        return str(self.folder)

    def view_lock(self) -> AbstractContextManager[None]:
        if self.is_external:
            return nullcontext()
        return self._place.exclusive(LOCK, f"writing to {self.folder}", logs.notify)

    def has_view(self, run: Run) -> bool:
        return self.is_external or (
            fingerprint_at(self._place, self._ledger_name) == run.fingerprint and self._view_is_whole(run)
        )

    def _view_is_whole(self, run: Run) -> bool:
        """Whether the folder holds the images of a run, whatever became of it since: they are measured there."""
        listed = self._listed(run)
        return self._digests_at([row["path"] for row in listed]) == [row["digest"] for row in listed]

    def _digests_at(self, paths: Sequence[str]) -> list[str]:
        """Of images below the folder, as they are now."""
        return digest_cache(self.store).file_digests(list(map(str, self.files(paths))))

    def files(self, paths: Sequence[str]) -> list[Path]:
        """Image files by their paths below the folder.

        Raises:
            UnsafePathError: one of them leads out of it.
        """
        return listed_files(self.folder, paths, follow_links=self.is_external)

    def weights_note(self) -> str | None:
        return next((task.weights_note() for task in self.samples_tasks()), None)

    def make(self, run: Run) -> dict[str, int]:
        from spctrl.data.records import rejects_table
        from spctrl.inference.folders import generated_table

        rejects: list[dict[str, object]] = []
        rows = self._external_rows(rejects) if self.is_external else self._rows()
        if not self._poses():
            raise ExpectedError(
                f"{self.part}: expected poses with a prompt, found none"
                f"{reject_examples(self.prompts_task().finished_run())}"
            )
        if not rows:
            example = "".join(f", such as {pose['image_name']}/0.jpg" for pose in self._poses()[:1])
            raise ExpectedError(
                f"{self.part}: expected images in {self.folder}{example}, found none that fit a pose"
            )
        run.write_table(IMAGES, generated_table(rows))
        run.write_table(REJECTS, rejects_table(rejects))
        return {"records": len(rows) + len(rejects), "made": len(rows), "rejected": len(rejects)}

    def _image_names(self) -> dict[int, str]:
        """Image names of all records of the index, by image id."""
        from spctrl.io.parquet import read_table

        columns = ["image_id", "file_name"]
        index = read_table(self.index_task().finished_run().path(RECORDS), columns=columns)
        return {row["image_id"]: self.spec.artifact_stem(row["file_name"]) for row in index.to_pylist()}

    def _poses(self) -> list[dict[str, Any]]:
        """``image_id``, ``image_name`` and ``prompt`` of each record of the index that has a prompt."""
        prompts = prompts_of(self.prompts_task().finished_run())
        return [
            {"image_id": image_id, "image_name": name, "prompt": prompts[image_id]}
            for image_id, name in self._image_names().items()
            if image_id in prompts
        ]

    @functools.cached_property
    def _locations(self) -> list[Artifacts]:
        return [Artifacts(task.finished_run()) for task in self.samples_tasks()]

    def _rows(self) -> list[dict[str, Any]]:
        from spctrl.inference.folders import generated_path
        from spctrl.inference.methods import image_seed

        weights = self.weights_note()
        return [
            {
                **pose,
                "index": index,
                "seed": image_seed(self.how.seed, pose["image_id"], index),
                "path": generated_path(pose["image_name"], index),
                "digest": found[pose["image_id"]].digest,
                "weights": weights,
            }
            for pose in self._poses()
            for index, found in enumerate(self._locations)
            if pose["image_id"] in found
        ]

    def _external_rows(self, rejects: list[dict[str, object]]) -> list[dict[str, Any]]:
        from spctrl.inference.folders import find_images

        poses = self._poses()
        try:
            found = find_images(
                self.folder,
                [pose["image_name"] for pose in poses],
                self.how.images_per_pose,
                split_names=self._image_names().values(),
            )
        except ExpectedError as error:
            raise ExpectedError(f"{self.part}: {error}") from error
        rows: list[dict[str, Any]] = []
        for pose in poses:
            for index, path in enumerate(found[pose["image_name"]]):
                if path is None:
                    message = f"expected image {index} of {pose['image_name']}, found none"
                    rejects.append(
                        {"image_id": pose["image_id"], "code": "missing_image", "message": message}
                    )
                else:
                    rows.append({**pose, "index": index, "path": path})
        digests = self._digests_at([row["path"] for row in rows])
        if (
            self._external_digest() != self.made_from().inputs["files"]
        ):  # others would take the run for theirs
            raise InputChangedError(f"{self.folder} was modified during the build; rerun once it is stable")
        return [{**row, "digest": found} for row, found in zip(rows, digests, strict=True)]

    def can_be_shown(self, run: Run) -> bool:
        """Whether the packs hold the listed images: those that were generated again may differ on a GPU."""
        return self.is_external or all(
            row["index"] in range(len(self._locations))
            and (found := self._locations[row["index"]].get(row["image_id"]))
            and found.digest == row["digest"]
            for row in self._listed(run)
        )

    def _listed(self, run: Run) -> list[dict[str, Any]]:
        """What a run lists of each image."""
        from spctrl.io.parquet import read_table

        columns = ["image_id", "index", "path", "digest"]
        rows: list[dict[str, Any]] = read_table(run.path(IMAGES), columns=columns).to_pylist()
        return rows

    def write_view(self, run: Run) -> None:
        """Write what changed, and remove what is no longer there."""
        if self.is_external:
            return
        rows, table, fingerprint = self._listed(run), run.path(IMAGES).read_bytes(), run.fingerprint
        old = Ledger.read(self._place, self._ledger_name)
        wanted = {f"{self._split_folder}/{row['path']}": row for row in rows}
        there = self._digests_at([row["path"] for row in rows])
        changed = {
            path: row
            for (path, row), found in zip(wanted.items(), there, strict=True)
            if found != row["digest"]
        }
        listing = f"{self._split_folder}/{IMAGES}"
        # A killed run must not pass for a finished one, and whatever it wrote must be known.
        files = old.files | dict.fromkeys([*changed, listing], UNFINISHED)
        ledger = Ledger(self._place, self._ledger_name, "", files)
        ledger.write()
        with progress(f"{self.stage} {self.part}", len(changed), self.set_progress_percentage) as advance:
            for count, (path, row) in enumerate(changed.items(), 1):
                found = self._locations[row["index"]].listed(row["image_id"], run)
                data = self.store.read(Samples.stage, found)
                self._place.write(path, data)
                if count % DISPLAY_EVERY == 0:
                    advance(DISPLAY_EVERY)
        self._place.write(listing, table)
        ledger.files |= {path: Entry(row["digest"], row["digest"]) for path, row in wanted.items()}
        ledger.files[listing] = Entry(fingerprint, content_digest(table))
        stale = ledger.files.keys() - wanted.keys() - {listing}
        self._place.remove(stale)
        for path in stale:
            del ledger.files[path]
        ledger.fingerprint = fingerprint
        ledger.write()

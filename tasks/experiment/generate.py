"""The stages that make images of poses: prompts, one image of each pose, and the folder that shows them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import luigi

from spctrl.errors import ExpectedError
from spctrl.paths import listed_files
from spctrl.storage import Files
from spctrl.store.digests import MISSING, InputChangedError, content_digest, digest
from spctrl.store.runs import Run
from tasks import settings
from tasks.dataset.conditions import FromArtifacts, condition_class
from tasks.dataset.export import LOCK, UNFINISHED, Entry, Ledger, fingerprint_at
from tasks.dataset.index import DatasetStage
from tasks.dataset.views import ViewStage
from tasks.execution import logs
from tasks.execution.progress import progress
from tasks.settings import LEDGERS
from tasks.stage.base import MANIFEST, REJECTS, StageTask, digest_cache, reject_examples
from tasks.stage.model_stage import OnDevice, Weights, weights_at, weights_digest
from tasks.stage.record_stage import NOTHING, Artifacts, Prepared

if TYPE_CHECKING:
    import pyarrow as pa

    from spctrl.inference.methods import Method
    from spctrl.prompts import KeypointWords

IMAGES, PROMPTS = "images.parquet", "prompts.parquet"
IMAGES_PER_PACK = 8
"""What a killed run may lose: an image takes seconds on a GPU and minutes on a processor."""
DISPLAY_EVERY = 16


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
        table = read_table(self.index_task().finished_run().path(MANIFEST))
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


class MethodStage(DatasetStage):
    """A stage of one method on one split."""

    method = luigi.Parameter(description="a Method of spctrl.inference.methods, as JSON (method_json)")

    @functools.cached_property
    def how(self) -> Method:
        import msgspec

        from spctrl.inference.methods import Method

        return msgspec.json.decode(self.method, type=Method)

    @property
    def part(self) -> str:
        return f"{super().part}-{self.how.name}"

    def prompts_task(self) -> Prompts:
        task: Prompts = self.clone(
            Prompts, keypoint_words=self.how.keypoint_words or "", templates=self.how.templates
        )
        return task


def method_json(method: Method) -> str:
    """A method as the parameter ``method`` of the tasks here; equal methods give equal texts."""
    import msgspec

    return msgspec.json.encode(method).decode()


class Samples(MethodStage, OnDevice, FromArtifacts):
    """One image of each pose, kept under its condition, prompt, seed, sampler and weights: none is made twice."""

    stage = "samples"
    function = "spctrl.inference.generator:load_generator"
    libraries = ("diffusers",)
    packages = ("torch", "transformers", "safetensors")
    section = settings.generate
    suffix = ".jpg"

    index = luigi.IntParameter(description="which of a pose's images")

    def sources(self) -> list[StageTask]:
        return [self.clone(condition_class(str(self.how.condition)))]

    def train_task(self) -> StageTask | None:
        """The training that makes the checkpoint, where it is not a folder."""
        if not self.how.train:
            return None
        from tasks.experiment.train import Train

        return Train(config=self.how.train)

    def requires(self) -> list[luigi.Task]:
        base = Weights(name="stable_diffusion", path=str(self.stable_diffusion))
        return [*super().requires(), self.prompts_task(), base, self.train_task() or self._given_checkpoint()]

    def _given_checkpoint(self) -> Weights:
        from spctrl.weights import known_weights

        name = f"spctrl_{self.dataset}" if self.how.kind == "spctrl" else self.how.kind
        if self.how.checkpoint in known_weights():
            name = self.how.checkpoint
        return Weights(name=name, path=str(weights_at(self.how.checkpoint)))

    @functools.cached_property
    def stable_diffusion(self) -> Path:
        return weights_at(self.how.stable_diffusion)

    @property
    def checkpoint(self) -> Path:
        """Folder of the checkpoint; of one to be trained, once it is."""
        train = self.train_task()
        return train.finished_run().folder if train else weights_at(self.how.checkpoint)

    def _checkpoint_digest(self) -> str:
        """Digest of what is used of the checkpoint."""
        from spctrl.inference.checkpoints import learned_embeds_file, network_folder

        network = weights_digest(self.store, network_folder(self.checkpoint))
        if network == MISSING:
            return MISSING
        tokens = learned_embeds_file(self.checkpoint)
        return digest(network, digest_cache(self.store).file_digest(tokens) if tokens else "")

    @functools.cached_property
    def _stable_diffusion_digest(self) -> str:
        from spctrl.models.stable_diffusion import PARTS

        parts = [weights_digest(self.store, self.stable_diffusion / part) for part in PARTS]
        return MISSING if MISSING in parts else digest(*parts)

    def parameters(self) -> dict[str, Any]:
        from spctrl.inference.methods import sampler_parameters

        return {
            "kind": self.how.kind,
            "condition": self.how.condition,
            "seed": self.how.seed,
            "index": self.index,
            "sampler": sampler_parameters(self.how.sampler),
        }

    def inputs(self) -> dict[str, str] | None:
        found = super().inputs()
        digests = {"stable_diffusion": self._stable_diffusion_digest}
        if not self.how.train:
            digests["checkpoint"] = self._checkpoint_digest()
        return None if found is None or MISSING in digests.values() else {**found, **digests}

    def arguments(self) -> dict[str, Any]:
        parameters = {name: self.parameters()[name] for name in ("kind", "sampler")}
        return {
            **parameters,
            "stable_diffusion": self._stable_diffusion_digest,
            "checkpoint": self._checkpoint_digest(),
        }

    def missing_records(self) -> int | None:
        train = self.train_task()
        return None if train and not train.complete() else super().missing_records()

    def model_parameters(self) -> dict[str, Any]:
        return {"kind": self.how.kind, "sampler": self.how.sampler}

    def model_paths(self) -> dict[str, Path]:
        return {"stable_diffusion": self.stable_diffusion, "checkpoint": self.checkpoint}

    def records_per_pack(self, total: int) -> int:
        return settings.generate().batch_size or IMAGES_PER_PACK

    def weights_note(self) -> str | None:
        from spctrl.inference.checkpoints import network_folder
        from spctrl.weights import are_random

        train = self.train_task()
        is_random = (
            are_random(self.stable_diffusion)
            or are_random(network_folder(self.checkpoint))
            or (train is not None and train.finished_run().provenance().get("weights") == "random")
            or super().weights_note() == "random"
        )
        return "random" if is_random else self._checkpoint_digest()

    @functools.cached_property
    def _prompts(self) -> dict[int, str]:
        return prompts_of(self.prompts_task().finished_run())

    def prepare(self, rows: pa.RecordBatch) -> list[Prepared]:
        from spctrl.inference.generator import request_bytes
        from spctrl.inference.methods import image_seed
        from tasks.execution.worker import TextSource

        prepared = []
        for each, image_id in zip(super().prepare(rows), rows.column("image_id").to_pylist(), strict=True):
            if each.identity is None or image_id not in self._prompts:
                prepared.append(NOTHING)  # the stage that could not make what is missing has said why
                continue
            seed = image_seed(self.how.seed, image_id, self.index)
            request = request_bytes(self._prompts[image_id], seed).decode()
            prepared.append(Prepared(f"{each.identity} {request}", (*each.sources, TextSource(request))))
        return prepared


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
        index = read_table(self.index_task().finished_run().path(MANIFEST), columns=columns)
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

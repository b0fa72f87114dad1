"""The stages of a dataset's split: index, images, conditions, manifest."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import luigi

from tasks import settings
from tasks.base import MANIFEST, REJECTS, RecordStage, StageTask, digest_cache
from tasks.executor import warm_up
from tasks.inputs import MISSING
from tasks.names import NamesParameter
from tasks.progress import progress
from tasks.store import Location, Run, parquet_bytes

if TYPE_CHECKING:
    import pyarrow as pa

    from spctrl.datasets import Dataset
    from spctrl.layout import Layout
    from tasks.work import Source

IMAGE_PATHS = "images.txt"
READ_AT_ONCE_BYTES = 64 * 2**20
"""How much may be read just to see whether anything changed; more is read when the stage runs, with progress."""
HASHED_BETWEEN_LINES = 512

Prepared = list[tuple[str, tuple["Source", ...]] | tuple[None, tuple[str, str]]]
NOTHING = (None, ("", ""))


class AnnotationFile(luigi.ExternalTask):
    """A raw annotation file, which the user puts in place."""

    dataset: str = luigi.Parameter()
    split: str = luigi.Parameter()

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
    """What all stages of a dataset's split know."""

    @functools.cached_property
    def spec(self) -> Dataset:
        return settings.dataset_of(self.dataset)

    @functools.cached_property
    def root(self) -> Path:
        return settings.dataset_root(self.dataset)

    def index_task(self) -> Index:
        return self.clone(Index)

    def image_paths(self) -> list[str] | None:
        """Paths of the index's images below the dataset's root; None before there is an index."""
        run = self.index_task().current_run()
        if run is None or not run.provenance():
            return None
        return run.path(IMAGE_PATHS).read_text().split("\n")[:-1]


class Index(DatasetStage):
    """Validated records of an annotation file (Parquet), and rejects with reasons."""

    stage = "index"
    function = "spctrl.index:write_index"
    also_reaches = ("spctrl.datasets:DATASETS",)

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
        found = digest_cache(self.store.root).file_digest(self._file().path)
        return None if found == MISSING else {"annotations": found}

    def make(self, run: Run) -> dict[str, int]:
        warm_up(settings.executor().workers)
        from spctrl.index import write_index

        path = self._file().path
        with progress(f"{self.stage} {self.part}", 1, self.set_progress_percentage) as advance:
            with run.create(MANIFEST) as destination:
                index = write_index(path, self.spec, self.split, destination, max_pixels=settings.index().max_pixels)
            run.write(REJECTS, parquet_bytes(index.rejects))
            run.write(IMAGE_PATHS, "".join(f"{each}\n" for each in index.image_paths).encode())
            advance(1)
        if self.inputs() != self.ingredients().inputs:
            raise RuntimeError(f"{path} changed while it was being read; run again when it is at rest")
        rejected = index.images_in_file - len(index.image_paths)
        orphans = index.rejects.column("image_id").null_count + index.rejects.column("file_name").null_count
        return {"records": index.images_in_file, "made": len(index.image_paths), "rejected": max(rejected, min(orphans, 1))}


class FileStage(DatasetStage, RecordStage):
    """A record stage that reads one file for each record, below one folder."""

    @property
    def folder(self) -> str:
        """The folder that holds the files."""
        raise NotImplementedError

    def file_paths(self, image_paths: Sequence[str]) -> list[str]:
        """For each image's path below the dataset's root the path of its file below ``folder``."""
        raise NotImplementedError

    def missing(self, path: str) -> tuple[None, tuple[str, str]]:
        """What becomes of a record whose file is not there."""
        return None, ("missing_file", f"expected a file {path}, found none")

    def requires(self) -> list[luigi.Task]:
        return [self.index_task()]

    def inputs(self) -> dict[str, str] | None:
        upstream, names = super().inputs(), self.image_paths()
        if upstream is None or names is None:
            return None
        cache = digest_cache(self.store.root)
        found = cache.list_digest(self.folder, self.file_paths(names), max_read_bytes=READ_AT_ONCE_BYTES)
        return None if found is None else {**upstream, "files": found}

    def fill_cache(self) -> None:
        if self.ingredients() is not None:
            return
        paths = [f"{self.folder}/{path}" for path in self.file_paths(self.image_paths() or [])]
        with progress(f"{self.stage} {self.part}: digests", len(paths), self.set_progress_percentage) as advance:
            for start in range(0, len(paths), HASHED_BETWEEN_LINES):
                some = paths[start : start + HASHED_BETWEEN_LINES]
                digest_cache(self.store.root).file_digests(some)
                advance(len(some))

    def prepare(self, rows: pa.RecordBatch) -> Prepared:
        from spctrl.images import outside_folder
        from tasks.work import FileSource

        image_paths = [self.spec.image_path(name) for name in rows.column("file_name").to_pylist()]
        paths = [f"{self.folder}/{path}" for path in self.file_paths(image_paths)]
        digests = digest_cache(self.store.root).file_digests(paths)
        prepared: Prepared = []
        for path, found, outside, width, height in zip(
            paths,
            digests,
            outside_folder(paths, self.folder),
            rows.column("width").to_pylist(),
            rows.column("height").to_pylist(),
            strict=True,
        ):
            if found == MISSING:
                prepared.append(self.missing(path))
            elif outside:
                prepared.append((None, ("outside_dataset", f"{path} is a link that leads out of {self.folder}")))
            else:
                prepared.append((f"{found} {width} {height}", (FileSource(path, found),)))
        return prepared


class Images(FileStage):
    """Every image on disk: whether it can be decoded, has the annotated size, and its perceptual hash."""

    stage = "images"
    function = "spctrl.images:probe_image"
    libraries = ("pillow",)
    suffix = ".json"

    images: str = luigi.ChoiceParameter(default="required", choices=["required", "optional"])

    def parameters(self) -> dict[str, Any]:
        return {"images": self.images}

    def arguments(self) -> dict[str, Any]:
        return {}

    @functools.cached_property
    def folder(self) -> str:
        return str(self.root / self.spec.image_folder)

    def file_paths(self, image_paths: Sequence[str]) -> list[str]:
        return [path.removeprefix(f"{self.spec.image_folder}/") for path in image_paths]

    def missing(self, path: str) -> tuple[None, tuple[str, str]]:
        if self.images == "optional":
            return NOTHING
        return None, ("missing_image", f"expected an image {path}, found none; --images optional builds without images")


class Spatext(DatasetStage, RecordStage):
    """Spatial-text index maps."""

    stage = "spatext"
    function = "spctrl.rendering.spatext:render_spatext"
    libraries = ("opencv-python-headless",)

    def requires(self) -> list[luigi.Task]:
        return [self.index_task()]

    def parameters(self) -> dict[str, Any]:
        section = settings.spatext()
        return {
            "links": self.spec.skeleton.links,
            "keypoint_radius_px": section.keypoint_radius_px,
            "link_half_width_px": section.link_half_width_px,
        }

    def prepare(self, rows: pa.RecordBatch) -> Prepared:
        return [(drawing, ()) for drawing in rows.column("drawing_digest").to_pylist()]


class Openpose(Spatext):
    """Colour renders of the skeletons."""

    stage = "openpose"
    function = "spctrl.rendering.openpose:render_openpose"

    def parameters(self) -> dict[str, Any]:
        section = settings.openpose()
        return {
            "style": section.style,
            "keypoint_names": self.spec.skeleton.keypoint_names,
            "links": self.spec.skeleton.links,
            "keypoint_radius_px": section.keypoint_radius_px,
            "link_half_width_px": section.link_half_width_px,
        }


class Precomputed(FileStage):
    """A folder of condition images that the user already has, laid out like the images."""

    libraries = ("opencv-python-headless",)
    section: ClassVar[type[settings.mask | settings.depth]]

    @functools.cached_property
    def folder(self) -> str:
        return str(self.section().folder.format(root=self.root, dataset=self.dataset))

    def file_paths(self, image_paths: Sequence[str]) -> list[str]:
        return [f"{self.spec.artifact_stem(path)}.png" for path in image_paths]


class Mask(Precomputed):
    """Foreground masks."""

    stage = "mask"
    function = "spctrl.conditions:check_mask"
    section = settings.mask


class Depth(Precomputed):
    """Depth maps."""

    stage = "depth"
    function = "spctrl.conditions:check_depth"
    section = settings.depth


class MaskedDepth(DatasetStage, RecordStage):
    """Depth within the mask."""

    stage = "masked_depth"
    function = "spctrl.conditions:mask_depth"
    libraries = ("opencv-python-headless",)

    def requires(self) -> list[StageTask]:
        return [self.index_task(), self.clone(Depth), self.clone(Mask)]

    def prepare(self, rows: pa.RecordBatch) -> Prepared:
        from tasks.work import ArtifactSource

        stages = {task.stage: self._locations(task) for task in self.requires()[1:]}
        prepared: Prepared = []
        for image_id in rows.column("image_id").to_pylist():
            found = {stage: locations.get(image_id) for stage, locations in stages.items()}
            if lacking := [stage for stage, location in found.items() if location is None]:
                prepared.append((None, ("missing_input", f"there is no usable {' and no '.join(lacking)} of this image")))
                continue
            sources = tuple(ArtifactSource(stage, location) for stage, location in found.items() if location)
            prepared.append((" ".join(source.location.digest for source in sources), sources))
        return prepared

    def _locations(self, task: StageTask) -> dict[int, Location]:
        known: dict[str, dict[int, Location]] = self.__dict__.setdefault("_known_locations", {})
        if task.stage not in known:
            known[task.stage] = artifact_locations(task.finished_run())
        return known[task.stage]


CONDITIONS: dict[str, type[StageTask]] = {
    "spatext": Spatext,
    "openpose": Openpose,
    "mask": Mask,
    "depth": Depth,
    "masked_depth": MaskedDepth,
}


class Manifest(DatasetStage):
    """One row per image that every stage could use: labels, captions, paths and digests."""

    stage = "manifest"
    function = "spctrl.manifest:manifest_batch"
    also_reaches = ("spctrl.layout:Layout", "spctrl.datasets:DATASETS")

    images: str = luigi.ChoiceParameter(default="required", choices=["required", "optional"])
    conditions: tuple[str, ...] = NamesParameter(default=("spatext", "openpose"), choices=tuple(CONDITIONS))

    def requires(self) -> list[StageTask]:
        return [self.index_task(), self.clone(Images), *(self.clone(CONDITIONS[name]) for name in self.conditions)]

    def condition_tasks(self) -> dict[str, StageTask]:
        return {name: self.clone(CONDITIONS[name]) for name in self.conditions}

    @functools.cached_property
    def layout(self) -> Layout:
        from spctrl.layout import Layout

        return Layout(
            dataset=self.spec,
            split=self.split,
            split_id=settings.split_id(self.dataset),
            names=settings.export().names,
            openpose_style=settings.openpose().style,
        )

    def parameters(self) -> dict[str, Any]:
        return {
            "conditions": self.conditions,
            "images": self.images,
            "split_name": self.layout.split_name,
            "names": self.layout.names,
            "openpose_style": self.layout.openpose_style,
        }

    def make(self, run: Run) -> dict[str, int]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        from spctrl.manifest import ConditionFacts, count_instances, manifest_batch, manifest_schema
        from spctrl.records import REJECT_SCHEMA

        tasks = self.condition_tasks()
        made = {
            name: {i: ConditionFacts(key, found.digest) for i, (key, found) in artifact_keys(task.finished_run()).items()}
            for name, task in tasks.items()
        }
        index = pq.ParquetFile(self.index_task().finished_run().path(MANIFEST))
        rejects = self._gather_rejects()
        rejected = set(rejects.column("image_id").to_pylist())
        images = self._image_facts()
        rows = instances = 0
        total = index.metadata.num_rows
        with (
            progress(f"{self.stage} {self.part}", total, self.set_progress_percentage) as advance,
            run.create(MANIFEST) as destination,
            pq.ParquetWriter(destination, manifest_schema(self.conditions), compression="zstd") as writer,
        ):
            for batch in index.iter_batches():
                written = manifest_batch(batch, self.layout, images, made, rejected)
                writer.write_batch(written)
                rows, instances = rows + len(written), instances + count_instances(written)
                advance(len(batch))
        schema = pa.schema([pa.field("stage", pa.string()), *REJECT_SCHEMA])
        run.write(REJECTS, parquet_bytes(rejects.select(schema.names).cast(schema)))
        if not rows:
            raise RuntimeError(f"{self.part}: expected at least one usable record, found none; see {run.path(REJECTS)}")
        listed = self.index_task().finished_run().provenance()["counts"]["records"]
        return {
            "records": listed,
            "made": rows,
            "instances": instances,
            "images_on_disk": len(images),
            "rejected": max(listed - rows, int(len(rejects) > 0)),
        }

    def _gather_rejects(self) -> pa.Table:
        """The rejects of all stages before this one, with the stage's name."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        tables = []
        for task in self.requires():
            table = pq.read_table(task.finished_run().path(REJECTS), partitioning=None)
            tables.append(table.append_column("stage", pa.repeat(task.stage, len(table))))
        return pa.concat_tables(tables)

    def _image_facts(self) -> dict[int, Any]:
        from spctrl.manifest import ImageFacts

        run = self.clone(Images).finished_run()
        facts = {}
        for image_id, found in artifact_locations(run).items():
            probe = json.loads(self.store.read(run.stage, found.pack, found.offset, found.size))
            facts[image_id] = ImageFacts(probe["sha256"], probe["phash"])
        return facts


def artifact_keys(run: Run) -> dict[int, tuple[str, Location]]:
    """Key and place of each artifact of a record stage's run, by image id."""
    import pyarrow.parquet as pq

    columns = pq.read_table(run.path(MANIFEST), partitioning=None).to_pydict()
    places = zip(*(columns[name] for name in ("pack", "offset", "size", "digest")), strict=True)
    return {
        image_id: (key, Location(*place))
        for image_id, key, place in zip(columns["image_id"], columns["key"], places, strict=True)
    }


def artifact_locations(run: Run) -> dict[int, Location]:
    """Place of each artifact of a record stage's run, by image id."""
    return {image_id: found for image_id, (_, found) in artifact_keys(run).items()}

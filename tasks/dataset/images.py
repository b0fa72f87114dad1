"""The images stage, and what it shares with every stage that reads one file for each record."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import luigi

from spctrl.data.datasets import MAX_IMAGE_FILE_BYTES
from spctrl.paths import outside_folders, refuse_unsafe_paths
from spctrl.store.digests import MISSING, TOO_LARGE, digest_cache
from tasks.dataset.index import DatasetStage
from tasks.execution.progress import progress
from tasks.stage.record_plan import NOTHING, Prepared
from tasks.stage.record_stage import RecordStage

if TYPE_CHECKING:
    import pyarrow as pa

READ_AT_ONCE_BYTES = 64 * 2**20
"""How much may be read just to see whether anything changed; more is read when the stage runs, with progress."""
HASHED_BETWEEN_LINES = 512


class FileStage(DatasetStage, RecordStage):
    """A record stage that reads one file for each record, below one folder."""

    @property
    def folder(self) -> str:
        """The folder that holds the files."""
        raise NotImplementedError

    def file_paths(self, image_paths: Sequence[str]) -> list[str]:
        """For each image's path below the dataset's root the path of its file below ``folder``."""
        raise NotImplementedError

    def confines(self, file_path: str) -> str:
        """The folder that no link may lead a file out of; it may itself be a link."""
        return self.folder

    def missing(self, path: str) -> Prepared:
        """What becomes of a record whose file is not there."""
        return Prepared(None, code="missing_file", message=f"expected a file {path}, found none")

    def requires(self) -> list[luigi.Task]:
        return [self.index_task()]

    def inputs(self) -> dict[str, str] | None:
        upstream, names = super().inputs(), self.image_paths()
        if upstream is None or names is None:
            return None
        cache = digest_cache(self.store)
        found = cache.list_digest(
            self.folder,
            self.file_paths(names),
            max_read_bytes=READ_AT_ONCE_BYTES,
            largest_bytes=MAX_IMAGE_FILE_BYTES,
        )
        return None if found is None else {**upstream, "files": found}

    def fill_cache(self) -> None:
        if self.ingredients() is not None:
            return
        paths = self.file_paths(self.image_paths() or [])
        with progress(
            f"{self.stage} {self.part}: digests", len(paths), self.set_progress_percentage
        ) as advance:
            for start in range(0, len(paths), HASHED_BETWEEN_LINES):
                some = [f"{self.folder}/{path}" for path in paths[start : start + HASHED_BETWEEN_LINES]]
                digest_cache(self.store).file_digests(some, largest_bytes=MAX_IMAGE_FILE_BYTES)
                advance(len(some))

    def prepare(self, rows: pa.RecordBatch) -> list[Prepared]:
        from tasks.execution.worker import FileSource

        image_paths = [self.spec.image_path(name) for name in rows.column("file_name").to_pylist()]
        refuse_unsafe_paths(self.root, image_paths)
        file_paths = self.file_paths(image_paths)
        paths = [f"{self.folder}/{path}" for path in file_paths]
        confines = [self.confines(path) for path in file_paths]
        digests = digest_cache(self.store).file_digests(paths, largest_bytes=MAX_IMAGE_FILE_BYTES)
        prepared = []
        for path, folder, found, outside, width, height in zip(
            paths,
            confines,
            digests,
            outside_folders(paths, confines),
            rows.column("width").to_pylist(),
            rows.column("height").to_pylist(),
            strict=True,
        ):
            if found == MISSING:
                prepared.append(self.missing(path))
            elif outside:
                message = f"{path} is a link that leads out of {folder}"
                prepared.append(Prepared(None, code="outside_dataset", message=message))
            elif found == TOO_LARGE:
                message = f"expected at most {MAX_IMAGE_FILE_BYTES:,} bytes, found more in {path}"
                prepared.append(Prepared(None, code="bad_image", message=message))
            else:
                prepared.append(Prepared(f"{found} {width} {height}", (FileSource(path, found),)))
        return prepared


class ImageFiles(FileStage):
    """A record stage that reads the images themselves."""

    @functools.cached_property
    def folder(self) -> str:
        return str(self.root)

    def file_paths(self, image_paths: Sequence[str]) -> list[str]:
        return list(image_paths)

    def confines(self, file_path: str) -> str:
        return f"{self.folder}/{file_path.split('/')[0]}"

    def missing(self, path: str) -> Prepared:
        message = f"expected an image {path}, found none; --images optional builds without images"
        return Prepared(None, code="missing_image", message=message)


class Images(ImageFiles):
    """Every image on disk: whether it can be decoded, has the annotated size, and its perceptual hash."""

    stage = "images"
    function = "spctrl.data.images:probe_image"
    libraries = ("pillow", "opencv-python-headless")
    suffix = ".json"

    images = luigi.ChoiceParameter(default="required", choices=["required", "optional"])

    def parameters(self) -> dict[str, Any]:
        return {"images": self.images}

    def arguments(self) -> dict[str, Any]:
        return {}

    def missing(self, path: str) -> Prepared:
        return NOTHING if self.images == "optional" else super().missing(path)

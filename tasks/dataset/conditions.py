"""The stages that make conditioning images."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import luigi

from spctrl.conditions.png_folder import PngFolder
from spctrl.errors import ExpectedError
from spctrl.fingerprints import without_neutral
from spctrl.storage import StoreError
from spctrl.store.artifacts import Artifacts, artifacts_in_order
from spctrl.store.digests import digest
from spctrl.store.packs import SAFETENSORS
from tasks import settings
from tasks.dataset.image_models import ModelStage
from tasks.dataset.images import FileStage
from tasks.dataset.index import DatasetStage
from tasks.stage.base import StageTask
from tasks.stage.record_plan import NOTHING, Prepared
from tasks.stage.record_stage import RecordStage

if TYPE_CHECKING:
    import pyarrow as pa

    from spctrl.data.records import Record
    from spctrl.store.runs import Run

OPENPOSE_COLOURS = 18
"""Links that the style ``openpose`` has colours for; it leaves out the rest."""

INSTANCES = "instances.parquet"
"""Masks of single instances, beside a run of ``segments``."""


class Spatext(DatasetStage, RecordStage):
    """Spatial-text index maps."""

    stage = "spatext"
    priority = 1  # before the renders, which may colour its maps instead of drawing again
    function = "spctrl.conditions.spatext:render_spatext"
    libraries = ("opencv-python-headless",)

    def requires(self) -> list[StageTask]:
        return [self.index_task()]

    def parameters(self) -> dict[str, Any]:
        section = settings.spatext()
        return {
            "links": self.spec.skeleton.links,
            "keypoint_radius_px": section.keypoint_radius_px,
            "link_half_width_px": section.link_half_width_px,
        }

    def prepare(self, rows: pa.RecordBatch) -> list[Prepared]:
        return [Prepared(drawing) for drawing in rows.column("drawing_digest").to_pylist()]


class Openpose(Spatext):
    """Colour renders of the skeletons."""

    stage = "openpose"
    function = "spctrl.conditions.openpose:render_openpose"
    priority = 0

    def parameters(self) -> dict[str, Any]:
        section = settings.openpose()
        return {
            "style": section.style,
            "keypoint_names": self.spec.skeleton.keypoint_names,
            "links": self.spec.skeleton.links,
            "keypoint_radius_px": section.keypoint_radius_px,
            "link_half_width_px": section.link_half_width_px,
        }

    def prepare(self, rows: pa.RecordBatch) -> list[Prepared]:
        from tasks.execution.worker import ArtifactSource

        plain = super().prepare(rows)
        if self._index_maps is None:
            return plain
        return [
            Prepared(each.identity, (ArtifactSource(Spatext.stage, found),)) if found else each
            for each, found in zip(plain, self._index_maps.at(rows.column("image_id")), strict=True)
        ]

    @functools.cached_property
    def _index_maps(self) -> Artifacts | None:
        """Index maps that are there and show what the render shows; the render's bytes are the same either way."""
        maps, section = settings.spatext(), settings.openpose()
        same_sizes = (maps.keypoint_radius_px, maps.link_half_width_px) == (
            section.keypoint_radius_px,
            section.link_half_width_px,
        )
        run = self.clone(Spatext).current_run()
        has_all_colours = len(self.spec.skeleton.links) <= OPENPOSE_COLOURS
        if (
            section.style == "openpose"
            and same_sizes
            and has_all_colours
            and run is not None
            and run.is_whole()
        ):
            return Artifacts(run)
        return None


class Precomputed(FileStage):
    """A folder of condition images that the user already has, laid out like the images."""

    libraries = ("opencv-python-headless",)
    section: ClassVar[type[settings.mask | settings.depth]]

    @functools.cached_property
    def folder(self) -> str:
        return str(settings.condition_folder(self.section, self.dataset))

    def file_paths(self, image_paths: Sequence[str]) -> list[str]:
        return [self._files.path_of(self.spec.stem_of(path)) for path in image_paths]

    @functools.cached_property
    def _files(self) -> PngFolder:
        return PngFolder(Path(self.folder))


class Mask(Precomputed):
    """Foreground masks."""

    stage = "mask"
    function = "spctrl.conditions.masks:check_mask"
    section = settings.mask

    def parameters(self) -> dict[str, Any]:
        return without_neutral({"empty": settings.mask().empty}, {"empty": "keep"})


class Depth(Precomputed):
    """Depth maps."""

    stage = "depth"
    function = "spctrl.conditions.masks:check_depth"
    section = settings.depth


class Segments(ModelStage):
    """Masks of single instances, by SAM or SAM-HQ: COCO run lengths with predicted IoU and area."""

    stage = "segments"
    function = "spctrl.image_models.segments:load_segmenter"
    packages = ("torch", "segment-anything", "segment-anything-hq", "pycocotools")
    section = settings.mask
    suffix = ".json"

    def weights_name(self) -> str:
        section = settings.mask()
        if (section.backend, section.model_type) == ("sam", "vit_tiny"):
            raise ExpectedError(
                "[mask] model_type: expected vit_h, vit_l or vit_b with backend = sam, found vit_tiny, a model of "
                "SAM-HQ"
            )
        return f"{section.backend}_{section.model_type}"

    def parameters(self) -> dict[str, Any]:
        section = settings.mask()
        return {
            "backend": section.backend,
            "model_type": section.model_type,
            "prompt": section.prompt,
            "empty": section.empty,
            "weights_digest": self.weights_digest,
        }

    def prepare(self, rows: pa.RecordBatch) -> list[Prepared]:
        from spctrl.data.records import records_from_table

        return [
            prepared._replace(identity=f"{prepared.identity} {digest(*_prompts(record))}")
            if prepared.identity
            else prepared
            for prepared, record in zip(super().prepare(rows), records_from_table(rows), strict=True)
        ]

    def make(self, run: Run) -> dict[str, int]:
        counts = super().make(run)
        rows = [
            {"image_id": image_id, **instance}
            for image_id, found in artifacts_in_order(run)
            for instance in self._instances(run.stage, image_id, self.store.read(run.stage, found))
        ]
        import pyarrow as pa

        from spctrl.data.manifest import INSTANCE_MASK_TYPE

        schema = pa.schema([("image_id", pa.int64()), *INSTANCE_MASK_TYPE])
        run.write_table(INSTANCES, pa.Table.from_pylist(rows, schema=schema))
        return counts

    @staticmethod
    def _instances(stage: str, image_id: int, data: bytes) -> list[dict[str, Any]]:
        from spctrl.conditions.segments import parse_segments

        try:
            return parse_segments(data)
        except ValueError as error:
            raise StoreError(
                f"{stage} of image {image_id}: {error}. `spctrl verify` drops what is damaged, then run again"
            ) from error


def _prompts(record: Record) -> tuple[bytes, bytes]:
    """What may point at the instances: their boxes and keypoints."""
    return record.bboxes_xywh.tobytes(), record.keypoints.tobytes()


class FromArtifacts(DatasetStage, RecordStage):
    """A record stage that reads only what other stages made of the record."""

    def sources(self) -> list[StageTask]:
        """The stages whose artifacts the function takes, in its order."""
        raise NotImplementedError

    def requires(self) -> list[luigi.Task]:
        return [self.index_task(), *self.sources()]

    def weights_note(self) -> str | None:
        notes = [note for task in self.sources() if (note := task.weights_note())]
        return "random" if "random" in notes else next(iter(notes), None)

    @functools.cached_property
    def _artifacts(self) -> dict[str, Artifacts]:
        return {task.stage: Artifacts(task.finished_run()) for task in self.sources()}

    def prepare(self, rows: pa.RecordBatch) -> list[Prepared]:
        from tasks.execution.worker import ArtifactSource

        prepared = []
        found = [each.at(rows.column("image_id")) for each in self._artifacts.values()]
        for places in zip(*found, strict=True):
            sources = tuple(map(ArtifactSource, self._artifacts, filter(None, places)))
            if len(sources) < len(places):
                prepared.append(NOTHING)  # the stage that could not make it has said why
            else:
                prepared.append(Prepared(" ".join(source.location.digest for source in sources), sources))
        return prepared


class SegmentedMask(FromArtifacts):
    """Foreground masks: the union of the instances' masks."""

    stage = "mask"
    function = "spctrl.conditions.masks:union_mask"
    libraries = ("opencv-python-headless", "pycocotools")

    def sources(self) -> list[StageTask]:
        return [self.clone(Segments)]


class EstimatedDepth(ModelStage):
    """Depth maps by ZoeDepth."""

    stage = "depth"
    function = "spctrl.image_models.depth:load_depth_estimator"
    packages = ("torch", "transformers")
    section = settings.depth

    def weights_name(self) -> str:
        return "zoedepth"

    def parameters(self) -> dict[str, Any]:
        return {"weights_digest": self.weights_digest}


class MaskedDepth(FromArtifacts):
    """Depth within the mask."""

    stage = "masked_depth"
    function = "spctrl.conditions.masks:mask_depth"
    libraries = ("opencv-python-headless",)

    def sources(self) -> list[StageTask]:
        return [self.clone(condition_class("depth")), self.clone(condition_class("mask"))]


class Latents(ModelStage):
    """Stable Diffusion's latents of the training crop, for training without its image encoder."""

    stage = "latents"
    function = "spctrl.image_models.latents:load_latent_encoder"
    packages = ("torch", "diffusers", "safetensors")
    section = settings.latents
    suffix = SAFETENSORS

    def weights_name(self) -> str:
        return "vae"

    def parameters(self) -> dict[str, Any]:
        return {"resolution": settings.latents().resolution, "weights_digest": self.weights_digest}


CONDITIONS = ("spatext", "openpose", "mask", "depth", "masked_depth", "latents")


def condition_class(name: str) -> type[StageTask]:
    """The stage that makes a condition under the present settings."""
    precomputed = "precomputed"
    return {
        "spatext": Spatext,
        "openpose": Openpose,
        "mask": Mask if settings.mask().backend == precomputed else SegmentedMask,
        "depth": Depth if settings.depth().backend == precomputed else EstimatedDepth,
        "masked_depth": MaskedDepth,
        "latents": Latents,
    }[name]

"""The stages that make conditioning images."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from tasks import settings
from tasks.base import StageTask
from tasks.images import FileStage
from tasks.index import DatasetStage
from tasks.record_stage import Prepared, RecordStage, artifact_locations

if TYPE_CHECKING:
    import pyarrow as pa

    from tasks.store import Location


class Spatext(DatasetStage, RecordStage):
    """Spatial-text index maps."""

    stage = "spatext"
    function = "spctrl.rendering.spatext:render_spatext"
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
        return [f"{self.spec.stem_of(path)}.png" for path in image_paths]


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

    def prepare(self, rows: pa.RecordBatch) -> list[Prepared]:
        from tasks.work import ArtifactSource

        stages = {task.stage: self._locations(task) for task in self.requires()[1:]}
        prepared = []
        for image_id in rows.column("image_id").to_pylist():
            found = {stage: locations.get(image_id) for stage, locations in stages.items()}
            if lacking := [stage for stage, location in found.items() if location is None]:
                message = f"there is no usable {' and no '.join(lacking)} of this image"
                prepared.append(Prepared(None, code="missing_input", message=message))
                continue
            sources = tuple(ArtifactSource(stage, location) for stage, location in found.items() if location)
            prepared.append(Prepared(" ".join(source.location.digest for source in sources), sources))
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

"""mmpose and mmdet, in an environment of their own (``make openmmlab``), called with Parquet files in between.

``MmposeEstimator`` gives the poses that mmpose itself gives, to compare with or to report; its ``predict`` is that of
``eval.pose_estimator.PoseEstimator``. ``detect`` gives boxes where no annotated ones shall be used.

Legend: N instances of all images together, K keypoints (17).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eval.images import file_without_orientation
from eval.pose_estimator import HEATMAP_WH, PoseEstimates, Protocol, choose_protocol, rows_of_images
from eval.vitpose.checkpoints import (
    HEAD_WIDTH,
    HEADS_OF_WIDTH,
    MMPOSE,
    from_transformers,
    load_vitpose,
)
from eval.vitpose.crops import scale_boxes
from spctrl.data.boxes import clip_boxes
from spctrl.data.records import NUM_KEYPOINTS
from spctrl.errors import ExpectedError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

SCRIPTS = Path(__file__).parent / "scripts"
DATASET_FILES = {"ap10k": "ap10k", "humanart": "humanart"}
"""Ours -> mmpose's, below configs/_base_/datasets."""

_OUTPUT_SHOWN = 2000


class OpenMMLabError(ExpectedError):
    """The environment is not there, or a script in it failed; shows the end of what it printed."""


@dataclass(frozen=True, kw_only=True)
class OpenMMLab:
    """The environment.

    Attributes:
        folder: where ``make openmmlab`` built it.
    """

    folder: Path

    def run(self, script: str, request: Mapping[str, Any], folder: Path) -> None:
        """Run a script of ``scripts/`` with a request, to be written into a folder.

        Raises:
            OpenMMLabError: there is no such environment, or the script failed.
        """
        python = self.folder / "bin" / "python"
        if not python.exists():
            raise OpenMMLabError(
                f"expected OpenMMLab's environment at {self.folder}, found no {python}. Build it with `make openmmlab` "
                "(about half an hour), or use the transformers backend, which needs none."
            )
        path = folder / "request.json"
        path.write_text(json.dumps(request))
        process = subprocess.run(
            [python, SCRIPTS / script, path], cwd=folder, capture_output=True, text=True, errors="replace"
        )
        if process.returncode:
            shown = (process.stdout + process.stderr)[-_OUTPUT_SHOWN:]
            raise OpenMMLabError(f"{script} in {self.folder} ended with code {process.returncode}:\n{shown}")


class MmposeEstimator:
    """ViTPose in mmpose, on image files, one image at a time."""

    def __init__(
        self,
        environment: Path,
        weights: Path | str,
        dataset: str = "ap10k",
        *,
        codec: str | None = None,
        flip_test: bool | None = None,
        shift_heatmap: bool | None = None,
        expert: int | None = None,
        config: Path | None = None,
        device: str = "cpu",
    ) -> None:
        """See ``PoseEstimator.from_weights``.

        Args:
            environment: the folder that ``make openmmlab`` built.
            weights: any of the three kinds; mmpose gets them in its own format. With ``config`` an mmpose checkpoint.
            config: an mmpose configuration file, for networks other than ViTPose.
            device: in that environment: ``cpu`` or ``cuda:N``.
        """
        self.environment = OpenMMLab(folder=environment)
        self.weights = Path(weights)
        self.dataset = dataset
        self.protocol: Protocol = choose_protocol(dataset, codec, flip_test, shift_heatmap, expert)
        self.config = config
        self.device = device

    def predict(
        self,
        images: Iterable[Path | str],
        bboxes_xywh: Iterable[ArrayLike],
        *,
        annotated_wh: Iterable[tuple[int, int]] | None = None,
        keep_heatmaps: bool = True,
    ) -> PoseEstimates:
        """As ``PoseEstimator.predict``, but for image files only.

        Raises:
            ImageError: an image cannot be measured.
            OpenMMLabError: see ``OpenMMLab.run``.
        """
        boxes: list[dict[str, Any]] = []
        factors: list[NDArray[np.float64]] = []
        with TemporaryDirectory() as name:
            folder = Path(name)
            for number, row in enumerate(rows_of_images(images, bboxes_xywh, annotated_wh)):
                path = Path(cast("Path | str", row.image)).resolve()
                # mmcv applies orientation tags.
                path, own_wh = file_without_orientation(path, folder / f"image-{number}{path.suffix}")
                annotated = row.annotated_wh or own_wh
                mapped = row.boxes
                if row.annotated_wh is not None:
                    mapped = scale_boxes(clip_boxes(mapped, annotated, smallest_px=1), annotated, own_wh)
                boxes += [{"image_path": str(path), "bbox_xywh": box} for box in mapped.tolist()]
                factors += [np.divide(annotated, own_wh)] * len(mapped)
            found = self._estimate(boxes, keep_heatmaps, folder)
        w, h = HEATMAP_WH
        heatmaps = None
        if keep_heatmaps:
            raw = b"".join(found.column("heatmaps").to_pylist())
            heatmaps = np.frombuffer(raw, "<f4").reshape(-1, NUM_KEYPOINTS, h, w)
        keypoints = np.array(found.column("keypoints").to_pylist()).reshape(-1, NUM_KEYPOINTS, 2)
        return PoseEstimates(
            keypoints * np.array(factors).reshape(-1, 1, 2),
            np.array(found.column("scores").to_pylist(), np.float32).reshape(-1, NUM_KEYPOINTS),
            heatmaps,
        )

    def _estimate(self, boxes: list[dict[str, Any]], keep_heatmaps: bool, folder: Path) -> pa.Table:
        schema = pa.schema([("image_path", pa.string()), ("bbox_xywh", pa.list_(pa.float64(), 4))])
        pq.write_table(pa.Table.from_pylist(boxes, schema=schema), folder / "boxes.parquet")
        request = {
            "weights": str(self.weights.resolve() if self.config else self._checkpoint(folder)),
            "config": self.config and str(self.config.resolve()),
            "heads": HEADS_OF_WIDTH,
            "default_head_width": HEAD_WIDTH,
            "dataset": DATASET_FILES[self.dataset],
            "codec": self.protocol.codec,
            "flip_test": self.protocol.flip_test,
            "shift_heatmap": self.protocol.shift_heatmap,
            "device": self.device,
            "boxes": str(folder / "boxes.parquet"),
            "result": str(folder / "poses.parquet"),
            "heatmaps": keep_heatmaps,
        }
        self.environment.run("estimate.py", request, folder)
        return pq.read_table(folder / "poses.parquet")

    def _checkpoint(self, folder: Path) -> Path:
        """The weights in mmpose's own format."""
        import torch

        model, found = load_vitpose(self.weights, expert=self.protocol.expert)
        if found == "mmpose":
            return self.weights.resolve()
        path = folder / "weights.pth"
        torch.save({"meta": {}, "state_dict": from_transformers(model.state_dict(), MMPOSE)}, path)
        return path


class Detections(NamedTuple):
    """Objects found in one image.

    Attributes:
        bboxes_xywh: (n, 4) float64, pixels.
        scores: (n,) float64 in [0, 1].
    """

    bboxes_xywh: NDArray[np.float64]
    scores: NDArray[np.float64]


def detect(
    environment: Path,
    images: Sequence[Path],
    *,
    config: str,
    weights: Path,
    labels: Sequence[str] = ("person",),
    score_threshold: float = 0.3,
    device: str = "cpu",
) -> list[Detections]:
    """Objects of some classes in image files, by a detector of mmdet.

    Args:
        environment: the folder that ``make openmmlab`` built.
        images: files.
        config: an mmdet configuration file, or the name of one that mmdet ships
            (``faster-rcnn_r50_fpn_1x_coco``).
        weights: its checkpoint.
        labels: class names of the detector; none means all.
        score_threshold: objects of lower scores are left out.
        device: in that environment.

    Raises:
        ImageError: an image cannot be measured.
        OpenMMLabError: see ``OpenMMLab.run``; also an unknown class.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        paths = []
        for number, path in enumerate(images):
            copy = folder / f"image-{number}{path.suffix}"
            upright, _ = file_without_orientation(path.resolve(), copy)  # mmcv applies orientation tags
            paths.append(str(upright))
        pq.write_table(pa.table({"image_path": paths}), folder / "images.parquet")
        request = {
            "config": config,
            "weights": str(weights.resolve()),
            "labels": list(labels),
            "score_threshold": score_threshold,
            "device": device,
            "images": str(folder / "images.parquet"),
            "result": str(folder / "objects.parquet"),
        }
        OpenMMLab(folder=environment).run("detect.py", request, folder)
        objects = pq.read_table(folder / "objects.parquet").to_pylist()
    found: dict[str, list[dict[str, Any]]] = {path: [] for path in paths}
    for each in objects:
        found[each["image_path"]].append(each)
    return [
        Detections(
            np.array([each["bbox_xywh"] for each in found[path]], np.float64).reshape(-1, 4),
            np.array([each["score"] for each in found[path]], np.float64),
        )
        for path in paths
    ]


def people_counting_error(found: Sequence[int], annotated: Sequence[int]) -> NDArray[np.float64]:
    """(I,) by how many the people found in each image differ from those annotated; the metric is their mean."""
    if len(found) != len(annotated):
        raise ValueError(
            f"expected as many counts found as annotated, found {len(found)} and {len(annotated)}"
        )
    return np.abs(np.subtract(found, annotated, dtype=np.float64))

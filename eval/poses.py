"""Poses in generated images, in the annotated boxes or in those of a detector.

Legend: D boxes, K keypoints (17).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.images import size_of
from eval.instances import NO_ANNOTATION, Floats, GroundTruth, Integers, Poses
from eval.settings import PoseSettings
from eval.vitpose.crops import scale_boxes
from spctrl.data.records import NUM_KEYPOINTS

if TYPE_CHECKING:
    import pyarrow as pa

IMAGES_AT_ONCE = 256
"""Images between two reports of progress."""


def make_estimator(how: PoseSettings, weights: Path, dataset: str, device: str) -> Any:
    """The pose estimator of either backend: both have the same ``predict``.

    Raises:
        ExpectedError: its weights or its environment cannot be used.
    """
    given: dict[str, Any] = {
        "codec": how.codec,
        "flip_test": how.flip_test,
        "shift_heatmap": how.shift_heatmap,
        "expert": how.expert,
    }
    if how.backend == "mmpose":
        from eval.openmmlab import MmposeEstimator

        there = "cpu" if device == "auto" else device
        return MmposeEstimator(Path(how.environment), weights, dataset, device=there, **given)
    from eval.pose_estimator import PoseEstimator

    return PoseEstimator.from_weights(weights, dataset, device=device, **given)


@dataclass(frozen=True, kw_only=True, eq=False)
class Boxes:
    """Where poses are looked for, ordered by image.

    Attributes:
        image_ids, category_ids, annotation_ids: (D,) int64; see ``Poses``.
        bboxes_xywh: (D, 4) float64, pixels of the annotated image.
        scores: (D,) float64 in [0, 1].
    """

    image_ids: Integers
    category_ids: Integers
    annotation_ids: Integers
    bboxes_xywh: Floats
    scores: Floats


def annotated_boxes(truth: GroundTruth) -> Boxes:
    """Boxes of the annotated instances, clipped to their images.

    Instances that the COCO protocol does not count (crowds, or no labelled keypoint) and boxes without an area are left
    out, as in mmpose.
    """
    rows = np.flatnonzero(truth.has_estimate)
    rows = rows[np.argsort(truth.image_of[rows], kind="stable")]
    return Boxes(
        image_ids=truth.image_ids[truth.image_of[rows]],
        category_ids=truth.category_ids[truth.category_of[rows]],
        annotation_ids=truth.annotation_ids[rows],
        bboxes_xywh=truth.clipped_bboxes_xywh[rows],
        scores=np.ones(len(rows)),
    )


def detected_boxes(
    files: Mapping[int, Path],
    sizes_wh: Mapping[int, tuple[int, int]],
    category_id: int,
    how: PoseSettings,
    weights: Path,
    device: str,
) -> Boxes:
    """Boxes of the people that a detector finds in generated images.

    Args:
        files: generated image by image id.
        sizes_wh: width and height of the annotated image by image id.
        category_id: of a person.
        how: names the environment and the detector.
        weights: the detector's.
        device: ``auto``, ``cpu`` or ``cuda:N``.

    Raises:
        OpenMMLabError: there is no such environment, or the detector failed.
    """
    from eval.openmmlab import detect

    ids = sorted(files)
    found = detect(
        Path(how.environment),
        [files[image_id] for image_id in ids],
        config=how.detector.config,
        weights=weights,
        labels=how.detector.labels,
        score_threshold=how.detector.score_threshold,
        device="cpu" if device == "auto" else device,
    )
    boxes, scores, owners = [np.empty((0, 4))], [np.empty(0)], [np.empty(0, np.int64)]
    for image_id, each in zip(ids, found, strict=True):
        own_wh = size_of(files[image_id])
        large = (each.bboxes_xywh[:, 2:] > 0).all(axis=1)
        boxes.append(scale_boxes(each.bboxes_xywh[large], own_wh, sizes_wh[image_id]))
        scores.append(each.scores[large])
        owners.append(np.full(int(large.sum()), image_id, np.int64))
    image_ids = np.concatenate(owners)
    return Boxes(
        image_ids=image_ids,
        category_ids=np.full(len(image_ids), category_id, np.int64),
        annotation_ids=np.full(len(image_ids), NO_ANNOTATION, np.int64),
        bboxes_xywh=np.concatenate(boxes),
        scores=np.concatenate(scores),
    )


def sizes_of(annotated: pa.Table) -> dict[int, tuple[int, int]]:
    """Width and height of each annotated image by image id, of a table of records."""
    columns = (annotated.column(name).to_pylist() for name in ("image_id", "width", "height"))
    return {image_id: (width, height) for image_id, width, height in zip(*columns, strict=True)}


def estimate_poses(
    estimator: Any,
    files: Mapping[int, Path],
    boxes: Boxes,
    sizes_wh: Mapping[int, tuple[int, int]],
    *,
    advance: Callable[[int], None] = lambda count: None,
) -> Poses:
    """Poses in boxes of generated images, in pixels of the annotated images.

    Args:
        estimator: of ``make_estimator``.
        files: generated image by image id; boxes of other images are left out.
        boxes: where poses are.
        sizes_wh: width and height of the annotated image by image id.
        advance: told how many images were done since.
    """
    rows = np.flatnonzero(np.isin(boxes.image_ids, list(files)))
    keypoints, scores = [np.empty((0, NUM_KEYPOINTS, 2))], [np.empty((0, NUM_KEYPOINTS))]
    ids, starts = np.unique(boxes.image_ids[rows], return_index=True)
    groups = np.split(boxes.bboxes_xywh[rows], starts[1:])
    of_images = dict(zip(ids.tolist(), groups, strict=False))  # numpy splits nothing into one group
    for start in range(0, len(ids), IMAGES_AT_ONCE):
        some = ids[start : start + IMAGES_AT_ONCE].tolist()
        found = estimator.predict(
            [files[image_id] for image_id in some],
            [of_images[image_id] for image_id in some],
            annotated_wh=[sizes_wh[image_id] for image_id in some],
            keep_heatmaps=False,
        )
        keypoints.append(found.keypoints)
        scores.append(found.scores)
        advance(len(some))
    return Poses(
        image_ids=boxes.image_ids[rows],
        category_ids=boxes.category_ids[rows],
        annotation_ids=boxes.annotation_ids[rows],
        bboxes_xywh=boxes.bboxes_xywh[rows],
        bbox_scores=boxes.scores[rows],
        keypoints=np.concatenate(keypoints),
        keypoint_scores=np.concatenate(scores).astype(np.float64),
    )

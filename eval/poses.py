"""Poses of annotated instances in generated images.

Legend: G annotated instances, K keypoints (17).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.instances import Poses, read_ground_truth
from eval.settings import PoseSettings

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


def estimate_poses(
    estimator: Any,
    files: Mapping[int, Path | str],
    annotated: pa.Table,
    *,
    advance: Callable[[int], None] = lambda count: None,
) -> Poses:
    """Poses in the boxes of the annotated instances, in pixels of the annotated images.

    Instances that the COCO protocol does not count (crowds, or no labelled keypoint) and boxes without an area are left
    out, as in mmpose.

    Args:
        estimator: of ``make_estimator``.
        files: generated image by image id; annotated images that are not among them are left out.
        annotated: table of records (``RECORD_SCHEMA``).
        advance: told how many images were done since.
    """
    truth = read_ground_truth(annotated)
    wh = dict(
        zip(
            annotated.column("image_id").to_pylist(),
            zip(annotated.column("width").to_pylist(), annotated.column("height").to_pylist(), strict=True),
            strict=True,
        )
    )
    usable = ~truth.ignored & (truth.bboxes_xywh[:, 2:] > 0).all(axis=1)
    instances: dict[int, list[int]] = {}
    for row in np.flatnonzero(usable).tolist():
        image_id = int(truth.image_ids[truth.image_of[row]])
        if image_id in files:
            instances.setdefault(image_id, []).append(row)
    keypoints, scores = [], []
    for some in _batches(list(instances)):
        found = estimator.predict(
            [files[image_id] for image_id in some],
            [truth.bboxes_xywh[instances[image_id]] for image_id in some],
            annotated_wh=[wh[image_id] for image_id in some],
        )
        keypoints.append(found.keypoints)
        scores.append(found.scores)
        advance(len(some))
    rows = np.array(list(itertools.chain.from_iterable(instances.values())), np.int64)
    K = truth.keypoints.shape[1]
    return Poses(
        image_ids=truth.image_ids[truth.image_of[rows]],
        category_ids=truth.category_ids[truth.category_of[rows]],
        annotation_ids=truth.annotation_ids[rows],
        bboxes_xywh=truth.bboxes_xywh[rows],
        bbox_scores=np.ones(len(rows)),
        keypoints=np.concatenate([np.empty((0, K, 2)), *keypoints]),
        keypoint_scores=np.concatenate([np.empty((0, K)), *scores]).astype(np.float64),
    )


def _batches(image_ids: list[int]) -> list[list[int]]:
    return [image_ids[start : start + IMAGES_AT_ONCE] for start in range(0, len(image_ids), IMAGES_AT_ONCE)]

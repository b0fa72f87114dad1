"""Percentage of correct keypoints: the share that lies near where it was annotated.

Legend: I images, N instances, K keypoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.instances import Booleans, Floats, GroundTruth, InstancesError, Integers, Poses
from spctrl.data.datasets import DATASETS, Dataset

THRESHOLD = 0.05
"""Of the longer side of the annotated box; mmpose's default."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pck:
    """Which keypoints are correct.

    Attributes:
        keypoint_names: K names.
        correct, labelled: (N, K) bool; what is not labelled is not correct.
        image_of: (N,) int64, position of the instance's image in ``image_ids``.
        image_ids: (I,) int64, ascending.
    """

    keypoint_names: tuple[str, ...]
    correct: Booleans
    labelled: Booleans
    image_of: Integers
    image_ids: Integers

    @property
    def scores(self) -> dict[str, float]:
        """``PCK``, the mean over keypoints as in mmpose, and each keypoint's, in [0, 1]; NaN where none is labelled."""
        values = self.at(np.ones(len(self.image_ids)))
        return dict(zip(("PCK", *self.keypoint_names), values.tolist(), strict=True))

    def at(self, weights: NDArray[Any]) -> Floats:
        """(..., 1 + K) ``scores`` with image i counted ``weights[..., i]`` times: for ``eval.bootstrap``."""
        weight = np.asarray(weights, np.float64)[..., self.image_of]
        total = weight @ self.labelled
        each = np.divide(weight @ self.correct, total, out=np.full_like(total, np.nan), where=total > 0)
        counted = (total > 0).sum(axis=-1)
        sums = np.nansum(each, axis=-1)
        mean = np.divide(sums, counted, out=np.full_like(sums, np.nan), where=counted > 0)
        return np.concatenate([mean[..., None], each], axis=-1)

    def labelled_images(self) -> Booleans:
        """(I, K) whether an image has an instance of which this keypoint counts."""
        found = np.zeros((len(self.image_ids), self.labelled.shape[1]), bool)
        np.logical_or.at(found, self.image_of, self.labelled)
        return found


def pck(poses: Poses, truth: GroundTruth, dataset: str | Dataset, threshold: float = THRESHOLD) -> Pck:
    """Compare each pose with the annotation whose box it was found in.

    A keypoint is correct when its distance is less than ``threshold`` times the longer side of the annotated box,
    clipped to the image (the definition of mmpose's ``PCKAccuracy`` with ``norm_item = bbox``). An annotated instance
    for which there is no pose has no correct keypoint. Instances without ``has_estimate`` do not count.

    Raises:
        InstancesError: a pose has no annotation of the ground truth, or two have the same.
    """
    dataset = DATASETS[dataset] if isinstance(dataset, str) else dataset
    row = {each: i for i, each in enumerate(truth.annotation_ids.tolist())}
    ids = poses.annotation_ids.tolist()
    unknown = [each for each in ids if each not in row]
    if unknown or len(set(ids)) < len(ids):
        problem = f"{len(unknown)} of others" if unknown else "two of the same one"
        raise InstancesError(
            f"PCK: expected one pose for each annotated box, found {problem}. PCK needs poses in ground-truth boxes."
        )
    rows = np.array([row[each] for each in ids], np.int64)
    labelled = (truth.keypoints[..., 2] > 0) & truth.has_estimate[:, None]
    reach = threshold * truth.clipped_bboxes_xywh[rows, 2:].max(axis=1, initial=0)
    distances = np.linalg.norm(poses.keypoints - truth.keypoints[rows, :, :2], axis=-1)
    correct = np.zeros_like(labelled)
    correct[rows] = labelled[rows] & (distances < reach[:, None])
    return Pck(
        keypoint_names=dataset.skeleton.keypoint_names,
        correct=correct,
        labelled=labelled,
        image_of=truth.image_of,
        image_ids=truth.image_ids,
    )

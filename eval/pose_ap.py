"""Average precision of poses by the COCO keypoint protocol.

The engine is this module's own, on flat arrays: predictions are matched once, which gives a true or false positive for
each OKS threshold and area range, and the numbers are accumulated from these for any weighting of the images. A
bootstrap resample is a weighting (how often an image was drawn), and so is a subset such as a scenario. pycocotools and
faster-coco-eval only evaluate lists of images, which takes them a second or two for AP-10K each time. The tests compare
with pycocotools.

From pycocotools differs what it mistakes or stops at: an annotation whose id is 0 can be matched like any other, where
pycocotools counts it as missed; annotations of one id all count, where pycocotools takes the last for each; a category
that the file does not list counts too; an area that is absent or not positive is estimated (``read_ground_truth``); and
an empty list of predictions scores 0. xtcocotools, which mmpose's ``CocoMetric`` uses, counts an instance's labelled
keypoints itself, where pycocotools and this module believe the file's ``num_keypoints``; they agree on AP-10K.

Legend: I images, G annotated instances, D predictions, K keypoints, P pairs of a prediction and an instance of the same
image and category, T OKS thresholds, A area ranges, C categories, L entries of all precision-recall curves.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from eval.instances import (
    NO_ANNOTATION,
    Booleans,
    Floats,
    GroundTruth,
    Integers,
    Poses,
    Predictions,
    check_predictions,
    keypoint_areas,
    read_ground_truth,
    read_poses,
    read_results,
)
from eval.settings import DetectionArea
from spctrl.data.boxes import clip_boxes
from spctrl.data.datasets import DATASETS, Dataset

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""OKS that a match needs."""
_AT_75 = 5
RECALLS = np.linspace(0.0, 1.0, 101)
"""Where precision is read off."""
_RECALLS_AND_BEYOND = np.append(RECALLS, np.inf)
AREA_RANGES = {"all": (0.0, 1e5**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e5**2)}
"""Square pixels, both ends included."""
MAX_PREDICTIONS = 20
"""Of an image and category; those of the highest scores count."""
METRICS = ("AP", "AP50", "AP75", "AP-M", "AP-L", "AR")

KEYPOINT_SCORE_THRESHOLD = 0.2
"""Keypoints of lower scores have no part in a prediction's score."""
NMS_THRESHOLD = 0.9
BOX_PADDING, BOX_ASPECT = 1.25, 192 / 256
"""Of the boxes that the pose estimator sees; their areas are the scale of non-maximum suppression."""

_EPSILON = np.spacing(1)
_ALMOST_ONE = 1 - 1e-10


class Scores(NamedTuple):
    """Numbers for weightings of the images; NaN where no instance counts.

    Attributes:
        precision: (..., T, A, C) average precision.
        recall: (..., T, A, C) recall of all predictions.
    """

    precision: Floats
    recall: Floats

    def summary(self) -> Floats:
        """(..., 6) ``METRICS`` in [0, 1]: means over thresholds and over the categories that have instances."""
        ap, ar = self.precision, self.recall
        means = (
            _mean(ap[..., 0, :], 2),
            _mean(ap[..., 0, 0, :], 1),
            _mean(ap[..., _AT_75, 0, :], 1),
            _mean(ap[..., 1, :], 2),
            _mean(ap[..., 2, :], 2),
            _mean(ar[..., 0, :], 2),
        )
        return np.stack(means, axis=-1)

    def per_category(self) -> Floats:
        """(..., C) AP of each category."""
        return np.asarray(self.precision[..., 0, :].mean(axis=-2))

    def per_threshold(self) -> Floats:
        """(..., T) mean over the categories of the average precision at each OKS threshold."""
        return _mean(self.precision[..., 0, :], 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class PoseAp:
    """What ``evaluate`` finds.

    Attributes:
        scores: ``METRICS`` and their values in [0, 1].
        per_category: AP by category name; only categories with instances.
        per_scenario: AP of the images of each scenario; empty where images have none.
        per_threshold: AP by OKS threshold.
        image_ids: (I,) int64, ascending: the images that ``at`` weights.
        matches: each prediction's fate, for further numbers.
    """

    scores: dict[str, float]
    per_category: dict[str, float]
    per_scenario: dict[str, float]
    per_threshold: dict[float, float]
    image_ids: Integers
    matches: Matches

    def at(self, weights: NDArray[Any]) -> Floats:
        """(..., 6) ``METRICS`` with image i counted ``weights[..., i]`` times: the statistic for ``eval.bootstrap``.

        The same as an evaluation of as many copies of the image, one after the other.
        """
        return self.matches.curves.at(weights).summary()


def evaluate(
    predictions: Path | str | Sequence[Mapping[str, Any]] | pa.Table | Poses | Predictions,
    annotations: Path | str | Mapping[str, Any] | pa.Table | GroundTruth,
    dataset: str | Dataset,
    *,
    detection_area: DetectionArea = "bbox",
) -> PoseAp:
    """Pose AP of predictions.

    Args:
        predictions: either scored ones, as they would be given to pycocotools (a COCO results list, its JSON file, or
            ``Predictions``), which are taken as they are; or what a pose estimator found in boxes (``Poses``, a table
            of ``PREDICTION_SCHEMA``, its Parquet file), which are scored and thinned out by ``score_poses`` first.
        annotations: a COCO keypoint file or its content, with the dataset's keypoints in its order; a table of records;
            or ``GroundTruth``.
        dataset: ``ap10k`` or ``humanart``, for its OKS sigmas.
        detection_area: by which a prediction that matches nothing counts against AP-M or AP-L: its own (``bbox``; see
            ``score_poses`` and ``read_results``), or that of the smallest box around its keypoints (``keypoints``).

    Raises:
        InstancesError: something cannot be read, is not finite, or does not belong together.
        ValueError: no such dataset or detection area.
    """
    if detection_area not in get_args(DetectionArea):
        raise ValueError(f"expected a detection_area among bbox, keypoints, found {detection_area!r}")
    sigmas = oks_sigmas(dataset)
    truth = read_ground_truth(annotations, DATASETS[dataset] if isinstance(dataset, str) else dataset)
    scored = _scored(predictions, sigmas, truth)
    if detection_area == "keypoints":
        scored = replace(scored, areas=keypoint_areas(scored.keypoints))
    check_predictions(scored, truth)
    matches = match(truth, scored, sigmas)
    scores = matches.curves.at(np.ones(len(truth.image_ids)))
    per_category = scores.per_category()
    return PoseAp(
        scores=dict(zip(METRICS, scores.summary().tolist(), strict=True)),
        per_category={
            name: ap
            for name, ap in zip(truth.category_names, per_category.tolist(), strict=True)
            if not np.isnan(ap)
        },
        per_scenario={
            name: float(matches.curves.at(inside).summary()[0])
            for name, inside in scenario_weights(truth).items()
        },
        per_threshold=dict(zip(THRESHOLDS.round(2).tolist(), scores.per_threshold().tolist(), strict=True)),
        image_ids=truth.image_ids,
        matches=matches,
    )


def oks_sigmas(dataset: str | Dataset) -> Floats:
    """(K,) the dataset's own sigmas.

    Raises:
        ValueError: no such dataset.
    """
    if isinstance(dataset, str):
        if dataset not in DATASETS:
            raise ValueError(f"expected a dataset among {', '.join(DATASETS)}, found {dataset!r}")
        dataset = DATASETS[dataset]
    return np.array(dataset.skeleton.oks_sigmas)


def scenario_weights(truth: GroundTruth) -> dict[str, Booleans]:
    """(I,) bool for each scenario, which picks its images."""
    names = np.array(truth.scenarios)
    return {name: names == name for name in sorted(set(truth.scenarios) - {""})}


def _scored(
    predictions: Path | str | Sequence[Mapping[str, Any]] | pa.Table | Poses | Predictions,
    sigmas: Floats,
    truth: GroundTruth,
) -> Predictions:
    is_file = isinstance(predictions, Path | str) and Path(predictions).suffix.lower() == ".parquet"
    if not is_file and not isinstance(predictions, pa.Table | Poses):
        return read_results(predictions)
    poses = read_poses(predictions)
    sizes_wh = truth.sizes_wh_of(poses.image_ids)
    sizes_wh[poses.annotation_ids == NO_ANNOTATION] = np.nan  # mmpose takes a detector's boxes as they are
    return score_poses(replace(poses, bboxes_xywh=clip_boxes(poses.bboxes_xywh, sizes_wh)), sigmas)


# From a pose estimator's output to ranked predictions


def score_poses(poses: Poses, sigmas: Floats) -> Predictions:
    """Predictions as mmpose's ``CocoMetric`` ranks them (``score_mode = bbox_keypoint``, ``oks_nms``).

    A prediction's score is its box's times the mean of its keypoints' scores above ``KEYPOINT_SCORE_THRESHOLD`` (0
    where there is none). Of predictions in one image whose OKS exceeds ``NMS_THRESHOLD``, the one that scores highest
    is kept, whatever their categories; of equal scores the first, which mmpose leaves to numpy's unstable sort. Those
    without a keypoint of positive score are then left out, as xtcocotools does. Annotated boxes are those that the
    estimator saw, clipped to the image; their areas are those of the predictions, as in mmpose from 1.2 on.
    """
    used = poses.keypoint_scores > KEYPOINT_SCORE_THRESHOLD
    means = np.where(used, poses.keypoint_scores, 0).sum(axis=1) / np.maximum(used.sum(axis=1), 1)
    scores = poses.bbox_scores * means
    keep = oks_nms(poses.image_ids, poses.keypoints, scores, padded_areas(poses.bboxes_xywh), sigmas)
    keep = keep[(poses.keypoint_scores[keep] > 0).any(axis=1)]
    return Predictions(
        image_ids=poses.image_ids[keep],
        category_ids=poses.category_ids[keep],
        keypoints=poses.keypoints[keep],
        scores=scores[keep],
        areas=poses.bboxes_xywh[keep, 2:].prod(axis=1),
    )


def padded_areas(bboxes_xywh: Floats) -> Floats:
    """(D,) areas of boxes after padding to the pose estimator's aspect ratio."""
    width, height = (bboxes_xywh[:, 2:] * BOX_PADDING).T
    return np.asarray(np.maximum(width, height * BOX_ASPECT) * np.maximum(height, width / BOX_ASPECT))


def oks_nms(
    image_ids: Integers, keypoints: Floats, scores: Floats, areas: Floats, sigmas: Floats
) -> Integers:
    """Greedy non-maximum suppression by OKS over all K keypoints, on the mean of both areas.

    Returns:
        Positions of those kept, ascending.
    """
    order = np.lexsort((-scores, image_ids))
    first, second = _pairs(image_ids[order], image_ids[order])
    first, second = order[first[second > first]], order[second[second > first]]  # the first scores higher
    squared = ((keypoints[first] - keypoints[second]) ** 2).sum(axis=-1)
    scale = (areas[first] + areas[second]) / 2
    alike = _similarity(squared, scale, sigmas).mean(axis=-1) > NMS_THRESHOLD
    keep = np.ones(len(scores), bool)
    for winner, loser in zip(first[alike].tolist(), second[alike].tolist(), strict=True):
        if keep[winner]:  # pairs come by falling score of the first, so its own fate is settled
            keep[loser] = False
    return np.flatnonzero(keep)


def _similarity(squared_px: Floats, areas: Floats, sigmas: Floats) -> Floats:
    """(P, K) keypoint similarities of squared distances (P, K) on objects of areas (P,)."""
    return np.asarray(np.exp(-squared_px / (2 * sigmas) ** 2 / (areas[:, None] + _EPSILON) / 2))


def _pairs(keys: NDArray[Any], other_keys: NDArray[Any]) -> tuple[Integers, Integers]:
    """Positions of all equal pairs, by the first key's position and then the other's; ``other_keys`` is sorted."""
    start = np.searchsorted(other_keys, keys, side="left")
    counts = np.searchsorted(other_keys, keys, side="right") - start
    firsts = np.repeat(np.arange(len(keys)), counts)
    within = np.arange(len(firsts)) - np.repeat(np.cumsum(counts) - counts, counts)
    return firsts, start[firsts] + within


# Matching


@dataclass(frozen=True, kw_only=True, eq=False)
class Matches:
    """The fate of each prediction that counts, in ranking order: by category, falling score, then image.

    Attributes:
        truth: what they were matched with.
        image_of, category_of: (D,) int64, positions in the ground truth's images and categories.
        matched: (D, T, A) bool: found an instance.
        ignored: (D, T, A) bool: found one that does not count, or found none and lies outside the area range.
        not_counted: (G, A) bool: instances that do not count: ignored, or outside the area range.
        best_oks: (G,) float64: each instance's highest OKS with any prediction of its image and category, 0 without.
    """

    truth: GroundTruth
    image_of: Integers
    category_of: Integers
    matched: Booleans
    ignored: Booleans
    not_counted: Booleans
    best_oks: Floats

    @functools.cached_property
    def curves(self) -> Curves:
        return _curves(self)

    def counted_images(self, area_range: str) -> Booleans:
        """(I, C) whether an image has an instance of this category and in this range of ``AREA_RANGES`` that counts."""
        counted = ~self.not_counted[:, list(AREA_RANGES).index(area_range)]
        found = np.zeros((len(self.truth.image_ids), len(self.truth.category_ids)), bool)
        found[self.truth.image_of[counted], self.truth.category_of[counted]] = True
        return found


def match(truth: GroundTruth, predictions: Predictions, sigmas: Floats) -> Matches:
    """Match predictions greedily, the highest score first, as pycocotools' ``COCOeval.evaluateImg`` does.

    A prediction takes the free instance of its image and category with the highest OKS (of equal ones the last), and
    one that does not count only where no other reaches the threshold; a crowd can be taken again and again.
    """
    C = len(truth.category_ids)
    image_of = np.searchsorted(truth.image_ids, predictions.image_ids)
    category_of = np.searchsorted(truth.category_ids, predictions.category_ids)
    cell, truth_cell = image_of * C + category_of, truth.image_of * C + truth.category_of
    order = np.lexsort((-predictions.scores, cell))
    rank = _rank_in_run(cell[order])
    order, rank = order[rank < MAX_PREDICTIONS], rank[rank < MAX_PREDICTIONS]
    truth_order = np.argsort(truth_cell, kind="stable")
    pair_prediction, pair_truth = _pairs(cell[order], truth_cell[truth_order])
    pair_truth = truth_order[pair_truth]
    oks = _oks(truth, predictions.keypoints[order], pair_prediction, pair_truth, sigmas)

    low, high = np.array(list(AREA_RANGES.values())).T
    not_counted = truth.ignored[:, None] | ~_within(truth.areas, low, high)
    matched, ignored = _match_by_rank(oks, rank, pair_prediction, pair_truth, not_counted, truth.crowd)
    ignored |= ~matched & ~_within(predictions.areas[order], low, high)[:, None, :]

    best_oks = np.zeros(len(truth.areas))
    np.maximum.at(best_oks, pair_truth, oks)
    ranking = np.lexsort((rank, image_of[order], -predictions.scores[order], category_of[order]))
    order = order[ranking]
    return Matches(
        truth=truth,
        image_of=image_of[order],
        category_of=category_of[order],
        matched=matched[ranking],
        ignored=ignored[ranking],
        not_counted=not_counted,
        best_oks=best_oks,
    )


def _rank_in_run(keys: Integers) -> Integers:
    """Place of each within its run of equal keys."""
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]][: len(keys)])
    return np.arange(len(keys)) - np.repeat(starts, np.diff(np.r_[starts, len(keys)]))


def _within(areas: Floats, low: Floats, high: Floats) -> Booleans:
    """(N, A)"""
    return (areas[:, None] >= low) & (areas[:, None] <= high)


def _oks(
    truth: GroundTruth, keypoints: Floats, pair_prediction: Integers, pair_truth: Integers, sigmas: Floats
) -> Floats:
    """(P,) object keypoint similarity over the labelled keypoints, on the instance's annotated area.

    Where no keypoint is labelled, the distances are those to twice the instance's box.
    """
    found, annotated = keypoints[pair_prediction], truth.keypoints[pair_truth]
    labelled = annotated[..., 2] > 0
    offsets = found - annotated[..., :2]
    blank = ~labelled.any(axis=1)
    if blank.any():
        corner, size = np.split(truth.bboxes_xywh[pair_truth[blank]][:, None], 2, axis=-1)
        before, after = (corner - size) - found[blank], found[blank] - (corner + 2 * size)
        offsets[blank] = np.maximum(before, 0) + np.maximum(after, 0)
        labelled[blank] = True
    similarity = _similarity((offsets**2).sum(axis=-1), truth.areas[pair_truth], sigmas)
    return np.asarray(np.where(labelled, similarity, 0).sum(axis=1) / labelled.sum(axis=1))


def _match_by_rank(
    oks: Floats,
    rank: Integers,
    pair_prediction: Integers,
    pair_truth: Integers,
    not_counted: Booleans,
    crowd: Booleans,
) -> tuple[Booleans, Booleans]:
    """``matched`` and ``ignored``, (D, T, A): first all predictions that rank highest in their image and category, for
    all thresholds and area ranges at once, then all that rank second, and so on."""
    D, P, T, A = len(rank), len(oks), len(THRESHOLDS), len(AREA_RANGES)
    matched, ignored = np.zeros((D, T, A), bool), np.zeros((D, T, A), bool)
    taken = np.zeros((len(crowd), T, A), bool)
    by_oks = np.lexsort((pair_truth, oks))
    preference = np.empty(P, np.int64)  # a whole number for each pair's OKS, so that equal ones stay in order
    preference[by_oks] = np.arange(P)
    reached = oks[:, None] >= np.minimum(THRESHOLDS, _ALMOST_ONE)  # (P, T)
    for each_rank in range(rank.max(initial=-1) + 1):
        pairs = np.flatnonzero(rank[pair_prediction] == each_rank)
        if not len(pairs):
            continue
        instances = pair_truth[pairs]
        free = ~taken[instances] | crowd[instances, None, None]
        choice = preference[pairs, None, None] + P * ~not_counted[instances][:, None, :]
        choice = np.where(reached[pairs][:, :, None] & free, choice, -1)  # (pairs, T, A)
        starts = np.flatnonzero(np.diff(pair_prediction[pairs], prepend=-1))
        best = np.maximum.reduceat(choice, starts, axis=0)
        which, t, a = np.nonzero(best >= 0)
        instance = pair_truth[by_oks[best[which, t, a] % P]]
        prediction = pair_prediction[pairs[starts]][which]
        matched[prediction, t, a] = True
        ignored[prediction, t, a] = not_counted[instance, a]
        taken[instance, t, a] = True
    return matched, ignored


# Accumulation


@dataclass(frozen=True, kw_only=True, eq=False)
class Curves:
    """All precision-recall curves, one after the other: of each threshold, area range and category, in this order.

    Attributes:
        shape: T, A, C.
        entry_image: (L,) int64, image of each prediction that counts, by falling score.
        hits: (H,) int64, the entries that are true positives.
        hit_image: (H,) int64.
        entry_start: (S,) int64, for each curve that has hits its first entry.
        hit_start: (S,) int64, and its first hit.
        hit_curve: (H,) int64, the hit's place among these S curves.
        curve: (S,) int64, their places among all T x A x C.
        instance_image: the images of the instances that count in each area range, by place in A x C.
        instance_curve: the places in A x C that have instances, ascending.
        instance_start: for each of these places its first instance.
    """

    shape: tuple[int, int, int]
    entry_image: Integers
    hits: Integers
    hit_image: Integers
    entry_start: Integers
    hit_start: Integers
    hit_curve: Integers
    curve: Integers
    instance_image: Integers
    instance_curve: Integers
    instance_start: Integers

    def at(self, weights: NDArray[Any]) -> Scores:
        """Average precision and recall with image i counted ``weights[..., i]`` times.

        Precision is made to fall with recall and read off at ``RECALLS``, as in pycocotools' ``accumulate``.
        """
        T, A, C = self.shape
        weights = np.asarray(weights, np.float64)
        before = weights.shape[:-1]
        positives = np.zeros((*before, A * C))
        if len(self.instance_start):
            counted = weights.take(self.instance_image, axis=-1)
            positives[..., self.instance_curve] = np.add.reduceat(counted, self.instance_start, axis=-1)
        precision, recall = np.zeros((2, *before, T * A * C))
        if len(self.hits):
            seen = _running_sums(weights.take(self.entry_image, axis=-1))
            found = _running_sums(weights.take(self.hit_image, axis=-1))
            true = found[..., 1:] - found.take(self.hit_start[self.hit_curve], axis=-1)
            seen = seen.take(self.hits + 1, axis=-1) - seen.take(self.entry_start[self.hit_curve], axis=-1)
            recalls = true / np.maximum(positives, 1).take((self.curve % (A * C))[self.hit_curve], axis=-1)
            reached = _recalls_reached(recalls)
            steps = np.diff(reached, prepend=0, axis=-1)
            steps[..., self.hit_start] = reached[..., self.hit_start]
            highest = _highest_from_here(true / np.maximum(seen, 1), self.hit_curve)
            total = np.add.reduceat(highest * steps, self.hit_start, axis=-1)
            precision[..., self.curve] = total / len(RECALLS)
            recall[..., self.curve] = recalls[..., np.append(self.hit_start[1:], len(self.hits)) - 1]
        absent = (positives == 0).reshape(*before, 1, A, C)
        return Scores(
            *(np.where(absent, np.nan, each.reshape(*before, T, A, C)) for each in (precision, recall))
        )


def _running_sums(values: Floats) -> Floats:
    """(..., L + 1) sums of the first 0 to L of (..., L) values."""
    sums = np.zeros((*values.shape[:-1], values.shape[-1] + 1))
    np.cumsum(values, axis=-1, out=sums[..., 1:])
    return sums


def _recalls_reached(recalls: Floats) -> Integers:
    """How many of ``RECALLS`` each recall in [0, 1] reaches: ``np.searchsorted(RECALLS, recalls, side="right")``."""
    step = (recalls * (len(RECALLS) - 1)).astype(np.int64)  # right but for rounding
    step -= RECALLS[step] > recalls
    return np.asarray(step + 1 + (_RECALLS_AND_BEYOND[step + 1] <= recalls), np.int64)


def _highest_from_here(precision: Floats, run: Integers) -> Floats:
    """The highest value from each place on to the end of its run; values in [0, 1], runs numbered from 0.

    One pass over all: later runs are lowered so far that they do not reach into earlier ones. That rounds to 1e-12
    where there are thousands of runs.
    """
    lowered = precision - 2.0 * run
    return np.asarray(np.maximum.accumulate(lowered[..., ::-1], axis=-1)[..., ::-1] + 2.0 * run)


def _curves(matches: Matches) -> Curves:
    _, T, A = matches.matched.shape
    C = len(matches.truth.category_ids)
    t, a, prediction = np.nonzero(~matches.ignored.transpose(1, 2, 0))
    curve = (t * A + a) * C + matches.category_of[prediction]  # ascending, since predictions come by category
    hits = np.flatnonzero(matches.matched[prediction, t, a])
    curves, hit_start, hit_curve = np.unique(curve[hits], return_index=True, return_inverse=True)
    instance, area = np.nonzero(~matches.not_counted)
    place = area * C + matches.truth.category_of[instance]
    order = np.argsort(place, kind="stable")
    places, instance_start = np.unique(place[order], return_index=True)
    return Curves(
        shape=(T, A, C),
        entry_image=matches.image_of[prediction],
        hits=hits,
        hit_image=matches.image_of[prediction[hits]],
        entry_start=np.searchsorted(curve, curves),
        hit_start=hit_start,
        hit_curve=hit_curve,
        curve=curves,
        instance_image=matches.truth.image_of[instance[order]],
        instance_curve=places,
        instance_start=instance_start,
    )


def _mean(values: Floats, axes: int) -> Floats:
    """Means over the last axes of those that are not NaN; NaN of none."""
    values = values.reshape(*values.shape[: values.ndim - axes], -1)
    valid = ~np.isnan(values)
    count = valid.sum(axis=-1)
    total = np.where(valid, values, 0).sum(axis=-1)
    return np.asarray(np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0))

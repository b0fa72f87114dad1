"""Scores of one method: each metric's value with its bootstrap interval, also of species, scenarios and keypoints.

From what the networks found (poses, features, cosines) to numbers. Everything here is cheap, and is done again when a
parameter of the metric changes; the networks are not run again.

Legend: I images, R resamples, F features.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from eval.bootstrap import bootstrap, difference, interval, weighted_mean
from eval.diversity import diversity
from eval.fid import ResampledFid, Statistics, TooFewImagesWarning, fid
from eval.instances import NO_ANNOTATION, GroundTruth, Integers, Poses
from eval.kid import ResampledKid, kid
from eval.openmmlab import people_counting_error
from eval.pck import pck
from eval.pose_ap import METRICS as AP_METRICS
from eval.pose_ap import THRESHOLDS, evaluate, scenario_weights
from eval.settings import DetectionArea, Intervals
from spctrl.arrays import read_arrays
from spctrl.errors import ExpectedError
from spctrl.parquet import read_table

Floats = NDArray[np.float64]
SCORES, SAMPLES = "scores.parquet", "samples.npz"
NOT_A_NUMBER = "its value is not a number"

SCORES_SCHEMA = pa.schema(
    [
        ("metric", pa.string()),
        ("kind", pa.string()),
        ("group", pa.string()),
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("reason", pa.string()),
    ]
)
"""One row per number. ``kind`` is empty for the number of all images, else ``species``, ``scenario``, ``keypoint`` or
``oks_threshold``, and ``group`` the one of these. ``reason`` says why a value is NaN; empty of a number."""


class Score(NamedTuple):
    """A row of ``SCORES_SCHEMA``."""

    metric: str
    kind: str
    group: str
    value: float
    low: float
    high: float
    reason: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """What one evaluation stage found.

    Attributes:
        rows: the numbers.
        samples: (R,) by metric, of the numbers of all images: for differences between methods.
        image_ids: (I,) int64, the images that were drawn from.
        centred: whether the samples were shifted to the value (see ``eval.bootstrap.interval``).
    """

    rows: list[Score]
    samples: dict[str, Floats]
    image_ids: Integers
    centred: bool = False


class Name(NamedTuple):
    """Which number: columns of ``SCORES_SCHEMA``."""

    metric: str
    kind: str = ""
    group: str = ""


def _scores(
    names: Sequence[Name],
    values: Sequence[float],
    statistic: Callable[[NDArray[np.int64]], Any],
    image_ids: Integers,
    intervals: Intervals,
    *,
    centred: bool = False,
    reasons: Mapping[str, str] | None = None,
) -> Scores:
    """Scores of a statistic that gives the named numbers for weights (I,); ``reasons`` by metric, of NaN values."""
    samples = bootstrap(statistic, len(image_ids), intervals.resamples, intervals.seed)
    samples = samples.reshape(intervals.resamples, len(names))
    rows = [
        Score(
            *name,
            *interval(value, each, intervals.level, centred=centred),
            (reasons or {}).get(name.metric, NOT_A_NUMBER) if np.isnan(value) else "",
        )
        for name, value, each in zip(names, values, samples.T, strict=True)
    ]
    overall = {name.metric: each for name, each in zip(names, samples.T, strict=True) if not name.kind}
    return Scores(rows=rows, samples=overall, image_ids=image_ids, centred=centred)


def pose_scores(
    poses: Poses,
    truth: GroundTruth,
    dataset: str,
    intervals: Intervals,
    *,
    pck_threshold: float,
    detection_area: DetectionArea = "bbox",
) -> tuple[Scores, Floats]:
    """Pose AP with its relatives, of all images and by species, scenario and OKS threshold, and PCK by keypoint.

    Of poses in detected boxes it is the people counting error instead of PCK: no keypoint is known to be whose.

    Returns:
        The scores, and (G,) each annotated instance's OKS.
    """
    result = evaluate(poses, truth, dataset, detection_area=detection_area)
    curves = result.matches.curves
    inside = list(scenario_weights(truth).items())
    present = [i for i, name in enumerate(truth.category_names) if name in result.per_category]
    names = [
        *(Name(metric) for metric in AP_METRICS),
        *(Name("AP", "species", truth.category_names[i]) for i in present),
        *(Name("AP", "oks_threshold", f"{each:.2f}") for each in THRESHOLDS),
        *(Name("AP", "scenario", name) for name, _ in inside),
    ]

    def of_all(weights: NDArray[Any]) -> Floats:
        found = curves.at(weights)
        scenarios = [curves.at(weights * mask).summary()[0] for _, mask in inside]
        return np.concatenate(
            [found.summary(), found.per_category()[present], found.per_threshold(), scenarios]
        )

    every = np.ones(len(truth.image_ids), np.int64)
    reasons = _reasons(truth)
    ap = _scores(names, of_all(every).tolist(), of_all, truth.image_ids, intervals, reasons=reasons)
    if (poses.annotation_ids == NO_ANNOTATION).any():
        near = counting_scores(poses, truth, intervals)
    else:
        correct = pck(poses, truth, dataset, pck_threshold)
        keypoints = [Name("PCK"), *(Name("PCK", "keypoint", name) for name in correct.keypoint_names)]
        values = correct.at(every).tolist()
        near = _scores(keypoints, values, correct.at, truth.image_ids, intervals, reasons=reasons)
    scores = Scores(
        rows=ap.rows + near.rows, samples={**ap.samples, **near.samples}, image_ids=truth.image_ids
    )
    return scores, result.matches.best_oks


def _reasons(truth: GroundTruth) -> dict[str, str]:
    """Why a metric of poses may have no value."""
    if truth.ignored.all():
        uncounted = f"all {len(truth.ignored):,} instances are crowds or have num_keypoints = 0"
        return dict.fromkeys((*AP_METRICS, "PCK"), uncounted)
    return {
        "AP-M": "no instance is of medium area",
        "AP-L": "no instance is of large area",
        "PCK": "no labelled keypoint belongs to a box inside its image",
    }


def counting_scores(poses: Poses, truth: GroundTruth, intervals: Intervals) -> Scores:
    """By how much the number of people found in an image is off, on average; an image that is not there has none."""
    I = len(truth.image_ids)  # noqa: E741 - as in the legend
    found = np.bincount(np.searchsorted(truth.image_ids, poses.image_ids), minlength=I)
    annotated = np.bincount(truth.image_of[~truth.crowd], minlength=I)
    errors = people_counting_error(found.tolist(), annotated.tolist())
    return mean_scores(
        "counting error", dict(zip(truth.image_ids.tolist(), errors.tolist(), strict=True)), intervals
    )


class Features(NamedTuple):
    """Inception features (I, F) float32 of images by id, ascending."""

    image_ids: Integers
    values: NDArray[np.float32]


def of_same_images(first: Features, second: Features) -> tuple[Integers, Floats, Floats]:
    """Ids of the images of which both have features, and both sides' features of them."""
    ids, a, b = np.intersect1d(first.image_ids, second.image_ids, assume_unique=True, return_indices=True)
    if len(ids) < 2:
        raise ExpectedError(f"expected features of at least 2 images of both sides, found {len(ids)}")
    return ids, first.values[a].astype(np.float64), second.values[b].astype(np.float64)


def fid_scores(
    real: Features,
    fake: Features,
    real_statistics: Statistics,
    fake_statistics: Statistics,
    intervals: Intervals,
) -> tuple[Scores, list[str]]:
    """FID of all images, and what is to be said of it (too few images)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TooFewImagesWarning)
        value = fid(real_statistics, fake_statistics)
    ids, *both = of_same_images(real, fake)
    scores = _scores([Name("FID")], [value], ResampledFid(*both), ids, intervals, centred=True)
    return scores, [str(each.message) for each in caught if each.category is TooFewImagesWarning]


def kid_scores(
    real: Features, fake: Features, intervals: Intervals, *, subsets: int, subset_size: int
) -> Scores:
    """KID of all images, not scaled."""
    value = kid(real.values, fake.values, subsets=subsets, subset_size=subset_size).mean
    ids, *both = of_same_images(real, fake)
    return _scores([Name("KID")], [value], ResampledKid(*both), ids, intervals, centred=True)


def mean_scores(metric: str, values: Mapping[int, float], intervals: Intervals) -> Scores:
    """The mean of a number that each image has, by image id."""
    ids = np.array(sorted(values), np.int64)
    each = np.array([values[image_id] for image_id in ids.tolist()])
    return _scores(
        [Name(metric)], [float(each.mean())], lambda weights: weighted_mean(each, weights), ids, intervals
    )


def diversity_scores(features: NDArray[np.float32], poses: Integers, intervals: Intervals) -> Scores:
    """Mean distance between two images of a pose, over the poses that have several."""
    ids, counts = np.unique(poses, return_counts=True)
    several = np.isin(poses, ids[counts > 1])
    return mean_scores("diversity", diversity(features[several], poses[several]), intervals)


# Files


def write_scores(scores: Scores, table: Path, samples: Path) -> None:
    """Write the numbers as Parquet (``SCORES_SCHEMA``) and the resamples as ``.npz``."""
    rows = [score._asdict() for score in scores.rows]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCORES_SCHEMA), table, compression="zstd")
    with samples.open("wb") as file:
        samples_by_name: dict[str, Any] = dict(scores.samples)
        np.savez(file, image_ids=scores.image_ids, centred=np.array(scores.centred), **samples_by_name)


def read_scores(folder: Path) -> Scores:
    """What ``write_scores`` wrote into a folder as ``SCORES`` and ``SAMPLES``."""
    rows = read_table(folder / SCORES).to_pylist()
    samples = read_arrays(folder / SAMPLES)
    return Scores(
        rows=[Score(**row) for row in rows],
        image_ids=samples.pop("image_ids"),
        centred=bool(samples.pop("centred")),
        samples=samples,
    )


class Difference(NamedTuple):
    """How much more one method has of a metric than another, on the same images and resamples."""

    metric: str
    method: str
    other: str
    value: float
    low: float
    high: float


def differences(metric: str, of_methods: Mapping[str, Scores], level: float) -> list[Difference]:
    """Paired differences of all pairs of methods that were measured on the same images."""
    found = []
    names = list(of_methods)
    for position, method in enumerate(names):
        for other in names[position + 1 :]:
            a, b = of_methods[method], of_methods[other]
            if not np.array_equal(a.image_ids, b.image_ids):
                continue
            value, other_value = (_overall(each, metric).value for each in (a, b))
            if np.isnan(value - other_value):
                continue
            offset = difference(
                value, a.samples[metric], other_value, b.samples[metric], level, centred=a.centred
            )
            found.append(Difference(metric, method, other, *offset))
    return found


def _overall(scores: Scores, metric: str) -> Score:
    return next(row for row in scores.rows if row.metric == metric and not row.kind)

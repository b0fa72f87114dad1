"""Scores of one method: each metric's value with its bootstrap interval, also of species, scenarios and keypoints.

From what the networks found (poses, features, cosines) to numbers. Everything here is cheap, and is done again when a
parameter of the metric changes; the networks are not run again.

Legend: I images, R resamples, F features.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from eval.bootstrap import (
    FEW_IMAGES,
    MIN_IMAGES,
    Interval,
    Statistic,
    Support,
    bootstrap,
    few_images,
    interval,
    normal_interval,
    rescaled,
    subsamples,
    support,
    weighted_mean,
)
from eval.diversity import diversity
from eval.fid import Statistics, TooFewImagesWarning, fid
from eval.fid_subsets import PairedFid, random_half
from eval.instances import NO_ANNOTATION, GroundTruth, Integers, Poses
from eval.kid import PairedKid, kid
from eval.openmmlab import people_counting_error
from eval.pck import Pck, pck
from eval.pose_ap import AREA_RANGES, THRESHOLDS, PoseAp, evaluate, scenario_weights
from eval.pose_ap import METRICS as AP_METRICS
from eval.settings import Intervals, KidSettings, PoseApSettings
from spctrl.errors import ExpectedError
from spctrl.io.arrays import read_arrays
from spctrl.io.parquet import read_table

Floats = NDArray[np.float64]
SCORES, SAMPLES = "scores.parquet", "samples.npz"
NOT_A_NUMBER = "its value is not a number"
FID_INFINITY = "FID-infinity"
FID_SPLITS = 20
"""Pairs of random halves of the images from which FID is extrapolated."""
MAX_FID_INFINITY_RESAMPLES = 100
"""Each takes two FIDs of half the images."""
FID_IMAGES_PER_FEATURE = 10
"""With fewer, what remains of FID's bias after extrapolation may be as large as its interval."""

SCORES_SCHEMA = pa.schema(
    [
        ("metric", pa.string()),
        ("kind", pa.string()),
        ("group", pa.string()),
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("images", pa.int64()),
        ("few", pa.bool_()),
        ("spread", pa.float64()),
        ("degrees_of_freedom", pa.float64()),
        ("reason", pa.string()),
    ]
)
"""One row per number. ``kind`` is empty for the number of all images, else ``species``, ``scenario``, ``keypoint`` or
``oks_threshold``, and ``group`` the one of these. ``images`` is how many it is based on, ``few`` whether they are too
few to trust it; ``spread`` and ``degrees_of_freedom`` are those of ``eval.bootstrap.FewImages``. ``reason`` says why
there is no value, or no interval; else it is empty."""


class Score(NamedTuple):
    """A row of ``SCORES_SCHEMA``."""

    metric: str
    kind: str
    group: str
    value: float
    low: float
    high: float
    images: int
    few: bool = False
    spread: float = 1.0
    degrees_of_freedom: float = math.inf
    reason: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """What one evaluation stage found.

    Attributes:
        rows: the numbers.
        samples: (R,) by metric, of the numbers of all images: for differences between methods.
        image_ids: (I,) int64, the images that were resampled.
    """

    rows: list[Score]
    samples: dict[str, Floats]
    image_ids: Integers


IntervalMaker = Callable[..., Interval]
"""``interval`` or ``normal_interval`` of ``eval.bootstrap``."""


class Name(NamedTuple):
    """Which number: columns of ``SCORES_SCHEMA``."""

    metric: str
    kind: str = ""
    group: str = ""


def _scores(
    names: Sequence[Name],
    values: Sequence[float],
    samples: Floats,
    supports: Sequence[Support],
    image_ids: Integers,
    level: float,
    reasons: Mapping[str, str] | None = None,
    make_interval: IntervalMaker = interval,
) -> Scores:
    """Scores of the named numbers and their samples (R, numbers); ``reasons`` by metric, of NaN values."""
    rows = [
        _score(name, value, each, of, level, (reasons or {}).get(name.metric, NOT_A_NUMBER), make_interval)
        for name, value, each, of in zip(names, values, samples.T, supports, strict=True)
    ]
    overall = {name.metric: each for name, each in zip(names, samples.T, strict=True) if not name.kind}
    return Scores(rows=rows, samples=overall, image_ids=image_ids)


def _score(
    name: Name,
    value: float,
    samples: Floats,
    of: Support,
    level: float,
    reason: str,
    make_interval: IntervalMaker,
) -> Score:
    if np.isnan(value):
        return Score(*name, value, np.nan, np.nan, of.images, reason=reason)
    if of.images < MIN_IMAGES:
        reason = f"no interval of fewer than {MIN_IMAGES} images"
        return Score(*name, value, np.nan, np.nan, of.images, of.few, reason=reason)
    few = few_images(of)
    found = make_interval(value, samples, level, expanded=few.expansion((1 - level) / 2))
    reason = ""
    if np.isnan(found.low):
        reason = "no interval: no resample has a value"
    elif found.low == found.high:
        found, reason = Interval(value, np.nan, np.nan), "no interval: all resamples have this value"
    return Score(*name, *found, of.images, of.few, *few, reason)


def _bootstrapped(
    names: Sequence[Name],
    statistic: Statistic,
    supports: Sequence[Support],
    image_ids: Integers,
    intervals: Intervals,
    reasons: Mapping[str, str] | None = None,
    *,
    size: int = 0,
) -> Scores:
    """Scores of a statistic that has the named numbers (B, numbers) for weights (B, I); see ``bootstrap``."""
    samples = bootstrap(statistic, len(image_ids), intervals.resamples, intervals.seed, size=size)
    samples = samples.reshape(intervals.resamples, len(names))
    values = np.asarray(statistic(np.ones((1, len(image_ids)), np.int64)), np.float64).reshape(-1)
    return _scores(names, values.tolist(), samples, supports, image_ids, intervals.level, reasons)


def pose_scores(
    poses: Poses,
    truth: GroundTruth,
    dataset: str,
    intervals: Intervals,
    settings: PoseApSettings,
) -> tuple[Scores, Floats]:
    """Pose AP with its relatives, of all images and by species, scenario and OKS threshold, and PCK by keypoint.

    Of poses in detected boxes it is the people counting error instead of PCK: no keypoint is known to be whose.

    Returns:
        The scores, and (G,) each annotated instance's OKS.
    """
    result = evaluate(poses, truth, dataset, detection_area=settings.detection_area)
    ap = _ap_scores(result, truth, msgspec.structs.replace(intervals, resamples=settings.resamples))
    if (poses.annotation_ids == NO_ANNOTATION).any():
        near = counting_scores(poses, truth, intervals)
    else:
        near = _pck_scores(pck(poses, truth, dataset, settings.pck_threshold), truth, intervals)
    scores = Scores(
        rows=ap.rows + near.rows, samples={**ap.samples, **near.samples}, image_ids=truth.image_ids
    )
    return scores, result.matches.best_oks


def _ap_scores(result: PoseAp, truth: GroundTruth, intervals: Intervals) -> Scores:
    curves = result.matches.curves
    inside = scenario_weights(truth)
    present = [i for i, name in enumerate(truth.category_names) if name in result.per_category]
    counted = {area: result.matches.counted_images(area) for area in AREA_RANGES}
    of_all = support(counted["all"])
    rows = {
        **{Name(metric): of_all for metric in AP_METRICS},
        Name("AP-M"): support(counted["medium"]),
        Name("AP-L"): support(counted["large"]),
        **{Name("AP", "species", truth.category_names[i]): support(counted["all"][:, i]) for i in present},
        **{Name("AP", "oks_threshold", f"{each:.2f}"): of_all for each in THRESHOLDS},
        **{
            Name("AP", "scenario", name): support(counted["all"] & mask[:, None])
            for name, mask in inside.items()
        },
    }

    def statistic(weights: NDArray[Any]) -> Floats:
        found = curves.at(weights)
        scenarios = [curves.at(weights * mask).summary()[..., :1] for mask in inside.values()]
        parts = found.summary(), found.per_category()[..., present], found.per_threshold(), *scenarios
        return np.concatenate(parts, axis=-1)

    return _bootstrapped(
        list(rows),
        statistic,
        list(rows.values()),
        truth.image_ids,
        intervals,
        _reasons(truth),
        size=len(curves.entry_image),
    )


def _pck_scores(correct: Pck, truth: GroundTruth, intervals: Intervals) -> Scores:
    labelled = correct.labelled_images()
    names = [Name("PCK"), *(Name("PCK", "keypoint", name) for name in correct.keypoint_names)]
    supports = [support(np.asarray(labelled.any(axis=1))), *(support(each) for each in labelled.T)]
    return _bootstrapped(names, correct.at, supports, truth.image_ids, intervals, _reasons(truth))


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
    scores = _subsampled("FID", value, ids, intervals, lambda left_out: PairedFid(*both).without(left_out))
    return scores, [str(each.message) for each in caught if each.category is TooFewImagesWarning]


def extrapolated_fid_scores(real: Features, fake: Features, intervals: Intervals) -> tuple[Scores, list[str]]:
    """FID of all images, extrapolated to any number of them, and what is to be said of it."""
    ids, *both = of_same_images(real, fake)
    paired, generator = PairedFid(*both), np.random.default_rng(intervals.seed)
    every = np.arange(len(ids))

    halves = [random_half(len(ids), generator) for _ in range(FID_SPLITS)]

    def of_subsamples(left_out: Integers) -> Floats:
        # By the same halves each time, so that what these have by chance is no deviation.
        return np.array(
            [
                paired.extrapolated(np.delete(every, each), found, halves[0])
                for each, found in zip(left_out, paired.without(left_out), strict=True)
            ]
        )

    value = math.nan
    if len(ids) >= FEW_IMAGES:
        of_all = paired.of(every)
        value = float(np.mean([paired.extrapolated(every, of_all, half) for half in halves]))
    fewer = msgspec.structs.replace(intervals, resamples=min(intervals.resamples, MAX_FID_INFINITY_RESAMPLES))
    scores = _subsampled(FID_INFINITY, value, ids, fewer, of_subsamples)
    features = both[0].shape[1]
    if len(ids) >= FID_IMAGES_PER_FEATURE * features:
        return scores, []
    return scores, [
        f"{len(ids):,} images are fewer than {FID_IMAGES_PER_FEATURE} for each of {features:,} features: a part of "
        "FID's bias may remain, and the interval may not hold the true FID"
    ]


def _subsampled(
    metric: str, value: float, ids: Integers, intervals: Intervals, statistic: Callable[[Integers], Floats]
) -> Scores:
    """Scores of a statistic of the images without those of the indices (R, D)."""
    samples = np.full(intervals.resamples, np.nan)
    if len(ids) >= MIN_IMAGES and not math.isnan(value):
        left_out = subsamples(len(ids), intervals.resamples, intervals.seed)
        samples = rescaled(value, statistic(left_out), len(ids), left_out.shape[1])
    of = support(np.ones(len(ids), bool))
    reasons = {FID_INFINITY: f"fewer than {FEW_IMAGES} images"}
    return _scores(
        [Name(metric)], [value], samples[:, None], [of], ids, intervals.level, reasons, normal_interval
    )


def kid_scores(real: Features, fake: Features, intervals: Intervals, settings: KidSettings) -> Scores:
    """KID of all images, not scaled, by the estimator for paired or for independent sets.

    The interval is that of the estimator for paired sets, around the value of the one that is asked for.
    """
    ids, *both = of_same_images(real, fake)
    paired = PairedKid(*both)
    of = support(np.ones(len(ids), bool))
    samples = paired.corrected(bootstrap(paired, len(ids), intervals.resamples, intervals.seed))
    value = paired.value
    if settings.estimator == "independent":
        value = kid(real.values, fake.values, subsets=settings.subsets, subset_size=settings.subset_size).mean
        samples += value - paired.value
    return _scores([Name("KID")], [value], samples[:, None], [of], ids, intervals.level)


def mean_scores(metric: str, values: Mapping[int, float], intervals: Intervals) -> Scores:
    """The mean of a number that each image has, by image id."""
    ids = np.array(sorted(values), np.int64)
    each = np.array([values[image_id] for image_id in ids.tolist()])
    return _bootstrapped(
        [Name(metric)],
        lambda weights: weighted_mean(each, weights)[:, None],
        [support(np.isfinite(each))],
        ids,
        intervals,
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
        np.savez(file, image_ids=scores.image_ids, **samples_by_name)


def read_scores(folder: Path) -> Scores:
    """What ``write_scores`` wrote into a folder as ``SCORES`` and ``SAMPLES``."""
    rows = read_table(folder / SCORES).to_pylist()
    samples = read_arrays(folder / SAMPLES)
    return Scores(
        rows=[Score(**row) for row in rows],
        image_ids=samples.pop("image_ids"),
        samples=samples,
    )

"""Pose AP against pycocotools: the same files, the same numbers."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval.instances import GroundTruth, Poses, read_ground_truth
from eval.pose_ap import METRICS, evaluate, oks_sigmas
from spctrl.data.datasets import AP10K, HUMANART, Dataset

pytest.importorskip("pycocotools")

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

DATA = Path(__file__).parents[3] / "shared" / "data"
VALIDATION = DATA / "ap10k/annotations/ap10k-val-split1.json"
HUMANART_VALIDATION = DATA / "humanart/annotations/validation_humanart.json"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"needs the real data in {DATA}")
EXACT = 1e-9
PLACES = (0, 1, 2, 3, 4, 5)
"""Of AP, AP50, AP75, AP-M, AP-L and AR in pycocotools' statistics."""

Json = dict[str, Any]
Results = list[Json]


def pycocotools_eval(document: Json, results: Results, dataset: Dataset) -> Any:
    """pycocotools' evaluation; it changes what it is given, so it gets copies."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(document)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), "keypoints")
        evaluation.params.kpt_oks_sigmas = oks_sigmas(dataset)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def assert_same(
    document: Json, results: Results, dataset: Dataset = AP10K, detection_area: Any = "bbox"
) -> dict[str, float]:
    """All metrics, and the precision and recall of each threshold, area range and category, are pycocotools'."""
    given = results if detection_area == "bbox" else without_boxes(results)
    theirs = pycocotools_eval(document, given, dataset)
    ours = evaluate(results, document, dataset, detection_area=detection_area)
    expected = np.where(theirs.stats[list(PLACES)] < 0, np.nan, theirs.stats[list(PLACES)])
    np.testing.assert_allclose([ours.scores[name] for name in METRICS], expected, rtol=0, atol=EXACT)
    found = ours.matches.curves.at(np.ones(len(ours.image_ids)))
    precision = theirs.eval["precision"][..., 0].mean(axis=1).transpose(0, 2, 1)  # (T, R, C, A) -> (T, A, C)
    recall = theirs.eval["recall"][..., 0].transpose(0, 2, 1)
    for mine, other in ((found.precision, precision), (found.recall, recall)):
        np.testing.assert_allclose(mine, np.where(other < 0, np.nan, other), rtol=0, atol=EXACT)
    return ours.scores


@pytest.fixture(scope="module")
def validation() -> Json:
    return json.loads(VALIDATION.read_bytes())


def without_boxes(results: Results) -> Results:
    return [{name: value for name, value in each.items() if name != "bbox"} for each in results]


def as_results(document: Json, scores: np.ndarray | None = None) -> Results:
    """The annotations as predictions."""
    return [
        {
            "image_id": each["image_id"],
            "category_id": each["category_id"],
            "keypoints": list(each["keypoints"]),
            "score": 1.0 if scores is None else float(scores[i]),
        }
        for i, each in enumerate(document["annotations"])
    ]


def jittered(document: Json, seed: int, strength: float) -> Results:
    """The annotations moved about, each by its own share of what the sigmas allow, and scored accordingly."""
    rng = np.random.default_rng(seed)
    results = as_results(document)
    for each, annotation in zip(results, document["annotations"], strict=True):
        size = rng.exponential(strength)
        points = np.array(each["keypoints"], float).reshape(-1, 3)
        spread = size * oks_sigmas(AP10K)[:, None] * np.sqrt(annotation["area"])
        points[:, :2] += rng.normal(size=(len(points), 2)) * spread
        each["keypoints"] = points.reshape(-1).tolist()
        each["score"] = float(np.exp(-size) + rng.normal(0, 0.1))
    return results


@needs_data
def test_annotations_as_predictions_score_one(validation: Json) -> None:
    scores = assert_same(validation, as_results(validation))
    assert scores == {name: pytest.approx(1.0, abs=1e-12) for name in METRICS}


@needs_data
def test_annotations_of_other_images_score_near_zero(validation: Json) -> None:
    results = as_results(validation)
    order = np.random.default_rng(0).permutation(len(results))
    for each, other in zip(results, order, strict=True):
        each["keypoints"] = list(validation["annotations"][other]["keypoints"])
    scores = assert_same(validation, results)
    assert scores["AP"] < 0.01 and scores["AP50"] < 0.05


def drop_some(results: Results, rng: np.random.Generator) -> Results:
    return [each for each in results if rng.random() < 0.7]


def duplicate_some(results: Results, rng: np.random.Generator) -> Results:
    copies = [{**copy.deepcopy(each), "score": float(rng.random())} for each in results if rng.random() < 0.5]
    return results + copies


def tie_scores(results: Results, rng: np.random.Generator) -> Results:
    return [{**each, "score": round(each["score"], 1)} for each in results]


def shuffle(results: Results, rng: np.random.Generator) -> Results:
    return [results[i] for i in rng.permutation(len(results))]


def wrong_category(results: Results, rng: np.random.Generator) -> Results:
    return [
        {**each, "category_id": int(rng.integers(1, 3))} if rng.random() < 0.2 else each for each in results
    ]


def with_boxes(results: Results, rng: np.random.Generator) -> Results:
    return [{**each, "bbox": [0.0, 0.0, *(rng.random(2) * 300).tolist()]} for each in results]


@needs_data
@pytest.mark.parametrize("strength", [0.3, 1.0, 2.5])
def test_known_perturbations_score_as_in_pycocotools(validation: Json, strength: float) -> None:
    scores = assert_same(validation, jittered(validation, seed=1, strength=strength))
    assert 0.05 < scores["AP"] < 0.99


@needs_data
@pytest.mark.parametrize(
    "change", [drop_some, duplicate_some, tie_scores, shuffle, wrong_category, with_boxes]
)
def test_odd_result_lists_score_as_in_pycocotools(
    validation: Json, change: Callable[[Results, np.random.Generator], Results]
) -> None:
    results = change(jittered(validation, seed=2, strength=1.0), np.random.default_rng(3))
    assert_same(validation, results)


def random_case(seed: int) -> tuple[Json, Results]:
    """A small data set with all that the protocol treats specially: crowds, blank instances, tied and many predictions,
    areas at the limits of the ranges, images and categories without instances."""
    rng = np.random.default_rng(seed)
    images = [{"id": int(i)} for i in rng.permutation(12) + 1]
    annotations, results = [], []
    for number in range(40):
        box = np.r_[rng.integers(0, 200, 2), rng.integers(10, 120, 2)]
        points = np.c_[box[:2] + rng.random((17, 2)) * box[2:], rng.integers(0, 3, 17)]
        if rng.random() < 0.15:
            points[:] = 0
        annotation = {
            "id": number + 1,
            "image_id": int(rng.integers(1, 9)),
            "category_id": int(rng.integers(1, 4)),
            "bbox": box.tolist(),
            "area": float(rng.choice([32**2, 96**2, box[2] * box[3], 20.0**2])),
            "iscrowd": int(rng.random() < 0.1),
            "num_keypoints": int((points[:, 2] > 0).sum()),
            "keypoints": points.reshape(-1).tolist(),
        }
        annotations.append(annotation)
        for _ in range(rng.integers(0, 12)):
            near = (
                points.copy()
                if points.any()
                else np.c_[box[:2] + rng.random((17, 2)) * 2 * box[2:], np.ones(17)]
            )
            near[:, :2] += rng.normal(size=(17, 2)) * rng.choice([0, 2, 8, 20])
            results.append(
                {
                    "image_id": annotation["image_id"] if rng.random() < 0.9 else int(rng.integers(1, 13)),
                    "category_id": annotation["category_id"],
                    "keypoints": near.reshape(-1).tolist(),
                    "score": float(rng.integers(0, 20) / 20),
                }
            )
    categories = [{"id": i, "name": f"kind {i}"} for i in range(1, 6)]
    return {"images": images, "annotations": annotations, "categories": categories}, results


@pytest.mark.parametrize("seed", range(12))
def test_random_cases_score_as_in_pycocotools(seed: int) -> None:
    document, results = random_case(seed)
    assert_same(document, results)


@pytest.mark.parametrize("seed", range(12))
def test_both_areas_of_detections_score_as_in_pycocotools(seed: int) -> None:
    """With boxes and keypoint extents in all area ranges and at their limits, apart from the instances too."""
    document, results = random_case(seed)
    rng = np.random.default_rng(seed)
    sides = [1, 16, 31, 32, 33, 95, 96, 97, 400, 1e5, 1.1e5]
    for each in results:
        each["bbox"] = [0.0, 0.0, *rng.choice(sides, 2).tolist()]
        if rng.random() < 0.3:
            each["keypoints"] = np.c_[rng.choice(sides, (17, 2)), np.ones(17)].reshape(-1).tolist()
    of_boxes = assert_same(document, results)
    of_keypoints = assert_same(document, results, detection_area="keypoints")
    assert of_boxes["AP-M"] != of_keypoints["AP-M"] or of_boxes["AP-L"] != of_keypoints["AP-L"]


@pytest.mark.parametrize("seed", range(4))
def test_crowded_cells_with_ties_score_as_in_pycocotools(seed: int) -> None:
    """Up to 60 predictions of one image and category, where 20 count, with three different scores."""
    document, results = random_case(seed)
    rng = np.random.default_rng(seed)
    for each in document["annotations"] + results:
        each["image_id"], each["category_id"] = int(rng.choice([3, 5])), int(rng.choice([1, 2]))
    for each in results:
        each["score"] = float(rng.choice([-1.0, 0.0, 1e9]))
    for number, each in enumerate(document["annotations"]):
        each["id"] = int(rng.choice([-1, 1])) * (number + 10**12)
    assert_same(document, results)


@needs_data
def test_humanart_with_its_own_sigmas() -> None:
    document = json.loads(HUMANART_VALIDATION.read_bytes())
    rng = np.random.default_rng(0)
    results = as_results(document)
    for each in results:
        each["keypoints"] = (np.array(each["keypoints"]) + rng.normal(size=51) * 12).tolist()
    assert_same(document, results, HUMANART)
    for each in document["categories"]:
        del each["keypoints"]  # which are not AP-10K's
    ours, others = (evaluate(results, document, dataset).matches.best_oks for dataset in (HUMANART, AP10K))
    assert (ours != others).all()


def repeated(document: Json, results: Results, weights: np.ndarray) -> tuple[Json, Results]:
    """Images as often as their weights say, copies next to each other; weights go by ascending image id."""
    images, annotations, copies = [], [], []
    ids = sorted(image["id"] for image in document["images"])
    for image_id, weight in zip(ids, weights, strict=True):
        for _ in range(weight):
            new = len(images) + 1
            images.append({"id": new})
            for each in document["annotations"]:
                if each["image_id"] == image_id:
                    annotations.append({**each, "image_id": new, "id": len(annotations) + 1})
            copies += [{**each, "image_id": new} for each in results if each["image_id"] == image_id]
    return {"images": images, "annotations": annotations, "categories": document["categories"]}, copies


@pytest.mark.parametrize("seed", range(4))
def test_a_weighting_is_an_evaluation_of_as_many_copies(seed: int) -> None:
    """What bootstrap resamples and scenarios rest on."""
    document, results = random_case(seed)
    scores = np.random.default_rng(seed).permutation(len(results))  # without ties, which copies would reorder
    results = [{**each, "score": float(score)} for each, score in zip(results, scores, strict=True)]
    weights = np.random.default_rng(seed).integers(0, 4, len(document["images"]))
    theirs = pycocotools_eval(*repeated(document, results, weights), AP10K).stats[list(PLACES)]
    ours = evaluate(results, document, "ap10k").at(weights)
    np.testing.assert_allclose(ours, np.where(theirs < 0, np.nan, theirs), rtol=0, atol=EXACT)


@pytest.mark.parametrize("detection_area", ["bbox", "keypoints"])
def test_poses_in_ground_truth_boxes_score_as_mmpose_scores_them(detection_area: Any) -> None:
    """Scored and thinned out in plain loops, written as a COCO list, and given to pycocotools."""
    document, _ = random_case(5)
    truth = read_ground_truth(document)
    rng = np.random.default_rng(0)
    twice = np.repeat(np.arange(len(truth.areas)), 2)
    poses = poses_of(truth, twice, rng)
    results = plain_scoring(poses)
    assert 0 < len(results) < len(twice)  # some were thinned out
    ours = evaluate(poses, document, "ap10k", detection_area=detection_area).scores
    given = results if detection_area == "bbox" else without_boxes(results)
    theirs = pycocotools_eval(document, given, AP10K).stats[list(PLACES)]
    np.testing.assert_allclose([ours[name] for name in METRICS], theirs, rtol=0, atol=EXACT)


def poses_of(truth: GroundTruth, rows: np.ndarray, rng: np.random.Generator) -> Poses:
    keypoints = truth.keypoints[rows, :, :2] + rng.normal(size=(len(rows), 17, 2)) * 3
    return Poses(
        image_ids=truth.image_ids[truth.image_of[rows]],
        category_ids=truth.category_ids[truth.category_of[rows]],
        annotation_ids=truth.annotation_ids[rows],
        bboxes_xywh=truth.bboxes_xywh[rows].astype(float),
        bbox_scores=rng.random(len(rows)),
        keypoints=keypoints,
        keypoint_scores=rng.random((len(rows), 17)) * rng.choice([-1.0, 0.0, 0.1, 1.0], size=(len(rows), 1)),
    )


def plain_scoring(poses: Poses) -> Results:
    """One image and one pair at a time."""
    results: Results = []
    for image_id in np.unique(poses.image_ids):
        found = []
        for i in np.flatnonzero(poses.image_ids == image_id):
            above = [score for score in poses.keypoint_scores[i] if score > 0.2]
            x, y, width, height = poses.bboxes_xywh[i]
            padded_w, padded_h = 1.25 * width, 1.25 * height
            padded_w, padded_h = max(padded_w, padded_h * 0.75), max(padded_h, padded_w / 0.75)
            found.append(
                {
                    "image_id": int(image_id),
                    "category_id": int(poses.category_ids[i]),
                    "keypoints": np.c_[poses.keypoints[i], poses.keypoint_scores[i]].reshape(-1).tolist(),
                    "score": float(poses.bbox_scores[i] * (np.mean(above) if above else 0)),
                    "bbox": [x, y, width, height],
                    "area": padded_w * padded_h,
                }
            )
        found.sort(key=lambda each: -each["score"])
        kept: Results = []
        for each in found:
            if all(plain_oks(each, other) <= 0.9 for other in kept):
                kept.append(each)
        results += [each for each in kept if max(each["keypoints"][2::3]) > 0]  # as xtcocotools does
    return results


def plain_oks(first: Json, second: Json) -> float:
    one, other = (np.array(each["keypoints"]).reshape(-1, 3)[:, :2] for each in (first, second))
    scale = (first["area"] + second["area"]) / 2
    similarities = [
        np.exp(-((x - u) ** 2 + (y - v) ** 2) / (2 * sigma) ** 2 / scale / 2)
        for (x, y), (u, v), sigma in zip(one, other, AP10K.skeleton.oks_sigmas, strict=True)
    ]
    return float(np.mean(similarities))

"""Pose AP and PCK: what may be given, what is refused, and what comes with the numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.bootstrap import bootstrap, interval
from eval.instances import (
    NO_ANNOTATION,
    PREDICTION_SCHEMA,
    GroundTruth,
    InstancesError,
    Poses,
    poses_table,
    read_ground_truth,
    read_poses,
    read_results,
)
from eval.pck import pck
from eval.pose_ap import METRICS, RECALLS, _recalls_reached, evaluate, oks_sigmas, score_poses
from eval.settings import Evaluation, PoseApSettings
from spctrl.data.boxes import clip_boxes
from spctrl.data.datasets import AP10K, HUMANART
from spctrl.data.index import write_index
from spctrl.inference.methods import Method
from tasks.experiment.evaluate import PoseAp as PoseApTask
from tasks.experiment.evaluate import evaluation_json
from tasks.experiment.generate.samples import method_json

Json = dict[str, Any]


@pytest.fixture(scope="module")
def annotation_file(sample: Path) -> Path:
    return sample / "AP-10K/annotations/ap10k-val-split1.json"


@pytest.fixture
def document(annotation_file: Path) -> Json:
    content: Json = json.loads(annotation_file.read_bytes())
    return content


def results_of(document: Json) -> list[Json]:
    return [
        {**{name: each[name] for name in ("image_id", "category_id", "keypoints")}, "score": 0.5 + i / 1000}
        for i, each in enumerate(document["annotations"])
    ]


def poses_of(truth: GroundTruth) -> Poses:
    """The annotations themselves, found with certainty."""
    return Poses(
        image_ids=truth.image_ids[truth.image_of],
        category_ids=truth.category_ids[truth.category_of],
        annotation_ids=truth.annotation_ids,
        bboxes_xywh=truth.bboxes_xywh,
        bbox_scores=np.ones(len(truth.areas)),
        keypoints=truth.keypoints[..., :2].copy(),
        keypoint_scores=np.ones(truth.keypoints.shape[:2]),
    )


def same(found: dict[str, float], expected: dict[str, float]) -> bool:
    """To the last bit, where NaN is the same as NaN."""
    return list(found) == list(expected) and np.array_equal(
        list(found.values()), list(expected.values()), equal_nan=True
    )


# What may be given


def test_files_dicts_tables_and_arrays_give_the_same(
    annotation_file: Path, document: Json, tmp_path: Path
) -> None:
    results = results_of(document)
    results[0]["keypoints"] = (np.array(results[0]["keypoints"]) + 15).tolist()
    (tmp_path / "results.json").write_text(json.dumps(results))
    write_index(annotation_file, AP10K, "val", tmp_path / "index.parquet", max_pixels=10**8)
    records = pq.read_table(tmp_path / "index.parquet", partitioning=None)
    expected = evaluate(results, document, "ap10k").scores
    assert 0.5 < expected["AP"] < 1
    for source in (annotation_file, str(annotation_file), records, read_ground_truth(document)):
        assert same(evaluate(results, source, "ap10k").scores, expected)
    assert same(evaluate(tmp_path / "results.json", document, AP10K).scores, expected)
    assert same(evaluate(read_results(results), document, AP10K).scores, expected)


def test_poses_survive_a_parquet_file(document: Json, tmp_path: Path) -> None:
    truth = read_ground_truth(document)
    poses = poses_of(truth)
    poses = replace(
        poses, annotation_ids=np.where(np.arange(len(poses)) == 0, NO_ANNOTATION, poses.annotation_ids)
    )
    path = tmp_path / "poses.parquet"
    pq.write_table(poses_table(poses), path)
    again = read_poses(path)
    for name in poses.__dataclass_fields__:
        assert np.array_equal(getattr(again, name), getattr(poses, name)), name
    assert same(evaluate(path, truth, "ap10k").scores, evaluate(poses, document, "ap10k").scores)
    assert evaluate(path, truth, "ap10k").scores["AP"] == 1
    assert evaluate(path.rename(tmp_path / "POSES.Parquet"), truth, "ap10k").scores["AP"] == 1


def test_no_predictions_score_zero(document: Json) -> None:
    assert evaluate([], document, "ap10k").scores["AP"] == 0
    assert evaluate(PREDICTION_SCHEMA.empty_table(), document, "ap10k").scores["AR"] == 0


def test_an_unknown_detection_area_is_refused(document: Json) -> None:
    with pytest.raises(ValueError, match="detection_area among bbox, keypoints, found 'box'"):
        evaluate(results_of(document), document, "ap10k", detection_area="box")  # type: ignore[arg-type]


def test_the_detection_area_decides_by_which_range_a_wrong_prediction_counts(document: Json) -> None:
    """One wrong prediction before all right ones: of a tiny box, but with keypoints that are far apart."""
    for each in document["annotations"]:
        each["area"] = 100.0**2
    results = [{**each, "bbox": [0.0, 0.0, 100.0, 100.0]} for each in results_of(document)]
    far = np.c_[np.linspace(0, 5000, 17), np.linspace(0, 5000, 17), np.ones(17)].reshape(-1).tolist()
    results.append({**results[0], "keypoints": far, "score": 1.0, "bbox": [0.0, 0.0, 5.0, 5.0]})
    of_boxes = evaluate(results, document, "ap10k").scores
    of_keypoints = evaluate(results, document, "ap10k", detection_area="keypoints").scores
    assert of_boxes["AP-L"] == 1
    assert of_keypoints["AP-L"] == of_keypoints["AP"] == of_boxes["AP"] < 1


def test_the_detection_area_names_results_only_where_it_is_not_the_default() -> None:
    """So that results from before there was a choice stay valid."""

    def parameters(**options: Any) -> Json:
        how = Evaluation(
            dataset="ap10k",
            methods=[Method(name="real", kind="external", folder="images")],
            pose_ap=PoseApSettings(**options),
        )
        task = PoseApTask(
            dataset="ap10k", split="val", method=method_json(how.methods[0]), evaluation=evaluation_json(how)
        )
        return task.parameters()["pose_ap"]

    defaults = {"pck_threshold": 0.05, "resamples": 1000}
    assert parameters() == parameters(detection_area="bbox") == defaults
    assert parameters(detection_area="keypoints") == {**defaults, "detection_area": "keypoints"}


def test_poses_without_a_positive_keypoint_score_are_left_out(document: Json) -> None:
    truth = read_ground_truth(document)
    poses = poses_of(truth)
    poses.keypoint_scores[0] = -0.5
    poses.keypoint_scores[1] = 0
    poses.keypoint_scores[2] = 0.1  # below the threshold, so that the score is 0
    found = score_poses(poses, oks_sigmas("ap10k"))
    assert len(found) == len(poses) - 2
    assert (found.scores == 0).sum() == 1


def test_an_annotation_of_id_zero_can_be_matched(document: Json) -> None:
    """pycocotools takes it for unmatched."""
    document["annotations"][0]["id"] = 0
    assert evaluate(results_of(document), document, "ap10k").scores["AP"] == 1


def test_area_ranges_without_instances_are_nan(document: Json) -> None:
    for each in document["annotations"]:
        each["area"] = 50.0**2
    scores = evaluate(results_of(document), document, "ap10k").scores
    assert scores["AP-M"] == 1 and np.isnan(scores["AP-L"])


# What comes with the numbers


def test_species_scenarios_and_thresholds(document: Json) -> None:
    results = results_of(document)
    species = {each["id"]: each["name"] for each in document["categories"]}
    lost = document["annotations"][0]["category_id"]
    for number, image in enumerate(document["images"]):
        image["category"] = "cartoon" if number % 2 else ""
    found = evaluate([each for each in results if each["category_id"] != lost], document, "ap10k")
    present = {each["category_id"] for each in document["annotations"]}
    assert found.per_category == {species[each]: float(each != lost) for each in present}
    assert found.scores["AP"] == pytest.approx(np.mean(list(found.per_category.values())))
    assert list(found.per_threshold) == [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
    assert found.per_threshold[0.5] == found.scores["AP50"]
    cartoons = {image["id"] for image in document["images"] if image["category"]}
    only = {
        **document,
        "images": [image for image in document["images"] if image["id"] in cartoons],
        "annotations": [each for each in document["annotations"] if each["image_id"] in cartoons],
    }
    kept = [each for each in results if each["image_id"] in cartoons and each["category_id"] != lost]
    assert found.per_scenario == {"cartoon": pytest.approx(evaluate(kept, only, "ap10k").scores["AP"])}


def test_best_oks_tells_good_cases_from_bad(document: Json) -> None:
    truth = read_ground_truth(document)
    poses = poses_of(truth)
    poses.keypoints[1] += 10_000
    found = evaluate(poses, truth, "ap10k")
    assert found.matches.best_oks[0] == 1 and found.matches.best_oks[1] < 1e-6


# What is refused


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(document: Json, bad: float) -> None:
    results = results_of(document)
    results[3]["keypoints"] = [bad, *results[3]["keypoints"][1:]]
    with pytest.raises(InstancesError, match="keypoints: expected finite numbers, found 1 that are not"):
        evaluate(results, document, "ap10k")
    results = results_of(document)
    results[3]["score"] = bad
    with pytest.raises(InstancesError, match="scores: expected finite numbers, found 1"):
        evaluate(results, document, "ap10k")
    poses = poses_of(read_ground_truth(document))
    poses.keypoint_scores[2, 3] = bad
    with pytest.raises(InstancesError, match="the poses: keypoint_scores: expected finite numbers, found 1"):
        replace(poses)


@pytest.mark.parametrize("what", ["image", "category"])
def test_predictions_for_other_annotations_are_refused(document: Json, what: str) -> None:
    results = results_of(document)
    results[0][f"{what}_id"] = 987654
    with pytest.raises(InstancesError, match=f"found 1 {what} ids that it does not have, such as 987654"):
        evaluate(results, document, "ap10k")


def test_other_numbers_of_keypoints_are_refused(document: Json) -> None:
    results = results_of(document)
    with pytest.raises(InstancesError, match="expected 17 keypoints an instance, found 16"):
        evaluate([{**each, "keypoints": each["keypoints"][:48]} for each in results], document, "ap10k")
    results[0]["keypoints"] = results[0]["keypoints"][:50]
    with pytest.raises(InstancesError, match=r"'keypoints' of all entries cannot be read: .*\[50, 51\]"):
        evaluate(results, document, "ap10k")


def test_incomplete_files_are_refused(document: Json, tmp_path: Path) -> None:
    with pytest.raises(InstancesError, match=r"none\.json: cannot be read: No such file"):
        evaluate([], tmp_path / "none.json", "ap10k")
    (tmp_path / "cut.json").write_text(json.dumps(document)[:-20])
    with pytest.raises(InstancesError, match=r"cut\.json: cannot be read as JSON"):
        evaluate([], tmp_path / "cut.json", "ap10k")
    (tmp_path / "latin.json").write_bytes(b'{"images": [],\n"note": "caf\xe9"}')
    with pytest.raises(
        InstancesError,
        match=r"latin\.json: cannot be read as JSON: expected text in UTF-8, .* line 2, byte 27.*LATIN1",
    ):
        evaluate([], tmp_path / "latin.json", "ap10k")
    with pytest.raises(InstancesError, match="expected the section 'images', found annotations"):
        evaluate([], {"annotations": []}, "ap10k")
    with pytest.raises(InstancesError, match="expected a COCO file's path or content, found list"):
        evaluate([], document["annotations"], "ap10k")
    with pytest.raises(InstancesError, match="'name' of all entries cannot be read: an entry has none"):
        evaluate([], {**document, "categories": [{"id": 1}]}, "ap10k")
    boxless = [{**each, "bbox": each["bbox"][:3]} for each in document["annotations"]]
    with pytest.raises(InstancesError, match=r"'bbox': expected x, y, width and height, found shape \(3,\)"):
        evaluate([], {**document, "annotations": boxless}, "ap10k")
    nameless = [{"file_name": "1.jpg"}, *document["images"]]
    with pytest.raises(InstancesError, match="'id' of all entries cannot be read: an entry has none"):
        evaluate([], {**document, "images": nameless}, "ap10k")
    with pytest.raises(InstancesError, match="expected annotated instances, found none"):
        evaluate([], {**document, "annotations": []}, "ap10k")
    with pytest.raises(InstancesError, match="expected each image once"):
        evaluate([], {**document, "images": [*document["images"], document["images"][0]]}, "ap10k")
    with pytest.raises(InstancesError, match="'score' of all entries cannot be read: an entry has none"):
        evaluate([{k: v for k, v in results_of(document)[0].items() if k != "score"}], document, "ap10k")
    with pytest.raises(InstancesError, match=r"expected the columns image_id, .* found no 'annotation_id'"):
        evaluate(pa.table({"image_id": [1]}), document, "ap10k")
    with pytest.raises(InstancesError, match=r"poses\.parquet: cannot be read"):
        evaluate(tmp_path / "poses.parquet", document, "ap10k")
    with pytest.raises(ValueError, match="expected a dataset among ap10k, humanart, found 'coco'"):
        evaluate([], document, "coco")


# What a file does not state


@pytest.mark.parametrize("stated", ["absent", None, []])
def test_a_box_that_is_not_there_is_the_extent_of_the_labelled_keypoints(
    document: Json, stated: object
) -> None:
    results = results_of(document)
    for position, each in enumerate(document["annotations"]):
        x, y, v = np.reshape(each["keypoints"], (-1, 3)).T
        if position % 2 or not (v > 0).any():
            continue
        x, y = x[v > 0], y[v > 0]
        each["bbox"] = [float(number) for number in (x.min(), y.min(), np.ptp(x), np.ptp(y))]
        each["area"] = None
    expected = read_ground_truth(document)
    scores = evaluate(results, document, "ap10k").scores
    for position, each in enumerate(document["annotations"]):
        if position % 2 == 0 and any(each["keypoints"][2::3]):
            each["bbox"] = stated
            if stated == "absent":
                del each["bbox"]
    found = read_ground_truth(document)
    assert np.array_equal(found.bboxes_xywh, expected.bboxes_xywh)
    assert np.array_equal(found.areas, expected.areas)
    assert evaluate(results, document, "ap10k").scores == pytest.approx(scores, nan_ok=True)
    document["annotations"][0] |= {"bbox": None, "keypoints": [5, 6, 0] * 17, "num_keypoints": 0}
    found = read_ground_truth(document)
    assert found.ignored[0] and found.bboxes_xywh[0].tolist() == [0, 0, 0, 0]
    for numbers in ([None] * 4, [1, 2, float("nan"), 4]):
        document["annotations"][1]["bbox"] = numbers
        with pytest.raises(InstancesError, match="bbox: expected finite numbers"):
            read_ground_truth(document)


@pytest.mark.parametrize("area", ["absent", None, 0, -3.0, float("nan")])
def test_an_area_that_is_not_there_is_never_zero(document: Json, area: object) -> None:
    results = results_of(document)
    for each in results:
        each["keypoints"] = (np.array(each["keypoints"]) + 1).tolist()
    expected = evaluate(results, document, "ap10k").scores["AP"]
    assert expected > 0.9
    for each in document["annotations"]:
        each["area"] = area
        if area == "absent":
            del each["area"]
    truth = read_ground_truth(document)
    assert truth.areas == pytest.approx(0.53 * truth.clipped_bboxes_xywh[:, 2:].prod(axis=1))
    assert evaluate(results, document, "ap10k").scores["AP"] == pytest.approx(expected, abs=0.1)
    document["annotations"][0]["segmentation"] = [[0, 0, 8, 0, 8, 6, 0, 6]]
    assert read_ground_truth(document).areas[0] == 48


@pytest.mark.parametrize("number", ["absent", None])
def test_labelled_keypoints_are_counted(document: Json, number: object) -> None:
    expected = evaluate(results_of(document), document, "ap10k").scores
    for each in document["annotations"]:
        each["num_keypoints"] = number
        if number == "absent":
            del each["num_keypoints"]
    assert same(evaluate(results_of(document), document, "ap10k").scores, expected)


def test_numbers_may_be_written_as_in_builds(document: Json) -> None:
    expected = evaluate(results_of(document), document, "ap10k").scores
    results = results_of(document)
    for each in document["annotations"]:
        each |= {"iscrowd": "0", "image_id": str(each["image_id"]), "category_id": float(each["category_id"])}
    for each in (*document["categories"], *document["images"]):
        each["id"] = str(each["id"])
    assert same(evaluate(results, document, "ap10k").scores, expected)
    document["categories"][0]["keypoints"] = document["categories"][0]["keypoints"][::-1]
    for each in document["annotations"]:
        each["category_id"] = document["categories"][0]["id"]
    with pytest.raises(InstancesError, match="in the order"):
        evaluate([], document, "ap10k")


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("annotations", {"area": "559104"}), ("annotations", {"area": True}), ("annotations", {"area": 10**400}),
        ("annotations", {"num_keypoints": 2.5}), ("annotations", {"num_keypoints": [1]}),
        ("annotations", {"num_keypoints": 10**30}), ("annotations", {"image_id": True}),
        ("annotations", {"iscrowd": "no"}), ("annotations", {"category_id": [1]}), ("images", {"width": "abc"}),
        ("images", {"height": [1]}), ("categories", {"id": [1]}), ("categories", {"keypoints": 5}),
        ("categories", {"keypoints": [1] * 17}),
    ],
)  # fmt: skip
def test_what_is_no_number_is_refused(document: Json, section: str, values: Json) -> None:
    used = document["annotations"][0]["category_id"]
    entry = next(each for each in document[section] if section != "categories" or each["id"] == used)
    entry |= values
    with pytest.raises(InstancesError):
        evaluate(results_of(document)[1:], document, "ap10k")


def test_ids_that_are_no_whole_numbers_are_refused(document: Json) -> None:
    document["annotations"][1]["image_id"] += 0.5
    with pytest.raises(
        InstancesError, match="'image_id' of all entries cannot be read: expected whole numbers"
    ):
        read_ground_truth(document)


def test_a_category_id_that_comes_twice_is_refused(document: Json) -> None:
    document["categories"].append({**document["categories"][0], "name": "another"})
    with pytest.raises(InstancesError, match="expected each category id once"):
        read_ground_truth(document)


def test_categories_that_share_a_name_are_told_apart(document: Json) -> None:
    used = sorted({each["category_id"] for each in document["annotations"]})[:2]
    for each in document["categories"]:
        if each["id"] in used:
            each["name"] = "cat"
    found = evaluate(results_of(document), document, "ap10k").per_category
    assert {f"cat ({key})" for key in used} <= found.keys()


def test_keypoints_in_another_order_are_refused(document: Json) -> None:
    used = {each["category_id"] for each in document["annotations"]}
    category = next(each for each in document["categories"] if each["id"] in used)
    category["keypoints"] = category["keypoints"][::-1]
    with pytest.raises(
        InstancesError, match=r"expected the keypoints of AP-10K in the order left_eye, .* found right"
    ):
        evaluate(results_of(document), document, "ap10k")
    category["keypoints"] = list(HUMANART.skeleton.keypoint_names)
    with pytest.raises(
        InstancesError, match=f"category {category['id']}: expected the 17 keypoints left_eye"
    ):
        evaluate(results_of(document), document, "ap10k")


# Boxes that leave the image


def two_of_one_image(
    bboxes: list[list[float]], size_wh: tuple[int, int], apart_px: float
) -> tuple[Poses, Json]:
    """Two instances of one image, whose estimated poses lie some pixels apart."""
    spread = np.random.default_rng(0).uniform(0, 40, (17, 2))
    center = np.array(size_wh) * 0.8
    poses = [center + spread, center + spread + [apart_px, 0]]
    content: Json = {
        "images": [{"id": 1, "width": size_wh[0], "height": size_wh[1]}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "area": 2000, "iscrowd": 0,
             "keypoints": np.c_[pose, np.full(17, 2)].ravel().tolist()}
            for i, (box, pose) in enumerate(zip(bboxes, poses, strict=True))
        ],
    }  # fmt: skip
    return replace(poses_of(read_ground_truth(content)), bboxes_xywh=np.array(bboxes, np.float64)), content


@pytest.mark.parametrize(
    ("bboxes", "size_wh"),
    [
        ([[150, 150, 400, 400], [152, 150, 400, 400]], (200, 200)),
        ([[-500, 10, 540, 30], [-480, 10, 520, 30]], (150, 90)),
        ([[30, -300, 40, 340], [30, -320, 40, 360]], (110, 64)),
    ],
)
def test_suppression_sees_boxes_clipped_to_the_image(
    bboxes: list[list[float]], size_wh: tuple[int, int]
) -> None:
    poses, content = two_of_one_image(bboxes, size_wh, apart_px=6)
    assert evaluate(poses, content, "ap10k").scores["AP"] == 1, "both stay"
    assert evaluate(poses_table(poses), read_ground_truth(content), "ap10k").scores["AP"] == 1
    content["images"] = [{"id": 1}]  # of an image of unknown size nothing can be clipped
    assert evaluate(poses, content, "ap10k").scores["AP"] < 1, "one is suppressed"


def test_detected_boxes_are_taken_as_they_are() -> None:
    poses, content = two_of_one_image([[150, 150, 400, 400], [152, 150, 400, 400]], (200, 200), apart_px=6)
    detected = replace(poses, annotation_ids=np.full(2, NO_ANNOTATION))
    assert evaluate(detected, content, "ap10k").scores["AP"] < 1


def test_boxes_are_clipped_as_in_mmpose() -> None:
    boxes = np.array([[-10, 5, 30, 200], [90, 40, 40, 9], [120, 0, 5, 5], [1, 2, 3, 4]], np.float64)
    sizes_wh = np.array([[100, 50]] * 3 + [[np.nan, np.nan]])
    expected = [[0, 5, 20, 44], [90, 40, 9, 9], [99, 0, 0, 5], [1, 2, 3, 4]]
    assert clip_boxes(boxes, sizes_wh).tolist() == expected


# PCK


def test_pck_counts_no_instance_whose_pose_is_never_estimated(document: Json) -> None:
    truth = read_ground_truth(document)
    expected = pck(poses_of(truth), truth, "ap10k").scores
    assert expected["PCK"] == 1
    extra = {**document["annotations"][0], "id": 10**6}
    document["annotations"] += [
        {**extra, "iscrowd": 1},
        {**extra, "id": 10**6 + 1, "num_keypoints": 0},
        {**extra, "id": 10**6 + 2, "bbox": [-90, -90, 50, 50]},
    ]
    assert same(pck(poses_of(truth), read_ground_truth(document), "ap10k").scores, expected)


def test_pck_of_each_keypoint(document: Json) -> None:
    truth = read_ground_truth(document)
    poses = poses_of(truth)
    labelled = truth.keypoints[..., 2] > 0
    sides = truth.bboxes_xywh[:, 2:].max(axis=1)
    poses.keypoints[:, 2, 0] += 0.049 * sides  # nose: just near enough
    poses.keypoints[:, 4, 1] -= 0.051 * sides  # root of the tail: just too far
    poses.keypoints[0, 0] += sides[0]
    found = pck(poses, truth, "ap10k")
    scores = found.scores
    assert scores["nose"] == scores["right_eye"] == 1 and scores["root_of_tail"] == 0
    assert scores["left_eye"] == pytest.approx(1 - labelled[0, 0] / labelled[:, 0].sum())
    assert scores["PCK"] == pytest.approx(np.mean([scores[name] for name in found.keypoint_names]))
    assert pck(poses, truth, AP10K, threshold=0.06).scores["root_of_tail"] == 1


def test_pck_counts_instances_without_a_pose_as_missed(document: Json) -> None:
    truth = read_ground_truth(document)
    poses = poses_of(truth)
    half = Poses(**{name: getattr(poses, name)[::2] for name in poses.__dataclass_fields__})
    labelled = truth.keypoints[..., 2] > 0
    expected = labelled[::2].sum(axis=0) / labelled.sum(axis=0)
    assert list(pck(half, truth, "ap10k").scores.values())[1:] == pytest.approx(expected.tolist())


def test_pck_needs_poses_in_annotated_boxes(document: Json) -> None:
    truth = read_ground_truth(document)
    poses = poses_of(truth)
    detected = replace(poses, annotation_ids=np.full(len(poses), NO_ANNOTATION))
    with pytest.raises(InstancesError, match=f"found {len(poses)} of others"):
        pck(detected, truth, "ap10k")
    twice = replace(poses, annotation_ids=np.full(len(poses), poses.annotation_ids[0]))
    with pytest.raises(InstancesError, match="two of the same one"):
        pck(twice, truth, "ap10k")


def test_a_keypoint_that_is_never_labelled_has_no_score(document: Json) -> None:
    for each in document["annotations"]:
        each["keypoints"][2] = 0
    truth = read_ground_truth(document)
    scores = pck(poses_of(truth), truth, "ap10k").scores
    assert np.isnan(scores["left_eye"]) and scores["PCK"] == 1


# Resamples


def test_ap_and_pck_of_resamples(document: Json) -> None:
    """As many numbers for each resample as for all images, scattered about them."""
    truth = read_ground_truth(document)
    poses = poses_of(truth)
    poses.keypoints[::3] += 40
    ap = evaluate(poses, truth, "ap10k")
    samples = bootstrap(ap.at, len(ap.image_ids), 50)
    assert samples.shape == (50, len(METRICS))
    found = interval(ap.scores["AP"], samples[:, 0])
    assert found.low <= found.value <= found.high and found.low < found.high
    correct = pck(poses, truth, "ap10k")
    assert bootstrap(correct.at, len(correct.image_ids), 3).shape == (3, 18)
    assert correct.at(np.ones(len(truth.image_ids)))[0] == correct.scores["PCK"]


def test_numbers_of_many_resamples_at_once_are_those_of_each(document: Json) -> None:
    truth = read_ground_truth(document)
    poses = poses_of(truth)
    poses.keypoints[::3] += 40
    weights = np.random.default_rng(0).multinomial(
        len(truth.image_ids), np.full(len(truth.image_ids), 1 / len(truth.image_ids)), 7
    )
    weights[3] = 0
    curves = evaluate(poses, truth, "ap10k").matches.curves
    correct = pck(poses, truth, "ap10k")
    found = curves.at(weights)
    assert np.isnan(found.summary()[3]).all() and np.isnan(correct.at(weights)[3]).all()
    for one, summary, categories, thresholds, keypoints in zip(
        weights,
        found.summary(),
        found.per_category(),
        found.per_threshold(),
        correct.at(weights),
        strict=True,
    ):
        alone = curves.at(one)
        assert np.array_equal(summary, alone.summary(), equal_nan=True)
        assert np.array_equal(categories, alone.per_category(), equal_nan=True)
        assert np.array_equal(thresholds, alone.per_threshold(), equal_nan=True)
        assert np.allclose(keypoints, correct.at(one), rtol=1e-12, equal_nan=True)


def test_the_images_that_ap_and_pck_are_based_on(document: Json) -> None:
    truth = read_ground_truth(document)
    matches = evaluate(poses_of(truth), truth, "ap10k").matches
    found = matches.counted_images("all")
    assert found.shape == (len(truth.image_ids), len(truth.category_ids))
    expected = {
        (i, c) for i, c, out in zip(truth.image_of, truth.category_of, truth.ignored, strict=True) if not out
    }
    assert set(zip(*np.nonzero(found), strict=True)) == expected
    medium, large = matches.counted_images("medium"), matches.counted_images("large")
    assert not (medium & ~found).any() and not (large & ~found).any()
    labelled = pck(poses_of(truth), truth, "ap10k").labelled_images()
    assert (
        labelled.shape == (len(truth.image_ids), 17) and not (labelled.any(axis=1) & ~found.any(axis=1)).any()
    )


@given(st.lists(st.integers(0, 400), min_size=1), st.integers(1, 400))
def test_recalls_reached_are_those_of_a_search(hits: list[int], positives: int) -> None:
    recalls = np.minimum(np.array(hits) / positives, 1)
    recalls = np.concatenate([recalls, RECALLS, np.nextafter(RECALLS, 0), np.nextafter(RECALLS[:-1], 1)])
    assert np.array_equal(_recalls_reached(recalls), np.searchsorted(RECALLS, recalls, side="right"))

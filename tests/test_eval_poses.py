"""Which boxes poses are looked for in, in whose pixels, and what follows for the scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="the models extra is not installed")

from eval.instances import NO_ANNOTATION, GroundTruth, read_ground_truth
from eval.openmmlab import Detections
from eval.pose_estimator import PoseEstimates
from eval.poses import annotated_boxes, detected_boxes, estimate_poses
from eval.scores import pose_scores
from eval.settings import DetectorSettings, Evaluation, Intervals, PoseApSettings, PoseSettings

SIZE_WH = (200, 100)


def instance(image_id: int, annotation_id: int, x: float, **other: Any) -> dict[str, Any]:
    keypoints = [[x + i, 40.0, 2] for i in range(17)]
    return {
        "image_id": image_id, "id": annotation_id, "category_id": 1, "bbox": [x, 30.0, 40.0, 20.0], "area": 800.0,
        "iscrowd": 0, "num_keypoints": 17, "keypoints": [number for point in keypoints for number in point], **other,
    }  # fmt: skip


@pytest.fixture
def truth() -> GroundTruth:
    return read_ground_truth(
        {
            "images": [{"id": 7}, {"id": 3}],
            "categories": [{"id": 1, "name": "person"}],
            "annotations": [
                instance(7, 1, 20),
                instance(3, 2, 60),
                instance(7, 3, 100),
                instance(7, 4, 0, iscrowd=1),
                instance(3, 5, 0, num_keypoints=0, keypoints=[0] * 51),
                instance(3, 6, 0, bbox=[5.0, 5.0, 0.0, 9.0]),
            ],
        }
    )


class Finder:
    """Finds all keypoints in the middle of their box, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Path, tuple[int, int]]] = []

    def predict(
        self,
        images: list[Path],
        bboxes: list[Any],
        *,
        annotated_wh: list[tuple[int, int]],
        keep_heatmaps: bool,
    ) -> PoseEstimates:
        assert not keep_heatmaps, "nobody reads them, and they are large"
        self.asked += zip(images, annotated_wh, strict=True)
        boxes = np.concatenate(bboxes)
        middles = boxes[:, :2] + boxes[:, 2:] / 2
        return PoseEstimates(
            np.repeat(middles[:, None], 17, axis=1), np.ones((len(boxes), 17), np.float32), None
        )


def test_poses_are_looked_for_where_the_protocol_counts_them(truth: GroundTruth) -> None:
    boxes = annotated_boxes(truth)
    assert boxes.annotation_ids.tolist() == [2, 1, 3], "by image; no crowd, nothing unlabelled, no empty box"
    finder = Finder()
    files = {7: Path("seven.jpg"), 3: Path("three.jpg")}
    poses = estimate_poses(finder, files, boxes, {3: (9, 9), 7: SIZE_WH})
    assert finder.asked == [(Path("three.jpg"), (9, 9)), (Path("seven.jpg"), SIZE_WH)]
    assert poses.annotation_ids.tolist() == [2, 1, 3]
    assert poses.keypoints[:, 0].tolist() == [[80, 40], [40, 40], [120, 40]]
    only = estimate_poses(Finder(), {7: Path("seven.jpg")}, boxes, {7: SIZE_WH})
    assert only.image_ids.tolist() == [7, 7]
    assert len(estimate_poses(Finder(), {}, boxes, {})) == 0


def test_detected_boxes_are_in_the_annotated_images_pixels(
    truth: GroundTruth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {image_id: tmp_path / f"{image_id}.png" for image_id in (7, 3)}
    for path in files.values():
        Image.new("RGB", (100, 100)).save(path)
    request: dict[str, Any] = {}

    def detect(environment: Path, images: list[Path], **how: Any) -> list[Detections]:
        request.update(how, environment=environment, images=images)
        three = Detections(np.array([[10.0, 20, 30, 40], [0, 0, 0, 5]]), np.array([0.9, 0.8]))
        return [three, Detections(np.empty((0, 4)), np.empty(0))]

    monkeypatch.setattr("eval.openmmlab.detect", detect)
    how = PoseSettings(boxes="detected", detector=DetectorSettings(score_threshold=0.5))
    boxes = detected_boxes(files, {3: SIZE_WH, 7: SIZE_WH}, 1, how, Path("detector.pth"), "auto")
    assert request["images"] == [files[3], files[7]]
    assert (request["score_threshold"], request["device"]) == (0.5, "cpu")
    assert boxes.image_ids.tolist() == [3] and boxes.annotation_ids.tolist() == [NO_ANNOTATION]
    assert boxes.bboxes_xywh.tolist() == [[20, 20, 60, 40]], "twice as wide as the generated image"

    # One person found of three that are annotated (a crowd is not counted): 2 of image 3 too few, 2 of image 7.
    poses = estimate_poses(Finder(), files, boxes, {3: SIZE_WH, 7: SIZE_WH})
    scores, _ = pose_scores(poses, truth, "humanart", Intervals(resamples=40), PoseApSettings(resamples=40))
    assert "PCK" not in scores.samples
    assert next(row.value for row in scores.rows if row.metric == "counting error") == 2.0


def test_a_detector_does_not_tell_species() -> None:
    method = {"name": "x", "kind": "external", "folder": "x"}
    import msgspec

    content = {"dataset": "ap10k", "methods": [method], "pose": {"boxes": "detected"}}
    with pytest.raises(msgspec.ValidationError, match="no species"):
        msgspec.convert(content, Evaluation)
    assert msgspec.convert({**content, "dataset": "humanart"}, Evaluation).pose.boxes == "detected"

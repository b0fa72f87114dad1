"""The drawn sample: formats of the real files, exact truth, planted leaks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from spctrl.data.skeletons import AP10K
from spctrl.demo_data import write_sample
from spctrl.demo_data.animals import SPECIES, make_animal
from spctrl.demo_data.figures import view
from spctrl.demo_data.scenes import MIN_VISIBLE_PIXELS, draw_animal_scene, draw_people_scene

REAL = Path(__file__).parents[2] / "shared" / "data"
ANNOTATIONS = {
    ("ap10k", "train"): "AP-10K/annotations/ap10k-train-split1.json",
    ("ap10k", "val"): "AP-10K/annotations/ap10k-val-split1.json",
    ("humanart", "train"): "HumanArt/annotations/training_humanart.json",
    ("humanart", "val"): "HumanArt/annotations/validation_humanart.json",
}
REAL_ANNOTATIONS = {
    "ap10k": REAL / "ap10k/annotations/ap10k-val-split1.json",
    "humanart": REAL / "humanart/annotations/validation_humanart.json",
}
# (dataset, image entry, its annotations, image, mask, depth); the last three are paths.
Entry = tuple[str, dict[str, Any], list[dict[str, Any]], Path, Path, Path]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sample")
    write_sample(path, images_per_split=8)
    return path


@pytest.fixture(scope="module")
def entries(root: Path) -> list[Entry]:
    return [entry for dataset, split in ANNOTATIONS for entry in _entries(root, dataset, split)]


def _load(root: Path, dataset: str, split: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((root / ANNOTATIONS[dataset, split]).read_text(encoding="utf-8"))
    return content


def _entries(root: Path, dataset: str, split: str) -> list[Entry]:
    content = _load(root, dataset, split)
    entries: list[Entry] = []
    for image in content["images"]:
        annotations = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        if dataset == "ap10k":
            path = root / "AP-10K/data" / image["file_name"]
            mask, depth = (root / "AP-10K" / kind / f"{path.stem}.png" for kind in ("mask", "depth"))
        else:
            path = root / image["file_name"]
            inside = Path(image["file_name"]).relative_to("HumanArt/images").with_suffix(".png")
            mask, depth = (root / "HumanArt" / kind / inside for kind in ("mask", "depth"))
        entries.append((dataset, image, annotations, path, mask, depth))
    return entries


def _hashes(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def _keypoints(annotation: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array(annotation.get("keypoints_21", annotation["keypoints"]), np.float64).reshape(-1, 3)


def _shape_of(value: object) -> object:
    """The JSON structure of a value: field names and kinds, numbers kept apart as int and float."""
    if isinstance(value, dict):
        return {key: _shape_of(item) for key, item in value.items()}
    if isinstance(value, list):
        return "list"
    return type(value).__name__


def test_same_arguments_give_same_bytes(root: Path, tmp_path: Path) -> None:
    write_sample(tmp_path, images_per_split=8)
    assert _hashes(tmp_path) == _hashes(root)


def test_seed_changes_the_pictures(root: Path, tmp_path: Path) -> None:
    write_sample(tmp_path, images_per_split=2, seed=1)
    for name in ("AP-10K/data/000000000001.jpg", "HumanArt/images/real_human/dance/000000000002.jpg"):
        assert (tmp_path / name).read_bytes() != (root / name).read_bytes()


def test_images_do_not_depend_on_how_many_there_are(root: Path, tmp_path: Path) -> None:
    write_sample(tmp_path, images_per_split=3, splits=("train",))
    large = _hashes(root)
    for name, digest in _hashes(tmp_path).items():
        if not name.endswith(".json"):
            assert large[name] == digest


@pytest.mark.parametrize("dataset", ["ap10k", "humanart"])
def test_fields_are_those_of_the_real_files(root: Path, dataset: str) -> None:
    path = REAL_ANNOTATIONS[dataset]
    if not path.is_file():
        pytest.skip(f"no real annotations at {path}")
    real = json.loads(path.read_text(encoding="utf-8"))
    for split in ("train", "val"):
        drawn = _load(root, dataset, split)
        assert list(drawn) == list(real)
        for kind in ("images", "annotations", "categories"):
            allowed = [_shape_of(entry) for entry in real[kind]]
            for entry in drawn[kind]:
                assert _shape_of(entry) in allowed
    by_id = {category["id"]: category for category in real["categories"]}
    assert all(category == by_id[category["id"]] for category in drawn["categories"])


def test_value_types_are_those_of_the_real_files(root: Path) -> None:
    for annotation in _load(root, "ap10k", "train")["annotations"]:
        assert all(type(v) is int for v in annotation["keypoints"] + annotation["bbox"])
        assert annotation["area"] == annotation["bbox"][2] * annotation["bbox"][3]
    for annotation in _load(root, "humanart", "train")["annotations"]:
        assert annotation["keypoints_21"][:51] == annotation["keypoints"]
        assert all(isinstance(v, float) for v in annotation["bbox"])
        assert 0 < annotation["area"] <= annotation["bbox"][2] * annotation["bbox"][3]


def test_ids_are_unique_over_both_splits(root: Path) -> None:
    for dataset in ("ap10k", "humanart"):
        contents = [_load(root, dataset, split) for split in ("train", "val")]
        for kind in ("images", "annotations"):
            ids = [entry["id"] for content in contents for entry in content[kind]]
            assert len(ids) == len(set(ids)) > 0


def test_keypoints_lie_in_the_image_and_box_and_are_counted(entries: list[Entry]) -> None:
    for dataset, image, instances, *_ in entries:
        assert instances
        for annotation in instances:
            keypoints = _keypoints(annotation)
            labelled = keypoints[:, 2] > 0
            assert set(keypoints[:, 2]) <= {0.0, 2.0}
            assert not keypoints[~labelled].any()
            assert annotation["num_keypoints"] == labelled[:17].sum()
            if dataset == "humanart":
                assert annotation["num_keypoints_21"] == labelled.sum()
            xy = np.round(keypoints[labelled, :2])
            x, y, w, h = annotation["bbox"]
            assert ((xy >= (x, y)) & (xy < (x + w, y + h))).all()
            assert ((xy >= 0) & (xy < (image["width"], image["height"]))).all()


def test_images_masks_and_depths_have_the_annotated_size(entries: list[Entry]) -> None:
    for _, image, _, path, mask_path, depth_path in entries:
        size = (image["height"], image["width"])
        pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        mask = cv2.imread(str(mask_path), cv2.IMREAD_UNCHANGED)
        depth = cv2.imread(str(depth_path), cv2.IMREAD_UNCHANGED)
        assert pixels is not None and mask is not None and depth is not None
        assert pixels.shape == (*size, 3)
        assert mask.shape == depth.shape == size
        assert mask.dtype == depth.dtype == np.uint8
        assert set(np.unique(mask)) == {0, 255}
        # The ground comes towards the viewer, and figures stand on it: they are nearer than the sky.
        assert depth[-1].mean() > depth[0].mean()
        assert np.median(depth[mask > 0]) > np.median(depth[: size[0] // 4][mask[: size[0] // 4] == 0])


def test_boxes_enclose_the_mask_tightly(entries: list[Entry]) -> None:
    for _, _, instances, _, mask_path, _ in entries:
        mask = cv2.imread(str(mask_path), cv2.IMREAD_UNCHANGED)
        assert mask is not None
        boxes = np.array([a["bbox"] for a in instances], int)
        lows, highs = boxes[:, :2].min(axis=0), (boxes[:, :2] + boxes[:, 2:]).max(axis=0)
        x, y, w, h = cv2.boundingRect(mask)
        assert (x, y) == tuple(lows) and (x + w, y + h) == tuple(highs)


@pytest.mark.parametrize("draw", [draw_animal_scene, draw_people_scene])
def test_scene_truth(draw: Any) -> None:
    labelled_count = distant_count = 0
    several = occluded = 0
    for index in range(30):
        scene = draw(np.random.default_rng([3, index]))
        visible = np.stack([instance.visible for instance in scene.instances])
        assert np.array_equal(scene.mask > 0, visible.any(axis=0))
        assert visible.sum(axis=0).max() == 1
        several += len(visible) > 1
        for instance in scene.instances:
            occluded += bool((instance.whole & ~instance.visible).any())
            assert not (instance.visible & ~instance.whole).any()
            assert instance.visible.sum() >= MIN_VISIBLE_PIXELS or len(visible) == 1
            x, y, w, h = instance.bbox_xywh
            rows, columns = np.nonzero(instance.visible)
            assert (x, y, x + w, y + h) == (
                columns.min(),
                rows.min(),
                columns.max() + 1,
                rows.max() + 1,
            )
            distance = cv2.distanceTransform((~instance.whole).astype(np.uint8), cv2.DIST_L2, 3)
            for kx, ky, v in instance.keypoints_xyv:
                if v > 0:
                    labelled_count += 1
                    distant_count += bool(distance[round(ky), round(kx)] > 2)
    assert labelled_count > 200
    assert distant_count == 0
    assert 3 <= several < 25
    assert occluded >= 3


@pytest.mark.parametrize("species", SPECIES, ids=lambda species: species.name)
def test_left_and_right_are_anatomical(species: Any) -> None:
    left = np.array([pair[0] for pair in AP10K.flip_pairs])
    right = np.array([pair[1] for pair in AP10K.flip_pairs])
    for index in range(5):
        figure = make_animal(species, np.random.default_rng(index))
        front = view(figure, yaw_deg=-90.0, pitch_deg=5.0).keypoints
        # Facing the viewer its left is on the right of the picture, seen from behind on the left.
        assert (front[left, 0] > front[right, 0]).all()
        behind = view(figure, yaw_deg=90.0, pitch_deg=5.0).keypoints
        assert (behind[left, 0] < behind[right, 0]).all()
        facing_right = view(figure, yaw_deg=0.0, pitch_deg=5.0).keypoints
        assert facing_right[2, 0] > facing_right[4, 0]
        assert (facing_right[right, 2] > facing_right[left, 2]).mean() > 0.8


def test_faces_turned_away_are_unlabelled() -> None:
    hidden = shown = 0
    for index in range(60):
        for instance in draw_animal_scene(np.random.default_rng([4, index])).instances:
            eyes = instance.keypoints_xyv[:2, 2] > 0
            shown += bool(eyes.all())
            hidden += bool(eyes.sum() == 1)
    assert hidden > 5 and shown > 5


def test_ap10k_leak_is_byte_identical(root: Path) -> None:
    train, val = _entries(root, "ap10k", "train")[0], _entries(root, "ap10k", "val")[-1]
    assert train[1]["file_name"] != val[1]["file_name"] and train[1]["id"] != val[1]["id"]
    for first, copy in zip(train[3:], val[3:], strict=True):
        assert first.read_bytes() == copy.read_bytes()
    ids = ("id", "image_id")
    assert [{k: v for k, v in a.items() if k not in ids} for a in train[2]] == [
        {k: v for k, v in a.items() if k not in ids} for a in val[2]
    ]


def test_humanart_leak_is_a_near_duplicate(root: Path) -> None:
    train, val = _entries(root, "humanart", "train")[0], _entries(root, "humanart", "val")[-1]
    assert train[3].read_bytes() != val[3].read_bytes()
    first, copy = (np.asarray(cv2.imread(str(path)), np.float64) for path in (train[3], val[3]))
    assert 0 < np.abs(first - copy).mean() < 12
    assert np.corrcoef(first.ravel(), copy.ravel())[0, 1] > 0.99
    assert train[4].read_bytes() == val[4].read_bytes()
    assert [a["keypoints"] for a in train[2]] == [a["keypoints"] for a in val[2]]


def test_no_other_image_is_repeated(root: Path) -> None:
    digests = [digest for name, digest in _hashes(root).items() if name.endswith(".jpg")]
    assert len(digests) == 32
    assert len(set(digests)) == 31


def test_unwanted_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown split test"):
        write_sample(tmp_path, splits=("test",))
    with pytest.raises(ValueError, match="unknown dataset coco"):
        write_sample(tmp_path, datasets=("coco",))
    with pytest.raises(ValueError, match="images_per_split is 0"):
        write_sample(tmp_path, images_per_split=0)
    with pytest.raises(ValueError, match="seed is -1"):
        write_sample(tmp_path, seed=-1)
    assert not list(tmp_path.iterdir())


def test_only_what_is_asked_for_is_written(tmp_path: Path) -> None:
    write_sample(tmp_path, images_per_split=1, splits=("val",), datasets=("humanart",))
    assert sorted(path.name for path in (tmp_path / "HumanArt" / "annotations").iterdir()) == [
        "validation_humanart.json"
    ]
    assert not (tmp_path / "AP-10K").exists()

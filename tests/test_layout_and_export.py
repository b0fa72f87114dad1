"""Names and texts of the triplet folders, as the released loaders read them, and how source images get there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spctrl.data.datasets import AP10K, HUMANART, Dataset
from spctrl.errors import ExpectedError
from spctrl.export.layout import Layout
from spctrl.export.text_files import categories_json, merged_categories, record_lines

ANIMAL = "000000001996.jpg"
PERSON = "HumanArt/images/2D_virtual_human/digital_art/000000001648.jpg"
SCENARIO = "2D_virtual_human/digital_art/000000001648"
Json = dict[str, Any]


def layout(
    dataset: Dataset, names: str = "readme", split: str = "train", style: str = "openpose", n: str = "1"
) -> Layout:
    return Layout(dataset=dataset, split=split, split_id=n, names=names, openpose_style=style)


# Names


@pytest.mark.parametrize(
    ("condition", "readme", "released"),
    [
        ("spatext", "pose_kptindex", "pose_kptindex"),
        ("openpose", "mmpose_skeleton", "train_split1_openpose_skeleton"),
        ("mask", "sam_hq_mask", "sam_hq_mask"),
        ("depth", "zeo_depth", "zeo_depth"),
        ("masked_depth", "zeo_depth_masked", "zeo_depth_masked"),
    ],
)
def test_condition_folders_of_ap10k(condition: str, readme: str, released: str) -> None:
    assert layout(AP10K).condition(condition, ANIMAL) == f"{readme}/000000001996.png"
    assert layout(AP10K, "released").condition(condition, ANIMAL) == f"{released}/000000001996.png"


@pytest.mark.parametrize(
    ("condition", "folder"),
    [
        ("spatext", "humanart_kptindex"),
        ("openpose", "humanart_openpose"),
        ("mask", "sam_hq_mask"),
        ("depth", "zeo_depth"),
        ("masked_depth", "zeo_depth_masked"),
    ],
)
@pytest.mark.parametrize("names", ["readme", "released"])
def test_condition_folders_of_humanart(condition: str, folder: str, names: str) -> None:
    assert layout(HUMANART, names).condition(condition, PERSON) == f"{folder}/{SCENARIO}.png"


@pytest.mark.parametrize(("split", "n"), [("train", "1"), ("val", "1"), ("val", "3"), ("test", "2")])
def test_released_renders_have_a_folder_for_each_split(split: str, n: str) -> None:
    skeletons = layout(AP10K, "released", split, n=n)
    keypoints = layout(AP10K, "released", split, "keypoints", n=n)
    folder = f"{split}_split{n}_openpose"
    assert skeletons.condition("openpose", ANIMAL) == f"{folder}_skeleton/000000001996.png"
    assert keypoints.condition("openpose", ANIMAL) == f"only_keypoint/{folder}_keypoint/000000001996.png"


@pytest.mark.parametrize(
    ("dataset", "split", "readme", "released"),
    [
        (AP10K, "train", "train_split1.jsonl", "train_split1.jsonl"),
        (AP10K, "val", "val_split1.jsonl", "val_split1.jsonl"),
        (HUMANART, "train", "train_split1.jsonl", "humanart_training.jsonl"),
        (HUMANART, "val", "val_split1.jsonl", "humanart_validation.jsonl"),
    ],
)
def test_text_files(dataset: Dataset, split: str, readme: str, released: str) -> None:
    assert layout(dataset, "readme", split).records == readme
    assert layout(dataset, "released", split).records == released
    assert layout(dataset, "readme", split).categories == "categories.jsonl"
    assert layout(dataset, "released", split).categories == "catgories.jsonl"
    assert layout(dataset, "readme", split).manifest == f"manifests/{split}_split1.parquet"


def test_shards_are_numbered_and_name_their_split() -> None:
    assert layout(AP10K, n="2").shard("webdataset", 0) == "webdataset/train_split2-000000.tar"
    assert layout(HUMANART, split="val").shard("parquet", 12) == "parquet/val_split1-000012.parquet"


def test_folders_images_and_heatmaps() -> None:
    assert (layout(AP10K).folder, layout(HUMANART).folder) == ("AP-10K_triplet", "HumanArt_triplet")
    assert layout(AP10K).image(ANIMAL) == "data/000000001996.jpg"
    assert layout(HUMANART).image(PERSON) == f"images/{SCENARIO}.jpg"
    assert layout(AP10K).heatmaps(ANIMAL) == "heatmap_multichannel_npy/000000001996.npy"
    assert layout(HUMANART).heatmaps(PERSON) == f"humanart_heatmap_multichannel_npy/{SCENARIO}.npy"
    assert layout(HUMANART).pose(PERSON) == f"pose/{SCENARIO}.json"
    assert layout(HUMANART).dirname(PERSON) == "HumanArt/images/2D_virtual_human/digital_art"


def test_a_name_without_the_datasets_own_name_leads_to_the_same_place() -> None:
    short = PERSON.removeprefix("HumanArt/")
    found = layout(HUMANART)
    assert found.image(short) == found.image(PERSON)
    assert found.condition("spatext", short) == found.condition("spatext", PERSON)
    assert found.dirname(short) == found.dirname(PERSON)


@pytest.mark.parametrize(
    ("name", "stem"),
    [("a.b.jpg", "a.b"), ("plain", "plain"), ("x.d/plain", "x.d/plain"), ("x.d/a.jpeg", "x.d/a")],
)
def test_only_the_suffix_is_replaced(name: str, stem: str) -> None:
    assert layout(AP10K).condition("spatext", name) == f"pose_kptindex/{stem}.png"


@pytest.mark.parametrize("dataset", [AP10K, HUMANART])
@pytest.mark.parametrize("names", ["readme", "released"])
def test_no_two_conditions_share_a_folder(dataset: Dataset, names: str) -> None:
    conditions = ("spatext", "openpose", "mask", "depth", "masked_depth")
    assert len({layout(dataset, names).condition(each, PERSON) for each in conditions}) == len(conditions)


def test_annotation_files_of_the_raw_datasets() -> None:
    assert AP10K.annotation_path("val", "2") == "annotations/ap10k-val-split2.json"
    assert HUMANART.annotation_path("train", "humanart_coco") == "annotations/training_humanart_coco.json"
    assert (
        HUMANART.annotation_path("val", "humanart_oil_painting")
        == "annotations/validation_humanart_oil_painting.json"
    )
    with pytest.raises(ValueError, match="split of HumanArt among train, val, found 'test'"):
        HUMANART.annotation_path("test", "humanart")


# JSON lines

RAW_ANNOTATIONS = [
    '{"id": 7, "image_id": 2, "bbox": [1.50, 2, 3e1, 4], "keypoints": [], "\\u00e9": "\\ud83e\\udd8a"}',
    '{"image_id": 1, "id": 8, "area": 12345678901234567890.123456789, "nested": {"b": [true, null], "a": -0.0}}',
    '{"id": 9, "image_id": 2, "iscrowd": 0, "text": "a \\/ b"}',
]
"""With the white space that Python's json writes, which the lines have too."""


def annotation_file(folder: Path, images: list[Json], comma: str = ", ", colon: str = ": ") -> Path:
    path = folder / "annotations.json"
    annotations = [each.replace(", ", comma).replace(": ", colon) for each in RAW_ANNOTATIONS]
    fox = {"id": 1, "name": "fox", "supercategory": "Canidae", "keypoints": ["left_eye", "root_of_tail"]}
    categories = [{**fox, "skeleton": [[1, 2]]}, {"id": 12, "name": "polar bear"}]
    sections = (json.dumps(images), f"[{comma.join(annotations)}]", json.dumps(categories))
    path.write_text('{{"images": {}, "annotations": {}, "categories": {}}}'.format(*sections))
    return path


def animal(image_id: int, **more: Any) -> Json:
    return {
        "id": image_id,
        "file_name": f"{image_id}.jpg",
        "width": 640,
        "height": 480,
        "background": 9,
        **more,
    }


def person(image_id: int, **more: Any) -> Json:
    return {
        "id": image_id,
        "file_name": f"HumanArt/images/real_human/dance/{image_id}.jpg",
        "width": 640,
        "height": 480,
        "picture_name": "Swan — 白鳥",
        "category": "dance",
        "description": "a dancer",
        **more,
    }


def test_lines_are_those_of_the_wanted_images_in_file_order(tmp_path: Path) -> None:
    path = annotation_file(tmp_path, [animal(2), animal(3), animal(1)])
    found = list(record_lines(path, layout(AP10K), {1, 2}))
    assert [name for name, _ in found] == ["2.jpg", "1.jpg"]
    assert [json.loads(line)["image_id"] for _, line in found] == [2, 1]


def test_lines_of_ap10k_tell_images_of_one_name_apart(tmp_path: Path) -> None:
    path = annotation_file(tmp_path, [animal(2, file_name="1.jpg"), animal(1, file_name="more/1.jpg")])
    lines = [json.loads(line) for _, line in record_lines(path, layout(AP10K), {1, 2})]
    assert [line["filename"] for line in lines] == ["1.jpg", "more/1.jpg"]


def test_a_line_of_ap10k_has_the_documented_fields(tmp_path: Path) -> None:
    path = annotation_file(tmp_path, [animal(2, extra="x"), animal(1, background=None)])
    lines = [json.loads(line) for _, line in record_lines(path, layout(AP10K), {1, 2})]
    assert list(lines[0]) == ["filename", "image_id", "height", "width", "anns", "background"]
    assert {key: value for key, value in lines[0].items() if key != "anns"} == {
        "filename": "2.jpg",
        "image_id": 2,
        "height": 480,
        "width": 640,
        "background": 9,
    }
    assert lines[1]["background"] is None


def test_a_line_of_humanart_has_the_documented_fields(tmp_path: Path) -> None:
    path = annotation_file(tmp_path, [person(2), person(1, description=None), person(5, description="")])
    lines = [json.loads(line) for _, line in record_lines(path, layout(HUMANART), {1, 2, 5})]
    assert {key: value for key, value in lines[0].items() if key != "anns"} == {
        "filename": "2.jpg",
        "image_id": 2,
        "height": 480,
        "width": 640,
        "dirname": "HumanArt/images/real_human/dance",
        "picture_name": "Swan — 白鳥",
        "category": "dance",
        "caption": ["a dancer"],
    }
    assert [line["caption"] for line in lines[1:]] == [[], []]
    assert lines[2]["anns"] == []


def test_raw_annotation_objects_stay_as_they_are_to_the_byte(tmp_path: Path) -> None:
    path = annotation_file(tmp_path, [animal(2), animal(1)])
    lines = dict(record_lines(path, layout(AP10K), {1, 2}))
    assert f'"anns": [{RAW_ANNOTATIONS[0]}, {RAW_ANNOTATIONS[2]}]'.encode() in lines["2.jpg"]
    assert f'"anns": [{RAW_ANNOTATIONS[1]}]'.encode() in lines["1.jpg"]


@pytest.mark.parametrize(("comma", "colon"), [(",", ":"), (",\n    ", ": "), (" ,\r\n\t", " :\n")])
def test_a_line_is_the_same_line_whatever_the_white_space_of_the_file(
    tmp_path: Path, comma: str, colon: str
) -> None:
    images = [animal(2), animal(1)]
    expected = list(record_lines(annotation_file(tmp_path, images), layout(AP10K), {1, 2}))
    found = list(record_lines(annotation_file(tmp_path, images, comma, colon), layout(AP10K), {1, 2}))
    assert found == expected
    assert not any(b"\n" in line or b"\r" in line for _, line in found)


@pytest.mark.parametrize(
    "entry",
    [
        "7",
        "null",
        "[]",
        "{}",
        '{"id": "two", "image_id": "two"}',
        '{"id": [2], "image_id": [2]}',
        '{"id": 3, "x": 1e999}',
        '{"id": 1e999}',
    ],
)
@pytest.mark.parametrize("section", ["images", "annotations"])
def test_entries_that_the_index_rejected_do_not_stop_the_others(
    tmp_path: Path, section: str, entry: str
) -> None:
    path = annotation_file(tmp_path, [animal(2)])
    path.write_text(path.read_text().replace(f'"{section}": [', f'"{section}": [{entry}, '))
    ((name, line),) = record_lines(path, layout(AP10K), {2})
    assert name == "2.jpg"
    assert [each["id"] for each in json.loads(line)["anns"]] == [7, 9]


def test_categories_are_one_object_with_spaces_in_keypoint_names(tmp_path: Path) -> None:
    found = json.loads(categories_json(annotation_file(tmp_path, [animal(1)]), AP10K))
    assert list(found) == ["1", "12"]
    assert found["1"] == {
        "id": 1,
        "name": "fox",
        "supercategory": "Canidae",
        "keypoints": ["left eye", "root of tail"],
        "skeleton": [[1, 2]],
    }
    assert found["12"] == {
        "id": 12,
        "name": "polar bear",
        "supercategory": "",
        "keypoints": [name.replace("_", " ") for name in AP10K.skeleton.keypoint_names],
        "skeleton": [],
    }


def part(**categories: Json) -> bytes:
    """A split's categories by key: an id and what differs from a bare one."""
    bare = {"supercategory": "", "keypoints": [], "skeleton": []}
    return json.dumps(
        {key[1:]: {"id": int(key[1:]), "name": key, **bare, **each} for key, each in categories.items()}
    ).encode()


def test_splits_that_describe_a_category_in_other_ways_share_the_fullest() -> None:
    full, bare = {"keypoints": ["nose", "neck"], "skeleton": [[1, 2]]}, {"keypoints": ["nose"]}
    parts = {"train": part(c1=bare, c2=full), "val": part(c1=full, c3={}), "test": b"damaged"}
    merged = merged_categories(parts)
    assert json.loads(merged) == json.loads(part(c1=full, c2=full, c3={}))
    assert merged_categories(dict(reversed(parts.items()))) == merged
    with pytest.raises(ExpectedError, match="found 1 for 'c1' in train and for 'cow' in val"):
        merged_categories({"train": part(c1=full), "val": part(c1={"name": "cow"})})

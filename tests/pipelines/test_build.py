"""BuildDataset from end to end: the files that it makes, and how it fails."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

if TYPE_CHECKING:
    from conftest import Build, Workspace
    from numpy.typing import NDArray

CONDITIONS = ["spatext", "openpose", "mask", "depth", "masked_depth"]
IMAGES = 8
DATASETS = ("ap10k", "humanart")
SPLITS = ("train", "val")
FOLDERS = {"ap10k": "AP-10K", "humanart": "HumanArt"}
README_FOLDERS = {
    "ap10k": {
        "image": "data",
        "spatext": "pose_kptindex",
        "openpose": "mmpose_skeleton",
        "mask": "sam_hq_mask",
        "depth": "zeo_depth",
        "masked_depth": "zeo_depth_masked",
    },
    "humanart": {
        "image": "images",
        "spatext": "humanart_kptindex",
        "openpose": "humanart_openpose",
        "mask": "sam_hq_mask",
        "depth": "zeo_depth",
        "masked_depth": "zeo_depth_masked",
    },
}
README_TEXTS = {
    "categories.jsonl",
    *(f"{split}_split1.jsonl" for split in SPLITS),
    *(f"manifests/{split}_split1.parquet" for split in SPLITS),
}

Whole = tuple["Workspace", "Build"]


@pytest.fixture(scope="module")
def whole(sample: Path, code: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The whole sample, built as a user does."""
    from conftest import Workspace

    workspace = Workspace(tmp_path_factory.mktemp("whole"), sample, code)
    return workspace, workspace.run("--conditions", ",".join(CONDITIONS))


@pytest.fixture
def built(whole: Whole) -> Workspace:
    workspace, build = whole
    assert build.exit_code == 0, build.output
    return workspace


def gray(path: Path) -> NDArray[np.uint8]:
    """(H, W) uint8 of a one-channel image."""
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


def rgb(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def raw_annotations(workspace: Workspace, dataset: str, split: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(workspace.annotation_path(dataset, split).read_bytes())
    return content


def raw_files(workspace: Workspace, dataset: str, folder: str) -> dict[str, Path]:
    """Files below one of the raw dataset's folders, by relative path without suffix."""
    root = workspace.data / FOLDERS[dataset] / folder
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in root.rglob("*.*")}


def exported_files(workspace: Workspace, dataset: str, condition: str) -> dict[str, Path]:
    root = workspace.export_folder(dataset) / README_FOLDERS[dataset][condition]
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in root.rglob("*.*")}


# The sample, all conditions


def test_the_build_exits_with_zero_and_says_what_it_built(whole: Whole) -> None:
    _, build = whole
    assert build.exit_code == 0, build.output
    assert "AP-10K" in build.output
    assert "HumanArt" in build.output
    assert "report.html" in build.output
    assert "Luigi Execution Summary" in build.output


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_export_has_the_files_of_the_readme_layout_and_no_others(built: Workspace, dataset: str) -> None:
    folder = built.export_folder(dataset)
    names = list(raw_files(built, dataset, README_FOLDERS[dataset]["image"]))
    assert len(names) == 2 * IMAGES
    expected = set(README_TEXTS)
    for condition, name in README_FOLDERS[dataset].items():
        suffix = ".jpg" if condition == "image" else ".png"
        expected |= {f"{name}/{stem}{suffix}" for stem in names}
    if dataset == "humanart":
        expected |= {f"pose/{stem}.json" for stem in names}
        expected |= {"annotations/training_humanart.json", "annotations/validation_humanart.json"}
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {path for path in found if not path.startswith(".spctrl/")} == expected


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_a_manifest_loads_with_pandas_duckdb_and_datasets(
    built: Workspace, dataset: str, split: str, tmp_path: Path
) -> None:
    import datasets
    import duckdb
    import pandas as pd

    path = built.export_folder(dataset) / "manifests" / f"{split}_split1.parquet"
    ids = [image["id"] for image in raw_annotations(built, dataset, split)["images"]]
    assert pd.read_parquet(path)["image_id"].tolist() == ids
    rows = duckdb.sql(f"SELECT image_id, len(instances) FROM '{path}'").fetchall()
    assert [row[0] for row in rows] == ids
    loaded = datasets.load_dataset("parquet", data_files=str(path), cache_dir=str(tmp_path), split="train")
    assert loaded["image_id"] == ids
    assert [len(instances) for instances in loaded["instances"]] == [row[1] for row in rows]


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_manifest_has_the_documented_schema(built: Workspace, dataset: str) -> None:
    from spctrl.data.manifest import manifest_schema

    path = built.export_folder(dataset) / "manifests" / "train_split1.parquet"
    assert pq.read_schema(path).equals(manifest_schema(CONDITIONS))
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).compression == "ZSTD"


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_a_manifest_holds_the_annotations(built: Workspace, dataset: str, split: str) -> None:
    content = raw_annotations(built, dataset, split)
    names = {each["id"]: each["name"] for each in content["categories"]}
    for row, image in zip(built.manifest(dataset, split), content["images"], strict=True):
        assert (row["dataset"], row["split"]) == (dataset, split)
        for column, field in (("image_id", "id"), ("file_name",) * 2, ("width",) * 2, ("height",) * 2):
            assert row[column] == image[field]
        assert row["background"] == image.get("background")
        assert row["captions"] == ([image["description"]] if dataset == "humanart" else [])
        own = [each for each in content["annotations"] if each["image_id"] == image["id"]]
        for instance, raw in zip(row["instances"], own, strict=True):
            assert instance["annotation_id"] == raw["id"]
            assert instance["category"] == names[raw["category_id"]]
            assert instance["bbox_xywh"] == raw["bbox"]
            assert instance["iscrowd"] == bool(raw["iscrowd"])
            assert list(chain(*instance["keypoints"])) == raw["keypoints"]
            if dataset == "humanart":
                assert list(chain(*instance["keypoints_21"])) == raw["keypoints_21"]
            else:
                assert instance["keypoints_21"] is None


@pytest.mark.parametrize("dataset", DATASETS)
def test_manifest_paths_and_digests_are_those_of_the_exported_files(built: Workspace, dataset: str) -> None:
    from conftest import sha256

    folder = built.export_folder(dataset)
    for split in SPLITS:
        for row in built.manifest(dataset, split):
            for name in ("image", *CONDITIONS):
                assert sha256(folder / row[f"{name}_path"]) == row[f"{name}_digest"]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_json_lines_hold_the_raw_annotation_objects(built: Workspace, dataset: str, split: str) -> None:
    content = raw_annotations(built, dataset, split)
    lines = built.json_lines(dataset, split)
    for line, image in zip(lines, content["images"], strict=True):
        own = [each for each in content["annotations"] if each["image_id"] == image["id"]]
        common = {
            "filename": Path(image["file_name"]).name,
            "image_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "anns": own,
        }
        if dataset == "ap10k":
            assert line == {**common, "background": image["background"]}
        else:
            assert line == {
                **common,
                "dirname": str(Path(image["file_name"]).parent),
                "picture_name": image["picture_name"],
                "category": image["category"],
                "caption": [image["description"]],
            }


def test_each_pose_file_of_humanart_holds_its_json_line(built: Workspace) -> None:
    lines = {line["filename"]: line for split in SPLITS for line in built.json_lines("humanart", split)}
    files = list((built.export_folder("humanart") / "pose").rglob("*.json"))
    assert len(files) == 2 * IMAGES
    for path in files:
        assert json.loads(path.read_bytes()) == lines[f"{path.stem}.jpg"]


@pytest.mark.parametrize("dataset", DATASETS)
def test_categories_are_one_object_by_id_with_spaces_in_keypoint_names(
    built: Workspace, dataset: str
) -> None:
    found = json.loads((built.export_folder(dataset) / "categories.jsonl").read_bytes())
    raw = raw_annotations(built, dataset, "train")["categories"]
    assert found.keys() == {str(each["id"]) for each in raw}
    for each in raw:
        names = [name.replace("_", " ") for name in each["keypoints"]]
        assert found[str(each["id"])] == {**each, "keypoints": names}


@pytest.mark.parametrize("dataset", DATASETS)
def test_source_images_are_hard_links(built: Workspace, dataset: str) -> None:
    sources = raw_files(built, dataset, README_FOLDERS[dataset]["image"])
    exported = exported_files(built, dataset, "image")
    assert exported.keys() == sources.keys()
    for stem, source in sources.items():
        assert not exported[stem].is_symlink()
        assert exported[stem].samefile(source)


@pytest.mark.parametrize("dataset", DATASETS)
def test_maps_and_renders_have_the_image_size_and_values_of_the_skeleton(
    built: Workspace, dataset: str
) -> None:
    from spctrl.conditions.openpose import palette
    from spctrl.data.datasets import DATASETS as KNOWN

    skeleton = KNOWN[dataset].skeleton
    allowed = {0, *range(1, 18), *range(51, 51 + len(skeleton.links))}
    colours = np.array(palette("openpose", skeleton.keypoint_names, skeleton.links), np.uint8)
    renders = exported_files(built, dataset, "openpose")
    for stem, path in exported_files(built, dataset, "spatext").items():
        values = gray(path)
        with Image.open(exported_files(built, dataset, "image")[stem]) as image:
            assert (values.shape[1], values.shape[0]) == image.size
        found = set(np.unique(values).tolist())
        assert found <= allowed
        assert len(found) > 5
        render = rgb(renders[stem])
        if len(skeleton.links) <= 18:  # the render draws 18 links at most
            assert np.array_equal(render, colours[values])


@pytest.mark.parametrize("dataset", DATASETS)
def test_masks_are_the_given_ones_and_depth_is_zero_outside_them(built: Workspace, dataset: str) -> None:
    masks, depths = raw_files(built, dataset, "mask"), raw_files(built, dataset, "depth")
    exported = {name: exported_files(built, dataset, name) for name in ("mask", "depth", "masked_depth")}
    assert exported["mask"].keys() == masks.keys()
    for stem, path in masks.items():
        mask, depth = gray(path), gray(depths[stem])
        assert np.array_equal(gray(exported["mask"][stem]), mask)
        assert np.array_equal(rgb(exported["depth"][stem]), np.dstack([depth] * 3))
        masked = rgb(exported["masked_depth"][stem])
        assert not masked[mask == 0].any()
        assert np.array_equal(masked[mask == 255], np.dstack([depth] * 3)[mask == 255])


# Settings


@pytest.mark.slow
def test_released_names_are_those_that_the_released_loaders_open(
    sample: Path, make_workspace: Callable[..., Workspace]
) -> None:
    workspace = make_workspace("released", sample)
    workspace.configure("build", conditions=CONDITIONS)
    workspace.configure("export", names="released")
    assert workspace.build().succeeded
    ap10k, humanart = (workspace.export_folder(dataset) for dataset in DATASETS)
    top = {path.name for path in ap10k.iterdir()}
    assert top >= {
        "catgories.jsonl", "train_split1.jsonl", "val_split1.jsonl", "data", "pose_kptindex", "zeo_depth",
        "train_split1_openpose_skeleton", "val_split1_openpose_skeleton", "heatmap_multichannel_npy",
    }  # fmt: skip
    assert not top & {"categories.jsonl", "mmpose_skeleton"}
    assert {path.name for path in humanart.iterdir()} >= {
        "catgories.jsonl", "humanart_training.jsonl", "humanart_validation.jsonl", "images", "humanart_kptindex",
        "humanart_openpose", "humanart_heatmap_multichannel_npy",
    }  # fmt: skip
    for folder in (ap10k / "heatmap_multichannel_npy", humanart / "humanart_heatmap_multichannel_npy"):
        stacks = list(folder.rglob("*.npy"))
        assert len(stacks) == 2 * IMAGES
        for path in stacks:
            stack = np.load(path)
            assert stack.shape == (17, 64, 64)
            assert stack.max() > 0.9
            assert stack.min() >= 0


@pytest.mark.slow
def test_the_command_line_sets_released_names_and_styles(workspace: Workspace) -> None:
    build = workspace.run(
        "--export-names", "released", "--export-heatmaps", "no", "--openpose-style", "keypoints"
    )
    assert build.exit_code == 0, build.output
    folder = workspace.export_folder("ap10k") / "only_keypoint" / "train_split1_openpose_keypoint"
    assert len(list(folder.glob("*.png"))) == IMAGES


@pytest.mark.parametrize(("way", "is_link"), [("copy", False), ("symbolic", True)])
def test_source_images_can_be_copied_or_linked_symbolically(
    workspace: Workspace, way: str, is_link: bool
) -> None:
    workspace.configure("export", link=way)
    assert workspace.build().succeeded
    for path in (workspace.export_folder("ap10k") / "data").iterdir():
        source = workspace.data / "AP-10K" / "data" / path.name
        assert path.is_symlink() == is_link
        assert path.samefile(source) == is_link
        assert path.read_bytes() == source.read_bytes()


def test_humanart_images_are_found_where_file_names_lack_the_datasets_own_name(workspace: Workspace) -> None:
    workspace.configure("build", datasets=["humanart"], splits=["val"])
    with workspace.edit_annotations("humanart", "val") as content:
        for image in content["images"]:
            image["file_name"] = image["file_name"].removeprefix("HumanArt/")
    assert workspace.build().succeeded
    assert len(list((workspace.export_folder("humanart") / "images").rglob("*.jpg"))) == IMAGES


def test_optional_images_build_records_without_a_file_and_the_manifest_says_so(workspace: Workspace) -> None:
    workspace.configure("build", images="optional")
    gone = sorted((workspace.data / "AP-10K" / "data").iterdir())[:5]
    for path in gone:
        path.unlink()
    build = workspace.build()
    assert build.succeeded, build.errors
    assert build.worked == {"spatext": IMAGES, "openpose": IMAGES, "images": IMAGES - 5}
    rows = workspace.manifest("ap10k", "train")
    assert [row["file_name"] for row in rows if row["image_path"] is None] == [path.name for path in gone]
    assert all((row["image_digest"] is None) == (row["image_path"] is None) for row in rows)


# Real annotations


def released(name: str) -> Path:
    from conftest import REAL_DATA

    path = REAL_DATA / "ap10k" / "expected" / "000000001996" / name
    if not path.is_file():
        pytest.skip(f"the released file {path} is not there")
    return path


@pytest.fixture(scope="module")
def real_ap10k(code: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Train and val of the real AP-10K without images, built as a user does with all cores."""
    from conftest import Workspace, real_annotations

    root = real_annotations("ap10k", "train", "val")
    workspace = Workspace(tmp_path_factory.mktemp("real"), root.parent, code)
    workspace.configure("ap10k", root=root)
    workspace.configure("executor", workers=0)
    return workspace, workspace.run("--dataset", "ap10k", "--images", "optional")


@pytest.mark.slow
def test_real_ap10k_gives_a_map_and_a_render_for_each_of_its_8018_images(real_ap10k: Whole) -> None:
    workspace, build = real_ap10k
    assert build.exit_code == 0, build.output
    assert build.worked["spatext"] == build.worked["openpose"] == 8018
    for folder in ("pose_kptindex", "mmpose_skeleton"):
        assert len(list((workspace.export_folder("ap10k") / folder).glob("*.png"))) == 8018
    assert sum(len(workspace.json_lines("ap10k", split)) for split in SPLITS) == 8018


@pytest.mark.slow
def test_the_map_of_image_1996_equals_the_released_one(real_ap10k: Whole) -> None:
    workspace, _ = real_ap10k
    ours = gray(workspace.export_folder("ap10k") / "pose_kptindex" / "000000001996.png")
    theirs = cv2.imread(str(released("pose_kptindex.png")), cv2.IMREAD_UNCHANGED)
    assert theirs is not None
    assert np.array_equal(ours, theirs if theirs.ndim == 2 else theirs[..., 0])


@pytest.mark.slow
def test_the_render_of_image_1996_equals_the_released_one(real_ap10k: Whole) -> None:
    workspace, _ = real_ap10k
    ours = rgb(workspace.export_folder("ap10k") / "mmpose_skeleton" / "000000001996.png")
    assert np.array_equal(ours, rgb(released("openpose.png")))


@pytest.mark.slow
def test_real_ap10k_again_runs_nothing(real_ap10k: Whole) -> None:
    workspace, _ = real_ap10k
    again = workspace.run("--dataset", "ap10k", "--images", "optional")
    assert again.exit_code == 0
    assert (again.committed, again.worked) == ({}, {})


def test_real_ap10k_images_of_the_test_split_are_probed_and_linked(
    make_workspace: Callable[..., Workspace],
) -> None:
    from conftest import real_annotations

    root = real_annotations("ap10k", "test")
    workspace = make_workspace("real-test", root.parent)
    workspace.configure("ap10k", root=root)
    workspace.configure("build", datasets=["ap10k"], splits=["test"])
    build = workspace.build()
    assert build.succeeded, build.errors
    rows = workspace.manifest("ap10k", "test")
    images = json.loads((root / "annotations" / "ap10k-test-split1.json").read_bytes())["images"]
    assert [row["image_id"] for row in rows] == [image["id"] for image in images]
    for row in rows:
        exported = workspace.export_folder("ap10k") / row["image_path"]
        assert exported.read_bytes() == (root / "data" / row["file_name"]).read_bytes()


def test_real_humanart_annotations_build_without_images(make_workspace: Callable[..., Workspace]) -> None:
    from conftest import real_annotations

    root = real_annotations("humanart", "validation")
    workspace = make_workspace("real-humanart", root.parent)
    workspace.configure("humanart", root=root)
    workspace.configure("build", datasets=["humanart"], splits=["val"], images="optional")
    build = workspace.build()
    assert build.succeeded, build.errors
    content = json.loads((root / "annotations" / "validation_humanart.json").read_bytes())
    maps = list((workspace.export_folder("humanart") / "humanart_kptindex").rglob("*.png"))
    assert len(maps) == len(content["images"])
    lines = workspace.json_lines("humanart", "val")
    own = [each for line in lines for each in line["anns"]]
    assert sorted(own, key=json.dumps) == sorted(content["annotations"], key=json.dumps)


# Failing


def test_a_missing_annotation_file_exits_with_20_and_names_it(workspace: Workspace) -> None:
    path = workspace.annotation_path("ap10k", "train")
    path.unlink()
    build = workspace.run()
    assert build.exit_code == 20, build.output
    assert str(path) in build.output.replace("\n", "")
    assert "--ap10k-root" in build.output


def test_an_annotation_file_that_is_not_json_exits_with_30_and_names_it(workspace: Workspace) -> None:
    path = workspace.annotation_path("ap10k", "train")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    build = workspace.run()
    assert build.exit_code == 30, build.output
    assert str(path) in build.output.replace("\n", "")
    assert build.committed == {}


def break_records(workspace: Workspace, count: int) -> None:
    """Spoil images of AP-10K's training split in two ways."""
    paths = sorted((workspace.data / "AP-10K" / "data").iterdir())[:count]
    for number, path in enumerate(paths):
        if number % 2:
            path.write_bytes(path.read_bytes()[:500])
        else:
            path.unlink()


def test_too_many_rejects_exit_with_30_and_name_the_reasons(workspace: Workspace) -> None:
    break_records(workspace, 4)
    build = workspace.run()
    assert build.exit_code == 30, build.output
    for text in ("missing_image", "bad_image", "max_reject_share", f"4 of {IMAGES}"):
        assert text in build.output
    assert "export" not in build.stages


def test_rejects_within_the_limit_are_set_aside_and_the_rest_is_built(workspace: Workspace) -> None:
    break_records(workspace, 4)
    workspace.configure("build", max_reject_share=0.5)
    build = workspace.build()
    assert build.succeeded, build.errors
    assert build.counted("manifest", "rejected") == 4
    assert (
        len(workspace.manifest("ap10k", "train")) == len(workspace.json_lines("ap10k", "train")) == IMAGES - 4
    )


def test_a_stricter_setting_fails_a_finished_build_and_costs_no_work_when_put_back(
    workspace: Workspace,
) -> None:
    break_records(workspace, 4)
    workspace.configure("build", max_reject_share=0.5)
    assert workspace.build().succeeded
    workspace.configure("build", max_reject_share=0.1)
    strict = workspace.build()
    assert not strict.succeeded
    assert strict.worked == {}
    workspace.configure("build", max_reject_share=0.5)
    again = workspace.build()
    assert again.succeeded
    assert again.worked == {}


def test_on_bad_record_fail_exits_with_30(workspace: Workspace) -> None:
    break_records(workspace, 1)
    workspace.configure("build", max_reject_share=1)
    build = workspace.run("--on-bad-record", "fail")
    assert build.exit_code == 30, build.output
    assert "on_bad_record" in build.output
    assert "missing_image" in build.output


def test_precomputed_masks_without_foreground_are_rejected_or_kept(workspace: Workspace) -> None:
    workspace.configure("build", conditions=["mask", "masked_depth"], max_reject_share=1)
    path = sorted((workspace.data / "AP-10K" / "mask").iterdir())[2]
    mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    assert mask is not None
    cv2.imwrite(str(path), np.zeros_like(mask))
    assert workspace.build().counted("mask", "rejected") == 1
    assert len(workspace.manifest("ap10k", "train")) == IMAGES - 1
    workspace.configure("mask", empty="keep")
    assert workspace.build().counted("mask", "rejected") == 0
    assert len(workspace.manifest("ap10k", "train")) == IMAGES


def test_a_model_that_the_backend_does_not_have_is_refused_in_a_line(workspace: Workspace) -> None:
    workspace.configure("build", conditions=["mask"])
    workspace.configure("mask", backend="sam", model_type="vit_tiny")
    build = workspace.run()
    assert build.exit_code != 0
    assert "expected vit_h, vit_l or vit_b with backend = sam, found vit_tiny" in build.output
    assert "Traceback" not in build.output


def test_masks_and_depth_maps_are_found_whatever_the_case_of_their_suffix(workspace: Workspace) -> None:
    workspace.configure(
        "build", conditions=CONDITIONS, datasets=["ap10k"], splits=["val"], max_reject_share=0
    )
    for folder in ("mask", "depth"):
        files = sorted((workspace.data / "AP-10K" / folder).rglob("*.png"))
        for i, file in enumerate(files):
            file.rename(file.with_suffix((".PNG", ".Png", ".png")[i % 3]))
    build = workspace.build()
    assert build.succeeded, build.errors
    assert build.worked["mask"] == build.worked["depth"] == len(workspace.manifest("ap10k", "val"))


def test_of_two_masks_of_one_image_the_one_in_lower_case_is_taken(workspace: Workspace) -> None:
    from conftest import _luigi_settings

    from tasks.dataset.conditions import Mask

    folder = workspace.data / "AP-10K" / "mask"
    (folder / "a").mkdir(parents=True)
    for name in ("1.png", "1.PNG", "2.PNG", "a/2.pNg", "3.jpg", "3.PNG.txt"):
        (folder / name).touch()
    with _luigi_settings(workspace.settings_file()):
        paths = Mask(dataset="ap10k", split="val").file_paths(
            ["data/1.jpg", "data/2.jpg", "data/a/2.jpg", "data/3.jpg", "data/b/4.jpg"]
        )
    assert paths == ["1.png", "2.PNG", "a/2.pNg", "3.png", "b/4.png"]


def test_what_was_finished_before_a_failure_is_kept(workspace: Workspace) -> None:
    workspace.configure("build", conditions=CONDITIONS)
    masks = workspace.data / "AP-10K" / "mask"
    shutil.move(masks, masks.with_name("elsewhere"))
    failed = workspace.build()
    assert not failed.succeeded
    assert any("missing_file" in error for error in failed.errors)
    assert failed.worked == {"images": IMAGES, "spatext": IMAGES, "openpose": IMAGES, "depth": IMAGES}
    shutil.move(masks.with_name("elsewhere"), masks)
    again = workspace.build()
    assert again.succeeded, again.errors
    assert again.worked == {"mask": IMAGES, "masked_depth": IMAGES}


@pytest.mark.parametrize(
    ("arguments", "valid"),
    [
        (("--conditions", "spatext,normals"), CONDITIONS),
        (("--dataset", "coco"), list(DATASETS)),
        (("--split", "training"), ["train", "val", "test"]),
        (("--openpose-style", "dwpose"), ["openpose", "keypoints", "coco", "mmpose"]),
    ],
)
def test_an_unknown_name_is_refused_with_the_valid_ones(
    workspace: Workspace, arguments: tuple[str, str], valid: list[str]
) -> None:
    build = workspace.run(*arguments)
    assert build.exit_code != 0
    assert arguments[1].split(",")[-1] in build.output
    for name in valid:
        assert name in build.output
    assert not workspace.exports.exists()


def test_a_split_that_no_dataset_has_is_refused(workspace: Workspace) -> None:
    build = workspace.run("--dataset", "humanart", "--split", "test")
    assert build.exit_code != 0
    assert "humanart" in build.output
    assert not workspace.exports.exists()


def test_renders_are_the_same_with_and_without_index_maps_to_colour(
    make_workspace: Callable[..., Workspace], sample: Path
) -> None:
    exported = {}
    for conditions in (["openpose"], ["spatext", "openpose"]):
        workspace = make_workspace("-".join(conditions), sample)
        workspace.configure("build", conditions=conditions)
        assert workspace.build().succeeded
        exported[len(conditions)] = {
            path: found
            for path, found in workspace.exported().items()
            if "skeleton" in path or "openpose" in path
        }
    assert exported[1] == exported[2] != {}

"""What a second build does again: only what a change touches, counted."""

from __future__ import annotations

import io
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest
from PIL import Image

if TYPE_CHECKING:
    from conftest import Build, Workspace

READERS = {"manifest", "export", "report"}
"""Stages that read every condition."""
NOTHING: dict[str, int] = {}
ALL_CONDITIONS = ["spatext", "openpose", "mask", "depth", "masked_depth"]
IMAGES = 8


def built(workspace: Workspace) -> Build:
    """A build that must succeed."""
    build = workspace.build()
    assert build.succeeded, build.errors
    return build


def record_counts(build: Build, stage: str) -> tuple[int, int, int]:
    """Records of a stage, how many artifacts it made, and how many records it rejected."""
    records, made, rejected = (build.counted(stage, what) for what in ("records", "made", "rejected"))
    return records, made, rejected


def touch_all(folder: Path, seconds_ago: float) -> None:
    """Give files another modification time, and no other content."""
    moment = time.time() - seconds_ago
    for path in folder.rglob("*"):
        os.utime(path, (moment, moment))


# Nothing changed


def test_first_build_makes_every_artifact_once(workspace: Workspace) -> None:
    workspace.configure("build", conditions=ALL_CONDITIONS)
    build = built(workspace)
    assert build.worked == dict.fromkeys(["images", *ALL_CONDITIONS], IMAGES)
    assert build.stages == {"index", "images", *ALL_CONDITIONS, *READERS}
    for stage in ("images", *ALL_CONDITIONS):
        assert record_counts(build, stage) == (IMAGES, IMAGES, 0)


def test_nothing_changed_so_nothing_runs(workspace: Workspace) -> None:
    workspace.configure(
        "build", datasets=["ap10k", "humanart"], splits=["train", "val"], conditions=ALL_CONDITIONS
    )
    built(workspace)
    before = workspace.exported()
    again = built(workspace)
    assert again.started == []
    assert (again.committed, again.worked) == ({}, NOTHING)
    assert workspace.exported() == before


@pytest.mark.slow
def test_nothing_changed_so_nothing_runs_in_a_new_process(workspace: Workspace) -> None:
    assert workspace.run().exit_code == 0
    again = workspace.run()
    assert again.exit_code == 0
    assert "Did not run any tasks" in again.output
    assert (again.committed, again.worked) == ({}, NOTHING)


# Annotations


def test_one_keypoint_moved_makes_one_map_and_one_render(workspace: Workspace) -> None:
    workspace.configure("build", splits=["train", "val"])
    built(workspace)
    before = {row["image_id"]: row for row in workspace.manifest("ap10k", "train")}
    with workspace.edit_annotations("ap10k", "train") as content:
        annotation = content["annotations"][3]
        labelled = annotation["keypoints"][2::3].index(2)
        annotation["keypoints"][3 * labelled] += 9
    build = built(workspace)
    assert build.worked == {"spatext": 1, "openpose": 1}
    assert build.counted("spatext", "made") == build.counted("openpose", "made") == 1
    assert {part for _, part in build.committed} == {"ap10k-train", "all"}
    after = {row["image_id"]: row for row in workspace.manifest("ap10k", "train")}
    changed = [i for i in before if before[i]["spatext_digest"] != after[i]["spatext_digest"]]
    assert changed == [annotation["image_id"]]


def test_a_moved_bounding_box_makes_no_map_but_a_new_manifest(workspace: Workspace) -> None:
    built(workspace)
    before = workspace.packs("spatext", "openpose", "images")
    with workspace.edit_annotations("ap10k", "train") as content:
        annotation = content["annotations"][0]
        annotation["bbox"][2] += 5
    build = built(workspace)
    assert build.worked == NOTHING
    assert build.counted("spatext", "made") == build.counted("openpose", "made") == 0
    assert build.stages >= {"index", *READERS}
    assert workspace.packs("spatext", "openpose", "images") == before
    boxes = {
        each["annotation_id"]: each["bbox_xywh"]
        for row in workspace.manifest("ap10k", "train")
        for each in row["instances"]
    }
    assert boxes[annotation["id"]] == annotation["bbox"]


def test_ten_images_added_make_ten_of_each(workspace: Workspace) -> None:
    from conftest import only

    from spctrl.demo_data import write_sample

    write_sample(workspace.data, images_per_split=IMAGES + 10, splits=["train"], datasets=["ap10k"])
    whole = workspace.annotation_path("ap10k", "train").read_bytes()
    with workspace.edit_annotations("ap10k", "train") as content:
        only({image["id"] for image in content["images"][5:13]}, content)
    built(workspace)
    workspace.annotation_path("ap10k", "train").write_bytes(whole)
    build = built(workspace)
    assert build.worked == {"spatext": 10, "openpose": 10, "images": 10}
    assert record_counts(build, "spatext") == record_counts(build, "openpose") == (IMAGES + 10, 10, 0)
    assert len(list((workspace.export_folder("ap10k") / "pose_kptindex").iterdir())) == IMAGES + 10


def test_reordered_annotation_file_makes_nothing(workspace: Workspace) -> None:
    built(workspace)
    with workspace.edit_annotations("ap10k", "train") as content:
        content["images"].reverse()
    assert built(workspace).worked == NOTHING


# Settings


def test_a_stage_parameter_reruns_that_stage_and_its_readers_only(workspace: Workspace) -> None:
    built(workspace)
    maps = workspace.packs("spatext", "images")
    workspace.configure("openpose", style="coco")
    build = built(workspace)
    assert build.stages == {"openpose", *READERS}
    assert build.worked == {"openpose": IMAGES}
    assert workspace.packs("spatext", "images") == maps


def test_a_setting_put_back_renders_nothing(workspace: Workspace) -> None:
    built(workspace)
    before = workspace.exported()
    workspace.configure("openpose", style="mmpose")
    built(workspace)
    assert workspace.exported() != before
    workspace.configure("openpose", style=None)
    build = built(workspace)
    assert build.worked == NOTHING
    assert build.stages <= {"export", "report"}
    assert workspace.exported() == before


def test_a_condition_left_out_leaves_the_export_and_comes_back_without_work(workspace: Workspace) -> None:
    built(workspace)
    before = workspace.exported()
    workspace.configure("build", conditions=["spatext"])
    build = built(workspace)
    assert build.worked == NOTHING
    assert not (workspace.export_folder("ap10k") / "mmpose_skeleton").exists()
    workspace.configure("build", conditions=None)
    assert built(workspace).worked == NOTHING
    assert workspace.exported() == before


def test_the_number_of_workers_is_no_ingredient(workspace: Workspace) -> None:
    built(workspace)
    workspace.configure("executor", workers=2)
    assert built(workspace).started == []


def test_renamed_export_folders_make_no_artifacts(workspace: Workspace) -> None:
    built(workspace)
    workspace.configure("export", names="released", heatmaps="no")
    build = built(workspace)
    assert build.stages == READERS
    assert build.worked == NOTHING
    names = {path.name for path in workspace.export_folder("ap10k").iterdir()}
    assert "train_split1_openpose_skeleton" in names
    assert not names & {"mmpose_skeleton", "categories.jsonl"}


# Files


@pytest.mark.parametrize("seconds_ago", [0, 3600])
def test_touched_images_change_nothing(workspace: Workspace, seconds_ago: float) -> None:
    workspace.configure("build", conditions=ALL_CONDITIONS)
    built(workspace)
    touch_all(workspace.data / "AP-10K", seconds_ago)
    build = built(workspace)
    assert (build.committed, build.worked, build.started) == ({}, NOTHING, [])


def test_changed_image_bytes_are_probed_and_draw_nothing(workspace: Workspace) -> None:
    built(workspace)
    path = sorted((workspace.data / "AP-10K" / "data").iterdir())[2]
    with Image.open(path) as image:
        pixels = image.convert("RGB")
    pixels.save(path, quality=40)
    build = built(workspace)
    assert build.worked == {"images": 1}
    assert build.stages == {"images", *READERS}
    assert build.counted("images", "made") == 1
    exported = workspace.export_folder("ap10k") / "data" / path.name
    assert exported.read_bytes() == path.read_bytes()


def test_an_edited_mask_makes_one_mask_and_one_masked_depth(workspace: Workspace) -> None:
    workspace.configure("build", conditions=ALL_CONDITIONS)
    built(workspace)
    path = sorted((workspace.data / "AP-10K" / "mask").iterdir())[4]
    pixels = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    assert pixels is not None
    pixels[:40, :40] = 255 - pixels[:40, :40]
    cv2.imwrite(str(path), pixels)
    build = built(workspace)
    assert build.worked == {"mask": 1, "masked_depth": 1}
    assert build.stages == {"mask", "masked_depth", *READERS}
    exported = cv2.imread(
        str(workspace.export_folder("ap10k") / "sam_hq_mask" / path.name), cv2.IMREAD_GRAYSCALE
    )
    assert exported is not None
    assert np.array_equal(exported, pixels)


@pytest.mark.parametrize("stage", ["images", "spatext", "openpose", "mask", "masked_depth"])
def test_a_deleted_pack_is_made_again(workspace: Workspace, stage: str) -> None:
    workspace.configure("build", conditions=ALL_CONDITIONS)
    built(workspace)
    exports, packs = workspace.exported(), workspace.packs("images", *ALL_CONDITIONS)
    (tar,) = workspace.store.glob(f"packs/{stage}/*.tar")
    tar.unlink()
    build = built(workspace)
    assert build.worked == {stage: IMAGES}
    assert workspace.packs("images", *ALL_CONDITIONS) == packs
    assert workspace.exported() == exports
    assert built(workspace).started == []


def test_a_deleted_pack_index_is_made_again_when_its_stage_runs(workspace: Workspace) -> None:
    built(workspace)
    packs = workspace.packs("openpose")
    for path in workspace.store.glob("packs/openpose/*.parquet"):
        path.unlink()
    shutil.rmtree(workspace.store / "runs" / "openpose")
    assert built(workspace).worked == {"openpose": IMAGES}
    assert workspace.packs("openpose") == packs


def test_a_pack_cut_short_never_passes_for_whole(workspace: Workspace) -> None:
    built(workspace)
    exports = workspace.exported()
    (tar,) = workspace.store.glob("packs/spatext/*.tar")
    os.truncate(tar, tar.stat().st_size // 2)
    workspace.build()
    workspace.build()
    assert workspace.faults() == []
    assert workspace.exported() == exports


@pytest.mark.parametrize("name", ["manifests/train_split1.parquet", "train_split1.jsonl", "categories.jsonl"])
def test_a_deleted_text_file_of_an_export_is_written_again(workspace: Workspace, name: str) -> None:
    built(workspace)
    before = workspace.exported()
    (workspace.export_folder("ap10k") / name).unlink()
    build = built(workspace)
    assert (build.stages, build.worked) == ({"export"}, NOTHING)
    assert workspace.exported() == before


def test_a_deleted_export_folder_is_written_again_from_the_packs(workspace: Workspace) -> None:
    built(workspace)
    before = workspace.exported()
    shutil.rmtree(workspace.exports)
    build = built(workspace)
    assert (build.stages, build.worked) == ({"export"}, NOTHING)
    assert workspace.exported() == before


# Records that leave


@pytest.mark.slow
@pytest.mark.parametrize(("dataset", "split"), [("ap10k", "train"), ("humanart", "val")])
def test_a_record_that_leaves_takes_its_files_along(workspace: Workspace, dataset: str, split: str) -> None:
    from conftest import only

    workspace.configure("build", datasets=[dataset], splits=["train", "val"], conditions=ALL_CONDITIONS)
    workspace.configure("export", heatmaps="yes")
    built(workspace)
    before = workspace.exported()
    with workspace.edit_annotations(dataset, split) as content:
        leaving = content["images"][1]
        only({image["id"] for image in content["images"]} - {leaving["id"]}, content)
    build = built(workspace)
    assert build.worked == NOTHING
    after = workspace.exported()
    gone = before.keys() - after.keys()
    stem = Path(leaving["file_name"]).stem
    # An image, five conditions, heatmaps, and for HumanArt the JSON file of the image.
    assert len(gone) == (8 if dataset == "humanart" else 7)
    assert {Path(path).stem for path in gone} == {stem}
    assert not [path for path in after if stem in path]
    ids = [image["id"] for image in content["images"]]
    assert [row["image_id"] for row in workspace.manifest(dataset, split)] == ids
    assert [line["image_id"] for line in workspace.json_lines(dataset, split)] == ids
    fresh = workspace.exports.with_name("exports-of-a-fresh-build")
    workspace.exports, old = fresh, workspace.exports
    workspace.configure("paths", export=fresh, store=workspace.store.with_name("fresh-store"))
    assert workspace.build().succeeded
    assert workspace.exported() == after
    workspace.exports = old


def test_a_scenario_that_leaves_takes_its_folders_along(workspace: Workspace) -> None:
    from conftest import only

    workspace.configure("build", datasets=["humanart"], splits=["train"])
    built(workspace)
    with workspace.edit_annotations("humanart", "train") as content:
        only({image["id"] for image in content["images"] if "/movie/" not in image["file_name"]}, content)
    built(workspace)
    assert list(workspace.exports.rglob("*movie*")) == []


def test_an_image_in_two_splits_stays_when_it_leaves_one(workspace: Workspace) -> None:
    from conftest import only

    workspace.configure("build", splits=["train", "val"])
    train = workspace.annotation_path("ap10k", "train").read_bytes()
    workspace.annotation_path("ap10k", "val").write_bytes(train)
    built(workspace)
    before = workspace.exported()
    with workspace.edit_annotations("ap10k", "val") as content:
        only({image["id"] for image in content["images"][:3]}, content)
    built(workspace)
    assert workspace.exported().keys() == before.keys()


# Rejects


def break_image(path: Path) -> bytes:
    """Cut a file short and give back what it held."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 3])
    return data


def test_a_repaired_image_is_probed_and_no_other(workspace: Workspace) -> None:
    workspace.configure("build", max_reject_share=0.5)
    first, second, *_ = sorted((workspace.data / "AP-10K" / "data").iterdir())
    data, _ = break_image(first), break_image(second)
    build = built(workspace)
    assert record_counts(build, "images") == (IMAGES, IMAGES - 2, 2)
    assert len(workspace.manifest("ap10k", "train")) == IMAGES - 2
    assert built(workspace).started == []
    first.write_bytes(data)
    build = built(workspace)
    assert build.worked == {"images": 1}
    assert record_counts(build, "images") == (IMAGES, 1, 1)
    names = [row["file_name"] for row in workspace.manifest("ap10k", "train")]
    assert first.name in names
    assert second.name not in names


def test_a_missing_image_is_probed_once_it_is_there(workspace: Workspace) -> None:
    workspace.configure("build", max_reject_share=0.5)
    first, second, *_ = sorted((workspace.data / "AP-10K" / "data").iterdir())
    data = first.read_bytes()
    first.unlink()
    second.unlink()
    assert built(workspace).counted("images", "rejected") == 2
    first.write_bytes(data)
    build = built(workspace)
    assert build.worked == {"images": 1}
    assert build.counted("images", "rejected") == 1


def test_a_repaired_mask_is_checked_and_no_other(workspace: Workspace) -> None:
    workspace.configure("build", conditions=["mask", "depth", "masked_depth"], max_reject_share=0.5)
    first, second, *_ = sorted((workspace.data / "AP-10K" / "mask").iterdir())
    data = first.read_bytes()
    for path in (first, second):
        buffer = io.BytesIO()
        Image.new("L", (8, 8)).save(buffer, "PNG")
        path.write_bytes(buffer.getvalue())
    assert built(workspace).counted("mask", "rejected") == 2
    first.write_bytes(data)
    build = built(workspace)
    assert build.worked == {"mask": 1, "masked_depth": 1}
    assert len(workspace.manifest("ap10k", "train")) == IMAGES - 1


# Code


Edit = Callable[[str], str]


def replace(old: str, new: str) -> Edit:
    """An edit of one place; the place must be there."""

    def edit(text: str) -> str:
        assert text.count(old) >= 1, f"{old!r} is not in the source any more: adapt this test"
        return text.replace(old, new, 1)

    return edit


def before_first(pattern: str, new: str) -> Edit:
    """An edit that puts text before the first line that matches."""

    def edit(text: str) -> str:
        assert re.search(pattern, text, re.MULTILINE), (
            f"{pattern!r} matches nothing any more: adapt this test"
        )
        return re.sub(pattern, lambda found: new + found.group(), text, count=1, flags=re.MULTILINE)

    return edit


def substitute(pattern: str, new: str) -> Edit:
    """An edit by regular expression."""

    def edit(text: str) -> str:
        assert re.search(pattern, text), f"{pattern!r} matches nothing any more: adapt this test"
        return re.sub(pattern, new, text, count=1)

    return edit


SPATEXT, OPENPOSE = "spctrl/conditions/spatext.py", "spctrl/conditions/openpose.py"
HELPER_EDITS: dict[str, tuple[str, Edit, set[str]]] = {
    "a helper of both drawings": (
        SPATEXT,
        substitute(r"int\(\(x1 \+ x2\) / 2\)", "int((x1 + x2 + 1) / 2)"),
        {"spatext", "openpose"},
    ),
    "a table of one drawing": (OPENPOSE, replace("(255, 85, 0)", "(254, 85, 0)"), {"openpose"}),
    "a function two modules away": (
        "spctrl/conditions/png.py",
        substitute(r"_COMPRESSION_LEVEL = \d+", "_COMPRESSION_LEVEL = 1"),
        {"spatext", "openpose"},
    ),
    "the image probe": (
        "spctrl/data/images.py",
        substitute(r"_THUMBNAIL_SIDE = \d+", "_THUMBNAIL_SIDE = 64"),
        {"images"},
    ),
    "a data class that stages get": (
        "spctrl/data/records.py",
        before_first(r"^    image_id: int$", "    spare = 0\n"),
        {"spatext", "openpose", "images"},
    ),
}
HARMLESS_EDITS: dict[str, tuple[str, Edit]] = {
    "comment": (SPATEXT, before_first(r"^def link_polygon", "# A comment.\n")),
    "docstring": (SPATEXT, replace('"""The ellipse along a link', '"""An ellipse along a link')),
    "module docstring": (OPENPOSE, replace('"""Colour renders', '"""Coloured renders')),
    "formatting": (SPATEXT, replace("FIRST_LINK = 51", "FIRST_LINK = (\n    51\n)")),
    "annotation": (SPATEXT, replace("half_width_px: int)", "half_width_px: float)")),
    "annotation of a variable": (SPATEXT, replace("BACKGROUND = 0", "BACKGROUND: int = 0")),
    "an unused function": (
        OPENPOSE,
        before_first(r"^def drawn_links", "def _spare() -> None:\n    pass\n\n\n"),
    ),
}


@pytest.fixture(scope="module")
def copied_project(sample: Path, code: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace that was built with its own copy of the project's code."""
    from conftest import Workspace

    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(code, folder / "code")
    workspace = Workspace(folder / "work", sample, folder / "code")
    workspace.configure("build", datasets=["ap10k"], splits=["train"])
    first = workspace.run()
    assert first.exit_code == 0, first.output
    return workspace


@pytest.fixture
def edited(copied_project: Workspace) -> Iterator[Callable[[str, Edit], Build]]:
    """Builds with one source file edited; the file is put back afterwards."""
    workspace = copied_project
    kept: dict[Path, str] = {}

    def build_edited(name: str, edit: Edit) -> Build:
        path = workspace.code / name
        kept[path] = path.read_text()
        new = edit(kept[path])
        assert new != kept[path]
        path.write_text(new)
        return workspace.run()

    yield build_edited
    for path, text in kept.items():
        path.write_text(text)


@pytest.mark.slow
@pytest.mark.parametrize("what", HELPER_EDITS)
def test_an_edited_helper_reruns_the_stages_that_reach_it(
    edited: Callable[[str, Edit], Build], copied_project: Workspace, what: str
) -> None:
    name, edit, stages = HELPER_EDITS[what]
    build = edited(name, edit)
    assert build.exit_code == 0, build.output
    assert build.worked == dict.fromkeys(stages, IMAGES)
    assert build.stages - READERS == stages


@pytest.mark.slow
@pytest.mark.parametrize("what", HARMLESS_EDITS)
def test_an_edit_without_effect_runs_nothing(edited: Callable[[str, Edit], Build], what: str) -> None:
    name, edit = HARMLESS_EDITS[what]
    build = edited(name, edit)
    assert build.exit_code == 0, build.output
    assert build.worked == NOTHING
    assert build.stages <= {"export", "report"}  # an edit with effect may have been put back just before


@pytest.mark.slow
def test_edited_code_that_is_put_back_is_found_again(
    edited: Callable[[str, Edit], Build], copied_project: Workspace
) -> None:
    workspace = copied_project
    workspace.run()
    before = workspace.exported()
    original = (workspace.code / SPATEXT).read_text()
    build = edited(SPATEXT, replace("FIRST_LINK = 51", "FIRST_LINK = 61"))
    assert build.worked == {"spatext": IMAGES, "openpose": IMAGES}
    assert workspace.exported() != before
    (workspace.code / SPATEXT).write_text(original)
    again = workspace.run()
    assert again.exit_code == 0
    assert again.worked == NOTHING
    assert workspace.exported() == before

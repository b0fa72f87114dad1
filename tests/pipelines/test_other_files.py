"""Annotation files that other tools wrote: what a build makes of them, and what it says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from spctrl.data.skeletons import AP10K, HUMANART

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Build, Workspace

Json = dict[str, Any]
MAPS = "pose_kptindex"


def crowded(content: Json) -> Json:
    """The image with most instances."""
    owners = [each["image_id"] for each in content["annotations"]]
    found: Json = max(content["images"], key=lambda image: owners.count(image["id"]))
    assert owners.count(found["id"]) > 1
    return found


def an_instance(content: Json) -> Json:
    """One of several instances of an image."""
    image_id = crowded(content)["id"]
    found: Json = [each for each in content["annotations"] if each["image_id"] == image_id][-1]
    return found


def conditions(workspace: Workspace) -> dict[str, str]:
    """Digests of the exported index maps and renders."""
    return {path: digest for path, digest in workspace.exported().items() if path.endswith(".png")}


def notes(workspace: Workspace) -> str:
    return (workspace.exports / "report.html").read_text()


def built(workspace: Workspace) -> Build:
    build = workspace.build()
    assert build.succeeded, build.errors
    return build


@pytest.mark.parametrize("written", [float, str, "{:06d}".format])
def test_ids_as_text_or_float_lose_no_instance(
    workspace: Workspace, written: Callable[[int], object]
) -> None:
    built(workspace)
    expected, lines = conditions(workspace), workspace.json_lines("ap10k", "train")
    with workspace.edit_annotations("ap10k", "train") as content:
        instance, image = an_instance(content), crowded(content)
        instance["image_id"], image["id"] = written(instance["image_id"]), written(image["id"])
        instance["category_id"] = written(instance["category_id"])
    assert built(workspace).worked == {}
    assert conditions(workspace) == expected
    assert workspace.json_lines("ap10k", "train") == lines
    assert "2 entries with ids, sizes or counts written as text, float or boolean" in notes(workspace)


@pytest.mark.parametrize("image_id", [None, "first", 10**6])
def test_an_annotation_without_an_image_fails_the_build(workspace: Workspace, image_id: object) -> None:
    with workspace.edit_annotations("ap10k", "train") as content:
        instance = an_instance(content)
        instance["image_id"] = image_id
        total = len(content["annotations"])
    build = workspace.run()
    assert build.exit_code == 30, build.output
    assert f"1 of {total} annotations belong to no image of the file" in build.output
    assert "max_unassigned_share" in build.output and str(instance["id"]) in build.output
    assert "spatext" not in build.stages
    allowed = workspace.run("--max-unassigned-share", "0.5")
    assert allowed.exit_code == 0, allowed.output
    for text in (allowed.output, notes(workspace)):
        assert "1 annotations of no image of the file: left out" in text


def test_permuted_keypoints_give_the_same_pictures(workspace: Workspace) -> None:
    built(workspace)
    expected, lines = conditions(workspace), workspace.json_lines("ap10k", "train")
    categories = (workspace.export_folder("ap10k") / "categories.jsonl").read_text()
    order = np.random.default_rng(1).permutation(17)
    place = np.argsort(order)
    with workspace.edit_annotations("ap10k", "train") as content:
        for category in content["categories"]:
            names = np.array(category["keypoints"])[order]
            category["keypoints"] = [name.replace("_", " ").upper() for name in names]
            category["skeleton"] = [
                [int(place[end - 1]) + 1 for end in link] for link in category["skeleton"]
            ]
        for each in content["annotations"]:
            each["keypoints"] = np.reshape(each["keypoints"], (17, 3))[order].ravel().tolist()
        count = len(content["annotations"])
    assert built(workspace).worked == {}
    assert conditions(workspace) == expected
    assert workspace.json_lines("ap10k", "train") == lines
    found = (workspace.export_folder("ap10k") / "categories.jsonl").read_text()
    assert found.lower() == categories.lower()
    assert f"{count} annotations with keypoints in another order" in notes(workspace)


def capitals(category: Json) -> None:
    category["keypoints"] = [name.title().replace("_", " ") for name in category["keypoints"]]


@pytest.mark.parametrize(
    "change",
    [
        capitals,
        lambda category: category.update(keypoints=[], skeleton=None, supercategory="Animal"),
    ],
)
def test_splits_may_describe_their_categories_in_other_ways(
    workspace: Workspace, change: Callable[[Json], object]
) -> None:
    workspace.configure("build", splits=["train", "val"])
    built(workspace)
    expected = json.loads((workspace.export_folder("ap10k") / "categories.jsonl").read_bytes())
    with workspace.edit_annotations("ap10k", "val") as content:
        for category in content["categories"]:
            change(category)
        content["categories"] = content["categories"][1::-1] + content["categories"][2:]
    built(workspace)
    found = json.loads((workspace.export_folder("ap10k") / "categories.jsonl").read_bytes())
    assert found.keys() == expected.keys()
    names = [{key: each["keypoints"] for key, each in categories.items()} for categories in (found, expected)]
    assert names[0] == names[1]
    assert built(workspace).committed == {}
    assert workspace.spctrl("verify").returncode == 0


def test_one_id_for_two_species_in_two_splits_is_refused(workspace: Workspace) -> None:
    workspace.configure("build", splits=["train", "val"])
    with workspace.edit_annotations("ap10k", "val") as content:
        content["categories"][0]["name"] = "unicorn"
    build = workspace.run()
    assert build.exit_code == 30, build.output
    assert "for 'unicorn' in val_split1" in build.output and "Traceback" not in build.output


def test_other_keypoints_stop_the_build_with_both_lists(workspace: Workspace) -> None:
    with workspace.edit_annotations("ap10k", "train") as content:
        for category in content["categories"]:
            category["keypoints"] = list(HUMANART.keypoint_names)
    build = workspace.run()
    assert build.exit_code == 30, build.output
    for skeleton in (AP10K, HUMANART):
        assert ", ".join(skeleton.keypoint_names) in build.output
    assert "Traceback" not in build.output


def test_two_categories_with_one_id_stop_the_build(workspace: Workspace) -> None:
    with workspace.edit_annotations("ap10k", "train") as content:
        first = content["categories"][0]
        content["categories"].append({**first, "name": "unicorn"})
    build = workspace.run()
    assert build.exit_code == 30, build.output
    assert f"found {first['id']} for {first['name']!r} and 'unicorn'" in build.output


@pytest.mark.parametrize("empty", [None, []])
def test_what_was_assumed_is_in_the_log_and_the_report(workspace: Workspace, empty: object) -> None:
    with workspace.edit_annotations("ap10k", "train") as content:
        used = {each["category_id"] for each in content["annotations"]}
        for category in content["categories"]:
            category["keypoints"] = empty
        for each in content["annotations"]:
            del each["area"], each["num_keypoints"]
        total = len(content["annotations"])
    build = workspace.run()
    assert build.exit_code == 0, build.output
    for text in (
        f"{total} annotations without an area",
        f"{total} annotations without num_keypoints",
        f"{len(used)} categories that name no keypoints",
    ):
        assert text in notes(workspace)
        assert f"ap10k-train: {text}" in build.output
    assert "annotations without" not in workspace.run().output, "nothing was read again"


@pytest.mark.slow
@pytest.mark.usefixtures("forked_models")
class TestMeasured:
    """Numbers of files without areas or counts."""

    @pytest.fixture
    def scored(self, workspace: Workspace, tmp_path: Path) -> Workspace:
        """The validation split's own images, as an external method, with tiny weights."""
        for package in ("torch", "transformers", "matplotlib"):
            pytest.importorskip(package, reason="the eval extra is not installed")
        import eval.vitpose.tiny

        list(eval.vitpose.tiny.write_tiny_weights(tmp_path / "weights"))
        workspace.configure("paths", weights=tmp_path / "weights")
        workspace.configure("executor", device="cpu")
        for file in (workspace.data / "AP-10K" / "data").glob("*.jpg"):
            (workspace.folder / "real" / file.stem).mkdir(parents=True)
            shutil.copyfile(file, workspace.folder / "real" / file.stem / "0.jpg")
        config = {
            "dataset": "ap10k",
            "methods": [{"name": "real", "kind": "external", "folder": str(workspace.folder / "real")}],
            "metrics": ["pose_ap"],
            "pose": {"weights": "vitpose"},
            "intervals": {"resamples": 40},
        }
        (workspace.folder / "real.yaml").write_text(json.dumps(config))
        return workspace

    def table(self, workspace: Workspace) -> str:
        build = workspace.build("Benchmark", config=str(workspace.folder / "real.yaml"))
        assert build.succeeded, build.errors
        return (workspace.exports / "benchmark-real" / "table.md").read_text().replace("../", "")

    def numbers(self, workspace: Workspace) -> list[Json]:
        content = json.loads((workspace.exports / "benchmark-real" / "table.json").read_bytes())
        names = ("metric", "kind", "group", "value", "low", "high")
        return [
            {name: row[name] for name in names} for row in content["numbers"] if row["source"] == "measured"
        ]

    def test_counts_that_are_absent_change_no_number(self, scored: Workspace) -> None:
        assert "not computed" not in self.table(scored).replace("not computed: no instance is of", "")
        expected = self.numbers(scored)
        with scored.edit_annotations("ap10k", "val") as content:
            for each in content["annotations"]:
                del each["num_keypoints"]
        self.table(scored)
        assert self.numbers(scored) == expected

    def test_what_cannot_be_computed_stays_in_the_table(self, scored: Workspace) -> None:
        with scored.edit_annotations("ap10k", "val") as content:
            for each in content["annotations"]:
                each["iscrowd"] = 1
            total = len(content["annotations"])
        table = self.table(scored)
        reason = f"not computed: all {total} instances are crowds or have num_keypoints = 0"
        assert table.count(reason) == 7, "AP and its relatives, and PCK"
        assert "0.00" not in table
        page = (scored.exports / "benchmark-real" / "report.html").read_text()
        assert page.count(reason) == 7


# Images without annotations, and files without a usable image


def test_images_without_an_annotation_are_left_out_of_a_build(workspace: Workspace) -> None:
    built(workspace)
    expected = workspace.exported()
    with workspace.edit_annotations("ap10k", "train") as content:
        for image_id, name in ((10**6, "nobody.jpg"), (10**6 + 1, "nothing/there.jpg")):
            content["images"].append({**content["images"][0], "id": image_id, "file_name": name})
    # More of them than max_reject_share allows of bad records: they are none.
    build = workspace.run("--max-reject-share", "0")
    assert build.exit_code == 0, build.output
    assert conditions(workspace) == {path: expected[path] for path in expected if path.endswith(".png")}
    for text in (build.output, notes(workspace)):
        assert "2 images without an annotation: left out" in text


@pytest.mark.parametrize("damage", [{"iscrowd": "maybe"}, {"bbox": "wide"}, {"keypoints": [1, 2]}])
def test_a_file_without_a_usable_image_shows_examples_and_leaves_the_rejects(
    workspace: Workspace, damage: Json
) -> None:
    with workspace.edit_annotations("ap10k", "train") as content:
        for each in content["annotations"]:
            each.update(damage)
        images = len({each["image_id"] for each in content["annotations"]})
        last = content["annotations"][-1]
    build = workspace.run("--max-reject-share", "1")
    assert build.exit_code == 30, build.output
    assert "expected at least one usable image, found none" in build.output
    assert "Traceback" not in build.output
    examples = [line for line in build.output.splitlines() if line.strip().startswith("image ")]
    assert len(examples) == 3 and all(next(iter(damage)) in line for line in examples)
    (rejects,) = workspace.store.glob("**/index/**/rejects.parquet")
    assert str(rejects) in build.output
    rows = pq.read_table(rejects, partitioning=None).to_pylist()
    assert len({row["image_id"] for row in rows}) == images
    assert rows[-1]["annotation_id"] == last["id"]


def test_a_file_without_annotations_fails_the_build_in_a_line(workspace: Workspace) -> None:
    with workspace.edit_annotations("ap10k", "train") as content:
        images, content["annotations"] = len(content["images"]), []
    build = workspace.run()
    assert build.exit_code == 30, build.output
    assert f"found none (images without an annotation: {images})" in build.output
    assert "Traceback" not in build.output and "spatext" not in build.stages

"""The tools that look at one pose, on tiny random models; and what they do to a pose."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tagged_images import exif

from spctrl.conditions.openpose import palette
from spctrl.configuration import ConfigurationError
from spctrl.data.datasets import AP10K, HUMANART, Dataset
from spctrl.data.orientation import orientation_of
from spctrl.errors import ExpectedError
from spctrl.inference.poses import (
    Pose,
    index_map_of,
    mirror,
    move,
    prompt_of,
    read_pose,
    with_species,
    write_pose,
)
from spctrl.inference.sheets import coloured_index_map, heat_over, sheet

SIZE_WH = (96, 64)
FAST = ["--steps", "2", "--resolution", "64", "--device", "cpu"]


def a_pose(dataset: Dataset = AP10K, instances: int = 1, seed: int = 0) -> Pose:
    rng = np.random.default_rng(seed)
    count = dataset.skeleton.num_keypoints
    keypoints = np.zeros((instances, count, 3))
    keypoints[..., :2] = rng.integers(8, 56, (instances, count, 2))
    keypoints[..., 2] = 2
    keypoints[:, 4] = 0  # not labelled
    return Pose(
        size_wh=SIZE_WH,
        keypoints=keypoints,
        categories=("dog",),
        background="forest or shrub",
        caption="a person dancing",
    )


# Poses


@pytest.mark.parametrize("dataset", [AP10K, HUMANART], ids=lambda dataset: dataset.name)
def test_a_pose_survives_its_file(dataset: Dataset, tmp_path: Path) -> None:
    pose = a_pose(dataset, instances=2)
    write_pose(pose, tmp_path / "pose.json")
    read = read_pose(tmp_path / "pose.json", dataset)
    np.testing.assert_array_equal(read.keypoints, pose.keypoints)
    assert replace(read, keypoints=pose.keypoints) == pose


def test_a_line_of_an_export_is_a_pose(tmp_path: Path) -> None:
    annotation = {"id": 1, "image_id": 2, "category_id": 5, "bbox": [0, 0, 9, 9], "keypoints": [1, 2, 2] * 17}
    line = {
        "filename": "2.jpg",
        "image_id": 2,
        "height": 64,
        "width": 96,
        "anns": [annotation],
        "background": 2,
    }
    (tmp_path / "line.json").write_text(json.dumps(line))
    pose = read_pose(tmp_path / "line.json", AP10K)
    assert (pose.size_wh, pose.background, pose.categories) == ((96, 64), "forest or shrub", ())
    assert pose.keypoints.shape == (1, 17, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is not a pose"),
        ("{", "is not a pose"),
        ('{"width": 9, "height": 9, "anns": [{"keypoints": [1, 2]}]}', "expected 51 numbers"),
        ('{"width": 9, "height": 9}', "anns"),
        (
            b'{"width": 9, "height": 9, "anns": [], "note": "caf\xe9"}',
            "text in UTF-8, .* byte 50,.* -f LATIN1",
        ),
        ("[]".encode("utf-16"), "text in UTF-8, .*iconv -f UTF-16"),
        (
            '{"width": 9,\n "height": 9, "anns": [],\n "width": 8}',
            "each key once, found `width` in lines 1 and 3",
        ),
        (
            '{"width": 9, "height": 9, "anns": [], "x": [{"a": 1, "\\u0061" : 2}]}',
            "found `a` twice in line 1",
        ),
    ],
)
def test_a_file_that_is_not_a_pose_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    (tmp_path / "pose.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigurationError, match=message):
        read_pose(tmp_path / "pose.json", AP10K)


def test_braces_and_colons_in_a_poses_texts_are_no_keys(tmp_path: Path) -> None:
    text = {"a\\": '{"a": ', 'a"': '}, "a": 1', "a": {"a": [{"a": 1}, {"a": '"a":'}]}}
    path = tmp_path / "pose.json"
    path.write_text(json.dumps({"width": 9, "height": 8, "anns": [], "note": text}))
    assert read_pose(path, AP10K).size_wh == (9, 8)


def test_a_byte_order_mark_before_a_pose_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "pose.json").write_bytes(b'\xef\xbb\xbf{"width": 9, "height": 8, "anns": []}')
    assert read_pose(tmp_path / "pose.json", AP10K).size_wh == (9, 8)


def test_a_missing_pose_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="none"):
        read_pose(tmp_path / "none.json", AP10K)


def test_moving_moves_what_is_labelled_and_nothing_else() -> None:
    pose = a_pose(instances=2)
    moved = move(pose, 5, -3, instance=1)
    assert np.array_equal(moved.keypoints[0], pose.keypoints[0])
    labelled = pose.keypoints[1, :, 2] > 0
    assert np.array_equal(moved.keypoints[1, labelled, :2] - pose.keypoints[1, labelled, :2], [[5, -3]] * 16)
    assert np.array_equal(moved.keypoints[1, ~labelled], pose.keypoints[1, ~labelled])
    one = move(pose, 5, -3, instance=0, keypoint=6)
    assert np.argwhere((one.keypoints != pose.keypoints).any(-1)).tolist() == [[0, 6]]
    assert np.array_equal(move(one, -5, 3, instance=0, keypoint=6).keypoints, pose.keypoints)


def test_an_instance_that_is_not_there_cannot_be_moved() -> None:
    with pytest.raises(ExpectedError, match="from 0 to 0, found 1"):
        move(a_pose(), 1, 1, instance=1)


@pytest.mark.parametrize("dataset", [AP10K, HUMANART], ids=lambda dataset: dataset.name)
def test_mirroring_twice_changes_nothing_and_once_swaps_the_sides(dataset: Dataset) -> None:
    pose = a_pose(dataset)
    mirrored = mirror(pose, dataset)
    assert np.array_equal(mirror(mirrored, dataset).keypoints, pose.keypoints)
    left, right = dataset.skeleton.flip_pairs[-1]
    x, y, _ = pose.keypoints[0, left]
    assert mirrored.keypoints[0, right].tolist() == [SIZE_WH[0] - 1 - x, y, 2]


def test_a_mirrored_pose_draws_the_mirrored_silhouette_of_its_joints() -> None:
    """On the keypoints' own pixels; links round differently."""
    pose = a_pose()
    before, after = index_map_of(pose, AP10K), index_map_of(mirror(pose, AP10K), AP10K)
    for k in (0, 16):
        x, y, _ = pose.keypoints[0, k].astype(int)
        assert (before[y, x] <= 17) == (after[y, SIZE_WH[0] - 1 - x] <= 17)


def test_prompts_follow_the_species_and_the_labels() -> None:
    text = prompt_of(with_species(a_pose(), "tiger"), AP10K, keypoints="tokens")
    assert "tiger" in text
    assert "dog" not in text
    assert "<left-eye>" in text
    assert "<root-of-tail>" not in text
    with pytest.raises(ExpectedError, match="category"):
        prompt_of(replace(a_pose(), categories=()), AP10K, keypoints=None)


# Pictures


def test_index_maps_are_shown_in_the_colours_of_renders() -> None:
    drawing = index_map_of(a_pose(), AP10K)
    shown = np.asarray(coloured_index_map(drawing, AP10K.skeleton))
    colours = palette("openpose", AP10K.skeleton.keypoint_names, AP10K.skeleton.links)
    assert shown[0, 0].tolist() == [0, 0, 0]
    for value in np.unique(drawing):
        assert {tuple(each) for each in shown[drawing == value].tolist()} == {tuple(colours[value])}
    links = np.arange(51, 70, dtype=np.uint8)[None]
    assert np.asarray(coloured_index_map(links, HUMANART.skeleton)).any(-1).all()


def test_heat_is_brightest_where_the_map_is_highest() -> None:
    heat: NDArray[np.float32] = np.zeros((8, 8), np.float32)
    heat[2, 5] = 1
    over = np.asarray(heat_over(Image.new("RGB", (64, 64)), heat), int).sum(-1)
    row, column = np.unravel_index(over.argmax(), over.shape)
    assert (row // 8, column // 8) == (2, 5)
    flat = heat_over(Image.new("RGB", (64, 64)), np.ones((8, 8), np.float32))
    assert np.asarray(flat).max() < 30


def test_a_sheet_has_room_for_all_its_pictures() -> None:
    pictures = [(f"{i}", Image.new("RGB", (100, 50), (0, 0, 200))) for i in range(5)]
    page = np.asarray(sheet(pictures, columns=3, side_px=50))
    blue = (page == (0, 0, 200)).all(-1).sum()
    assert blue == 5 * 50 * 25


# The command


@pytest.fixture(scope="module")
def place(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny weights, an index of the sample, and the settings that name both."""
    pytest.importorskip("diffusers", reason="the models extra is not installed")
    from conftest import Workspace

    from spctrl.models import tiny

    folder = tmp_path_factory.mktemp("tools")
    base = folder / "weights" / "stable-diffusion-v1-5"
    tiny.build_stable_diffusion(base)
    tiny.build_spctrl(folder / "weights" / "spctrl-ap10k", base, "ap10k")
    workspace = Workspace(folder / "work", sample)
    workspace.configure("build", datasets=["ap10k"], splits=["val"], conditions=["spatext"])
    workspace.configure("paths", weights=folder / "weights")
    built = workspace.build()
    assert built.succeeded, built.errors
    return folder


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the ``spctrl`` command with the settings of ``place``; gives what it printed."""
    from conftest import _luigi_settings
    from typer.testing import CliRunner

    from pipelines.cli.main import app

    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*arguments: object, fails: bool = False) -> str:
        with _luigi_settings(place / "work" / "luigi-test.cfg"):
            result = CliRunner().invoke(app, [str(each) for each in arguments])
        if fails:
            assert result.exit_code != 0
            return " ".join(result.output.replace("│", " ").split())
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output

    return invoke


IMAGE_ID = 100_001


def test_prompt_prints_the_labelled_keypoints_as_tokens(run: Any, tmp_path: Path) -> None:
    printed = run("prompt", IMAGE_ID, "--pose", tmp_path / "pose.json")
    pose = read_pose(tmp_path / "pose.json", AP10K)
    assert printed.strip() == prompt_of(pose, AP10K, keypoints="tokens")
    labelled = (pose.keypoints[..., 2] > 0).any(axis=0)
    for placeholder, is_labelled in zip(AP10K.skeleton.placeholders, labelled, strict=True):
        assert (placeholder in printed) == is_labelled
    assert "<" not in run("prompt", IMAGE_ID, "--words", "none")
    assert "found none" in run("prompt", 5, fails=True)


def test_infer_writes_images_and_a_sheet(run: Any, tmp_path: Path) -> None:
    printed = run("infer", "--image-id", IMAGE_ID, "--images", 2, *FAST, "-o", tmp_path / "one")
    assert "prompt: " in printed
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "0.jpg",
        "1.jpg",
        "condition.png",
        "sheet.png",
    ]
    # The same map and prompt by hand give the same images, whatever mode and orientation tag the map has.
    prompt = run("prompt", IMAGE_ID).strip()
    with Image.open(tmp_path / "one" / "condition.png") as image:
        image.convert("RGB").save(tmp_path / "map.png", exif=b"Exif\0\0" + exif(6))
    again = ["--map", tmp_path / "map.png", "--prompt", prompt]
    run("infer", *again, "--images", 2, *FAST, "-o", tmp_path / "two")
    for name in ("0.jpg", "1.jpg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert (tmp_path / "one" / "0.jpg").read_bytes() != (tmp_path / "one" / "1.jpg").read_bytes()
    with Image.open(tmp_path / "two" / "condition.png") as image:
        assert orientation_of(image) == 1
    # The map's pixels and the end of sampling are settings.
    run("infer", *again, "--images", 1, *FAST, "--preset", "released", "-o", tmp_path / "three")
    assert (tmp_path / "three" / "0.jpg").read_bytes() != (tmp_path / "one" / "0.jpg").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one of --map, --pose and --image-id"),
        (["--image-id", IMAGE_ID, "--kind", "controlnet"], "takes its condition with --map"),
        (["--image-id", IMAGE_ID, "--words", "all"], "tokens, names, none"),
        (["--image-id", IMAGE_ID, "--checkpoint", "nowhere"], "nowhere"),
        (["--image-id", IMAGE_ID, "--resolution", "100"], "multiple of 8"),
        (["--map", __file__, "--prompt", "a dog", *FAST], f"{Path(__file__).name}: expected an image"),
        (["--image-id", IMAGE_ID, "--preset", "paper"], "--preset: expected released, found paper"),
        (
            ["--image-id", IMAGE_ID, "--map-resize", "nearest"],
            "--map-resize: expected centre, floor, found nearest",
        ),
        (["--image-id", IMAGE_ID, "--split", "new"], "expected train, val, test"),
    ],
)
def test_infer_says_what_it_cannot_do(run: Any, tmp_path: Path, arguments: list[str], message: str) -> None:
    assert message in run("infer", "-o", tmp_path, *arguments, fails=True)


def test_attention_writes_a_map_for_each_token_and_timestep(run: Any, tmp_path: Path) -> None:
    run("attention", "--image-id", IMAGE_ID, *FAST, "--layers", "down_blocks.2", "-o", tmp_path)
    arrays = np.load(tmp_path / "attention.npz")
    names = arrays["names"].tolist()
    prompt = run("prompt", IMAGE_ID)
    assert names == [each for each in AP10K.skeleton.placeholders if each in prompt]
    assert arrays["maps"].shape == (2, len(names), 64, 64)
    assert np.allclose(arrays["mean"], arrays["maps"].mean(0))
    assert (arrays["maps"] >= 0).all()
    assert arrays["maps"].sum(1).max() <= 1 + 1e-5  # shares of one attention
    assert arrays["timesteps"][0] > arrays["timesteps"][1]
    for name in names:
        pictures = {path.name for path in (tmp_path / name.strip("<>")).iterdir()}
        assert pictures == {"mean.png", *(f"t{each:04}.png" for each in arrays["timesteps"])}
    assert (tmp_path / "sheet.png").is_file()


def test_attention_needs_tokens(run: Any, tmp_path: Path) -> None:
    failed = run("attention", "--image-id", IMAGE_ID, *FAST, "--prompt", "a dog", "-o", tmp_path, fails=True)
    assert "expected keypoint tokens" in failed


def test_keypoint_embeddings_differ_from_name_to_name(run: Any, tmp_path: Path) -> None:
    import torch

    run("keypoint-embeddings", "-o", tmp_path / "names.pt")
    rows = torch.load(tmp_path / "names.pt", weights_only=True)
    assert rows.shape == (17, 32)
    assert len({tuple(row.tolist()) for row in rows}) == 17


def test_edit_draws_a_pose_before_and_after(run: Any, tmp_path: Path) -> None:
    run("prompt", IMAGE_ID, "--pose", tmp_path / "pose.json")
    before = read_pose(tmp_path / "pose.json", AP10K)
    folder = tmp_path / "edited"
    run(
        "edit", tmp_path / "pose.json", "-o", folder, *FAST,
        "--move", "0:6,-2", "--move", "0.left_elbow:3,1", "--mirror", "--species", "zebra",
    )  # fmt: skip
    after = read_pose(folder / "pose.json", AP10K)
    expected = move(before, 6, -2, instance=0)
    expected = move(expected, 3, 1, instance=0, keypoint=AP10K.skeleton.keypoint_names.index("left_elbow"))
    expected = mirror(expected, AP10K)
    np.testing.assert_array_equal(after.keypoints, expected.keypoints)
    assert after.categories == ("zebra",)
    with Image.open(folder / "condition.png") as image:
        np.testing.assert_array_equal(np.asarray(image), index_map_of(after, AP10K))
    assert (folder / "before-0.jpg").read_bytes() != (folder / "after-0.jpg").read_bytes()
    assert (folder / "sheet.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected something to change"),
        (["--move", "elbow"], "expected INSTANCE:DX,DY"),
        (["--move", "0.wing:1,1"], "expected a keypoint among left_eye"),
        (["--move", "7:1,1"], "expected an instance from 0"),
    ],
)
def test_edit_says_what_it_cannot_do(run: Any, tmp_path: Path, arguments: list[str], message: str) -> None:
    write_pose(a_pose(), tmp_path / "pose.json")
    failed = run("edit", tmp_path / "pose.json", "-o", tmp_path / "out", *arguments, fails=True)
    assert message in failed

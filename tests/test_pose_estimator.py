"""Poses: the same network from every kind of weights, crops and decoding by what they must give, and bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from eval.vitpose.crops import boxes_to_regions, cells_to_image, crop_matrix, scale_boxes
from spctrl.data.boxes import clip_boxes
from spctrl.errors import ExpectedError

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import VitPoseForPoseEstimation  # noqa: E402

from eval.openmmlab import MmposeEstimator, OpenMMLabError, people_counting_error  # noqa: E402
from eval.pose_estimator import HEATMAP_WH, PoseEstimator, PoseInputError  # noqa: E402
from eval.vitpose import small, tiny  # noqa: E402
from eval.vitpose.checkpoints import MMPOSE, VITPOSE, from_transformers, load_vitpose  # noqa: E402
from eval.vitpose.decoding import decode, merge_flipped  # noqa: E402

TOLERANCE = 1e-5
BOXES = [[[10.0, 2.0, 60.0, 90.0], [0.0, 0.0, 128.0, 96.0]], [[5.0, 5.0, 40.0, 20.0]]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    paths = {name: folder / name for name in tiny.BUILDERS}
    for name, build in tiny.BUILDERS.items():
        build(paths[name])
    return paths


@pytest.fixture(scope="module")
def images() -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    return [
        cv2.resize(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8), size, interpolation=cv2.INTER_CUBIC)
        for size in ((128, 96), (80, 60))
    ]


@pytest.fixture(scope="module")
def estimator(weights: dict[str, Path]) -> PoseEstimator:
    return PoseEstimator.from_weights(weights["vitpose_humanart"], "humanart", device="cpu")


def heatmaps_of(path: Path, expert: int) -> Any:
    model, _ = load_vitpose(path, expert=expert)
    with torch.inference_mode():
        return model(pixels()).heatmaps


def pixels() -> Any:
    return torch.randn(2, 3, 256, 192, generator=torch.Generator().manual_seed(0))


# Weights


def test_every_kind_of_weights_is_recognised_and_the_same_network(weights: dict[str, Path]) -> None:
    kinds = {name: load_vitpose(path, expert=tiny.AP10K_EXPERT)[1] for name, path in weights.items()}
    assert kinds == {"vitpose": "transformers", "vitpose_ap10k": "vitpose", "vitpose_humanart": "mmpose"}
    first, *others = (heatmaps_of(path, tiny.AP10K_EXPERT) for path in weights.values())
    assert first.std() > 0.05
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("expert", range(tiny.EXPERTS))
def test_an_expert_folded_in_computes_what_transformers_does(weights: dict[str, Path], expert: int) -> None:
    model = VitPoseForPoseEstimation.from_pretrained(weights["vitpose"]).eval()
    with torch.inference_mode():
        expected = model(pixels(), dataset_index=torch.tensor([expert, expert])).heatmaps
    torch.testing.assert_close(heatmaps_of(weights["vitpose"], expert), expected, rtol=0, atol=TOLERANCE)


def test_a_split_file_is_its_experts_network(weights: dict[str, Path], tmp_path: Path) -> None:
    """Split files have whole MLPs; the first dataset's still holds the experts and the other heads."""
    state = torch.load(weights["vitpose_ap10k"], weights_only=True)["state_dict"]
    whole = {
        key.replace("mlp.experts.0.", "mlp.fc2."): torch.cat(
            [state[key.replace("experts.0.", "fc2.")], value]
        )
        for key, value in state.items()
        if "experts.0." in key
    }
    torch.save({"state_dict": state | whole}, tmp_path / "coco.pth")
    found = heatmaps_of(tmp_path / "coco.pth", tiny.AP10K_EXPERT)
    torch.testing.assert_close(found, heatmaps_of(weights["vitpose_ap10k"], 0), rtol=0, atol=TOLERANCE)
    assert not torch.allclose(found, heatmaps_of(weights["vitpose_ap10k"], tiny.AP10K_EXPERT), atol=0.01)


@pytest.mark.parametrize("names", [MMPOSE, VITPOSE])
def test_a_simple_head_is_read(names: Any, tmp_path: Path) -> None:
    model = small_network()
    torch.save(from_transformers(model.state_dict(), names), tmp_path / "simple.pth")
    with torch.inference_mode():
        expected = model(pixels()).heatmaps
    found = heatmaps_of(tmp_path / "simple.pth", 0)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def small_network() -> Any:
    from transformers import VitPoseBackboneConfig, VitPoseConfig

    backbone = VitPoseBackboneConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=1, layer_norm_eps=1e-6, out_indices=[1]
    )
    return VitPoseForPoseEstimation(VitPoseConfig(backbone_config=backbone, num_labels=17)).eval()


def test_the_class_position_is_added_by_vitpose_and_dropped_by_mmpose(
    weights: dict[str, Path], tmp_path: Path
) -> None:
    content = torch.load(weights["vitpose_humanart"], weights_only=True)
    positions = content["state_dict"]["backbone.pos_embed"]
    content["state_dict"]["backbone.pos_embed"] = torch.cat(
        [torch.ones_like(positions[:, :1]), positions], dim=1
    )
    torch.save(content, tmp_path / "with_class.pth")
    torch.testing.assert_close(
        heatmaps_of(tmp_path / "with_class.pth", 0), heatmaps_of(weights["vitpose_humanart"], 0)
    )


# Crops


@pytest.mark.parametrize("codec", ["msra", "udp"])
def test_cells_go_back_to_where_the_crop_took_them_from(codec: Any) -> None:
    boxes = [[10, 20, 60, 90], [-5.5, 3, 300, 20], [400, 300, 7, 7]]
    centres, sizes = boxes_to_regions(boxes)
    assert np.allclose(sizes[:, 0] / sizes[:, 1], 0.75)
    assert np.allclose((sizes / np.array(boxes)[:, 2:]).min(axis=1), 1.25)
    points = np.random.default_rng(0).uniform(0, 400, (len(boxes), 17, 2))
    inputs = np.stack(
        [
            own @ (matrix := crop_matrix(centre, size, codec=codec))[:, :2].T + matrix[:, 2]
            for own, centre, size in zip(points, centres, sizes, strict=True)
        ]
    )
    # A heatmap covers the input: cell = position / 4, or, where outer pixels' centres coincide, 47 / 191 and 63 / 255.
    cells = inputs / 4 if codec == "msra" else inputs * np.divide((47, 63), (191, 255))
    back = cells_to_image(cells, centres, sizes, codec=codec, heatmap_wh=HEATMAP_WH)
    assert np.abs(back - points).max() < 1e-3


def test_boxes_are_clipped_and_mapped() -> None:
    clipped = clip_boxes([[-10, -10, 50, 50], [90, 40, 50, 50], [500, 500, 10, 10]], (100, 60), smallest_px=1)
    assert clipped.tolist() == [[0, 0, 40, 40], [90, 40, 9, 19], [99, 59, 1, 1]]
    assert scale_boxes([[10, 20, 30, 40]], (100, 200), (50, 600)).tolist() == [[5, 60, 15, 120]]


# Decoding


def gaussians(centres: NDArray[np.float64]) -> Any:
    """(N, K, 64, 48) heatmaps of sigma 2 around cells (N, K, 2)."""
    x, y = np.arange(48), np.arange(64)
    columns, rows = (np.exp(-((axis - centres[..., i, None]) ** 2) / 8) for i, axis in ((0, x), (1, y)))
    return torch.from_numpy((rows[..., :, None] * columns[..., None, :]).astype(np.float32))


def test_dark_finds_the_centre_between_cells() -> None:
    centres = np.random.default_rng(0).uniform((8, 8), (40, 56), (4, 17, 2))
    keypoints, scores = decode(gaussians(centres), "udp")
    assert np.abs(keypoints.numpy() - centres).max() < 0.01
    assert ((scores > 0.85) & (scores <= 1)).all()


def test_msra_moves_a_quarter_of_a_cell_towards_the_larger_neighbour() -> None:
    centres = np.array([[[20.3, 30.0], [20.0, 29.8], [10.4, 50.4], [0.3, 5.2], [47.0, 63.0]]])
    keypoints, _ = decode(gaussians(centres), "msra")
    assert keypoints.tolist() == [[[20.25, 30], [20, 29.75], [10.25, 50.25], [0, 5], [47, 63]]]


@pytest.mark.parametrize("codec", ["msra", "udp"])
def test_a_heatmap_without_a_positive_value_has_no_keypoint(codec: Any) -> None:
    heatmaps = torch.stack([torch.zeros(17, 64, 48), torch.full((17, 64, 48), -0.5)])
    keypoints, scores = decode(heatmaps, codec)
    assert (keypoints == -1).all()
    assert scores[:, 0].tolist() == [0, -0.5]


@pytest.mark.parametrize("codec", ["msra", "udp"])
def test_a_heatmap_of_zeros_has_no_keypoint_among_others(codec: Any) -> None:
    """Also where the map before it, whose end is next to it in memory, has values there."""
    heatmaps = gaussians(np.full((1, 17, 2), (47.0, 63.0)))
    heatmaps[:, [0, 5]] = 0
    keypoints, _ = decode(heatmaps, codec)
    assert (keypoints[:, [0, 5]] == -1).all()
    assert (keypoints[:, 1:5] > 46).all()


def test_flipped_heatmaps_come_back_mirrored_exchanged_and_shifted() -> None:
    straight = torch.zeros(1, 2, 1, 4)
    flipped = torch.tensor([[[[1.0, 2, 3, 4]], [[5.0, 6, 7, 8]]]])
    merged = merge_flipped(straight, flipped, torch.tensor([1, 0]), shift=False) * 2
    assert merged.tolist() == [[[[8, 7, 6, 5]], [[4, 3, 2, 1]]]]
    shifted = merge_flipped(straight, flipped, torch.tensor([1, 0]), shift=True) * 2
    assert shifted.tolist() == [[[[8, 8, 7, 6]], [[4, 4, 3, 2]]]]


# The estimator


def test_batches_and_input_types_change_nothing(
    weights: dict[str, Path], images: list[NDArray[np.uint8]], estimator: PoseEstimator, tmp_path: Path
) -> None:
    expected = estimator.predict(images, BOXES)
    assert expected.keypoints.shape == (3, 17, 2)
    assert expected.heatmaps is not None and expected.heatmaps.shape == (3, 17, 64, 48)
    assert (expected.heatmaps.max(axis=(2, 3)) == expected.scores).all()
    single = PoseEstimator.from_weights(weights["vitpose_humanart"], "humanart", device="cpu", batch_size=1)
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    files = [tmp_path / f"{number}.png" for number in range(len(images))]
    for found in (
        single.predict(images, BOXES),
        estimator.predict(files, BOXES, keep_heatmaps=False),
        estimator.predict([images[0], *images], [[], *BOXES]),
        estimator.predict([Image.fromarray(image) for image in images], BOXES),
        estimator.predict([images[0], *images], np.concatenate(BOXES)),  # one box an image
    ):
        assert np.abs(found.keypoints - expected.keypoints).max() < 0.05
        assert np.abs(found.scores - expected.scores).max() < TOLERANCE
        if found.heatmaps is not None:
            assert np.abs(found.heatmaps - expected.heatmaps).max() < TOLERANCE


def test_heatmaps_are_given_unless_they_are_not_wanted(
    images: list[NDArray[np.uint8]], estimator: PoseEstimator
) -> None:
    keypoints, scores, heatmaps = estimator.predict(images[1:], BOXES[1:])
    assert keypoints.shape == (1, 17, 2) and scores.shape == (1, 17)
    assert heatmaps is not None and heatmaps.shape == (1, 17, 64, 48)
    assert estimator.predict(images[1:], BOXES[1:], keep_heatmaps=False).heatmaps is None


def test_boxes_of_the_annotated_image_are_mapped_there_and_back(
    images: list[NDArray[np.uint8]], estimator: PoseEstimator
) -> None:
    annotated = [(256, 288), (40, 60)]
    boxes = [
        scale_boxes(own, image.shape[1::-1], size)
        for own, image, size in zip(BOXES, images, annotated, strict=True)
    ]
    boxes[0][1] -= (0, 0, 1, 1)  # inside the image as mmpose has it, so that nothing is clipped
    direct = [
        scale_boxes(own, size, image.shape[1::-1])
        for own, image, size in zip(boxes, images, annotated, strict=True)
    ]
    expected = estimator.predict(images, direct).keypoints * np.array([[[2, 3]], [[2, 3]], [[0.5, 1]]])
    found = estimator.predict(images, boxes, annotated_wh=annotated).keypoints
    assert np.abs(found - expected).max() < 1e-6


def test_no_boxes_at_all(images: list[NDArray[np.uint8]], estimator: PoseEstimator) -> None:
    keypoints, scores, heatmaps = estimator.predict(images, [[], []])
    assert keypoints.shape == (0, 17, 2) and scores.shape == (0, 17)
    assert heatmaps is not None and heatmaps.shape == (0, 17, 64, 48)


# Bad input


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([BOXES[0]], "only 1 in bboxes_xywh"),
        ([BOXES[0], [[1, 2, 3]]], "image 1: expected boxes"),
        ([BOXES[0], [[1, 2, float("nan"), 4]]], "image 1: expected boxes"),
        ([BOXES[0], [[1, 2, 0, 4]]], "image 1: expected boxes"),
        ([BOXES[0], [[1, 2, 3, 4], [5]]], "image 1: expected boxes"),
        ([BOXES[0], "left"], "image 1: expected boxes"),
    ],
)
def test_bad_boxes(
    boxes: Any, message: str, images: list[NDArray[np.uint8]], estimator: PoseEstimator
) -> None:
    with pytest.raises(PoseInputError, match=message):
        estimator.predict(images, boxes)


def test_a_single_image_is_no_list(
    images: list[NDArray[np.uint8]], estimator: PoseEstimator, tmp_path: Path
) -> None:
    for single in (tmp_path / "image.png", str(tmp_path / "image.png"), Image.fromarray(images[0])):
        with pytest.raises(PoseInputError, match=r"found a single .*: put it into a list"):
            estimator.predict(single, BOXES[0])  # type: ignore[arg-type]


def test_missing_and_broken_images(
    images: list[NDArray[np.uint8]], estimator: PoseEstimator, tmp_path: Path
) -> None:
    with pytest.raises(ExpectedError, match=r"missing\.png"):
        estimator.predict([tmp_path / "missing.png"], [BOXES[1]])
    Image.fromarray(images[1]).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with pytest.raises(ExpectedError, match=r"cut\.png"):
        estimator.predict([tmp_path / "cut.png"], [BOXES[1]])


def test_weights_that_cannot_be_used(weights: dict[str, Path], tmp_path: Path) -> None:
    good = torch.load(weights["vitpose_humanart"], weights_only=True)["state_dict"]
    cut = tmp_path / "cut.pth"
    cut.write_bytes(weights["vitpose_humanart"].read_bytes()[:100_000])
    for name, state in {
        "other": {"conv1.weight": torch.zeros(1)},
        "list": [1, 2],
        "lacking": {key: value for key, value in good.items() if key != "head.final_layer.bias"},
        "more": good | {"head.extra": torch.zeros(1)},
        "shape": good | {"backbone.ln1.weight": torch.zeros(7)},
        "keypoints": good
        | {f"head.final_layer.{kind}": good[f"head.final_layer.{kind}"][:14] for kind in ("weight", "bias")},
    }.items():
        torch.save({"state_dict": state}, tmp_path / f"{name}.pth")
    for name, message in {
        "cut": "cannot be read",
        "other": "another architecture",
        "list": "dictionary of tensors",
        "lacking": r"head\.conv\.bias is missing",
        "more": r"head\.extra is left over",
        "shape": r"shape \(7,\) instead of \(128,\)",
        "keypoints": "expected 17 keypoints",
    }.items():
        with pytest.raises(ExpectedError, match=message) as caught:
            PoseEstimator.from_weights(tmp_path / f"{name}.pth", device="cpu")
        assert name in str(caught.value)
    with pytest.raises(ExpectedError, match=r"expert among 0\.\.5, asked for 9"):
        load_vitpose(weights["vitpose_ap10k"], expert=9)
    with pytest.raises(ExpectedError, match=r"expert among 0\.\.5, asked for 9"):
        load_vitpose(weights["vitpose"], expert=9)
    with pytest.raises(ExpectedError, match="is not a folder"):
        load_vitpose(tmp_path / "nowhere")
    shutil.copytree(weights["vitpose"], tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_bytes())
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config | {"model_type": "vit"}))
    with pytest.raises(ExpectedError, match="vitpose"):
        load_vitpose(tmp_path / "folder")


def test_heatmaps_that_are_not_finite(
    weights: dict[str, Path], images: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    content = torch.load(weights["vitpose_humanart"], weights_only=True)
    content["state_dict"]["head.final_layer.bias"][3] = float("nan")
    torch.save(content, tmp_path / "nan.pth")
    broken = PoseEstimator.from_weights(tmp_path / "nan.pth", device="cpu")
    with pytest.raises(ExpectedError, match="finite heatmaps"):
        broken.predict(images, BOXES)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_cell_that_is_not_finite(
    images: list[NDArray[np.uint8]], estimator: PoseEstimator, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    heatmaps = torch.zeros(3, 17, 64, 48)
    heatmaps[1, 3, 5, 7] = bad
    monkeypatch.setattr(estimator, "_heatmaps", lambda crops: heatmaps[: len(crops)])
    with pytest.raises(ExpectedError, match="finite heatmaps"):
        estimator.predict(images, BOXES)


def test_unknown_settings(weights: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="dataset among ap10k, humanart"):
        PoseEstimator.from_weights(weights["vitpose"], "coco")
    with pytest.raises(ValueError, match="codec among msra, udp"):
        PoseEstimator.from_weights(weights["vitpose"], codec="dark")


# Beside it


def test_mmpose_backend_says_how_to_get_its_environment(weights: dict[str, Path], tmp_path: Path) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "image.png")
    backend = MmposeEstimator(tmp_path / "none", weights["vitpose_humanart"])
    with pytest.raises(OpenMMLabError, match="make openmmlab"):
        backend.predict([tmp_path / "image.png"], [[[1, 2, 30, 40]]])


def test_people_counting_error() -> None:
    assert people_counting_error([1, 3, 0], [1, 1, 2]).tolist() == [0, 2, 2]
    with pytest.raises(ValueError, match="found 2 and 1"):
        people_counting_error([1, 2], [1])


def test_small_network_learns_where_keypoints_are() -> None:
    """The loss of right heatmaps is lower than that of heatmaps that are moved, flat or upside down."""
    cells = torch.from_numpy(np.random.default_rng(0).uniform((8, 8), (40, 56), (2, 17, 2))).float()
    labelled = torch.ones(2, 17, dtype=torch.bool)
    right = gaussians(cells.double().numpy())
    losses = [
        small.heatmap_loss(heatmaps, cells, labelled).item()
        for heatmaps in (right, right.roll(1, dims=-1), torch.zeros_like(right), -right)
    ]
    assert losses == sorted(losses)
    assert losses[0] < losses[1]


def test_small_network_is_made_and_used(tmp_path: Path) -> None:
    recipe = small.Recipe(images=4, steps=2, batch_size=4, width=32, layers=1, heads=1)
    path = small.make_small(tmp_path, "humanart", recipe)
    found = small.check_small(tmp_path, "humanart", images=2)
    assert path == tmp_path / "weights"
    assert set(found) == {"own", "shuffled"}

"""Instance masks, with tiny random networks through the real loading code, against the packages' own predictors."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle

from spctrl.conditions.masks import check_mask, union_mask
from spctrl.data.records import Record
from spctrl.demo_data.scenes import draw_animal_scene, draw_people_scene
from spctrl.errors import ExpectedError
from spctrl.image_models import segments
from spctrl.image_models.base import Result, run_model
from spctrl.image_models.sam_networks import PACKAGES, Sizes, build_tiny, load_network, network_of_sizes
from spctrl.image_models.segments import Segmenter, load_segmenter, run_lengths

MODELS = [("sam", "vit_b"), ("sam_hq", "vit_b"), ("sam_hq", "vit_tiny")]
MAX_DIFFERENT = 1e-4
"""Share of pixels whose logit may be so near 0 that the order of summation decides."""

Masks = NDArray[np.bool_]


class Item(NamedTuple):
    """A record and its image file: the work of ``run_model``."""

    record: Record
    data: bytes


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def weights_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    for backend, model_type in MODELS:
        build_tiny(backend, model_type, folder / f"{backend}_{model_type}.pth")  # type: ignore[arg-type]
    return folder


@pytest.fixture
def load(weights_folder: Path) -> Callable[..., Segmenter]:
    """Loads a tiny segmenter; settings as those of ``load_segmenter``."""

    def make(backend: str = "sam", model_type: str = "vit_b", **settings: Any) -> Segmenter:
        settings = {
            "weights": weights_folder / f"{backend}_{model_type}.pth",
            "prompt": "box",
            "device": "cpu",
            **settings,
        }
        return load_segmenter(backend=backend, model_type=model_type, **settings)  # type: ignore[arg-type]

    return make


@pytest.fixture
def changed_weights(weights_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of SAM's tiny weights in which some tensors have another value."""

    def make(key: str, value: float) -> Path:
        path = tmp_path / "changed.pth"
        state = torch.load(weights_folder / "sam_vit_b.pth", weights_only=True)
        found = [name for name in state if key in name]
        assert found
        state.update({name: torch.full_like(state[name], value) for name in found})
        torch.save(state, path)
        shutil.copyfile(weights_folder / "sam_vit_b.pth.json", tmp_path / "changed.pth.json")
        return path

    return make


@pytest.fixture(scope="module")
def scenes() -> list[Item]:
    """Five pictures of several sizes with 1, 2 and 3 instances; one instance has no labelled keypoint."""
    rng = np.random.default_rng(5)
    found: list[Item] = []
    for count, draw in [(1, draw_animal_scene), (3, draw_people_scene), (2, draw_animal_scene)] * 2:
        scene = draw(rng)
        while len(scene.instances) != count:
            scene = draw(rng)
        keypoints = np.stack([each.keypoints_xyv[:17] for each in scene.instances])
        boxes = [each.bbox_xywh for each in scene.instances]
        found.append(item(scene.rgb, boxes, keypoints, image_id=len(found)))
    found[1].record.keypoints[1] = 0
    assert len({each.record.size_wh for each in found[:5]}) > 2
    return found[:5]


def item(
    rgb: NDArray[np.uint8],
    boxes: Sequence[Sequence[float]],
    keypoints: NDArray[np.float64] | None = None,
    image_id: int = 1,
    kind: str = "JPEG",
) -> Item:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, kind)
    if keypoints is None:
        keypoints = np.zeros((len(boxes), 17, 3))
    bboxes = np.array(boxes, np.float64).reshape(-1, 4)
    record = Record(image_id, f"{image_id}.jpg", (rgb.shape[1], rgb.shape[0]), keypoints, bboxes)
    return Item(record, buffer.getvalue())


def run(segmenter: Segmenter, work: Sequence[Item], batch_size: int = 2) -> list[Result]:
    return list(run_model(segmenter, work, batch_size=batch_size))


def instances_of(result: Result) -> list[dict[str, Any]]:
    assert isinstance(result, bytes), result
    found: list[dict[str, Any]] = json.loads(result)["instances"]
    return found


def masks_of(result: Result) -> Masks:
    """(N, H, W) masks of an artifact."""
    coded = [{"size": each["size"], "counts": each["counts"]} for each in instances_of(result)]
    return np.stack([rle.decode(each) for each in coded]).astype(bool)


def predictor_masks(
    predictor: Any, work: Item, prompt: str
) -> tuple[Masks, list[float], list[dict[str, NDArray[np.float64]]]]:
    """Masks, IoUs and prompts in the released manner: the image embedded again for each instance."""
    rgb = np.asarray(Image.open(io.BytesIO(work.data)).convert("RGB"))
    masks, ious, prompts = [], [], []
    for keypoints, (x, y, w, h) in zip(work.record.keypoints, work.record.bboxes_xywh, strict=True):
        labelled = keypoints[keypoints[:, 2] > 0]
        given = {"box": np.array([x, y, x + w, y + h])}
        if prompt == "points" and len(labelled):
            given = {"point_coords": labelled[:, :2], "point_labels": np.ones(len(labelled))}
        predictor.set_image(rgb)
        mask, iou, _ = predictor.predict(**given, multimask_output=False)
        masks.append(mask[0])
        ious.append(float(iou[0]))
        prompts.append(given)
    return np.stack(masks), ious, prompts


def assert_same(found: Masks, expected: Masks) -> None:
    assert found.shape == expected.shape
    assert (found != expected).mean() <= MAX_DIFFERENT


# Against SamPredictor


@pytest.mark.parametrize("prompt", ["box", "points"])
@pytest.mark.parametrize(("backend", "model_type"), MODELS)
def test_masks_equal_those_of_the_package_one_prompt_at_a_time(
    load: Callable[..., Segmenter], scenes: list[Item], backend: str, model_type: str, prompt: str
) -> None:
    work = scenes[:2] if model_type == "vit_tiny" else scenes  # which is slow: see build_tiny
    segmenter = load(backend, model_type, prompt=prompt)
    predictor = PACKAGES[backend].SamPredictor(segmenter.model)
    kinds = set()
    for each, result in zip(work, run(segmenter, work, batch_size=5), strict=True):
        expected, ious, prompts = predictor_masks(predictor, each, prompt)
        kinds |= {name for given in prompts for name in given}
        found = masks_of(result)
        assert_same(found, expected)
        assert ((found.mean(axis=(1, 2)) > 0.02) & (found.mean(axis=(1, 2)) < 0.98)).all()
        for index, (instance, mask, iou) in enumerate(zip(instances_of(result), found, ious, strict=True)):
            assert instance["annotation_index"] == index
            assert instance["size"] == [each.record.size_wh[1], each.record.size_wh[0]]
            assert instance["area"] == mask.sum()
            assert instance["predicted_iou"] == pytest.approx(iou, abs=1e-4)
    assert kinds == ({"box"} if prompt == "box" else {"box", "point_coords", "point_labels"})


def test_the_masks_depend_on_image_and_prompt(load: Callable[..., Segmenter], scenes: list[Item]) -> None:
    """Without this, the comparisons here would show nothing."""
    size_wh = scenes[0].record.size_wh
    rgb = np.asarray(Image.open(io.BytesIO(scenes[0].data)))
    boxes = [[0, 0, 60, 60], [100, 80, 100, 90]]
    first, second = (masks_of(each) for each in run(load(), [item(rgb, boxes), item(rgb[::-1], boxes)]))
    assert first.shape == (2, size_wh[1], size_wh[0])
    assert (first[0] != first[1]).mean() > 0.01
    assert (first != second).mean() > 0.01


@pytest.mark.parametrize("prompt", ["box", "points"])
@pytest.mark.parametrize("backend", ["sam", "sam_hq"])
def test_batch_size_order_and_passes_change_nothing(
    load: Callable[..., Segmenter],
    scenes: list[Item],
    backend: str,
    prompt: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    segmenter = load(backend, prompt=prompt)
    expected = [masks_of(each) for each in run(segmenter, scenes, batch_size=1)]
    for batch_size in (2, 5):
        for masks, each in zip(expected, run(segmenter, scenes, batch_size), strict=True):
            assert_same(masks_of(each), masks)
    for masks, each in zip(expected[::-1], run(segmenter, scenes[::-1]), strict=True):
        assert_same(masks_of(each), masks)
    monkeypatch.setattr(segments, "PROMPTS_PER_PASS", 2)
    monkeypatch.setattr(segments, "PROCESSOR_PASS_PX", 0)
    for masks, each in zip(expected, run(segmenter, scenes, batch_size=5), strict=True):
        assert_same(masks_of(each), masks)


def test_images_are_encoded_once_and_together(
    load: Callable[..., Segmenter], scenes: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter = load()
    seen = []
    segmenter.model.image_encoder.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    nobody = item(np.zeros((20, 30, 3), np.uint8), [])
    run(segmenter, [nobody, *scenes, nobody], batch_size=7)
    assert seen == [len(scenes)]
    run(segmenter, [nobody, nobody])
    assert seen == [len(scenes)]
    monkeypatch.setattr(segments, "PROCESSOR_PASS_PX", 2 * 128 * 128)
    run(segmenter, scenes, batch_size=7)
    assert seen[1:] == [2, 2, 1]


@pytest.mark.parametrize("backend", ["sam", "sam_hq"])
def test_mixed_precision_changes_little(
    load: Callable[..., Segmenter], scenes: list[Item], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, but on the processor."""
    segmenter = load(backend)
    expected = [masks_of(each) for each in run(segmenter, scenes)]
    monkeypatch.setattr(
        segments, "mixed_precision", lambda device: torch.autocast("cpu", dtype=torch.bfloat16)
    )
    inputs = [segmenter.decode(*each) for each in scenes]
    assert {output.logits.dtype for output in segmenter.predict(inputs)} == {torch.float32}
    outputs = segmenter.infer(inputs)
    found = [
        masks_of(segmenter.encode(each.record, decoded, output))
        for each, decoded, output in zip(scenes, inputs, outputs, strict=True)
    ]
    share = np.mean([(a != b).mean() for a, b in zip(found, expected, strict=True)])
    assert 0 < share < 0.02


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 7), (5, 1), (33, 48)])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_runs_are_those_of_cocos_encoding(size_hw: tuple[int, int], share: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        mask = rng.random(size_hw) < share
        runs = run_lengths(torch.from_numpy(mask))
        coded = rle.frPyObjects({"size": list(size_hw), "counts": runs.tolist()}, *size_hw)
        assert coded == rle.encode(np.asfortranarray(mask.view(np.uint8)))
        assert runs[1::2].sum() == mask.sum()


# Images and prompts at the edges


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size_wh", [(1, 1), (3000, 40), (40, 3000), (129, 127)])
def test_unusual_sizes(load: Callable[..., Segmenter], size_wh: tuple[int, int], kind: str) -> None:
    width, height = size_wh
    rgb = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    work = item(rgb, [[0, 0, width, height], [-5, -5, 6, 6]], kind=kind)
    segmenter = load(empty="keep")
    expected, _, _ = predictor_masks(PACKAGES["sam"].SamPredictor(segmenter.model), work, "box")
    assert_same(masks_of(run(segmenter, [work])[0]), expected)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_huge_image(load: Callable[..., Segmenter]) -> None:
    work = item(np.full((9_000, 12_000, 3), 90, np.uint8), [[10, 10, 8_000, 8_000]])
    (instance,) = instances_of(run(load(), [work])[0])
    assert instance["size"] == [9_000, 12_000]
    assert 0 < instance["area"] < 9_000 * 12_000


def test_a_sliver_that_resizing_leaves_nothing_of(load: Callable[..., Segmenter]) -> None:
    result = run(load(), [item(np.zeros((2, 3000, 3), np.uint8), [[0, 0, 9, 2]])])[0]
    assert result[0] == "image_size"


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_colours_of_any_kind(load: Callable[..., Segmenter], mode: str, scenes: list[Item]) -> None:
    record = scenes[0].record
    buffer = io.BytesIO()
    image = Image.open(io.BytesIO(scenes[0].data)).convert(mode)
    image.save(buffer, "JPEG" if mode == "CMYK" else "PNG")
    decoded = load().decode(record, buffer.getvalue())
    assert decoded.pixels.dtype == torch.uint8
    assert decoded.pixels.shape[0] == 3
    assert max(decoded.pixels.shape[1:]) == 128


@pytest.mark.parametrize(
    "box",
    [[50, 0, 5, 5], [0, 40, 5, 5], [-9, 0, 9, 5], [0, -9, 5, 9], [0, 0, float("nan"), 5]],
)
def test_a_box_outside_the_image(load: Callable[..., Segmenter], box: list[float]) -> None:
    rgb = np.zeros((40, 50, 3), np.uint8)
    keypoints = np.zeros((2, 17, 3))
    keypoints[1, 3] = 20, 20, 2
    work = [item(rgb, [[0, 0, 9, 9], box], keypoints), item(rgb, [[0, 0, 9, 9]])]
    bad, good = run(load(empty="keep"), work)
    assert bad[0] == "bad_box"
    assert "instance 1" in str(bad[1])
    assert isinstance(good, bytes)
    assert isinstance(run(load(empty="keep", prompt="points"), work)[0], bytes), "its keypoint was the prompt"


def test_files_that_are_not_the_record_s_image(load: Callable[..., Segmenter], scenes: list[Item]) -> None:
    record, data = scenes[0]
    other = scenes[1].data if scenes[1].record.size_wh != record.size_wh else scenes[2].data
    broken = [Item(record, each) for each in (b"", b"no image", data[: len(data) // 2], other)]
    codes = [result[0] for result in run(load(), [*broken, scenes[0]], batch_size=5)[:4]]
    assert codes == ["bad_image", "bad_image", "bad_image", "image_size"]


# Outputs


def test_values_that_are_not_finite(
    load: Callable[..., Segmenter], changed_weights: Callable[..., Path], scenes: list[Item]
) -> None:
    weights = changed_weights("image_encoder.neck", float("nan"))
    for empty in ("reject", "keep"):
        results = run(load(weights=weights, empty=empty), scenes)
        assert [result[0] for result in results] == ["not_finite"] * len(scenes)


def test_empty_masks_are_rejected_or_kept(
    load: Callable[..., Segmenter], changed_weights: Callable[..., Path], scenes: list[Item]
) -> None:
    weights = changed_weights("output_hypernetworks_mlps.0.layers.2", 0.0)  # logits of 0, which are outside
    work = [*scenes, item(np.zeros((20, 30, 3), np.uint8), [])]
    rejected = run(load(weights=weights), work)
    assert [each[0] for each in rejected] == ["empty_mask"] * len(work)
    for each, kept in zip(work, run(load(weights=weights, empty="keep"), work), strict=True):
        assert [instance["area"] for instance in instances_of(kept)] == [0] * len(each.record.bboxes_xywh)
        assert isinstance(kept, bytes)
        check_mask(each.record, union_mask(each.record, kept))
        with Image.open(io.BytesIO(union_mask(each.record, kept))) as image:
            assert image.size == each.record.size_wh
            assert not np.asarray(image).any()


def test_the_union_of_instances(load: Callable[..., Segmenter], scenes: list[Item]) -> None:
    for each, result in zip(scenes, run(load(), scenes), strict=True):
        assert isinstance(result, bytes)
        with Image.open(io.BytesIO(union_mask(each.record, result))) as image:
            assert image.mode == "L"
            union = np.asarray(image)
        np.testing.assert_array_equal(union, np.where(masks_of(result).any(axis=0), 255, 0))


# Weights


class Harmful:
    """Makes a folder when unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def refusal(weights: Path, backend: str = "sam", model_type: str = "vit_b") -> str:
    with pytest.raises(ExpectedError) as caught:
        load_network(backend, model_type, weights)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize("save", [torch.save, lambda what, path: path.write_bytes(pickle.dumps(what))])
def test_a_pickle_with_code_is_refused(tmp_path: Path, save: Callable[[Any, Path], None]) -> None:
    path = tmp_path / "harmful.pth"
    save({"weight": Harmful(tmp_path / "made")}, path)
    message = refusal(path)
    assert "code, which is not run" in message
    assert "sam_vit_b_01ec64.pth from https://github.com/facebookresearch/segment-anything" in message
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_file_cut_short(weights_folder: Path, tmp_path: Path, share: float) -> None:
    whole = (weights_folder / "sam_hq_vit_b.pth").read_bytes()
    path = tmp_path / "short.pth"
    path.write_bytes(whole[: int(share * len(whole))])
    message = refusal(path, "sam_hq")
    assert str(path) in message
    assert "cut short" in message
    assert "sam_hq_vit_b.pth from https://github.com/SysCV/sam-hq" in message


def test_a_missing_file(tmp_path: Path) -> None:
    message = refusal(tmp_path / "absent.pth", "sam_hq", "vit_h")
    for part in ("absent.pth", "sam_hq_vit_h.pth", "https://github.com/SysCV/sam-hq", "[mask] weights"):
        assert part in message


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"epoch": 3, "model": {"a": torch.zeros(2)}}])
def test_other_things_than_a_dictionary_of_tensors(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pth")
    assert "dictionary of tensors" in refusal(tmp_path / "other.pth")


def test_loading_is_strict(weights_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    shutil.copyfile(weights_folder / "sam_vit_b.pth.json", tmp_path / "weights.pth.json")
    state = torch.load(weights_folder / "sam_vit_b.pth", weights_only=True)
    hq = torch.load(weights_folder / "sam_hq_vit_b.pth", weights_only=True)

    torch.save({key: value for key, value in state.items() if key != "image_encoder.pos_embed"}, path)
    assert "1 missing (image_encoder.pos_embed)" in refusal(path)
    torch.save({**state, "image_encoder.pos_embed": torch.zeros(1, 2, 2, 3)}, path)
    assert "1 of another shape (image_encoder.pos_embed)" in refusal(path)
    torch.save(hq, path)
    message = refusal(path)
    assert f"{len(hq) - len(state)} unexpected (mask_decoder.hf_token.weight, " in message
    assert ", ...)" in message
    for part in (str(path), "backend and model_type of [mask]", "[mask] weights"):
        assert part in message


def test_tiny_weights_without_their_sizes_are_not_a_released_model(
    weights_folder: Path, tmp_path: Path
) -> None:
    shutil.copyfile(weights_folder / "sam_vit_b.pth", tmp_path / "alone.pth")
    message = refusal(tmp_path / "alone.pth")
    assert "missing" in message
    assert "of another shape" in message


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", None])
def test_sizes_that_are_none(weights_folder: Path, tmp_path: Path, content: bytes | None) -> None:
    shutil.copyfile(weights_folder / "sam_vit_b.pth", tmp_path / "a.pth")
    sizes = json.loads((weights_folder / "sam_vit_b.pth.json").read_bytes())
    if content is None:
        content = json.dumps({**sizes, "encoder": {"width": 3}}).encode()
    (tmp_path / "a.pth.json").write_bytes(content)
    assert "a.pth.json: expected a network's sizes" in refusal(tmp_path / "a.pth")


def test_settings_that_name_no_model(weights_folder: Path) -> None:
    weights = weights_folder / "sam_vit_b.pth"
    assert "[mask] backend: expected one of sam_hq, sam, found 'sam2'" in refusal(weights, "sam2")
    message = "[mask] model_type: expected one of vit_h, vit_l, vit_b with backend = sam, found 'vit_tiny'"
    assert message in refusal(weights, "sam", "vit_tiny")
    assert "expected sam vit_h" in refusal(weights, "sam", "vit_h"), "the sizes beside the file say vit_b"


def test_tiny_vit_uses_the_loaded_attention_biases(weights_folder: Path) -> None:
    """The package computes what it uses before it loads the weights, so its own loading leaves the initial ones."""
    network = load_network("sam_hq", "vit_tiny", weights_folder / "sam_hq_vit_tiny.pth")
    attentions = [each for each in network.modules() if hasattr(each, "attention_biases")]
    assert attentions
    for each in attentions:
        assert torch.equal(each.ab, each.attention_biases[:, each.attention_bias_idxs])


def test_tiny_weights_say_that_they_are_random_and_are_always_the_same(
    weights_folder: Path, tmp_path: Path
) -> None:
    for backend, model_type in MODELS:
        name = f"{backend}_{model_type}.pth"
        assert json.loads((weights_folder / f"{name}.json").read_bytes())["weights"] == "random"
        torch.manual_seed(7)
        build_tiny(backend, model_type, tmp_path / name)  # type: ignore[arg-type]
        assert (tmp_path / name).read_bytes() == (weights_folder / name).read_bytes()
        assert (tmp_path / name).stat().st_size < 15e6


@pytest.mark.parametrize(
    ("backend", "model_type", "encoder"),
    [
        *(
            (
                backend,
                "vit_b",
                {
                    "embed_dim": 768,
                    "depth": 12,
                    "num_heads": 12,
                    "window_size": 14,
                    "global_attn_indexes": [2, 5, 8, 11],
                },
            )
            for backend in ("sam", "sam_hq")
        ),
        (
            "sam_hq",
            "vit_tiny",
            {
                "embed_dims": [64, 128, 160, 320],
                "depths": [2, 2, 6, 2],
                "num_heads": [2, 4, 5, 10],
                "window_sizes": [7, 7, 14, 7],
                "drop_path_rate": 0.0,
            },
        ),
    ],
)
def test_the_released_sizes_give_the_released_network(
    backend: str, model_type: str, encoder: dict[str, Any]
) -> None:
    """So that the tiny networks are built as the real ones are."""
    sizes = Sizes(
        backend=backend,  # type: ignore[arg-type]
        model_type=model_type,  # type: ignore[arg-type]
        weights="random",
        image_size=1024,
        prompt_dim=256,
        decoder_depth=2,
        decoder_heads=8,
        decoder_mlp_dim=2048,
        iou_head_dim=256,
        encoder=encoder,
    )
    ours, theirs = network_of_sizes(sizes), PACKAGES[backend].sam_model_registry[model_type]()
    shapes = [{name: tuple(value.shape) for name, value in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert [(type(a), a.extra_repr()) for a in ours.modules()] == [
        (type(b), b.extra_repr()) for b in theirs.modules()
    ]

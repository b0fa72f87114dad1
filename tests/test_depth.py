"""Depth maps: equal to a plain transcription of the facts through the same model, whatever the batch."""

from __future__ import annotations

import io
import itertools
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from spctrl.data.records import Record, RecordError
from spctrl.errors import ExpectedError
from spctrl.image_models.base import run_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from spctrl.image_models import depth as zoedepth  # noqa: E402
from spctrl.image_models.depth import DepthEstimator, build_tiny, load_depth_estimator  # noqa: E402

Pixels = NDArray[np.uint8]
SIZES_WH = [(64, 48), (640, 427), (48, 64), (130, 130), (64, 48), (700, 900), (91, 60)]
"""Enlarged and reduced, wide and tall; some share a batch."""
DIFFERENT_SHARE = 3e-4
"""Of pixels that may differ by a level. Rounding of float32 moves depth by some 1e-4 of a level, whatever the network
(that is 2 units in the last place), and levels are truncated, so that about as many pixels as that change theirs."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "zoedepth"
    build_tiny(path)
    return path


@pytest.fixture(scope="module")
def estimator(folder: Path) -> DepthEstimator:
    return load_depth_estimator(weights=folder, device="cpu")


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder, for breaking."""
    return Path(shutil.copytree(folder, tmp_path / "broken"))


def picture(width: int, height: int, seed: int = 0) -> Pixels:
    """Blobs of colour and some noise."""
    rng = np.random.default_rng(seed)
    blobs = cv2.resize(
        rng.integers(0, 256, (5, 7, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC
    )
    return np.clip(blobs + rng.normal(0, 5, blobs.shape), 0, 255).astype(np.uint8)


def png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def record(width: int, height: int) -> Record:
    return Record(1, "1.png", (width, height), np.empty((0, 17, 3)), np.empty((0, 4)))


def work(images: Sequence[Pixels]) -> Iterator[tuple[Record, bytes]]:
    return ((record(image.shape[1], image.shape[0]), png(image)) for image in images)


def map_of(result: bytes | tuple[str, str]) -> Pixels:
    assert isinstance(result, bytes), result
    with Image.open(io.BytesIO(result)) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        pixels = np.asarray(image)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def depth_map(estimator: DepthEstimator, image: Pixels) -> Pixels:
    (result,) = run_model(estimator, work([image]), batch_size=1)
    return map_of(result)


def assert_alike(found: Sequence[Pixels], expected: Sequence[Pixels]) -> None:
    """The same but for one level on ``DIFFERENT_SHARE`` of all pixels (and on one pixel, where they are few)."""
    assert [each.shape for each in found] == [each.shape for each in expected]
    pairs = zip(found, expected, strict=True)
    apart = np.concatenate([np.abs(one.astype(int) - other).reshape(-1) for one, other in pairs])
    assert apart.max() <= 1
    assert np.count_nonzero(apart) <= max(1, DIFFERENT_SHARE * apart.size)


def plain_depth_map(model: Any, image: Pixels, network_hw: tuple[int, int]) -> Pixels:
    """REFERENCE section 5, one image and one pass at a time."""
    height, width = image.shape[:2]
    k = 512 / min(height, width)
    H, W = (int(np.round(side * k / 64)) * 64 for side in (height, width))
    resized = cv2.resize(image, (W, H), interpolation=cv2.INTER_LANCZOS4 if k > 1 else cv2.INTER_AREA)
    straight = plain_inference(model, resized, network_hw)
    mirrored = plain_inference(model, resized[:, ::-1], network_hw)
    depth = (straight + mirrored[:, ::-1]) / 2
    low, high = np.percentile(depth, 2), np.percentile(depth, 85)
    levels = (255 * (1 - (depth - low) / (high - low))).clip(0, 255).astype(np.uint8)
    rgb = Image.fromarray(np.stack([levels] * 3, axis=-1))
    return np.asarray(rgb.resize((width, height), Image.Resampling.BICUBIC))[..., 0]


def plain_inference(model: Any, image: Pixels, network_hw: tuple[int, int]) -> NDArray[np.float32]:
    H, W = image.shape[:2]
    pad_h, pad_w = int(np.sqrt(H / 2) * 3), int(np.sqrt(W / 2) * 3)
    padded = np.pad(image / np.float32(255), ((pad_h, pad_h), (pad_w, pad_w), (0, 0)), mode="reflect")
    scale_h, scale_w = network_hw[0] / padded.shape[0], network_hw[1] / padded.shape[1]
    scale = scale_w if abs(1 - scale_w) < abs(1 - scale_h) else scale_h
    inner_hw = [int(np.round(scale * side / 32)) * 32 for side in padded.shape[:2]]
    pixels = torch.from_numpy(np.ascontiguousarray(padded.transpose(2, 0, 1)[None]))
    pixels = torch.nn.functional.interpolate(pixels, inner_hw, mode="bilinear", align_corners=True)
    with torch.no_grad():
        depth = model((pixels - 0.5) / 0.5).predicted_depth[None]
    depth = torch.nn.functional.interpolate(depth, padded.shape[:2], mode="bicubic", align_corners=False)
    return depth[0, 0, pad_h : pad_h + H, pad_w : pad_w + W].numpy()


# Parity


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_maps_equal_a_plain_transcription_of_the_facts(estimator: DepthEstimator, batch_size: int) -> None:
    images = [picture(*size_wh, seed) for seed, size_wh in enumerate(SIZES_WH)]
    results = list(run_model(estimator, work(images), batch_size=batch_size))
    expected = [plain_depth_map(estimator.model, image, (96, 128)) for image in images]
    assert_alike([map_of(each) for each in results], expected)


def test_without_a_preprocessor_config_the_network_sees_384_x_512(folder: Path, tmp_path: Path) -> None:
    published = Path(shutil.copytree(folder, tmp_path / "published"))
    (published / "preprocessor_config.json").unlink()
    estimator = load_depth_estimator(weights=published, device="cpu")
    image = picture(640, 427)
    expected = plain_depth_map(estimator.model, image, (384, 512))
    assert_alike([depth_map(estimator, image)], [expected])


@pytest.mark.parametrize("size_wh", [(512, 512), (704, 512), (512, 1024), (2048, 512)])
def test_depth_equals_that_of_transformers_own_processor(
    estimator: DepthEstimator, size_wh: tuple[int, int]
) -> None:
    """Relative tolerance 1e-5 of the range: only the order of additions differs."""
    processor = transformers.ZoeDepthImageProcessor(
        size={"height": 96, "width": 128}, ensure_multiple_of=32, resample=Image.Resampling.BILINEAR
    )
    image = picture(*size_wh)
    (found,) = estimator.infer([image])
    inputs = processor(images=image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        straight, mirrored = estimator.model(inputs), estimator.model(inputs.flip(-1))
    (expected,) = processor.post_process_depth_estimation(
        straight, source_sizes=[image.shape[:2]], outputs_flipped=mirrored
    )
    depth = expected["predicted_depth"].numpy()
    assert np.abs(found - depth).max() <= 1e-5 * np.ptp(depth)


def test_the_order_of_images_changes_nothing(estimator: DepthEstimator) -> None:
    images = [picture(64, 48, seed) for seed in range(5)]
    forwards = [map_of(each) for each in run_model(estimator, work(images), batch_size=5)]
    backwards = [map_of(each) for each in run_model(estimator, work(images[::-1]), batch_size=2)]
    assert_alike(backwards[::-1], forwards)


def test_different_images_of_one_batch_get_their_own_maps(estimator: DepthEstimator) -> None:
    maps = [
        map_of(each)
        for each in run_model(estimator, work([picture(64, 48, i) for i in range(3)]), batch_size=3)
    ]
    for one, other in itertools.combinations(maps, 2):
        assert np.mean(one != other) > 0.5


def test_image_and_mirror_image_go_through_in_one_pass(estimator: DepthEstimator) -> None:
    seen = []

    def model(pixels: Any) -> Any:
        seen.append(tuple(pixels.shape))
        return estimator.model(pixels)

    counting = DepthEstimator(estimator.model, device=estimator.device, network_hw=(96, 128))
    counting.model = model
    list(run_model(counting, work([picture(64, 48, seed) for seed in range(4)]), batch_size=4))
    assert [shape[0] for shape in seen] == [8]


def test_a_mirrored_image_gets_the_mirrored_map(estimator: DepthEstimator) -> None:
    image = picture(128, 128)
    mirrored = depth_map(estimator, np.ascontiguousarray(image[:, ::-1]))
    assert_alike([mirrored[:, ::-1]], [depth_map(estimator, image)])


# Levels


def test_near_is_bright_and_levels_lie_between_the_percentiles() -> None:
    depth = np.arange(10_000, dtype=np.float32).reshape(100, 100)
    levels = zoedepth.depth_levels(depth)
    near, far = np.percentile(depth, 2), np.percentile(depth, 85)
    assert (levels[depth <= near] == 255).all()
    assert (levels[depth >= far] == 0).all()
    assert (np.diff(levels.reshape(-1).astype(int)) <= 0).all()
    assert levels[depth == 4350] == math.trunc(255 * (1 - (4350 - float(near)) / float(far - near)))


@pytest.mark.parametrize("value", [0.0, 3.5])
def test_a_flat_map_is_black(value: float) -> None:
    depth = np.full((30, 40), value, np.float32)
    depth[0, 0] += 1  # outside the percentiles
    assert not zoedepth.depth_levels(depth).any()


def test_a_flat_depth_makes_a_black_artifact(estimator: DepthEstimator) -> None:
    def model(pixels: Any) -> Any:
        return SimpleNamespace(predicted_depth=torch.full((len(pixels), *pixels.shape[2:]), 2.0))

    flat = DepthEstimator(estimator.model, device=estimator.device)
    flat.model = model
    assert not depth_map(flat, picture(64, 48)).any()


def test_an_image_of_one_colour_gets_a_map(estimator: DepthEstimator) -> None:
    image = np.full((48, 64, 3), 127, np.uint8)
    expected = plain_depth_map(estimator.model, image, (96, 128))
    assert_alike([depth_map(estimator, image)], [expected])


# Sizes


@pytest.mark.parametrize(
    ("size_wh", "expected"),
    [
        ((1, 1), (512, 512)),
        ((640, 480), (704, 512)),  # 682.67 is nearer to 704 than to 640
        ((12_000, 9_000), (704, 512)),
        ((1000, 250), (2048, 512)),
        ((1001, 250), (2048, 512)),
        ((1, 12_000), (512, 2048)),
    ],
)
def test_resized_sizes_are_multiples_of_64_and_bounded(
    size_wh: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert zoedepth.resized_wh(size_wh) == expected


@pytest.mark.parametrize("size_wh", [(1, 1), (2, 1), (1, 3000), (3000, 1), (40_000, 3)])
def test_the_smallest_and_the_longest_images_get_maps_of_their_size(
    estimator: DepthEstimator, size_wh: tuple[int, int]
) -> None:
    assert depth_map(estimator, picture(*size_wh)).shape == size_wh[::-1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_of_12000_x_9000_pixels_is_small_once_decoded(estimator: DepthEstimator) -> None:
    image = np.broadcast_to(np.linspace(0, 255, 12_000).astype(np.uint8)[None, :, None], (9_000, 12_000, 3))
    of, data = record(12_000, 9_000), png(image)
    decoded = estimator.decode(of, data)
    assert decoded.shape == (512, 704, 3)
    (output,) = estimator.infer([decoded])
    with Image.open(io.BytesIO(estimator.encode(of, decoded, output))) as found:
        assert found.size == (12_000, 9_000)


# Records that cannot be used


def test_wrong_images_are_rejected_and_the_others_are_not(estimator: DepthEstimator) -> None:
    good = png(picture(64, 48))
    of = record(64, 48)
    items = [(of, good), (of, b"no image"), (of, good[: len(good) // 2]), (record(63, 48), good), (of, good)]
    results = list(run_model(estimator, items, batch_size=3))
    codes = [result if isinstance(result, bytes) else result[0] for result in results]
    assert codes[1:4] == ["bad_image", "bad_image", "image_size"]
    assert_alike([map_of(results[0])], [map_of(results[4])])


def change_weights(folder: Path, **changes: Any) -> None:
    """Replace tensors of a folder's weights; None removes one. In names, __ stands for a dot."""
    path = folder / "model.safetensors"
    kept = {**load_file(path), **{name.replace("__", "."): value for name, value in changes.items()}}
    save_file({name: value for name, value in kept.items() if value is not None}, path, {"format": "pt"})


def test_weights_that_are_not_numbers_reject_records(broken: Path) -> None:
    change_weights(broken, metric_head__conv2__bias=torch.full((4,), math.nan))
    estimator = load_depth_estimator(weights=broken, device="cpu")
    (result,) = run_model(estimator, work([picture(64, 48)]), batch_size=1)
    assert result[0] == "not_finite"
    with pytest.raises(RecordError, match="not_finite"):
        zoedepth.depth_levels(np.array([[1, np.inf]], np.float32))


# Loading


def test_the_tiny_weights_are_small_always_the_same_and_say_that_they_are_random(
    folder: Path, tmp_path: Path
) -> None:
    random_state = torch.get_rng_state()
    build_tiny(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), random_state)
    for name in ("model.safetensors", "config.json", "preprocessor_config.json", "spctrl.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert json.loads((folder / "spctrl.json").read_bytes()) == {"weights": "random"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 300_000


def assert_refused(folder: Path, *words: str) -> None:
    with pytest.raises(ExpectedError) as caught:
        load_depth_estimator(weights=folder, device="cpu")
    for word in (str(folder), "[depth] weights", "Intel/zoedepth-nyu", *words):
        assert word in str(caught.value)


def test_a_missing_folder_says_what_to_get_and_where_to_put_it(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none", "put it there", "model.safetensors")


def test_missing_unexpected_and_misshapen_weights_are_named(broken: Path) -> None:
    change_weights(broken, metric_head__conv2__bias=None)
    assert_refused(broken, "1 missing (metric_head.conv2.bias)")
    change_weights(broken, metric_head__conv2__bias=torch.zeros(4), head__extra=torch.zeros(1))
    assert_refused(broken, "1 unexpected (head.extra)")
    change_weights(broken, metric_head__conv2__bias=torch.zeros(5), head__extra=None)
    assert_refused(broken, "1 mismatched (metric_head.conv2.bias)")


def test_many_missing_weights_are_counted(broken: Path) -> None:
    names = [name.replace(".", "__") for name in load_file(broken / "model.safetensors") if "neck" in name]
    change_weights(broken, **dict.fromkeys(names))
    assert_refused(broken, f"{len(names)} missing (neck.", ", ...)")


@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_weights_cut_short_are_refused(broken: Path, kept: int) -> None:
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert_refused(broken, "cut short")


def test_pickled_weights_are_not_read(broken: Path) -> None:
    path = broken / "model.safetensors"
    torch.save(load_file(path), broken / "pytorch_model.bin")
    path.unlink()
    assert_refused(broken, "model.safetensors")


@pytest.mark.parametrize("config", ['{"model_type": "dpt"}', '{"_class_name": "AutoencoderKL"}', "[]"])
def test_another_models_folder_is_refused(broken: Path, config: str) -> None:
    (broken / "config.json").write_text(config)
    assert_refused(broken, "expected model_type = zoedepth")


@pytest.mark.parametrize("config", [None, "", "{", pytest.param("[" * 100_000, id="deep")])
def test_a_folder_without_a_readable_config_is_refused(broken: Path, config: str | None) -> None:
    (broken / "config.json").unlink()
    if config is not None:
        (broken / "config.json").write_text(config)
    assert_refused(broken, "config.json cannot be read")


@pytest.mark.parametrize("config", ["{}", "{", '{"size": {"height": 0, "width": 4}}', '{"size": 384}'])
def test_a_broken_preprocessor_config_is_refused(broken: Path, config: str) -> None:
    (broken / "preprocessor_config.json").write_text(config)
    assert_refused(broken, "preprocessor_config.json")


def test_an_unknown_device_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="expected a device among auto, cpu"):
        load_depth_estimator(weights=folder, device="gpu")

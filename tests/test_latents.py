"""Latents: equal to diffusers' own encoding of torchvision's training crop, whatever the batch."""

from __future__ import annotations

import io
import json
import math
import pickle
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from spctrl.data.crops import training_crop
from spctrl.data.records import Record, RecordError
from spctrl.errors import ExpectedError
from spctrl.image_models.base import run_model

torch = pytest.importorskip("torch")
transforms = pytest.importorskip("torchvision.transforms")
diffusers = pytest.importorskip("diffusers")

from safetensors.torch import load_file, save_file  # noqa: E402

from spctrl.data.images import open_rgb  # noqa: E402
from spctrl.image_models.latents import (  # noqa: E402
    LatentEncoder,
    build_tiny,
    latent_shape,
    load_latent_encoder,
)

Pixels = NDArray[np.uint8]
RESOLUTION = 64
WEIGHTS = "diffusion_pytorch_model.safetensors"
SIZES_WH = [(64, 64), (640, 427), (427, 640), (65, 64), (30, 40), (1000, 251), (63, 200)]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vae"
    build_tiny(path)
    return path


@pytest.fixture(scope="module")
def encoder(folder: Path) -> LatentEncoder:
    return load_latent_encoder(weights=folder, resolution=RESOLUTION, device="cpu")


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


def png(pixels: Pixels | Image.Image) -> bytes:
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def record(width: int, height: int) -> Record:
    return Record(1, "1.png", (width, height), np.empty((0, 17, 3)), np.empty((0, 4)))


def work(images: Sequence[Pixels]) -> Iterator[tuple[Record, bytes]]:
    return ((record(image.shape[1], image.shape[0]), png(image)) for image in images)


def latents_of(result: bytes | tuple[str, str]) -> NDArray[np.float16]:
    assert isinstance(result, bytes), result
    return np.frombuffer(result, "<f2").reshape(8, RESOLUTION // 8, RESOLUTION // 8)


def crop_by_torchvision(image: Pixels, resolution: int) -> Image.Image:
    steps = [
        transforms.Resize(resolution, interpolation=transforms.InterpolationMode.BILINEAR),
        transforms.CenterCrop(resolution),
    ]
    cropped = transforms.Compose(steps)(Image.fromarray(image))
    assert isinstance(cropped, Image.Image)
    return cropped


def moments_by_diffusers(folder: Path, image: Pixels) -> NDArray[np.float32]:
    """The way of diffusers' training scripts, one image at a time."""
    vae = diffusers.AutoencoderKL.from_pretrained(folder).eval()
    pixels = transforms.ToTensor()(crop_by_torchvision(image, RESOLUTION))
    with torch.no_grad():
        posterior = vae.encode(transforms.Normalize([0.5], [0.5])(pixels)[None]).latent_dist
    moments: NDArray[np.float32] = posterior.parameters[0].numpy()
    return moments


# Parity


@pytest.mark.parametrize("resolution", [64, 512])
@pytest.mark.parametrize("size_wh", [*SIZES_WH, (512, 512), (513, 512), (1, 1), (2, 3), (3, 12)])
def test_the_crop_is_torchvisions_to_the_pixel(size_wh: tuple[int, int], resolution: int) -> None:
    image = picture(*size_wh)
    expected = np.asarray(crop_by_torchvision(image, resolution))
    assert np.array_equal(training_crop(Image.fromarray(image), resolution), expected)


@pytest.mark.parametrize("size_wh", [(1000, 100), (100, 1000), (1, 300), (300, 1), (1001, 37)])
def test_the_crop_of_a_very_long_image_is_torchvisions_to_one_level(size_wh: tuple[int, int]) -> None:
    image = picture(*size_wh)
    expected = np.asarray(crop_by_torchvision(image, RESOLUTION)).astype(int)
    assert np.abs(training_crop(Image.fromarray(image), RESOLUTION) - expected).max() <= 1


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_latents_equal_those_of_diffusers(encoder: LatentEncoder, folder: Path, batch_size: int) -> None:
    images = [picture(*size_wh, seed) for seed, size_wh in enumerate(SIZES_WH)]
    expected = [moments_by_diffusers(folder, image) for image in images]
    crops = [encoder.decode(of, data) for of, data in work(images)]
    for start in range(0, len(crops), batch_size):
        found = encoder.infer(crops[start : start + batch_size])
        for one, other in zip(found, expected[start : start + batch_size], strict=True):
            assert (one.shape, one.dtype) == (encoder.shape, np.float32)
            assert np.abs(one - other).max() <= TOLERANCE
    results = run_model(encoder, work(images), batch_size=batch_size)
    for result, other in zip(results, expected, strict=True):
        # Half a step of float16 at most: 11 bits, and 2**-24 absolute below its normal range.
        assert np.allclose(latents_of(result), other, rtol=2**-11, atol=TOLERANCE)


def test_artifacts_are_the_rounded_latents_little_endian(encoder: LatentEncoder) -> None:
    of = record(64, 64)
    crop = encoder.decode(of, png(picture(64, 64)))
    (output,) = encoder.infer([crop])
    data = encoder.encode(of, crop, output)
    assert data == output.astype(np.float16).astype("<f2").tobytes()
    assert len(data) == 2 * math.prod(encoder.shape)


def test_the_order_of_images_changes_nothing(encoder: LatentEncoder) -> None:
    images = [picture(64, 48, seed) for seed in range(5)]
    forwards = [latents_of(each) for each in run_model(encoder, work(images), batch_size=5)]
    backwards = [latents_of(each) for each in run_model(encoder, work(images[::-1]), batch_size=2)]
    for found, expected in zip(backwards[::-1], forwards, strict=True):
        assert np.allclose(found, expected, rtol=2**-10, atol=TOLERANCE)  # one step of float16
    assert not np.allclose(forwards[0], forwards[1], atol=0.01)


def test_mean_comes_before_log_variance(encoder: LatentEncoder) -> None:
    """Sampling from the artifact as training does gives diffusers' own samples."""
    (output,) = encoder.infer([encoder.decode(record(64, 64), png(picture(64, 64)))])
    mean, logvar = np.split(output, 2)
    posterior = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution(torch.from_numpy(output)[None])
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
    sample = posterior.sample(torch.Generator().manual_seed(1))[0].numpy()
    assert np.allclose(mean + np.exp(logvar / 2) * noise[0].numpy(), sample, atol=TOLERANCE)


@pytest.mark.parametrize(("resolution", "expected"), [(512, (8, 64, 64)), (64, (8, 8, 8)), (8, (8, 1, 1))])
def test_latent_shape(encoder: LatentEncoder, resolution: int, expected: tuple[int, int, int]) -> None:
    assert latent_shape(resolution, encoder.vae.config) == expected


@pytest.mark.parametrize("resolution", [0, -8, 500, 4])
def test_a_resolution_that_the_model_cannot_divide_is_refused(folder: Path, resolution: int) -> None:
    with pytest.raises(ExpectedError, match=r"\[latents\] resolution: expected a multiple of 8"):
        load_latent_encoder(weights=folder, resolution=resolution, device="cpu")


# Images


@pytest.mark.parametrize("size_wh", [(1, 1), (1, 12_000), (60_000, 1), (20_000, 3)])
def test_the_smallest_and_the_longest_images_have_latents(
    encoder: LatentEncoder, size_wh: tuple[int, int]
) -> None:
    (result,) = run_model(encoder, work([picture(*size_wh)]), batch_size=1)
    assert np.isfinite(latents_of(result)).all()


def test_an_image_of_one_colour_has_latents(encoder: LatentEncoder, folder: Path) -> None:
    image = np.full((80, 64, 3), 200, np.uint8)
    (found,) = encoder.infer([encoder.decode(record(64, 80), png(image))])
    assert np.abs(found - moments_by_diffusers(folder, image)).max() <= TOLERANCE


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_of_12000_x_9000_pixels_is_small_once_decoded(encoder: LatentEncoder) -> None:
    image = np.broadcast_to(np.linspace(0, 255, 12_000).astype(np.uint8)[None, :, None], (9_000, 12_000, 3))
    assert encoder.decode(record(12_000, 9_000), png(image)).shape == (RESOLUTION, RESOLUTION, 3)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1"])
def test_images_of_any_mode_are_read_as_rgb(mode: str) -> None:
    image = Image.fromarray(picture(20, 10)).convert(mode)
    assert np.array_equal(np.asarray(open_rgb(record(20, 10), png(image))), np.asarray(image.convert("RGB")))


def test_an_orientation_tag_turns_nothing() -> None:
    image = Image.fromarray(picture(20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    assert np.array_equal(np.asarray(open_rgb(record(20, 10), buffer.getvalue())), np.asarray(image))


def test_wrong_images_are_rejected_and_the_others_are_not(encoder: LatentEncoder) -> None:
    good, of = png(picture(64, 48)), record(64, 48)
    items = [(of, good), (of, b"no image"), (of, good[: len(good) // 2]), (record(63, 48), good), (of, good)]
    results = list(run_model(encoder, items, batch_size=3))
    codes = [result if isinstance(result, bytes) else result[0] for result in results]
    assert codes[1:4] == ["bad_image", "bad_image", "image_size"]
    assert np.allclose(latents_of(results[0]), latents_of(results[4]), rtol=2**-10, atol=TOLERANCE)


# Loading


def change_weights(folder: Path, **changes: Any) -> None:
    """Replace tensors of a folder's weights; None removes one. In names, __ stands for a dot."""
    path = folder / WEIGHTS
    kept = {**load_file(path), **{name.replace("__", "."): value for name, value in changes.items()}}
    save_file({name: value for name, value in kept.items() if value is not None}, path, {"format": "pt"})


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e5])
def test_latents_that_float16_cannot_hold_reject_records(broken: Path, value: float) -> None:
    change_weights(broken, quant_conv__bias=torch.full((8,), value))
    encoder = load_latent_encoder(weights=broken, resolution=RESOLUTION, device="cpu")
    (result,) = run_model(encoder, work([picture(64, 48)]), batch_size=1)
    assert result[0] == "not_finite"


def test_latents_just_within_float16_are_kept(encoder: LatentEncoder) -> None:
    of, crop = record(64, 64), np.zeros((RESOLUTION, RESOLUTION, 3), np.uint8)
    for value in (65504.0, -65504.0, 0.0):
        output = np.full(encoder.shape, value, np.float32)
        assert (latents_of(encoder.encode(of, crop, output)) == value).all()
    with pytest.raises(RecordError, match="not_finite"):
        encoder.encode(of, crop, np.full(encoder.shape, 65520, np.float32))


def test_the_tiny_weights_are_small_always_the_same_and_say_that_they_are_random(
    folder: Path, tmp_path: Path
) -> None:
    random_state = torch.get_rng_state()
    build_tiny(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), random_state)
    for name in (WEIGHTS, "config.json", "spctrl.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert json.loads((folder / "spctrl.json").read_bytes()) == {"weights": "random"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 200_000


def assert_refused(folder: Path, *words: str) -> None:
    with pytest.raises(ExpectedError) as caught:
        load_latent_encoder(weights=folder, resolution=RESOLUTION, device="cpu")
    for word in (str(folder), "[latents] weights", "stable-diffusion-v1-5", *words):
        assert word in str(caught.value)


def test_a_missing_folder_says_what_to_get_and_where_to_put_it(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none", "put it there", WEIGHTS)


def test_missing_unexpected_and_misshapen_weights_are_named(broken: Path) -> None:
    change_weights(broken, quant_conv__bias=None)
    assert_refused(broken, "1 missing (quant_conv.bias)")
    change_weights(broken, quant_conv__bias=torch.zeros(8), head__extra=torch.zeros(1))
    assert_refused(broken, "1 unexpected (head.extra)")
    change_weights(broken, quant_conv__bias=torch.zeros(9), head__extra=None)
    assert_refused(broken, "1 mismatched (quant_conv.bias)")


@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_weights_cut_short_are_refused(broken: Path, kept: int) -> None:
    path = broken / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    assert_refused(broken, "cut short")


@pytest.mark.parametrize(
    "config", ['{"_class_name": "UNet2DConditionModel"}', '{"model_type": "zoedepth"}', "[]"]
)
def test_another_models_folder_is_refused(broken: Path, config: str) -> None:
    (broken / "config.json").write_text(config)
    assert_refused(broken, "expected _class_name = AutoencoderKL")


@pytest.mark.parametrize("config", [None, "", "{"])
def test_a_folder_without_a_readable_config_is_refused(broken: Path, config: str | None) -> None:
    (broken / "config.json").unlink()
    if config is not None:
        (broken / "config.json").write_text(config)
    assert_refused(broken, "config.json cannot be read")


def test_a_folder_without_weights_is_refused(broken: Path) -> None:
    (broken / WEIGHTS).unlink()
    assert_refused(broken, "may be missing")


def same_latents(folder: Path, encoder: LatentEncoder) -> bool:
    crop = encoder.decode(record(64, 64), png(picture(64, 64)))
    other = load_latent_encoder(weights=folder, resolution=RESOLUTION, device="cpu")
    return np.array_equal(other.infer([crop])[0], encoder.infer([crop])[0])


def test_the_attention_names_of_the_published_file_are_read(broken: Path, encoder: LatentEncoder) -> None:
    """Stable Diffusion 1.5's file is older than diffusers' present names."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(broken / WEIGHTS)
    for name in [name for name in weights if ".attentions." in name]:
        for new_part, old_part in old.items():
            if f".{new_part}." in name:
                weights[name.replace(new_part, old_part)] = weights.pop(name)
    assert any(".query." in name for name in weights)
    save_file(weights, broken / WEIGHTS, {"format": "pt"})
    assert same_latents(broken, encoder)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickled_weights_are_read_but_nothing_in_them_is_run(
    broken: Path, tmp_path: Path, encoder: LatentEncoder
) -> None:
    weights = load_file(broken / WEIGHTS)
    (broken / WEIGHTS).unlink()
    pickled, ran = broken / "diffusion_pytorch_model.bin", tmp_path / "ran"
    torch.save(weights, pickled)
    assert same_latents(broken, encoder)
    torch.save({**weights, "payload": Payload(ran)}, pickled)
    assert_refused(broken, "cannot be read")
    pickled.write_bytes(pickle.dumps(Payload(ran)))
    assert_refused(broken, "cannot be read")
    assert not ran.exists()


def test_an_unknown_device_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="expected a device among auto, cpu"):
        load_latent_encoder(weights=folder, device="gpu")

"""Images by tiny random models: what they depend on, what is loaded, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

pytest.importorskip("diffusers", reason="the models extra is not installed")

import torch

from spctrl.data.records import Record, RecordError
from spctrl.errors import ExpectedError
from spctrl.inference import SpCtrlPipeline
from spctrl.inference.generator import (
    ImageGenerator,
    Request,
    load_generator,
    read_condition,
    request_bytes,
)
from spctrl.inference.methods import Kind, Sampler
from spctrl.inference.pipeline import index_maps, initial_noise, load_network, unipc
from spctrl.models import tiny
from spctrl.models.tokens import PLACEHOLDERS, load_learned_embeds

GOLDEN = Path(__file__).parents[2] / "shared" / "data" / "golden" / "controlnet_tiny" / "controlnet"
RESOLUTION = 64
FAST = Sampler(steps=2, resolution=RESOLUTION)
ROUNDING = 1e-4
"""Of pixels within [0, 1]: sums may be taken in another order for another batch."""
FOLDERS: dict[Kind, str] = {"spctrl": "spctrl", "controlnet": "controlnet", "t2i_adapter": "adapter"}
RECORD = Record(1, "a.jpg", (96, 64), np.zeros((0, 17, 3)), np.zeros((0, 4)))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    base = folder / "stable-diffusion"
    tiny.build_stable_diffusion(base)
    tiny.build_spctrl(folder / "spctrl", base, "ap10k")
    tiny.build_controlnet(folder / "controlnet", base)
    tiny.build_t2i_adapter(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def pipelines(weights: Path) -> dict[Kind, Any]:
    return {kind: load(weights, kind).pipeline for kind in FOLDERS}


def load(weights: Path, kind: Kind, **sampler: Any) -> ImageGenerator:
    return load_generator(
        kind=kind,
        stable_diffusion=weights / "stable-diffusion",
        checkpoint=weights / FOLDERS[kind],
        sampler=Sampler(**{"steps": 2, "resolution": RESOLUTION, **sampler}),
        device="cpu",
    )


def generator(pipelines: dict[Kind, Any], kind: Kind = "spctrl", **sampler: Any) -> ImageGenerator:
    settings = {"steps": 2, "resolution": RESOLUTION, **sampler}
    return ImageGenerator(pipelines[kind], kind, Sampler(**settings), torch.device("cpu"))


def index_map() -> NDArray[np.uint8]:
    drawing = np.zeros((64, 96), np.uint8)
    drawing[10:40, 20:70] = 51
    drawing[20:30, 30:40] = 3
    return drawing


def png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def request(kind: Kind = "spctrl", prompt: str = "a dog <left-eye, nose>", seed: int = 0) -> Request:
    return Request(read_condition(png(index_map()), kind, RESOLUTION), prompt, seed)


def draw(model: ImageGenerator, *requests: Request) -> list[NDArray[np.float32]]:
    return model.infer(requests)


@pytest.mark.parametrize("kind", FOLDERS)
def test_an_image_does_not_depend_on_its_batch(pipelines: dict[Kind, Any], kind: Kind) -> None:
    model = generator(pipelines, kind)
    requests = [request(kind, f"a dog {i}", seed=i) for i in range(5)]
    together = draw(model, *requests)
    alone = [draw(model, each)[0] for each in requests]
    backwards = draw(model, *requests[::-1])[::-1]
    for image, single, reversed_one in zip(together, alone, backwards, strict=True):
        assert image.shape == (RESOLUTION, RESOLUTION, 3)
        np.testing.assert_allclose(single, image, atol=ROUNDING)
        np.testing.assert_allclose(reversed_one, image, atol=ROUNDING)


@pytest.mark.parametrize("kind", FOLDERS)
def test_an_image_depends_on_condition_prompt_and_seed(pipelines: dict[Kind, Any], kind: Kind) -> None:
    model, one = generator(pipelines, kind), request(kind)
    (image,) = draw(model, one)
    others = [
        one._replace(condition=np.zeros_like(one.condition)),
        one._replace(prompt="a cat"),
        one._replace(seed=1),
    ]
    for other in draw(model, *others):
        assert np.abs(other - image).max() > 10 * ROUNDING


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("guidance_scale", [0.0, 1.0])
def test_without_guidance_the_negative_prompt_says_nothing(
    pipelines: dict[Kind, Any], kind: Kind, guidance_scale: float
) -> None:
    def image(guidance: float, negative: str) -> NDArray[np.float32]:
        return draw(
            generator(pipelines, kind, guidance_scale=guidance, negative_prompt=negative), request(kind)
        )[0]

    plain = image(guidance_scale, "")
    np.testing.assert_allclose(image(guidance_scale, "a cat"), plain, atol=ROUNDING)
    assert np.abs(image(7.5, "") - plain).max() > 10 * ROUNDING
    assert np.abs(image(7.5, "a cat") - image(7.5, "")).max() > 10 * ROUNDING


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_condition_without_weight_changes_nothing(pipelines: dict[Kind, Any], kind: Kind) -> None:
    model, one = generator(pipelines, kind, conditioning_scale=0.0), request(kind)
    with_it, without = draw(model, one, one._replace(condition=np.zeros_like(one.condition)))
    np.testing.assert_allclose(with_it, without, atol=ROUNDING)


@pytest.mark.parametrize("kind", FOLDERS)
def test_networks_work_in_half_precision_and_the_decoder_in_full(weights: Path, kind: Kind) -> None:
    def image(precision: str) -> NDArray[np.float32]:
        model = load_generator(
            kind=kind,
            stable_diffusion=weights / "stable-diffusion",
            checkpoint=weights / FOLDERS[kind],
            sampler=Sampler(steps=2, resolution=RESOLUTION, precision=precision),  # type: ignore[arg-type]
            device="cpu",
        )
        assert model.pipeline.unet.dtype == getattr(torch, precision)
        assert model.pipeline.vae.dtype == torch.float32
        return draw(model, request(kind))[0]

    half, full = image("bfloat16"), image("float32")
    assert 0 < np.abs(half - full).max() < 0.2


def test_the_condition_acts_in_its_share_of_the_steps(pipelines: dict[Kind, Any]) -> None:
    def image(**window: float) -> NDArray[np.float32]:
        return draw(generator(pipelines, **window), request())[0]

    whole, first, second = (
        image(),
        image(control_guidance_end=0.5),
        image(control_guidance_start=0.5),
    )
    assert np.abs(first - whole).max() > 10 * ROUNDING
    assert np.abs(second - whole).max() > 10 * ROUNDING
    assert np.abs(first - second).max() > 10 * ROUNDING
    never = image(control_guidance_start=0.1, control_guidance_end=0.2)
    np.testing.assert_allclose(never, image(conditioning_scale=0.0), atol=ROUNDING)


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (Sampler(), 0.0),
        (Sampler(preset="released"), 0.029167),
        (Sampler(steps=7, preset="released"), 0.029167),
    ],
)
def test_sampling_ends_at_the_noise_level_that_is_set(
    weights: Path, sampler: Sampler, expected: float
) -> None:
    scheduler = unipc(weights / "stable-diffusion", sampler.final_sigmas_type)
    scheduler.set_timesteps(sampler.steps)
    assert len(scheduler.timesteps) == sampler.steps
    assert float(scheduler.sigmas[-1]) == pytest.approx(expected, abs=1e-6)
    assert float(scheduler.sigmas[-2]) > 0.0292


def test_the_preset_reaches_the_images(weights: Path) -> None:
    def images(**settings: Any) -> NDArray[np.float32]:
        model = load(weights, "spctrl", **settings)
        decoded = model.decode(RECORD, png(index_map()), request_bytes("a dog", 0))
        return draw(model, decoded)[0]

    default, last_sigma, resized = (
        images(),
        images(final_sigmas_type="sigma_min"),
        images(map_resize="floor"),
    )
    assert np.abs(last_sigma - default).max() > 0
    assert np.abs(resized - default).max() > 10 * ROUNDING
    released = images(preset="released")
    assert np.array_equal(released, images(final_sigmas_type="sigma_min", map_resize="floor"))
    assert np.abs(released - resized).max() > 0
    assert np.array_equal(default, images(preset="released", final_sigmas_type="zero", map_resize="centre"))


def test_the_pipeline_resizes_as_it_is_told(pipelines: dict[Kind, Any]) -> None:
    pipeline = pipelines["spctrl"]
    columns = torch.arange(5).expand(1, 1, 5, 5)  # keypoints 1 to 4

    def resized(how: str) -> list[float]:
        pipeline.map_resize = how
        try:
            maps = pipeline.prepare_image(columns, 8, 8, 1, 1, torch.device("cpu"), torch.float32)
        finally:
            del pipeline.map_resize
        assert maps.shape == (1, 1, 8, 8)
        row: list[float] = maps[0, 0, 0].tolist()
        return row

    assert resized("floor") == [0, 0, 1, 1, 2, 3, 3, 4]
    assert resized("centre") == [0, 0, 1, 2, 2, 3, 4, 4]


def test_noise_depends_on_the_seed_alone() -> None:
    noise = initial_noise([3, 2**62, 3], 64)
    assert noise.shape == (3, 4, 8, 8)
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(noise[1], initial_noise([2**62], 64)[0])


# Conditions


def test_index_maps_stay_whole_numbers_and_other_conditions_do_not() -> None:
    resized = read_condition(png(index_map()), "spctrl", 40)
    assert resized.shape == (1, 40, 40)
    assert set(np.unique(resized)) == {0, 3, 51}
    picture = read_condition(png(index_map() * 4), "controlnet", 40)
    assert picture.shape == (3, 40, 40)
    assert 0 <= picture.min() < picture.max() <= 1
    assert len(np.unique(picture)) > 3


def test_a_condition_that_is_not_an_image_is_refused(pipelines: dict[Kind, Any]) -> None:
    with pytest.raises(RecordError, match="bad_image"):
        generator(pipelines).decode(RECORD, b"not an image", request_bytes("a dog", 0))


def test_an_image_that_is_not_finite_is_refused(pipelines: dict[Kind, Any]) -> None:
    with pytest.raises(RecordError, match="not_finite"):
        generator(pipelines).encode(RECORD, request(), np.full((8, 8, 3), np.nan, np.float32))


def test_an_image_is_kept_as_jpeg(pipelines: dict[Kind, Any]) -> None:
    smooth = np.linspace(0, 1, 64 * 64 * 3, dtype=np.float32).reshape(64, 64, 3)
    data = generator(pipelines).encode(RECORD, request(), smooth)
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == ("JPEG", (64, 64))
        assert np.abs(np.asarray(image) / 255 - smooth).max() < 0.03


# The pipeline by itself


def test_the_pipeline_takes_an_index_map_as_diffusers_takes_an_image(pipelines: dict[Kind, Any]) -> None:
    pipeline = pipelines["spctrl"]
    assert isinstance(pipeline, SpCtrlPipeline)

    def images(image: Any, **sizes: int) -> list[Image.Image]:
        found: list[Image.Image] = pipeline(
            "a dog",
            image=image,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            **sizes,
        ).images
        return found

    (drawn,) = images(Image.fromarray(index_map()))
    assert drawn.size == (96, 64)
    (from_tensor,) = images(torch.from_numpy(index_map())[None, None])
    assert np.array_equal(np.asarray(drawn), np.asarray(from_tensor))
    (smaller,) = images(Image.fromarray(index_map()), height=40, width=48)
    assert smaller.size == (48, 40)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("RGB", (64, 64), (1, 1, 2)), "mode RGB"),
        (Image.new("L", (64, 64), 255), "found 255"),
        (torch.zeros(1, 3, 64, 64), "shape"),
        (np.full((64, 64), 30, np.uint8), "found 30"),
    ],
)
def test_what_is_not_an_index_map_is_refused(image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        index_maps(image)


def test_index_maps_may_be_followed_by_the_extra_channels_of_the_controlnet() -> None:
    both = torch.stack([torch.from_numpy(index_map()).float(), torch.full((64, 96), 0.5)])
    assert torch.equal(index_maps(both, 1), both[None])
    assert torch.equal(index_maps([both.numpy()] * 2, 1), both.expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match=r"\(B, 2, H, W\), with the extra channels"):
        index_maps(Image.fromarray(index_map()), 1)


# Checkpoints


def test_keypoint_tokens_beside_the_checkpoint_are_loaded(weights: Path, pipelines: dict[Kind, Any]) -> None:
    embeds = load_learned_embeds(weights / "spctrl" / "learned_embeds.bin")
    pipeline = pipelines["spctrl"]
    ids = pipeline.tokenizer("<nose>", add_special_tokens=False).input_ids
    assert len(ids) == 1
    rows = pipeline.text_encoder.get_input_embeddings().weight
    assert len(rows) == tiny.VOCABULARY_SIZE + len(PLACEHOLDERS["ap10k"])
    assert torch.equal(rows[ids[0]], embeds["<nose>"])
    assert len(pipelines["controlnet"].tokenizer("<nose>", add_special_tokens=False).input_ids) > 1


def test_a_folder_saved_by_the_released_code_loads() -> None:
    if not GOLDEN.is_dir():
        pytest.skip(f"the golden ControlNet is not in {GOLDEN}")
    network = load_network("spctrl", GOLDEN)
    assert network.config.spatext_skeleton_type == "one"


def test_a_checkpoint_of_another_kind_is_refused(weights: Path) -> None:
    with pytest.raises(ExpectedError, match="expected _class_name = SpaTextControlNetModel"):
        load_network("spctrl", weights / "controlnet")


def test_a_checkpoint_without_some_weights_is_refused(weights: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "cut"
    shutil.copytree(weights / "spctrl" / "controlnet", folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    del state["conv_in.weight"]
    save_file(state, path)
    with pytest.raises(ExpectedError, match="missing"):
        load_network("spctrl", folder)


def test_tokens_of_another_text_encoder_are_refused(weights: Path, tmp_path: Path) -> None:
    shutil.copytree(weights / "spctrl", tmp_path / "spctrl")
    torch.save({"<nose>": torch.zeros(768)}, tmp_path / "spctrl" / "learned_embeds.bin")
    with pytest.raises(ExpectedError, match="width 32"):
        load_generator(
            kind="spctrl",
            stable_diffusion=weights / "stable-diffusion",
            checkpoint=tmp_path / "spctrl",
            sampler=FAST,
            device="cpu",
        )


def test_stable_diffusion_in_its_published_layout_loads(weights: Path, tmp_path: Path) -> None:
    """The published text encoder has a prefix and position numbers that this version of transformers writes not."""
    from safetensors.torch import load_file, save_file

    base = tmp_path / "stable-diffusion"
    shutil.copytree(weights / "stable-diffusion", base)
    path = base / "text_encoder" / "model.safetensors"
    state = {f"text_model.{name.removeprefix('text_model.')}": each for name, each in load_file(path).items()}
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, path, metadata={"format": "pt"})
    scheduler = base / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_bytes())
    scheduler.write_text(json.dumps({**config, "clip_sample": False}))
    model = load_generator(
        kind="controlnet",
        stable_diffusion=base,
        checkpoint=weights / "controlnet",
        sampler=FAST,
        device="cpu",
    )
    one = request("controlnet")
    np.testing.assert_array_equal(draw(model, one)[0], draw(load(weights, "controlnet"), one)[0])

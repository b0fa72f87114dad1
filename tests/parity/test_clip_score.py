"""CLIP-score against torchmetrics, pair by pair."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
torchmetrics_clip = pytest.importorskip("torchmetrics.functional.multimodal.clip_score")

from eval.clip_score import ClipScorer, clip_score, load_clip_scorer  # noqa: E402
from eval.images import ImageError  # noqa: E402
from eval.tiny import build_clip  # noqa: E402
from spctrl.errors import ExpectedError  # noqa: E402
from spctrl.weights import are_random  # noqa: E402

PROMPTS = ["a photo of a cat on the grass", "some dogs", "", "two people dancing, <left-eye, nose>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "clip"
    build_clip(path)
    return path


@pytest.fixture(scope="module")
def scorer(folder: Path) -> ClipScorer:
    return load_clip_scorer(folder, device="cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos")
    for number, size_wh in enumerate([(320, 240), (64, 96), (128, 128), (41, 30)]):
        coarse = np.random.default_rng(number).integers(0, 256, (5, 7, 3), np.uint8)
        Image.fromarray(coarse).resize(size_wh, Image.Resampling.BICUBIC).save(path / f"{number}.png")
    return path


class WithTensors:
    """transformers 5 gives features in an output object, which torchmetrics 1.9 does not unpack."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config

    def to(self, _device: Any) -> WithTensors:
        return self

    def get_image_features(self, *arguments: Any) -> Any:
        return self.model.get_image_features(*arguments).pooler_output

    def get_text_features(self, *arguments: Any) -> Any:
        return self.model.get_text_features(*arguments).pooler_output


def theirs(scorer: ClipScorer, images: list[np.ndarray], prompts: list[str]) -> np.ndarray:
    tensors = [torch.from_numpy(image).permute(2, 0, 1) for image in images]
    with torch.inference_mode():
        scores, _ = torchmetrics_clip._clip_score_update(
            tensors, prompts, WithTensors(scorer.model), scorer.processor
        )
    return scores.numpy()


def test_scores_are_those_of_torchmetrics(scorer: ClipScorer, folder: Path, photos: Path) -> None:
    images = [np.array(Image.open(path)) for path in sorted(photos.iterdir())]
    expected = theirs(scorer, images, PROMPTS)
    assert np.ptp(expected) > 1  # of 200: the pairs differ
    for batch_size in (1, 3, 32):
        found = scorer.scores(images, PROMPTS, batch_size=batch_size)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
    np.testing.assert_allclose(
        clip_score(photos, PROMPTS, weights=folder, device="cpu"), expected, rtol=0, atol=2e-4
    )


def test_a_long_prompt_keeps_its_end(scorer: ClipScorer, photos: Path) -> None:
    """It is cut to as many tokens as the model takes; so a prompt cut beforehand scores the same."""
    image = [photos / "0.png"]
    words = ["cat"] * 75
    (long,) = scorer.scores(image, [" ".join([*words, "dog", "dog", "horse"])])
    (cut,) = scorer.scores(image, [" ".join(words)])
    (shorter,) = scorer.scores(image, [" ".join(words[:20])])
    assert long == pytest.approx(cut, abs=1e-5)
    assert abs(long - shorter) > 1e-3


def test_what_does_not_belong_together_is_refused(scorer: ClipScorer, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a prompt for each of 4 images, found 3"):
        scorer.scores(photos, PROMPTS[:3])
    with pytest.raises(ValueError, match="expected a prompt for each of 4 images, found one text"):
        scorer.scores(photos, "four")
    with pytest.raises(ValueError, match="expected prompts as texts"):
        scorer.scores(photos, [*PROMPTS[:3], None])  # type: ignore[list-item]
    with pytest.raises(ImageError, match=r"0\.png: expected 512 x 512 pixels, found 320 x 240"):
        scorer.scores(photos, PROMPTS, size_wh=(512, 512))
    with pytest.raises(ImageError, match=r"none\.png: expected an image, found no file"):
        scorer.scores([tmp_path / "none.png"], ["a cat"])
    file = next(photos.iterdir())
    with pytest.raises(ImageError, match="expected a folder of images, found a file"):
        scorer.scores(file, ["a cat"])
    with (
        Image.open(file) as single,
        pytest.raises(ImageError, match="found a single one: put it into a list"),
    ):
        scorer.scores(single, ["a cat"])  # type: ignore[arg-type]


def test_weights_that_cannot_be_used_are_named(folder: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ExpectedError, match=r"found none\. Get a CLIP model .* spctrl tiny-weights"):
        clip_score(photos, PROMPTS)
    with pytest.raises(ExpectedError, match=r"nowhere is not a folder. Get a CLIP model"):
        load_clip_scorer(tmp_path / "nowhere")
    for name, problem in (
        ("model.safetensors", "the weights cannot be read"),
        ("config.json", "config.json cannot be read"),
        ("tokenizer_config.json", "the tokenizer or the image settings cannot be read"),
        ("preprocessor_config.json", "the tokenizer or the image settings cannot be read"),
    ):
        broken = Path(shutil.copytree(folder, tmp_path / name))
        (broken / name).write_bytes((broken / name).read_bytes()[:30])
        with pytest.raises(ExpectedError, match=problem):
            load_clip_scorer(broken)


def test_features_that_are_not_finite_are_refused(folder: Path, photos: Path) -> None:
    scorer = load_clip_scorer(folder, device="cpu")
    with torch.no_grad():
        scorer.model.visual_projection.weight[0] = torch.nan
    with pytest.raises(ExpectedError, match="features are not finite"):
        scorer.scores(photos, PROMPTS)


def test_the_tiny_weights_say_that_they_are_random_and_are_always_the_same(
    folder: Path, tmp_path: Path
) -> None:
    assert are_random(folder)
    build_clip(tmp_path)
    for name in ("model.safetensors", "vocab.json", "preprocessor_config.json"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()

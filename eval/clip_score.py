"""CLIP-score: 100 times the cosine between an image and its prompt, image by image.

Hessel et al., "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", EMNLP 2021, with factor 100 and
without a floor at 0, as torchmetrics computes each pair (it floors the mean).

Legend: N pairs, B pairs of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eval.images import Images, Pixels, in_batches, listed, read_rgb
from spctrl.errors import ExpectedError
from spctrl.image_models.base import choose_device
from spctrl.image_models.loading import WeightsFolder, load_strictly
from spctrl.io.network_size import MAX_SIDE, check_tokenizer, read_config
from spctrl.io.reading_faults import faults_of

if TYPE_CHECKING:
    import torch

BATCH_SIZE = 32
IMAGE_SETTINGS = ("preprocessor_config.json", "processor_config.json")

CLIP = WeightsFolder(
    what="a CLIP model in transformers' format",
    source="openai/clip-vit-large-patch14 on the Hugging Face hub",
    files="config.json, preprocessor_config.json, vocab.json, merges.txt, tokenizer_config.json and model.safetensors",
    setting="clip weights",
    kind=("model_type", "clip"),
)


class ClipScorer:
    """A CLIP model with its own preparation of images and prompts."""

    def __init__(self, model: Any, processor: Any, *, device: torch.device) -> None:
        self.model = model.to(device).eval()
        self.processor = processor
        self.device = device

    def scores(
        self,
        images: Images,
        prompts: Sequence[str],
        *,
        batch_size: int = BATCH_SIZE,
        size_wh: tuple[int, int] | None = None,
    ) -> NDArray[np.float64]:
        """(N,) float64 in [-100, 100].

        A prompt of more tokens than the model takes is cut before its end token, which the model reads the prompt's
        meaning from, as it is cut for the generator. (torchmetrics cuts the end token off.)

        Args:
            images: a folder (its images by path), files or arrays.
            prompts: N, as given to the generator, in the images' order.
            batch_size: changes nothing but the time.
            size_wh: width and height that all images must have, where they are known.

        Raises:
            ImageError: an image is missing, broken, or of another size.
            ValueError: not as many prompts as images, or a prompt that is no text.
            ExpectedError: the model gives numbers that are not finite.
        """
        found = listed(images)
        if isinstance(prompts, str) or len(found) != len(prompts):
            raise ValueError(f"expected a prompt for each of {len(found)} images, found {_count(prompts)}")
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("expected prompts as texts, found something else among them")
        pairs = zip(found, prompts, strict=True)
        batches = in_batches(
            pairs, lambda pair: (self._pixels(read_rgb(pair[0], size_wh)), pair[1]), batch_size
        )
        return np.concatenate([self._infer(batch) for batch in batches])

    def _pixels(self, image: Pixels) -> torch.Tensor:
        """(1, 3, h, w) float32: resized, cropped and normalised as the model's own settings say."""
        pixels: torch.Tensor = self.processor.image_processor(
            Image.fromarray(image), return_tensors="pt"
        ).pixel_values
        return pixels

    def _infer(self, batch: Sequence[tuple[torch.Tensor, str]]) -> NDArray[np.float64]:
        import torch

        pixels, prompts = zip(*batch, strict=True)
        tokens = self.processor.tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        with torch.inference_mode():
            of_images = self.model.get_image_features(torch.cat(pixels).to(self.device)).pooler_output
            of_prompts = self.model.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output
            cosines = torch.cosine_similarity(of_images.double(), of_prompts.double())
        scores: NDArray[np.float64] = 100 * cosines.cpu().numpy()
        if not np.isfinite(scores).all():
            raise ExpectedError(
                "the CLIP model's features are not finite: its weights are broken, or it overflowed"
            )
        return scores


def clip_score(
    images: Images,
    prompts: Sequence[str],
    *,
    weights: Path | str | None = None,
    batch_size: int = BATCH_SIZE,
    device: str = "auto",
) -> NDArray[np.float64]:
    """(N,) CLIP-score of each image and its prompt; a method's is the mean.

    Args:
        images, prompts, batch_size: see ``ClipScorer.scores``.
        weights: folder of a CLIP model in transformers' format, which must be given: nothing is fetched, and scores of
            different CLIP models are not comparable.
        device: ``auto``, ``cpu`` or ``cuda:N``.

    Raises:
        ImageError, ValueError: see ``ClipScorer.scores``.
        ExpectedError: there are no such weights.
    """
    if weights is None:
        raise ExpectedError(
            f"expected weights for the features of images and prompts, found none. Get {CLIP.what} from {CLIP.source} "
            f"({CLIP.files}) and give its folder, or write random ones to try the pipeline with: spctrl tiny-weights."
        )
    return load_clip_scorer(weights, device=device).scores(images, prompts, batch_size=batch_size)


def load_clip_scorer(weights: Path | str, *, device: str = "auto") -> ClipScorer:
    """
    Raises:
        ExpectedError: the folder is not there, not CLIP's, broken, or has missing or unexpected keys.
        ValueError: there is no such device.
    """
    import torch
    from transformers import CLIPModel, CLIPProcessor

    folder = Path(weights)
    chosen = choose_device(device)
    model = load_strictly(
        CLIP,
        folder,
        lambda path: CLIPModel.from_pretrained(
            path,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are listed then, and load_strictly names them
            dtype=torch.float32,
        ),
    )
    with faults_of(
        f"{CLIP.setting}: {folder}: the tokenizer or the image settings cannot be read",
        f"Get {CLIP.what} from {CLIP.source} ({CLIP.files}).",
    ):
        check_tokenizer(folder)
        for name in IMAGE_SETTINGS:
            if (folder / name).exists():
                read_config(folder / name, most=MAX_SIDE)
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    return ClipScorer(model, processor, device=chosen)


def _count(prompts: Sequence[str]) -> str:
    return "one text" if isinstance(prompts, str) else str(len(prompts))

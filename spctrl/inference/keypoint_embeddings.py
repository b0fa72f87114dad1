"""CLIP's embeddings of the keypoints' names, from which the spatial-text embedding may start (``spatext_init_emb``)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spctrl.models.stable_diffusion import load_text_encoder, load_tokenizer
from spctrl.prompts import keypoint_words

if TYPE_CHECKING:
    import torch


def keypoint_embeddings(stable_diffusion: Path, dataset: str) -> torch.Tensor:
    """(K, D) float32: the pooled output of Stable Diffusion's text encoder for each keypoint's plain name.

    Raises:
        ExpectedError: tokenizer or text encoder is missing or broken.
    """
    import torch

    tokenizer, text_encoder = load_tokenizer(stable_diffusion), load_text_encoder(stable_diffusion).eval()
    tokens = tokenizer(
        list(keypoint_words(dataset, "names")), padding="max_length", truncation=True, return_tensors="pt"
    )
    with torch.inference_mode():
        pooled: torch.Tensor = text_encoder(tokens.input_ids).pooler_output
    return pooled.clone()

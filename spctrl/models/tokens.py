"""Keypoint tokens: one placeholder per keypoint, by textual inversion (REFERENCE section 9).

Legend: K = 17 keypoints, V rows of the text encoder's token embedding, D its width (768).
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spctrl.errors import ExpectedError
from spctrl.skeletons import AP10K, HUMANART

if TYPE_CHECKING:
    import torch

PLACEHOLDERS: dict[str, tuple[str, ...]] = {
    dataset: tuple(f"<{name.replace('_', '-')}>" for name in skeleton.keypoint_names)
    for dataset, skeleton in (("ap10k", AP10K), ("humanart", HUMANART))
}
"""Per dataset K placeholders such as ``<left-eye>``, in the order of its keypoints."""

INITIALIZERS: dict[str, tuple[str, ...]] = {
    dataset: tuple(placeholder.strip("<>").split("-")[-1] for placeholder in placeholders)
    for dataset, placeholders in PLACEHOLDERS.items()
}
"""Per dataset K words, each one token of CLIP's, that the placeholders start from."""


def add_keypoint_tokens(tokenizer: Any, text_encoder: Any, dataset: str) -> list[int]:
    """Give a tokenizer and a text encoder the placeholders of a dataset, each initialised from a word's row.

    The encoder's other rows stay as they are, to the bit. Placeholders that are there already keep their rows.

    Args:
        tokenizer: a ``CLIPTokenizer``; changed.
        text_encoder: a ``CLIPTextModel``; its token embedding grows.
        dataset: ``ap10k`` or ``humanart``.

    Returns:
        The placeholders' K token ids, in order.

    Raises:
        ExpectedError: a word is not one token of the tokenizer's.
    """
    raise NotImplementedError


def trainable_token_rows(text_encoder: Any, ids: Sequence[int]) -> torch.nn.Parameter:
    """Freeze a text encoder but for some rows of its token embedding.

    Args:
        text_encoder: a ``CLIPTextModel``; its token embedding is replaced by a ``TokenEmbedding`` that looks
            ``ids`` up in the returned rows. All of its other parameters lose ``requires_grad``.
        ids: token ids, such as those of ``add_keypoint_tokens``.

    Returns:
        (len(ids), D), for an optimizer.
    """
    raise NotImplementedError


def learned_embeds(tokenizer: Any, text_encoder: Any, dataset: str) -> dict[str, torch.Tensor]:
    """The present rows of a dataset's placeholders: placeholder -> (D,) float32 on the processor."""
    raise NotImplementedError


def set_learned_embeds(tokenizer: Any, text_encoder: Any, embeds: Mapping[str, torch.Tensor]) -> list[int]:
    """Give a tokenizer and a text encoder placeholders and their rows; returns the token ids."""
    raise NotImplementedError


def save_learned_embeds(path: Path, embeds: Mapping[str, torch.Tensor]) -> None:
    """Write ``learned_embeds.bin``."""
    raise NotImplementedError


def load_learned_embeds(path: Path) -> dict[str, torch.Tensor]:
    """Read ``learned_embeds.bin``: placeholder -> (D,) float32. Nothing in the file is executed."""
    raise NotImplementedError

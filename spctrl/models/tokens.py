"""Keypoint tokens: one placeholder per keypoint, by textual inversion (REFERENCE section 9).

Legend: K = 17 keypoints, D width of the text encoder's token embedding (768).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spctrl.data.datasets import DATASETS
from spctrl.errors import ExpectedError
from spctrl.weights import TorchFileError, read_torch_file, save_torch_file

if TYPE_CHECKING:
    import torch

PLACEHOLDERS = {name: dataset.skeleton.placeholders for name, dataset in DATASETS.items()}
"""Per dataset K placeholders such as ``<left-eye>``, in the order of its keypoints."""

INITIALIZERS = {
    name: tuple(
        "tail" if keypoint == "root_of_tail" else keypoint.split("_")[-1]
        for keypoint in dataset.skeleton.keypoint_names
    )
    for name, dataset in DATASETS.items()
}
"""Per dataset K words, each one token of CLIP's, whose embeddings the placeholders start from."""


def add_keypoint_tokens(tokenizer: Any, text_encoder: Any, dataset: str) -> list[int]:
    """Give a tokenizer and a text encoder the placeholders of a dataset, each initialised from a word's row.

    The encoder's other rows stay as they are, to the bit. Placeholders that have a row already keep it.

    Args:
        tokenizer: a ``CLIPTokenizer``; changed.
        text_encoder: a ``CLIPTextModel``; its token embedding grows.
        dataset: ``ap10k`` or ``humanart``.

    Returns:
        The placeholders' K token ids, in order.

    Raises:
        ExpectedError: a word is not one token of the tokenizer's.
    """
    ids, table = tokenizer.get_vocab(), text_encoder.get_input_embeddings().weight.detach()
    missing = {
        placeholder: table[_token_id(tokenizer, word)]
        for placeholder, word in zip(PLACEHOLDERS[dataset], INITIALIZERS[dataset], strict=True)
        if ids.get(placeholder, len(table)) >= len(table)
    }
    set_learned_embeds(tokenizer, text_encoder, missing)
    return [int(each) for each in tokenizer.convert_tokens_to_ids(list(PLACEHOLDERS[dataset]))]


def trainable_token_rows(text_encoder: Any, ids: Sequence[int]) -> torch.nn.Parameter:
    """Freeze a text encoder but for some rows of its token embedding.

    Args:
        text_encoder: a ``CLIPTextModel``. Its token embedding is replaced by a ``TokenEmbedding``, which shares the
            old one's table; all parameters but the returned one lose ``requires_grad``.
        ids: token ids, such as those of ``add_keypoint_tokens``.

    Returns:
        (len(ids), D) float32, for an optimizer.
    """
    from spctrl.models.token_embedding import TokenEmbedding

    text_encoder.requires_grad_(False)
    embedding = TokenEmbedding(text_encoder.get_input_embeddings(), ids)
    text_encoder.set_input_embeddings(embedding)
    return embedding.rows


def learned_embeds(tokenizer: Any, text_encoder: Any, dataset: str) -> dict[str, torch.Tensor]:
    """The present rows of a dataset's placeholders, as ``save_learned_embeds`` takes them.

    Returns:
        Placeholder -> (D,) float32 on the processor, in order.
    """
    import torch

    from spctrl.models.token_embedding import TokenEmbedding

    placeholders = list(PLACEHOLDERS[dataset])
    embedding = text_encoder.get_input_embeddings()
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(placeholders), device=embedding.weight.device)
    # While they are trained, in the precision of the optimizer's rows, not of the encoder's table.
    rows = embedding.lookup(ids) if isinstance(embedding, TokenEmbedding) else embedding(ids)
    return dict(zip(placeholders, rows.detach().float().cpu().clone(), strict=True))


def set_learned_embeds(tokenizer: Any, text_encoder: Any, embeds: Mapping[str, torch.Tensor]) -> list[int]:
    """Give a tokenizer and a text encoder placeholders with these embeddings; others stay as they are.

    Args:
        tokenizer: a ``CLIPTokenizer``; changed.
        text_encoder: a ``CLIPTextModel`` whose token embedding is not wrapped (``trainable_token_rows``); changed.
        embeds: placeholder -> (D,).

    Returns:
        The placeholders' token ids, in order.

    Raises:
        ExpectedError: embeddings of another width than the encoder's.
        ValueError: the token embedding is wrapped.
    """
    import torch

    from spctrl.models.token_embedding import TokenEmbedding

    if isinstance(text_encoder.get_input_embeddings(), TokenEmbedding):
        raise ValueError(
            "expected a text encoder whose rows are not being trained: set the parameter instead"
        )
    placeholders = list(embeds)
    tokenizer.add_tokens(placeholders)
    ids = [int(each) for each in tokenizer.convert_tokens_to_ids(placeholders)]
    embedding = text_encoder.get_input_embeddings()
    for placeholder, row in embeds.items():
        if row.shape != (embedding.embedding_dim,):
            raise ExpectedError(
                f"expected embeddings of the text encoder's width {embedding.embedding_dim}, found shape "
                f"{tuple(row.shape)} for {placeholder}: they belong to another text encoder"
            )
    if (needed := max(ids, default=-1) + 1) > embedding.num_embeddings:
        # Otherwise the new rows would be drawn from the old ones' distribution, which takes seconds to find.
        embedding = text_encoder.resize_token_embeddings(needed, mean_resizing=False)
    with torch.no_grad():
        for token_id, row in zip(ids, embeds.values(), strict=True):
            embedding.weight[token_id] = row.to(embedding.weight)
    return ids


def save_learned_embeds(path: Path, embeds: Mapping[str, torch.Tensor]) -> None:
    """Write ``learned_embeds.bin``: placeholder -> (D,) float32."""
    save_torch_file({name: row.detach().float().cpu().clone() for name, row in embeds.items()}, path)


def load_learned_embeds(path: Path) -> dict[str, torch.Tensor]:
    """Read ``learned_embeds.bin``, a released one too; nothing in the file is executed.

    Returns:
        Placeholder -> (D,) float32 on the processor.

    Raises:
        ExpectedError: there is no such file, or it holds something else.
    """
    import torch

    expected = f"expected a dict of placeholders and their embeddings in {path}"
    try:
        found = read_torch_file(path)
    except TorchFileError as error:
        raise ExpectedError(f"{expected}, which cannot be read: {error}") from None
    if not isinstance(found, dict) or not found:
        raise ExpectedError(f"{expected}, found {type(found).__name__}{' without entries' * (found == {})}")
    for name, row in found.items():
        if not (isinstance(name, str) and isinstance(row, torch.Tensor) and row.ndim == 1):
            raise ExpectedError(f"{expected}, found {type(row).__name__} under {name!r}")
    return {name: row.detach().float() for name, row in found.items()}


def _token_id(tokenizer: Any, word: str) -> int:
    ids: list[int] = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1:
        raise ExpectedError(
            f"expected {word!r} to be one token of the tokenizer's, as it is of CLIP's, found {len(ids)}"
        )
    return ids[0]

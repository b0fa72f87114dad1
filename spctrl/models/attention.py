"""Cross-attention maps of chosen layers, from the attention that is computed anyway.

Legend: B images of a batch, h and w of a layer's feature map, T = 77 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


class AttentionMaps:
    """The maps of the last forward pass."""

    def maps(self) -> dict[str, Tensor]:
        """By module name (B, 1, T, h, w): probabilities, mean over heads."""
        raise NotImplementedError


@contextmanager
def capture_attention(
    model: Any, layers: str | None = None, *, detach_query: bool = False
) -> Iterator[AttentionMaps]:
    """Keep the cross-attention maps of a ControlNet or UNet while the context is open.

    Args:
        model: diffusers' ``ControlNetModel`` or ``UNet2DConditionModel``, itself and not a wrapper of it.
        layers: layers whose module name contains this; None for all.
        detach_query: whether the maps give the query no gradient. The layer's output still does.
    """
    raise NotImplementedError
    yield

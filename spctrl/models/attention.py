"""Cross-attention maps of chosen layers, from the attention that is computed anyway.

Legend: B images of a batch, M heads, h and w of a layer's feature map, T = 77 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spctrl.errors import ExpectedError

CROSS_ATTENTION = "attn2"
"""How diffusers names a transformer block's attention to the text."""


class AttentionMaps:
    """The maps of the last forward pass; ``capture_attention`` fills it."""

    def __init__(self) -> None:
        self._maps: dict[str, Tensor] = {}
        self._latent_hw: tuple[int, int] | None = None

    def maps(self) -> dict[str, Tensor]:
        """Probabilities by module name, in the order of computation: (B, 1, T, h, w), mean over heads.

        Of the network's precision (under autocast, the lower one). Their gradient reaches the network.
        """
        return dict(self._maps)

    def _start(self, sample: Tensor) -> None:
        self._maps = {}
        self._latent_hw = int(sample.shape[-2]), int(sample.shape[-1])

    def _stop(self) -> None:
        self._latent_hw = None

    def _keep(self, name: str, probabilities: Tensor) -> None:
        # Outside the forward pass it is gradient checkpointing that computes a block again.
        if self._latent_hw is not None:
            h, w = _feature_hw(self._latent_hw, probabilities.shape[1])
            self._maps[name] = probabilities.transpose(1, 2).unflatten(2, (h, w)).unsqueeze(1)


@contextmanager
def capture_attention(
    model: Any, layers: str | None = None, *, detach_query: bool = False
) -> Iterator[AttentionMaps]:
    """Keep the cross-attention maps of a ControlNet or UNet while the context is open.

    The chosen layers compute attention once, with diffusers' unfused processor, whose probabilities are kept; all
    other layers stay as they are. With gradient checkpointing the backward pass has to be inside the context too,
    since it computes the blocks again.

    Args:
        model: diffusers' ``ControlNetModel`` or ``UNet2DConditionModel``, itself and not a wrapper of it.
        layers: layers whose module name contains this, such as ``down_blocks.2``; None for all.
        detach_query: whether the maps give the query no gradient, so that they train only ``to_k`` and the text
            embeddings. The layer's output gives it the full one all the same.

    Raises:
        ExpectedError: no layer's name contains ``layers``.
    """
    from diffusers.models.attention_processor import AttnProcessor

    attentions = {name: module for name, module in model.named_modules() if _is_cross_attention(name)}
    chosen = {name: module for name, module in attentions.items() if layers is None or layers in name}
    if not chosen:
        raise ExpectedError(
            f"expected a part of the name of a cross-attention layer, found {layers!r}; "
            f"there are {', '.join(attentions)}"
        )
    kept = AttentionMaps()
    with ExitStack() as restore:
        hooks = [
            model.register_forward_pre_hook(
                lambda _, args, kwargs: kept._start(args[0] if args else kwargs["sample"]), with_kwargs=True
            ),
            model.register_forward_hook(lambda *_: kept._stop()),
        ]
        for hook in hooks:
            restore.callback(hook.remove)
        for name, attention in chosen.items():
            restore.callback(attention.set_processor, attention.processor)
            attention.set_processor(
                _KeepingProcessor(AttnProcessor(), partial(kept._keep, name), detach_query)
            )
        yield kept


def _is_cross_attention(name: str) -> bool:
    return name.rpartition(".")[2] == CROSS_ATTENTION


class _KeepingProcessor:
    """An unfused attention processor that also hands out the probabilities that it computes."""

    def __init__(self, processor: Any, keep: Callable[[Tensor], None], detach_query: bool) -> None:
        self.processor = processor
        self.keep = keep
        self.detach_query = detach_query

    def __call__(self, attention: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self.processor(_Watched(attention, self.keep, self.detach_query), *args, **kwargs)


class _Watched:
    """An attention layer as its processor sees it, with the one method that computes the probabilities replaced."""

    def __init__(self, attention: Any, keep: Callable[[Tensor], None], detach_query: bool) -> None:
        self.attention = attention
        self.keep = keep
        self.detach_query = detach_query

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attention, name)

    def get_attention_scores(
        self, query: Tensor, key: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """(BM, hw, d), (BM, T, d) to (BM, hw, T)."""
        if self.detach_query:
            probabilities, mean = _DetachedQuery.apply(query, key, attention_mask, self.attention)
        else:
            probabilities = self.attention.get_attention_scores(query, key, attention_mask)
            mean = _mean_over_heads(probabilities, self.attention.heads)
        self.keep(mean)
        return probabilities


class _DetachedQuery(torch.autograd.Function):
    """Attention probabilities and their mean over heads, of which the second gives the query no gradient.

    With plain operations that would take the computation of the probabilities twice.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, attention_mask: Tensor | None, attention: Any
    ) -> tuple[Tensor, Tensor]:
        """(BM, hw, d), (BM, T, d) to (BM, hw, T), (B, hw, T)."""
        probabilities = attention.get_attention_scores(query, key, attention_mask)
        ctx.save_for_backward(query, key, probabilities)
        ctx.scale, ctx.heads = attention.scale, attention.heads
        return probabilities, _mean_over_heads(probabilities, attention.heads)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        query, key, probabilities = ctx.saved_tensors
        of_output, of_mean = gradients
        of_heads = (of_mean / ctx.heads).repeat_interleave(ctx.heads, dim=0)
        # By the scores: the output's share goes to both, the maps' share to the key alone.
        output_share = _softmax_backward(of_output, probabilities) * ctx.scale
        map_share = _softmax_backward(of_heads, probabilities) * ctx.scale
        of_query = output_share @ key
        of_key = (output_share + map_share).transpose(1, 2) @ query
        return of_query, of_key, None, None


def _softmax_backward(gradient: Tensor, probabilities: Tensor) -> Tensor:
    weighted = gradient * probabilities
    return weighted - probabilities * weighted.sum(-1, keepdim=True)


def _mean_over_heads(probabilities: Tensor, heads: int) -> Tensor:
    """(BM, hw, T) to (B, hw, T)."""
    return probabilities.unflatten(0, (-1, heads)).mean(dim=1)


def _feature_hw(latent_hw: tuple[int, int], cells: int) -> tuple[int, int]:
    """(h, w) of a feature map of so many cells; each of the network's levels halves the sides, rounding up."""
    h, w = latent_hw
    while h * w > cells:
        h, w = (h + 1) // 2, (w + 1) // 2
    return h, w

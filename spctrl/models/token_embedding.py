"""A token embedding of which only chosen rows are trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenEmbedding(nn.Embedding):
    """A frozen token embedding whose rows for some ids are looked up in a small parameter instead.

    So the optimizer has only those rows, and no step, however it treats zero gradients, touches the others.

    Attributes:
        weight: (V, D) frozen; the rows of ``ids`` are as they were at the start.
        rows: (R, D) float32 parameter: the rows of ``ids``, in their order.

    Args:
        embedding: the embedding to wrap; its table is shared, not copied.
        ids: R token ids.
    """

    slots: Tensor

    def __init__(self, embedding: nn.Embedding, ids: Sequence[int]) -> None:
        table = embedding.weight.detach()
        super().__init__(*table.shape, padding_idx=embedding.padding_idx, _weight=table, _freeze=True)
        chosen = torch.tensor(ids, device=table.device)
        slots = torch.full((len(table),), -1, device=table.device)
        slots[chosen] = torch.arange(len(ids), device=table.device)
        self.register_buffer("slots", slots, persistent=False)
        self.rows = nn.Parameter(table[chosen].float())

    def forward(self, input: Tensor) -> Tensor:
        """Token ids (...,) to embeddings (..., D), of the frozen table's type."""
        return self.lookup(input).to(self.weight.dtype)

    def lookup(self, ids: Tensor) -> Tensor:
        """As ``forward``, in float32."""
        slots = self.slots[ids]
        learned = F.embedding(slots.clamp(min=0), self.rows)
        return torch.where((slots >= 0).unsqueeze(-1), learned, super().forward(ids).float())

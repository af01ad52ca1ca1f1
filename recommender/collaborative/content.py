"""What texts say of items, for models whose item vectors are not just learnt item by item."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Content(nn.Module):
    """Adds a projection of an item's text vector to the vector of its own.

    In training some lookups get the text's part alone, so that it learns to stand for items that have nothing else
    (after DropoutNet; Volkovs et al., NeurIPS 2017).

    Args:
        texts: float32 [items, features].
        known: bool [items]; items that training saw.
        dim: of the item vectors.
        own: share of the lookups in training that keep the item's own vector.
    """

    texts: Tensor
    known: Tensor

    def __init__(self, texts: Tensor, known: Tensor, dim: int, own: float):
        super().__init__()
        self.own = own
        self.projection = nn.Linear(texts.shape[1], dim, bias=False)
        self.register_buffer("texts", texts, persistent=False)
        self.register_buffer("known", known, persistent=False)

    def forward(self, vectors: Tensor, items: Tensor) -> Tensor:
        """Item vectors [..., dim] from items' own vectors [..., dim] and their indices, int64 [...]."""
        if self.training and self.own < 1:
            vectors = vectors * (torch.rand(items.shape, device=items.device) < self.own)[..., None]
        described = items.clamp(max=len(self.texts) - 1)  # a mask is no item
        said = self.projection(self.texts[described]) * (items < len(self.texts))[..., None]
        return vectors + said

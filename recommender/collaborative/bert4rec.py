"""BERT4Rec."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from recommender.collaborative.attention import Block
from recommender.collaborative.config import BERT4RecConfig
from recommender.collaborative.model import CollaborativeModel, TrainingBatch


class BERT4Rec(CollaborativeModel):
    """Sequential recommendation with bidirectional attention (Sun et al., CIKM 2019).

    Trained to restore masked items from both sides (the Cloze task); asked for the next item by a mask behind the
    history. As in the paper some windows have just their last target masked, as it is when the model is used. Positions
    are counted from the end, where that mask is. It differs from the paper in pre-norm blocks, in masking nothing but
    training targets, and in comparing states with item vectors directly, without another layer between.
    """

    def __init__(self, config: BERT4RecConfig, items: int):
        super().__init__(config, items, extra=1)
        self.mask = items
        self.masked, self.last_only = config.masked, config.last_only
        self.positions = nn.Embedding(config.max_length + 1, config.dim)
        self.blocks = nn.ModuleList(
            Block(config.dim, config.heads, 4 * config.dim, config.dropout) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.positions.weight, std=0.02)

    def embed(self, histories: Sequence[np.ndarray]) -> Tensor:
        items, lengths = self.padded(histories, room=1)
        rows = torch.arange(len(items), device=items.device)
        items[rows, lengths] = self.mask
        return self._read(items, lengths + 1, (rows, lengths))

    def loss_sum(self, batch: TrainingBatch) -> tuple[Tensor, int]:
        hidden = self._hidden(batch)
        seen = batch.items.masked_fill(hidden, self.mask)
        rows, places = hidden.nonzero(as_tuple=True)
        embeddings = self._read(seen, batch.lengths, (rows, places))
        return self.prediction_loss(embeddings, batch.items[rows, places], batch.negatives), len(rows)

    def _hidden(self, batch: TrainingBatch) -> Tensor:
        """What is masked: bool [B, T], at least one target in each window that has any."""
        places = torch.arange(batch.items.shape[1], device=batch.items.device)
        last = batch.targets & (places == torch.where(batch.targets, places, -1).amax(1, keepdim=True))
        some = batch.targets & (batch.draws < self.masked)
        # The first item of a window is no target, so its number is free to choose between the two ways.
        only_last = (batch.draws[:, :1] < self.last_only) | ~some.any(1, keepdim=True)
        return torch.where(only_last, last, some)

    def _read(self, items: Tensor, lengths: Tensor, at: tuple[Tensor, Tensor]) -> Tensor:
        """Embeddings [t, dim] at places (rows [t], columns [t]) of padded items [B, T]."""
        places = torch.arange(items.shape[1], device=items.device)
        readable = places < lengths[:, None]
        before_the_end = (lengths[:, None] - 1 - places).clamp(min=0)
        states = self.dropout(self.vectors(items) + self.positions(before_the_end))
        for block in self.blocks:
            states = block(states, readable)
        return self.norm(states[at])

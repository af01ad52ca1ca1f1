"""SASRec."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recommender.collaborative.attention import Block
from recommender.collaborative.config import AttentionConfig
from recommender.collaborative.model import CausalModel


class SASRec(CausalModel):
    """Self-attentive sequential recommendation (Kang and McAuley, ICDM 2018).

    A causal transformer over item vectors and learned positions; the item table is the prediction layer too. It differs
    from the paper in its loss, a softmax over all items where the paper has a binary cross-entropy with one negative
    an item (it alone makes SASRec weaker than BERT4Rec; Klenitskiy and Vasilev, RecSys 2023), in an item bias, and,
    as in RecBole's, in normalised inputs and a feed-forward layer of four times the width. Its blocks are normalised
    before each layer, with a GELU between.
    """

    block = Block

    def __init__(self, config: AttentionConfig, items: int):
        super().__init__(config, items)
        self.positions = nn.Embedding(config.max_length, config.dim)
        self.blocks = nn.ModuleList(
            self.block(config.dim, config.heads, 4 * config.dim, config.dropout) for _ in range(config.layers)
        )
        self.input_norm = nn.LayerNorm(config.dim)
        self.norm = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.positions.weight, std=0.02)

    def states(self, items: Tensor) -> Tensor:
        places = torch.arange(items.shape[1], device=items.device)
        states = self.dropout(self.input_norm(self.vectors(items) + self.positions(places)))
        for block in self.blocks:
            states = block(states)
        return self.norm(states)

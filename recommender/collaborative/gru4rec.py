"""GRU4Rec."""

from __future__ import annotations

from torch import Tensor, nn

from recommender.collaborative.config import GRU4RecConfig
from recommender.collaborative.model import CausalModel


class GRU4Rec(CausalModel):
    """Session-based recommendation with recurrent networks (Hidasi et al., ICLR 2016).

    A gated recurrent network over item vectors. It differs from the paper in its loss, a softmax over all items where
    the paper ranks against the other items of a mini-batch, in reading item vectors (with dropout) and not one-hot
    items, in sharing them with the prediction layer, in training on whole windows at once and not session-parallel,
    and in normalised inputs and outputs, as SASRec's here: two epochs then teach it as much as six without
    (docs/results.md).
    """

    def __init__(self, config: GRU4RecConfig, items: int):
        super().__init__(config, items)
        between = config.dropout if config.layers > 1 else 0.0
        hidden = config.dim if config.hidden is None else config.hidden
        self.gru = nn.GRU(config.dim, hidden, config.layers, batch_first=True, dropout=between)
        self.out = nn.Linear(hidden, config.dim)
        self.input_norm = nn.LayerNorm(config.dim)
        self.norm = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def states(self, items: Tensor) -> Tensor:
        states, _ = self.gru(self.dropout(self.input_norm(self.vectors(items))))
        return self.norm(self.out(self.dropout(states)))

"""The transformer block of SASRec and BERT4Rec."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and a feed-forward layer of some width, normalised before each (pre-norm), with residuals."""

    def __init__(self, dim: int, heads: int, width: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(dim)
        self.projections = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim)
        self.before_feed_forward = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor, readable: Tensor | None = None) -> Tensor:
        """States [B, T, dim] after the block.

        Args:
            readable: bool [B, T]; positions that all others read. None: each reads itself and those before it.
        """
        rows, length, dim = states.shape
        projected = self.projections(self.before_attention(states)).view(rows, length, 3, self.heads, dim // self.heads)
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if readable is None else readable[:, None, None, :],
            dropout_p=self.dropout.p if self.training else 0.0,
            is_causal=readable is None,
        )
        states = states + self.dropout(self.out(attended.transpose(1, 2).reshape(rows, length, dim)))
        return states + self.dropout(self.feed_forward(self.before_feed_forward(states)))

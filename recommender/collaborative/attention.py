"""Transformer blocks: that of SASRec and BERT4Rec, and eSASRec's."""

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
        self.feed_forward: nn.Module = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor, readable: Tensor | None = None) -> Tensor:
        """States [B, T, dim] after the block.

        Args:
            readable: bool [B, T]; positions that all others read. None: each reads itself and those before it.
        """
        states = states + self.dropout(self.attended(self.before_attention(states), readable))
        return states + self.dropout(self.feed_forward(self.before_feed_forward(states)))

    def attended(self, states: Tensor, readable: Tensor | None) -> Tensor:
        """The attention layer by itself: [B, T, dim] from [B, T, dim]."""
        rows, length, dim = states.shape
        projected = self.projections(states).view(rows, length, 3, self.heads, dim // self.heads)
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if readable is None else readable[:, None, None, :],
            dropout_p=self.dropout.p if self.training else 0.0,
            is_causal=readable is None,
        )
        return self.out(attended.transpose(1, 2).reshape(rows, length, dim))


class LiGRBlock(Block):
    """A block whose two layers are gated before they are added, with SwiGLU as its feed-forward layer.

        x + σ(x W) ⊙ layer(norm(x))

    From LinkedIn's LiGR (Borisyuk et al., 2025), as in eSASRec (Tikhonovich et al., RecSys 2025).
    """

    def __init__(self, dim: int, heads: int, width: int, dropout: float):
        super().__init__(dim, heads, width, dropout)
        self.attention_gate = nn.Linear(dim, dim)
        self.feed_forward_gate = nn.Linear(dim, dim)
        self.feed_forward = SwiGLU(dim, width)

    def forward(self, states: Tensor, readable: Tensor | None = None) -> Tensor:
        attended = self.dropout(self.attended(self.before_attention(states), readable))
        states = states + self.attention_gate(states).sigmoid() * attended
        fed = self.dropout(self.feed_forward(self.before_feed_forward(states)))
        return states + self.feed_forward_gate(states).sigmoid() * fed


class SwiGLU(nn.Module):
    """Swish(x W) ⊙ (x V), then a projection back (Shazeer, 2020)."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.gate_and_value = nn.Linear(dim, 2 * width)
        self.out = nn.Linear(width, dim)

    def forward(self, states: Tensor) -> Tensor:
        gate, value = self.gate_and_value(states).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)

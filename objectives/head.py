"""The prediction layer and the losses on it, piece by piece, so that logits of the whole batch never exist.

For each piece: logits of the layers asked for, losses, the losses' gradient with respect to the logits, and from it
those of states and weights, all before the next piece begins. So nothing is kept for the backward pass but gradients of
the size of the states and the weight, nothing is computed twice, and a piece's memory is what bounds the peak.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from objectives.blocks import Block
from objectives.objective import Objective, Predictions
from objectives.rewards import Rewards
from recommender.backbone import Backbone


def objective_sums(
    objective: Objective,
    backbone: Backbone,
    hidden: Tensor,
    taps: Sequence[Tensor],
    blocks: Sequence[Block],
    rewards: Rewards | None,
    memory_mb: int,
) -> dict[str, Tensor]:
    """Sums over predictions of everything that the objective computes; only "loss" has a gradient.

    Args:
        hidden: [P, D], normed last hidden states at the positions that predict.
        taps: one [P, D] for each of the objective's layers, not yet normed.
        blocks: every prediction once.
        rewards: of the predictions, where the objective takes them.
        memory_mb: most MiB for the logits of a piece and what the losses make of them.
    """
    states = [hidden, *(backbone.norm(tap) for tap in taps)]
    names: list[str] = []
    gradients = torch.is_grad_enabled()

    def head(*states: Tensor) -> tuple[Tensor, Tensor]:
        layer: Any = backbone.head
        work = _Work(objective, blocks, rewards, memory_mb, names, gradients)
        return _HeadLoss.apply(work, layer.weight, layer.bias, *states)

    loss, sums = backbone.as_head(head, *states)
    return {name: loss if name == "loss" else value for name, value in zip(names, sums, strict=True)}


class _Work:
    """What a forward computes, and into which gradients."""

    def __init__(
        self,
        objective: Objective,
        blocks: Sequence[Block],
        rewards: Rewards | None,
        memory_mb: int,
        names: list[str],
        gradients: bool,
    ):
        self.objective, self.blocks, self.rewards = objective, blocks, rewards
        self.memory_mb, self.names, self.gradients = memory_mb, names, gradients

    def run(
        self, weight: Tensor, bias: Tensor | None, states: Sequence[Tensor], into: Sequence[Tensor | None]
    ) -> Tensor:
        """float64 [names]: the sums. Adds to `into`: gradients of weight, bias and each of the states, where wanted."""
        to_weight, to_bias, *to_states = into
        totals: Tensor | None = None
        for block in self.blocks:
            for piece in block.pieces(self._positions(block, weight)):
                columns = _Columns(weight, bias, piece.tokens)
                own = [state[piece.at] for state in states]
                leaves = [columns.logits(each).float().requires_grad_(self.gradients) for each in own]
                # From here on the logits' own dtype does not matter: what scales them scales float32.
                leaves = [_masked(leaf, piece.valid) for leaf in leaves]
                with torch.set_grad_enabled(self.gradients):
                    reward = None if self.rewards is None else self.rewards.of(piece, leaves[0].shape[1])
                    values = self.objective.losses(
                        Predictions(leaves[0], leaves[1:], piece.target, piece.node, piece.valid, reward)
                    )
                    loss = values["loss"].sum()
                if self.gradients:
                    found = torch.autograd.grad(loss, leaves, allow_unused=True)
                    for each, gradient, to_state in zip(own, found, to_states, strict=True):
                        if gradient is not None:
                            columns.backward(gradient.to(each.dtype), each, piece.at, to_state, to_weight, to_bias)
                if not self.names:
                    self.names.extend(values)
                sums = torch.stack([values[name].detach().sum(dtype=torch.float64) for name in self.names])
                totals = sums if totals is None else totals + sums
        assert totals is not None
        return totals

    def _positions(self, block: Block, weight: Tensor) -> int:
        vocabulary, width = weight.shape
        columns = vocabulary if block.tokens is None else block.tokens.shape[-1]
        floats = columns * self.objective.floats
        if block.tokens is not None and block.tokens.dim() == 2:
            floats += 2 * columns * width
        return max(1, self.memory_mb * 2**20 // (4 * floats))


def _masked(logits: Tensor, valid: Tensor | None) -> Tensor:
    with torch.no_grad():
        return logits if valid is None else logits.masked_fill_(~valid, -torch.inf)


class _Columns:
    """The rows of the prediction layer that stand behind a block's columns."""

    def __init__(self, weight: Tensor, bias: Tensor | None, tokens: Tensor | None):
        self.tokens = tokens
        self.rows = weight.detach() if tokens is None else F.embedding(tokens, weight.detach())
        self.bias = None if bias is None else (bias.detach() if tokens is None else bias.detach()[tokens])

    def logits(self, states: Tensor) -> Tensor:
        """[n, w] of states [n, D]."""
        if self.rows.dim() == 2:
            return F.linear(states, self.rows, self.bias)
        logits = torch.bmm(self.rows, states[:, :, None]).squeeze(2)
        return logits if self.bias is None else logits + self.bias

    def backward(
        self,
        gradient: Tensor,
        states: Tensor,
        at: Tensor,
        to_states: Tensor | None,
        to_weight: Tensor | None,
        to_bias: Tensor | None,
    ) -> None:
        """Add what the gradient [n, w] with respect to the logits means for states [n, D], weight and bias."""
        shared = self.rows.dim() == 2
        if to_states is not None:
            to_states[at] = gradient @ self.rows if shared else torch.bmm(gradient[:, None], self.rows).squeeze(1)
        if to_weight is not None:
            if self.tokens is None and gradient.dtype == to_weight.dtype:
                to_weight.addmm_(gradient.T, states)
            elif self.tokens is None:
                to_weight += gradient.T @ states
            elif shared:
                to_weight.index_add_(0, self.tokens, (gradient.T @ states).float())
            else:
                outer = gradient[:, :, None].float() * states[:, None, :]
                to_weight.index_add_(0, self.tokens.flatten(), outer.flatten(0, 1))
        if to_bias is not None:
            of_columns = gradient.float().sum(0) if shared else gradient.float().flatten()
            if self.tokens is None:
                to_bias += of_columns
            else:
                to_bias.index_add_(0, self.tokens.flatten(), of_columns)


class _HeadLoss(torch.autograd.Function):
    """Loss and sums of a forward; its gradients were computed along the way and are only scaled here."""

    @staticmethod
    def forward(ctx: Any, work: _Work, weight: Tensor, bias: Tensor | None, *states: Tensor) -> tuple[Tensor, Tensor]:
        # Many pieces add to the gradients of weight and bias: in float32, whatever the weights are in.
        inputs = [weight, bias, *states]
        dtypes = [torch.float32, torch.float32, *(state.dtype for state in states)]
        ctx.found = [
            torch.zeros_like(x, dtype=dtype) if x is not None and work.gradients and needed else None
            for x, dtype, needed in zip(inputs, dtypes, ctx.needs_input_grad[1:], strict=True)
        ]
        sums = work.run(weight, bias, [state.detach() for state in states], ctx.found)
        ctx.mark_non_differentiable(sums)
        return sums[work.names.index("loss")].float(), sums

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _sums: Tensor) -> tuple[Tensor | None, ...]:
        found, ctx.found = ctx.found, []
        return (None, *(x if x is None else x.mul_(scale) for x in found))

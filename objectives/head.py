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
from recommender.backbone.backbone import Backbone


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
            shared = None if block.has_own_columns else _Columns(weight, bias, block.tokens)
            for piece in block.pieces(self._positions(block, weight)):
                columns = shared or _Columns(weight, bias, piece.tokens)
                own = torch.stack([state[piece.at] for state in states])
                leaves = [_leaf(each, piece.valid, self.gradients) for each in columns.logits(own)]
                with torch.set_grad_enabled(self.gradients):
                    reward = None if self.rewards is None else self.rewards.of(piece, leaves[0].shape[1])
                    values = self.objective.losses(
                        Predictions(leaves[0], leaves[1:], piece.target, piece.node, piece.valid, reward)
                    )
                    loss = values["loss"].sum()
                if self.gradients:
                    found = torch.autograd.grad(loss, leaves, allow_unused=True)
                    learnt = [layer for layer, each in enumerate(found) if each is not None]
                    parts = [found[layer].to(own.dtype) for layer in learnt]
                    gradient = parts[0][None] if len(parts) == 1 else torch.stack(parts)
                    to_own = columns.backward(gradient, own[learnt], to_weight, to_bias)
                    for layer, each in zip(learnt, to_own, strict=True):
                        if (to_state := to_states[layer]) is not None:
                            to_state[piece.at] = each
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
        if block.has_own_columns:
            floats += 2 * columns * width
        return max(1, self.memory_mb * 2**20 // (4 * floats))


def _leaf(logits: Tensor, valid: Tensor | None, gradients: bool) -> Tensor:
    """Logits as losses see them: float32 before anything scales them, −inf where they do not count."""
    leaf = logits.float()
    if valid is not None:
        leaf.masked_fill_(~valid, -torch.inf)
    return leaf.requires_grad_(gradients)


class _Columns:
    """The rows of the prediction layer that stand behind a block's columns."""

    def __init__(self, weight: Tensor, bias: Tensor | None, tokens: Tensor | None):
        self.tokens = tokens
        self.rows = weight.detach() if tokens is None else F.embedding(tokens, weight.detach())
        self.bias = None if bias is None else (bias.detach() if tokens is None else bias.detach()[tokens])

    def logits(self, states: Tensor) -> Tensor:
        """[layers, n, w] of states [layers, n, D]: one product for all layers."""
        if self.rows.dim() == 2:
            return F.linear(states, self.rows, self.bias)
        logits = torch.bmm(self.rows, states.permute(1, 2, 0)).permute(2, 0, 1)
        return logits if self.bias is None else logits + self.bias

    def backward(self, gradient: Tensor, states: Tensor, to_weight: Tensor | None, to_bias: Tensor | None) -> Tensor:
        """What the gradient [layers, n, w] with respect to the logits means for weight and bias, which it is added to,
        and for states [layers, n, D], which it returns."""
        if self.tokens is not None and self.tokens.dim() == 2:  # each prediction has columns of its own
            if to_weight is not None:
                products = torch.bmm(gradient.permute(1, 2, 0).float(), states.transpose(0, 1).float())
                to_weight.index_add_(0, self.tokens.flatten(), products.flatten(0, 1))
            if to_bias is not None:
                to_bias.index_add_(0, self.tokens.flatten(), gradient.float().sum(0).flatten())
            return torch.bmm(gradient.transpose(0, 1), self.rows).transpose(0, 1)

        flat, of_states = gradient.flatten(0, 1), states.flatten(0, 1)
        if to_weight is not None:
            if self.tokens is not None:
                to_weight.index_add_(0, self.tokens, (flat.T @ of_states).float())
            elif flat.dtype == to_weight.dtype:
                to_weight.addmm_(flat.T, of_states)
            else:
                to_weight += flat.T @ of_states
        if to_bias is not None:
            of_columns = flat.float().sum(0)
            if self.tokens is None:
                to_bias += of_columns
            else:
                to_bias.index_add_(0, self.tokens, of_columns)
        return gradient @ self.rows


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

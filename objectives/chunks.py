"""The prediction layer over response positions, in chunks, so that logits of the whole batch never exist."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from objectives.objective import Objective
from objectives.valid import valid_tokens
from recommender.backbone import Backbone
from recommender.trie import TrieTensors


def objective_sums(
    objective: Objective,
    backbone: Backbone,
    trie: TrieTensors,
    hidden: Tensor,
    taps: list[Tensor],
    target: Tensor,
    nodes: Tensor,
    chunks: int,
) -> dict[str, Tensor]:
    """Sums over positions of everything that the objective computes.

    Args:
        hidden: [P, D], normed last hidden states at the positions that predict.
        taps: one [P, D] for each of the objective's layers, not yet normed.
        target: int64 [P].
        nodes: int64 [P]; trie node of each prediction, −1 where the target is forced.
        chunks: how many times the prediction layer is applied. Under ZeRO-3 every rank must pass the same number,
            whatever its P; chunks may then be empty.
    """
    pieces = zip(
        hidden.tensor_split(chunks),
        zip(*(tap.tensor_split(chunks) for tap in taps), strict=True) if taps else [()] * chunks,
        target.tensor_split(chunks),
        nodes.tensor_split(chunks),
        strict=True,
    )
    totals: dict[str, Tensor] = {}
    for h, layers, y, node in pieces:
        if chunks == 1:
            sums = _chunk_sums(objective, backbone, trie, h, list(layers), y, node)
        else:
            sums = checkpoint(_chunk_sums, objective, backbone, trie, h, list(layers), y, node, use_reentrant=False)
        for name, value in sums.items():
            totals[name] = totals[name] + value if name in totals else value
    return totals


def _chunk_sums(
    objective: Objective,
    backbone: Backbone,
    trie: TrieTensors,
    hidden: Tensor,
    taps: list[Tensor],
    target: Tensor,
    nodes: Tensor,
) -> dict[str, Tensor]:
    invalid = ~valid_tokens(trie, nodes, target, backbone.vocabulary) if objective.valid_only else None

    def logits(states: Tensor) -> Tensor:
        values = backbone.logits(states).float()  # cast before anything scales them
        return values if invalid is None else values.masked_fill(invalid, -torch.inf)

    layer_logits = [logits(backbone.norm(tap)) for tap in taps]
    values = objective.losses(logits(hidden), layer_logits, target)
    return {name: value.sum() for name, value in values.items()}

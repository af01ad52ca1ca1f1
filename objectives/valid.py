"""Valid tokens: the children of the trie nodes at which responses are predicted."""

from __future__ import annotations

import torch
from torch import Tensor

from recommender.trie import TrieTensors


def valid_tokens(trie: TrieTensors, nodes: Tensor, target: Tensor, vocabulary: int) -> Tensor:
    """bool [P, V]: True for v ∈ C(t).

    Args:
        nodes: int64 [P]; −1 where the target is forced, and then the only valid token.
        target: int64 [P].
    """
    mask = torch.zeros(len(target), vocabulary, dtype=torch.bool, device=target.device)
    mask[torch.arange(len(target), device=target.device), target] = True
    branching = nodes.clamp_min(0)
    counts = torch.where(nodes >= 0, trie.child_count[branching], 0).long()
    rows = torch.repeat_interleave(torch.arange(len(target), device=target.device), counts)
    within = torch.arange(len(rows), device=target.device) - (counts.cumsum(0) - counts)[rows]
    children = trie.first_child[branching][rows] + within
    mask[rows, trie.first_token[children].long()] = True
    return mask

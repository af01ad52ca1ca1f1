"""Blocks: predictions whose logits are computed together, and the columns that compete in them.

Over the whole vocabulary there is one block. Over the valid tokens, positions at the same wide node (above all the
root) share their columns, one matrix product; positions at narrow nodes are gathered into blocks of similar width. So
only the child rows of the prediction layer are ever touched, and losses see plain matrices either way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recommender.items.trie import RadixTrie

_WIDE = 32  # children from which on a node's positions get a matrix product of their own


@dataclass(frozen=True)
class Block:
    """n predictions with w columns each.

    Attributes:
        at: int64 [n]; which predictions of the batch.
        target: int64 [n]; columns of the targets.
        node: int64 [n]; trie node of each prediction, −1 where the target is forced.
        tokens: what the columns stand for. None: the vocabulary; [w]: these tokens; [n, w]: each prediction's own.
        valid: bool [n, w]; the columns that are more than padding. None: all are.
    """

    at: Tensor
    target: Tensor
    node: Tensor
    tokens: Tensor | None = None
    valid: Tensor | None = None

    def to(self, device: torch.device | str) -> Block:
        moved: dict[str, Any] = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if v is not None}
        return replace(self, **moved)

    @property
    def has_own_columns(self) -> bool:
        """Whether each prediction has columns of its own; otherwise all share them."""
        return self.tokens is not None and self.tokens.dim() == 2

    def pieces(self, positions: int) -> Iterator[Block]:
        """This block in pieces of at most `positions` predictions; one empty piece where there are none."""
        for begin in range(0, max(len(self.at), 1), positions):
            part = slice(begin, begin + positions)
            yield Block(
                self.at[part],
                self.target[part],
                self.node[part],
                self.tokens[part] if self.tokens is not None and self.has_own_columns else self.tokens,
                None if self.valid is None else self.valid[part],
            )


def vocabulary_blocks(nodes: Tensor, target: Tensor) -> list[Block]:
    """All predictions over the whole vocabulary.

    Args:
        nodes: int64 [P].
        target: int64 [P], tokens.
    """
    return [Block(torch.arange(len(target)), target, nodes)]


def child_blocks(trie: RadixTrie, nodes: Tensor, target: Tensor) -> list[Block]:
    """Predictions over the valid tokens, the children of their nodes.

    Args:
        nodes: int64 [P] on the CPU, each with more than one child.
        target: int64 [P] on the CPU, tokens.

    Raises:
        ValueError: a target is no child of its node.
    """
    node, token = nodes.numpy(), target.numpy()
    child = trie.child_of(node, token)
    if (child < 0).any():
        wrong = int(np.flatnonzero(child < 0)[0])
        raise ValueError(f"target token {token[wrong]} is no child of trie node {node[wrong]}")
    column, count = child - trie.first_child[node], trie.child_count[node].astype(np.int64)
    blocks = []
    for wide in np.unique(node[count > _WIDE]):
        at = np.flatnonzero(node == wide)
        first = int(trie.first_child[wide])
        tokens = trie.first_token[first : first + int(trie.child_count[wide])]
        blocks.append(_block(at, column[at], node[at], tokens.astype(np.int64)))
    width = 2
    while width <= _WIDE:
        at = np.flatnonzero((count <= width) & (count > (width // 2 if width > 2 else 0)))
        if len(at):
            place = np.arange(width)
            valid = place < count[at, None]
            children = trie.first_child[node[at], None] + np.where(valid, place, 0)
            blocks.append(_block(at, column[at], node[at], trie.first_token[children].astype(np.int64), valid))
        width *= 2
    nothing = np.empty(0, np.int64)  # one column, so that reductions over columns stay defined
    return blocks or [_block(nothing, nothing, nothing, np.zeros(1, np.int64))]


def _block(
    at: np.ndarray, column: np.ndarray, node: np.ndarray, tokens: np.ndarray, valid: np.ndarray | None = None
) -> Block:
    return Block(
        torch.from_numpy(at),
        torch.from_numpy(column.astype(np.int64)),
        torch.from_numpy(node.astype(np.int64)),
        torch.from_numpy(tokens),
        None if valid is None or valid.all() else torch.from_numpy(valid),
    )

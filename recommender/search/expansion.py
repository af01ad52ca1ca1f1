"""What a search expands: tensors that its steps hand on. Shapes are those of `recommender/search/search.py`.

To expand a node is to append the tokens of its chain to its row and to score its entries: its children or, where it is
a leaf, itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from recommender.config import Score
from recommender.items.trie import Below, RadixTrie, TrieTensors
from recommender.search.bounds import Levels


@dataclass(frozen=True)
class Expansion:
    """What it is to expand each node of a trie under one of the scores."""

    sizes: torch.Tensor  # int64 [nodes, 2], tokens to append, and entries
    finished_at_sight: torch.Tensor  # bool [nodes], whether an entry has its whole score as soon as it is seen
    below: Below  # the nodes that may be expanded
    radix: RadixTrie

    def __post_init__(self) -> None:
        assert len(self.sizes) == len(self.finished_at_sight) == len(self.below.start)

    @classmethod
    def of(cls, radix: RadixTrie, trie: TrieTensors, score: Score) -> Expansion:
        is_leaf = trie.child_count == 0
        if score == "valid":
            length, entries, finished = trie.chain_length, trie.child_count, is_leaf
        else:
            # What follows the last token of an identifier is never asked for, so that token is not run. An expanded
            # leaf is its own single entry: its chain has then been scored.
            length = trie.chain_length - is_leaf.long()
            entries = torch.where(is_leaf, 1, trie.child_count)
            finished = is_leaf & (trie.chain_length == 1)
        below = radix.below(~finished.cpu().numpy()).to(finished.device)
        return cls(torch.stack([length, entries], 1), finished, below, radix)

    @cached_property
    def levels(self) -> Levels:
        """Where the terms of items are bounded; made when a search is first given some."""
        return Levels.of(self.radix, self.sizes.device)


@dataclass(frozen=True)
class Sizes:
    """How much a step expands: all that Python has to know of it, and so what the device is waited for."""

    rows: int  # of which nodes are expanded
    nodes: int  # N
    tokens: int  # T
    longest: int  # tokens of the row with the most
    entries: int  # E
    widest: int  # entries of the row with the most
    deepest: int = 0  # levels from an open node down to the lowest that is expanded with it

    def __post_init__(self) -> None:
        assert 0 < self.rows <= self.nodes <= self.entries
        assert self.longest <= self.tokens <= self.rows * self.longest
        assert self.widest <= self.entries <= self.rows * self.widest


@dataclass(frozen=True)
class Step:
    """The nodes that a step expands: of each row, the first `take` in its places of `node`.

    The score of an open node is known. A node further down goes with all those above it, from the open one on.
    """

    take: torch.Tensor  # int64 [R]
    node: torch.Tensor  # int64 [R, W]
    levels: torch.Tensor  # int8 [R, W], how far below an open node; 0: it is one
    place: torch.Tensor  # int64 [R, W], where that one is among the open nodes
    sizes: Sizes

    def __post_init__(self) -> None:
        assert self.node.shape == self.levels.shape == self.place.shape
        assert len(self.take) == len(self.node) >= self.sizes.rows


@dataclass(frozen=True)
class Nodes:
    """The nodes of a step, row by row."""

    row: torch.Tensor  # int64 [N]
    node: torch.Tensor  # int64 [N], in the trie
    score: torch.Tensor  # float32 [N], up to the first token of the node's chain; of an open node
    expansion: torch.Tensor  # int64 [N], ordinal in the appended tree
    parent: torch.Tensor  # int64 [N], the parent's ordinal there
    is_open: torch.Tensor  # bool [N]; the others were chosen before their scores were known
    above: torch.Tensor  # int64 [N], where among these the parent is, of such others

    def __post_init__(self) -> None:
        assert {each.shape for each in vars(self).values()} == {self.row.shape}

    @classmethod
    def roots(cls, rows: int, device: torch.device) -> Nodes:
        """The root, in every row."""
        zero = torch.zeros(rows, dtype=torch.int64, device=device)
        row, is_open = torch.arange(rows, device=device), torch.ones_like(zero, dtype=torch.bool)
        return cls(row, zero, torch.zeros(rows, device=device), zero, zero, is_open, zero)


@dataclass(frozen=True)
class Chains:
    """The tokens that were appended for nodes: what the score `full` asks of them."""

    last: torch.Tensor  # int64 [N], where the node's last token is
    length: torch.Tensor  # int64 [N]
    following: torch.Tensor  # int64 [T], the next token of the chain
    is_scored: torch.Tensor  # bool [T], whether there is one; where the chain ends, its own last one stands there

    def __post_init__(self) -> None:
        assert self.last.shape == self.length.shape
        assert self.following.shape == self.is_scored.shape


@dataclass(frozen=True)
class Entries:
    """What comes of the nodes of a step, node by node."""

    counts: torch.Tensor  # int64 [N], how many of each node
    owner: torch.Tensor  # int64 [E], of which node
    node: torch.Tensor  # int64 [E], in the trie
    token: torch.Tensor  # int [E], the first of its chain
    of_leaf: torch.Tensor  # bool [E], whether it is the expanded node itself

    def __post_init__(self) -> None:
        assert self.owner.shape == self.node.shape == self.token.shape == self.of_leaf.shape

"""What terms of items add to the scores of the nodes above them. Shapes are those of `recommender/search/search.py`.

An item ends with s(i) = log p(i) + t(i). Nothing under a node is better than log p(node) + max t(i), over the items
below it: log-probabilities only fall along a path, and a maximum over fewer items is no larger. So the sum bounds
whatever is below, for terms of any sign, and the search stops with a proof as it does without them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from recommender.items.trie import RadixTrie


@dataclass(frozen=True)
class Levels:
    """The nodes of a trie, parents before children: what a maximum over the items below each is made from.

    Attributes
    ----------
    nodes : of the trie
    node_of_item : int64 [items], each item's leaf node
    steps : from the deepest level up: a level's nodes are the children, `counts` each, of the nodes `parents`
    """

    nodes: int
    node_of_item: torch.Tensor
    steps: list[tuple[slice, torch.Tensor, torch.Tensor]]

    @classmethod
    def of(cls, trie: RadixTrie, device: torch.device) -> Levels:
        leaves = np.flatnonzero(trie.child_count == 0)
        node_of_item = np.empty(len(trie), np.int64)
        node_of_item[trie.item_of_leaf[trie.lo[leaves]]] = leaves
        steps, begin, end = [], 0, 1
        while begin < end:
            parents = begin + np.flatnonzero(trie.child_count[begin:end])
            counts = trie.child_count[parents].astype(np.int64)
            children = slice(end, end + int(counts.sum()))
            if len(parents):
                steps.append((children, torch.from_numpy(parents).to(device), torch.from_numpy(counts).to(device)))
            begin, end = children.start, children.stop
        return cls(trie.nodes, torch.from_numpy(node_of_item).to(device), steps[::-1])

    def maxima(self, terms: torch.Tensor) -> torch.Tensor:
        """float32 [nodes, R], the largest term below each node.

        Parameters
        ----------
        terms : float32 [R, items]
        """
        found = terms.new_full((self.nodes, len(terms)), -torch.inf)
        found[self.node_of_item] = terms.T
        for children, parents, counts in self.steps:
            found[parents] = torch.segment_reduce(found[children], "max", lengths=counts, unsafe=True)
        return found


@dataclass(frozen=True)
class Bounds:
    """What the items below each node may add, for the rows of a batch."""

    best: torch.Tensor  # float32 [nodes, R]

    @classmethod
    def of(cls, levels: Levels, terms: torch.Tensor) -> Bounds:
        """From the terms [R, items] of all items; −inf where one may not be recommended."""
        return cls(levels.maxima(terms))

    def below(self, row: torch.Tensor, node: torch.Tensor) -> torch.Tensor:
        """The largest term below nodes, each for its row."""
        return self.best[node, row]

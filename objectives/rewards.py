"""Token rewards from a collaborative model, through the trie (ILRec, Eq. 10).

    r_v = Σ R(i) over items whose identifier goes on with v / Σ R(i) over items that share the prefix,

R = the collaborative model's softmax over all items for this history. Items under a trie node are one range of leaves,
so both sums are differences of one cumulative sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from objectives.blocks import Block
from recommender.collaborative.model import CollaborativeModel
from recommender.items.trie import RadixTrie, TrieTensors
from recommender.ragged import ragged

_SURE = 1e-9  # a prefix with less mass is summed by itself: differences of the cumulative sum would be rounding errors


@dataclass(frozen=True)
class Histories:
    """What a batch's samples have seen, and what they are to predict.

    Attributes:
        sequences: for each row, int [n]; its items, oldest first.
        lengths: for each row, int [t]; sample i of the row has seen the first lengths[i] items.
        targets: for each row, int [t]; the items that the samples are to predict.
    """

    sequences: Sequence[np.ndarray]
    lengths: Sequence[np.ndarray]
    targets: Sequence[np.ndarray]


@dataclass(frozen=True)
class Rewards:
    """Rewards of the children of the nodes at which a batch predicts.

    Attributes:
        values: float32 [T]; each prediction's children one after the other, in the trie's order.
        start: int64 [P]; where a prediction's children begin; a forced prediction has none.
    """

    values: Tensor
    start: Tensor
    trie: TrieTensors

    def of(self, block: Block, columns: int) -> Tensor:
        """float32 [n, w]: the rewards of a block's columns; −1 for a token that leads to no item.

        Args:
            columns: w.
        """
        start, node = self.start[block.at], block.node
        if block.tokens is not None:
            place = torch.arange(columns, device=node.device)
            found = self.values[(start[:, None] + place).clamp(max=max(len(self.values) - 1, 0))]
            return found if block.valid is None else found.masked_fill(~block.valid, -1.0)
        rewards = torch.full((len(node), columns), -1.0, device=node.device)
        rewards.scatter_(1, block.target[:, None], 1.0)  # right where it is forced, and overwritten where it is not
        count = torch.where(node >= 0, self.trie.child_count[node.clamp(min=0)], 0)
        owner, place = ragged(count)
        token = self.trie.first_token[self.trie.first_child[node[owner]] + place].long()
        rewards[owner, token] = self.values[start[owner] + place]
        return rewards


class RewardSource:
    """Computes rewards for batches.

    Args:
        model: fitted on training interactions only; on the device of training.
        trie: of the catalogue that the model ranks.
        items: N; None: R is the softmax over all items. Else over the target and the N others that score highest: no
            sum over the catalogue any more, at the price of rewards of 0 for whatever has none of them below it.
        memory_mb: most MiB for the scores of the samples that are worked on together.
    """

    def __init__(self, model: CollaborativeModel, trie: RadixTrie, items: int | None, memory_mb: int = 256):
        self._model, self._trie = model.eval(), trie
        self._device = next(model.parameters()).device
        self._tensors = trie.to(self._device)
        self._leaf_of_item = torch.from_numpy(trie.leaf_of_item.astype(np.int64)).to(self._device)
        self._top = None if items is None else min(items, len(trie))
        self._at_once = max(1, memory_mb * 2**20 // (32 * len(trie)))

    @torch.no_grad()
    def rewards(self, histories: Histories, sample: np.ndarray, node: np.ndarray) -> Rewards:
        """Rewards for P predictions.

        Args:
            sample: int [P]; the sample of each, numbered through the rows.
            node: int [P]; trie node of each, −1 where the target is forced.
        """
        if not len(sample):
            return Rewards(torch.zeros(0, device=self._device), self._on_device(sample), self._tensors)
        embedding = self._model.embed_prefixes(histories.sequences, histories.lengths)
        target = np.concatenate(histories.targets)
        children = np.where(node >= 0, self._trie.child_count[np.maximum(node, 0)], 0).astype(np.int64)
        order = np.argsort(sample, kind="stable")
        start = np.empty(len(order), np.int64)
        start[order] = np.cumsum(children[order]) - children[order]

        values = []
        for begin in range(0, len(target), self._at_once):
            end = min(begin + self._at_once, len(target))
            of_these = order[np.searchsorted(sample[order], begin) : np.searchsorted(sample[order], end)]
            of_these = of_these[node[of_these] >= 0]
            if len(of_these):
                mass = self._mass(self._model.scores(embedding[begin:end]).float(), self._on_device(target[begin:end]))
                values.append(self._shares(mass, self._on_device(sample[of_these] - begin), node[of_these]))
        together = torch.cat(values) if values else torch.zeros(0, device=self._device)
        return Rewards(together, self._on_device(start), self._tensors)

    def _mass(self, scores: Tensor, target: Tensor) -> _Mass:
        if self._top is None:
            return _Mass(scores.log_softmax(1)[:, self._tensors.item_of_leaf], None)
        taken = scores.scatter(1, target[:, None], -torch.inf).topk(min(self._top, scores.shape[1] - 1)).indices
        taken = torch.cat([taken, target[:, None]], 1)
        leaves, at = self._leaf_of_item[taken].sort(1)
        log_r = scores.gather(1, taken).log_softmax(1).gather(1, at)
        return _Mass(log_r, leaves)

    def _shares(self, mass: _Mass, sample: Tensor, node: np.ndarray) -> Tensor:
        """float32: for each prediction, its children's shares of the mass under its node."""
        trie, parent = self._tensors, self._on_device(node)
        owner, place = ragged(trie.child_count[parent])
        child = trie.first_child[parent][owner] + place
        low, high = mass.place(sample, trie.lo[parent]), mass.place(sample, trie.hi[parent])
        child_low, child_high = mass.place(sample[owner], trie.lo[child]), mass.place(sample[owner], trie.hi[child])
        total = mass.between(sample, low, high)
        shares = mass.between(sample[owner], child_low, child_high) / total[owner].clamp(min=_SURE)
        unsure = torch.nonzero(total <= _SURE).squeeze(1)
        if len(unsure):
            number = torch.full_like(parent, -1)
            number[unsure] = torch.arange(len(unsure), device=number.device)
            at = torch.nonzero(number[owner] >= 0).squeeze(1)
            which = number[owner[at]]
            start = low[unsure][which]
            shares[at] = mass.shares_within(
                sample[unsure], low[unsure], high[unsure], which, child_low[at] - start, child_high[at] - start
            )
        return shares.clamp(0, 1).float()

    def _on_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(self._device)


class _Mass:
    """R of s samples over their items in leaf order, ready for range sums.

    Args:
        log_r: float32 [s, K].
        leaves: int64 [s, K], rising, the leaf of each; None: all leaves, K = items.
    """

    def __init__(self, log_r: Tensor, leaves: Tensor | None):
        self._log_r = log_r
        samples, width = log_r.shape
        self._cumulative = torch.zeros(samples, width + 1, dtype=torch.float64, device=log_r.device)
        torch.cumsum(log_r.double().exp_(), 1, out=self._cumulative[:, 1:])
        self._keys: Tensor | None = None
        if leaves is not None:
            self._keys = ((torch.arange(samples, device=leaves.device)[:, None] << 32) | leaves).flatten()

    def place(self, sample: Tensor, leaf: Tensor) -> Tensor:
        """How many of a sample's items have a smaller leaf: int64, like both arguments."""
        if self._keys is None:
            return leaf
        return torch.searchsorted(self._keys, (sample << 32) | leaf) - sample * self._log_r.shape[1]

    def between(self, sample: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """float64: the mass of a sample's items between two places.

        >>> mass, first = _Mass(torch.tensor([[0.5, 0.3, 0.2]]).log(), None), torch.tensor([0])
        >>> mass.between(first, first + 1, first + 2) / mass.between(first, first + 1, first + 3)  # r = 0.3 / 0.5
        tensor([0.6000], dtype=torch.float64)
        """
        return self._cumulative[sample, high] - self._cumulative[sample, low]

    def shares_within(
        self, sample: Tensor, low: Tensor, high: Tensor, which: Tensor, child_low: Tensor, child_high: Tensor
    ) -> Tensor:
        """float64: shares of children in ranges [U] of little mass, scaled by each range's largest item.

        Args:
            which: the range of each child; `child_low`, `child_high` count from its start.
        """
        length = high - low
        owner, place = ragged(length)
        log_r = self._log_r[sample[owner], low[owner] + place].double()
        largest = torch.segment_reduce(log_r, "max", lengths=length, unsafe=True)
        sums = torch.zeros(len(log_r) + 1, dtype=torch.float64, device=log_r.device)
        torch.cumsum((log_r - largest[owner]).exp_(), 0, out=sums[1:])
        start = length.cumsum(0) - length
        total = sums[start + length] - sums[start]
        return (sums[start[which] + child_high] - sums[start[which] + child_low]) / total[which]

"""The radix trie over all spelled identifiers, as flat arrays.

Single-child chains are one edge, so a node is a place where identifiers part (or a leaf: one item). Items are held in
the sorted order of their identifiers, so that "all items under this node" is a range of leaves `[lo, hi)` and any sum
over them (popularity, allowed items, a reward) is a difference of two cumulative sums. Memory grows with the tokens of
the catalogue, never with catalogue x vocabulary.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file


@dataclass(frozen=True)
class TrieTensors:
    """A :class:`RadixTrie` on a device. Every tensor has a length of `nodes` unless stated; int64, tokens int32."""

    parent: torch.Tensor
    first_child: torch.Tensor
    child_count: torch.Tensor
    first_token: torch.Tensor
    depth: torch.Tensor
    lo: torch.Tensor
    hi: torch.Tensor
    chain_start: torch.Tensor  # where the node's chain begins in leaf_tokens
    chain_length: torch.Tensor  # tokens of the chain; the root's is 0
    first_item: torch.Tensor  # smallest item index under the node
    leaf_tokens: torch.Tensor  # int32 [tokens]
    item_of_leaf: torch.Tensor  # [items]


@dataclass(frozen=True)
class Below:
    """Nodes at and below every node, those with the most leaves first; on a device.

    Attributes
    ----------
    start, count : int64 [nodes], where a node's are; the root has only itself
    node : int32 [entries], itself first, if it is listed
    levels : int8 [entries], edges down to it
    log_share : float64 [entries], logarithm of its share of the leaves; precise enough that none ties with one above it
    """

    start: torch.Tensor
    count: torch.Tensor
    node: torch.Tensor
    levels: torch.Tensor
    log_share: torch.Tensor

    def to(self, device: torch.device | str) -> Below:
        """Copy to a device."""
        return Below(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True)
class RadixTrie:
    """Radix trie of a catalogue's identifiers; build it with :meth:`build`.

    Nodes are numbered breadth-first: the root is 0 and the children of a node are consecutive, in the order of their
    first tokens. Every inner node has at least two children, except a root whose items all open with the same token.

    Attributes
    ----------
    parent : int32 [nodes], -1 for the root
    first_child, child_count : int32 [nodes]; the children of node `v` are
        `first_child[v] ... first_child[v] + child_count[v] - 1`; a leaf has `child_count` 0
    first_token : int32 [nodes], first token of the chain that leads into the node; -1 for the root
    depth : int32 [nodes], tokens from the root to the node
    lo, hi : int32 [nodes], the leaves under the node
    leaf_tokens, leaf_offsets : int32 [tokens], int64 [items + 1], identifiers in leaf order; the chain of node `v` is
        `leaf_tokens[leaf_offsets[lo[v]] + depth[parent[v]] : leaf_offsets[lo[v]] + depth[v]]`
    item_of_leaf : int32 [items]
    """

    parent: np.ndarray
    first_child: np.ndarray
    child_count: np.ndarray
    first_token: np.ndarray
    depth: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    leaf_tokens: np.ndarray
    leaf_offsets: np.ndarray
    item_of_leaf: np.ndarray

    @classmethod
    def build(cls, tokens: np.ndarray, offsets: np.ndarray) -> RadixTrie:
        """Build the trie of the identifiers `tokens[offsets[i]:offsets[i + 1]]` of the items `i`.

        Parameters
        ----------
        tokens : int32 [T], token ids, not negative
        offsets : int64 [items + 1]

        Raises
        ------
        ValueError
            No items, an empty identifier, a negative token, two equal identifiers, or one that another one begins
            with; the message names the items.
        """
        tokens, offsets = _checked(tokens, offsets)
        if len(offsets) == 1:
            raise ValueError("a trie needs at least one item")
        item_of_leaf = _lexicographic_order(tokens, offsets)
        return cls._of_leaves(*_reorder(tokens, offsets, item_of_leaf), item_of_leaf)

    def extended(self, tokens: np.ndarray, offsets: np.ndarray) -> RadixTrie:
        """The trie with further items, numbered after those that it has; only the new ones are sorted.

        Parameters
        ----------
        tokens, offsets : identifiers of the new items, as for :meth:`build`

        Raises
        ------
        ValueError
            As :meth:`build`; items are numbered as in the new trie.
        """
        tokens, offsets = _checked(tokens, offsets)
        order = _lexicographic_order(tokens, offsets)
        tokens, offsets = _reorder(tokens, offsets, order)
        bounds = self.leaf_offsets
        place = np.array([self._leaf_at(tokens[start:end]) for start, end in pairwise(offsets)], np.int64)
        lengths = np.insert(np.diff(bounds), place, np.diff(offsets))
        return RadixTrie._of_leaves(
            np.insert(self.leaf_tokens, np.repeat(bounds[place], np.diff(offsets)), tokens),
            np.concatenate([[0], np.cumsum(lengths)]),
            np.insert(self.item_of_leaf, place, len(self) + order),
        )

    @classmethod
    def _of_leaves(cls, leaf_tokens: np.ndarray, leaf_offsets: np.ndarray, item_of_leaf: np.ndarray) -> RadixTrie:
        """The trie of identifiers in sorted order."""
        leaf_lengths = np.diff(leaf_offsets)
        shared = _shared_with_next(leaf_tokens, leaf_offsets)
        # In sorted order an identifier is directly followed by those that begin with it.
        swallowed = np.flatnonzero(shared == leaf_lengths[:-1])
        if len(swallowed):
            at = int(swallowed[0])
            first, second = int(item_of_leaf[at]), int(item_of_leaf[at + 1])
            relation = "equals" if leaf_lengths[at] == leaf_lengths[at + 1] else "is a prefix of"
            raise ValueError(
                f"item {first}: its identifier {relation} that of item {second} ({len(swallowed)} such pairs)"
            )
        nodes = _split_into_nodes(shared, leaf_lengths)
        start = leaf_offsets[nodes["lo"]] + np.where(nodes["parent"] < 0, 0, nodes["depth"][nodes["parent"]])
        first_token = np.where(nodes["parent"] < 0, -1, leaf_tokens[start]).astype(np.int32)
        return cls(
            **nodes,
            first_token=first_token,
            leaf_tokens=leaf_tokens,
            leaf_offsets=leaf_offsets,
            item_of_leaf=item_of_leaf,
        )

    def __len__(self) -> int:
        """Number of items."""
        return len(self.item_of_leaf)

    @property
    def nodes(self) -> int:
        return len(self.parent)

    @cached_property
    def leaf_of_item(self) -> np.ndarray:
        """int32 [items], the inverse of `item_of_leaf`."""
        leaves = np.empty_like(self.item_of_leaf)
        leaves[self.item_of_leaf] = np.arange(len(self), dtype=np.int32)
        return leaves

    @cached_property
    def first_item(self) -> np.ndarray:
        """int32 [nodes], the smallest item index under each node."""
        bounds = np.stack([self.lo, self.hi], axis=1).ravel()
        return np.minimum.reduceat(np.append(self.item_of_leaf, np.iinfo(np.int32).max), bounds)[::2]

    @cached_property
    def _parent_depth(self) -> np.ndarray:
        return np.where(self.parent < 0, 0, self.depth[self.parent])

    @cached_property
    def mean_chain(self) -> float:
        """Tokens between a node and its parent, on average."""
        return float((self.depth - self._parent_depth)[1:].mean())

    @cached_property
    def _leaf_keys(self) -> np.ndarray:
        return self.leaf_tokens.astype(">u4")  # big-endian bytes compare like the tokens they spell

    def _leaf_at(self, identifier: np.ndarray) -> int:
        """The leaf of an identifier or, where there is none, the one that it would stand before."""
        bounds = self.leaf_offsets
        return bisect_left(
            range(len(self)),
            identifier.astype(">u4").tobytes(),
            key=lambda leaf: self._leaf_keys[bounds[leaf] : bounds[leaf + 1]].tobytes(),
        )

    def item_spelled(self, identifier: np.ndarray) -> int | None:
        """The item with this identifier, int [length]; None if there is none."""
        leaf = self._leaf_at(identifier)
        if leaf == len(self) or not np.array_equal(
            self.leaf_tokens[self.leaf_offsets[leaf] : self.leaf_offsets[leaf + 1]], identifier
        ):
            return None
        return int(self.item_of_leaf[leaf])

    def identifier(self, item: int) -> np.ndarray:
        """int32 [length], the tokens of one item."""
        leaf = self.leaf_of_item[item]
        return self.leaf_tokens[self.leaf_offsets[leaf] : self.leaf_offsets[leaf + 1]]

    def identifiers(self) -> tuple[np.ndarray, np.ndarray]:
        """int32 [T] and int64 [items + 1]: the tokens and offsets that the trie was built from, in the items' order."""
        return _reorder(self.leaf_tokens, self.leaf_offsets, self.leaf_of_item)

    def chain(self, node: int) -> np.ndarray:
        """int32 [length], the tokens between the parent of a node and the node."""
        start = self.leaf_offsets[self.lo[node]]
        return self.leaf_tokens[start + self._parent_depth[node] : start + self.depth[node]]

    def prediction_nodes(self) -> np.ndarray:
        """For every token of every identifier, in the *items'* order: the node at which it is predicted.

        Returns
        -------
        int32 [T], aligned with the `tokens` that the trie was built from: the node whose children are the valid tokens
        there, or -1 where only one token is valid (a forced token).
        """
        branching = np.flatnonzero(self.child_count >= 2)
        owner, leaf = _ragged(self.lo[branching], self.hi[branching] - self.lo[branching])
        item = self.item_of_leaf[leaf]
        offsets = np.concatenate([[0], np.cumsum(np.diff(self.leaf_offsets)[self.leaf_of_item])])
        predicted_at = np.full(len(self.leaf_tokens), -1, np.int32)
        predicted_at[offsets[item] + self.depth[branching][owner]] = branching[owner]
        return predicted_at

    @property
    def first_branching(self) -> int:
        """The node at which items first part: the root, or below it where all items open with the same tokens."""
        return int(self.first_child[0]) if self.child_count[0] == 1 < self.nodes - 1 else 0

    @cached_property
    def _edges(self) -> np.ndarray:
        """int64 [nodes − 1], rising: parent and first token of each node but the root, as one number."""
        return (self.parent[1:].astype(np.int64) << 32) | self.first_token[1:]

    def child_of(self, nodes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The children that tokens lead to.

        Parameters
        ----------
        nodes, tokens : int [N]

        Returns
        -------
        int64 [N], -1 where a node has no child that begins with the token
        """
        wanted = (nodes.astype(np.int64) << 32) | tokens
        at = np.minimum(np.searchsorted(self._edges, wanted), len(self._edges) - 1)
        return np.where(self._edges[at] == wanted, at + 1, -1)

    def below(self, is_listed: np.ndarray) -> Below:
        """The nodes that `is_listed` (bool [nodes]) names, at themselves and at each ancestor but the root."""
        node = np.flatnonzero(is_listed).astype(np.int32)
        pairs, above, level = [], node, 0
        while level == 0 or len(above):
            pairs.append((above, node, np.full(len(node), level, np.int8)))
            above = self.parent[above]
            node, above, level = node[above > 0], above[above > 0], level + 1
        above, node, levels = (np.concatenate(each) for each in zip(*pairs, strict=True))
        leaves = self.hi - self.lo
        order = np.lexsort((node, -leaves[node], above))  # breadth-first numbers: a node before those below it
        above, node, levels = above[order], node[order], levels[order]
        count = np.bincount(above, minlength=self.nodes)
        log_share = np.log(leaves[node]) - np.log(leaves[above])
        return Below(*map(torch.from_numpy, (np.cumsum(count) - count, count, node, levels, log_share)))

    def to(self, device: torch.device | str) -> TrieTensors:
        """Copy to a device."""

        def tensor(array: np.ndarray, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.tensor(array, dtype=dtype, device=device)

        return TrieTensors(
            parent=tensor(self.parent),
            first_child=tensor(self.first_child),
            child_count=tensor(self.child_count),
            first_token=tensor(self.first_token),
            depth=tensor(self.depth),
            lo=tensor(self.lo),
            hi=tensor(self.hi),
            chain_start=tensor(self.leaf_offsets[self.lo] + self._parent_depth),
            chain_length=tensor(self.depth - self._parent_depth),
            first_item=tensor(self.first_item),
            leaf_tokens=tensor(self.leaf_tokens, torch.int32),
            item_of_leaf=tensor(self.item_of_leaf),
        )

    def save(self, path: str | Path) -> None:
        """Write the arrays to a safetensors file."""
        save_file({field.name: getattr(self, field.name) for field in fields(self)}, str(path))

    @classmethod
    def load(cls, path: str | Path) -> RadixTrie:
        """Read what :meth:`save` wrote."""
        return cls(**load_file(str(path)))


def _checked(tokens: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int32 tokens and int64 offsets of identifiers that a trie can hold."""
    tokens, offsets = np.asarray(tokens, np.int32), np.asarray(offsets, np.int64)
    lengths = np.diff(offsets)
    if offsets[0] != 0 or offsets[-1] != len(tokens) or (lengths < 1).any():
        raise ValueError(f"item {int(lengths.argmin())}: its identifier is empty, or the offsets do not fit")
    if (tokens < 0).any():
        item = int(np.searchsorted(offsets, int(tokens.argmin()), side="right")) - 1
        raise ValueError(f"item {item}: its identifier holds a negative token")
    return tokens, offsets


def _lexicographic_order(tokens: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """int32 [items], the items sorted by identifier. Big-endian bytes compare like the tokens they spell."""
    spelled = tokens.astype(">u4").tobytes()
    bounds = (4 * offsets).tolist()
    keys = [spelled[start:end] for start, end in pairwise(bounds)]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int32)


def _reorder(tokens: np.ndarray, offsets: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.diff(offsets)[order]
    _, at = _ragged(offsets[:-1][order], lengths)
    return tokens[at], np.concatenate([[0], np.cumsum(lengths)])


def _ragged(starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ranges `starts[i] ... starts[i] + counts[i] - 1` laid end to end: (i, element) of each entry."""
    owner = np.repeat(np.arange(len(counts)), counts)
    ends = np.cumsum(counts, dtype=np.int64)
    return owner, np.arange(len(owner)) - (ends - counts)[owner] + starts[owner]


def _shared_with_next(leaf_tokens: np.ndarray, leaf_offsets: np.ndarray) -> np.ndarray:
    """int64 [items - 1], the length of the prefix that each identifier shares with the next."""
    start, lengths = leaf_offsets[:-1], np.diff(leaf_offsets)
    limit = np.minimum(lengths[:-1], lengths[1:])
    shared = np.zeros(len(limit), np.int64)
    pairs = np.arange(len(limit))
    for depth in range(int(lengths.max())):
        pairs = pairs[limit[pairs] > depth]
        pairs = pairs[leaf_tokens[start[pairs] + depth] == leaf_tokens[start[pairs + 1] + depth]]
        if len(pairs) == 0:
            break
        shared[pairs] = depth + 1
    return shared


def _split_into_nodes(shared: np.ndarray, leaf_lengths: np.ndarray) -> dict[str, np.ndarray]:
    """The nodes of the trie, level after level: a range of leaves parts where neighbours share the least."""
    items = len(leaf_lengths)
    lo, hi, parent = np.array([0]), np.array([items]), np.array([-1])
    is_inner = np.array([True])  # the root is never a leaf, also when there is one item
    gaps = np.arange(items - 1)  # gap g lies between the leaves g and g + 1
    levels: list[dict[str, np.ndarray]] = []
    numbered = 0
    while len(lo):
        depth = leaf_lengths[lo].copy()
        inner = np.flatnonzero(is_inner)
        if numbered == 0:
            depth[0] = 0
        elif len(inner):
            depth[inner] = np.minimum.reduceat(shared[gaps], np.searchsorted(gaps, lo[inner]))
        node_of_gap = np.searchsorted(lo, gaps, side="right") - 1
        is_split = shared[gaps] == depth[node_of_gap]
        splits = gaps[is_split] + 1
        child_lo = np.sort(np.concatenate([lo[inner], splits]))
        child_hi = np.sort(np.concatenate([hi[inner], splits]))
        child_parent = np.searchsorted(lo, child_lo, side="right") - 1
        child_count = np.bincount(child_parent, minlength=len(lo))
        first_child = numbered + len(lo) + np.cumsum(child_count) - child_count
        levels.append(
            {
                "lo": lo,
                "hi": hi,
                "parent": parent,
                "depth": depth,
                "child_count": child_count,
                "first_child": np.where(child_count, first_child, 0),
            }
        )
        parent = child_parent + numbered
        numbered += len(lo)
        lo, hi, gaps = child_lo, child_hi, gaps[~is_split]
        is_inner = hi - lo > 1
    return {name: np.concatenate([level[name] for level in levels]).astype(np.int32) for name in levels[0]}

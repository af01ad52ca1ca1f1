"""Prompt trees: many samples in one row, every shared prefix computed once.

A sample is a prompt and a response. The samples of a row are merged into the tree of their tokens, laid out depth
first; with each token stands the end of its subtree, and that one integer is the whole attention mask:

    query q sees key k  ⇔  k ≤ q < end[k]        (k is an ancestor of q, or q itself)

Position ids are depths on the token's own path, so a causal language model computes for each token exactly what it
would compute in a row of its own. This module is the only one that builds and masks such rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class Sample:
    """A prompt and the response that is to be learnt.

    Attributes:
        prompt: int32 [p], p ≥ 1.
        response: int32 [r].
        nodes: int32 [r]; the trie node at which each response token is predicted, −1 where the token is forced.
    """

    prompt: np.ndarray
    response: np.ndarray
    nodes: np.ndarray


@dataclass(frozen=True)
class Row:
    """A tree of tokens and the predictions that are supervised in it.

    Attributes:
        tokens: int32 [L], depth first.
        end: int32 [L]; one past the last token of the subtree.
        depth: int32 [L]; position ids.
        source: int32 [E]; the token whose hidden state predicts.
        target: int32 [E]; the token that is predicted.
        nodes: int32 [E]; trie node of the prediction, −1 where the target is forced.
        sample: int32 [E]; which of the row's samples it belongs to, in the order that they were given in.
    """

    tokens: np.ndarray
    end: np.ndarray
    depth: np.ndarray
    source: np.ndarray
    target: np.ndarray
    nodes: np.ndarray
    sample: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def build_row(samples: Sequence[Sample]) -> Row:
    """Merge samples into one row; what two of them share from the start on is laid out once.

    Sorted by their tokens, neighbours share the most, so comparing each sample with the one before it finds every
    shared prefix. A response's last token is predicted but predicts nothing, so it is laid out only where another
    sample goes on from it.
    """
    paths = [np.concatenate([s.prompt, s.response[:-1]]) for s in samples]
    order = sorted(range(len(samples)), key=lambda i: paths[i].tolist())
    tokens: list[np.ndarray] = []
    end = np.empty(sum(map(len, paths)), np.int32)
    depth = np.empty_like(end)
    source, target, nodes = [], [], []
    size = 0
    previous, at = paths[order[0]][:0], np.empty(0, np.int32)  # the latest path and where its tokens lie in the row
    for index in order:
        path, sample = paths[index], samples[index]
        shared = _shared_prefix(previous, path)
        end[at[shared:]] = size
        new = np.arange(size, size + len(path) - shared, dtype=np.int32)
        depth[new] = np.arange(shared, len(path))
        tokens.append(path[shared:])
        size += len(new)
        previous, at = path, np.concatenate([at[:shared], new])
        source.append(at[len(sample.prompt) - 1 :])
        target.append(sample.response)
        nodes.append(sample.nodes)
    end[at] = size
    return Row(
        np.concatenate(tokens).astype(np.int32),
        end[:size],
        depth[:size],
        np.concatenate(source),
        np.concatenate(target).astype(np.int32),
        np.concatenate(nodes).astype(np.int32),
        np.repeat(np.array(order, np.int32), [len(part) for part in target]),
    )


def _shared_prefix(a: np.ndarray, b: np.ndarray) -> int:
    limit = min(len(a), len(b))
    differs = np.flatnonzero(a[:limit] != b[:limit])
    return int(differs[0]) if len(differs) else limit


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right to one length.

    Attributes:
        input_ids: int64 [B, L].
        position_ids: int64 [B, L].
        end: int64 [B, L]; None when no row branches, so that plain causal attention is the right mask.
        source: int64 [E]; positions in the flattened [B·L] of the tokens that predict.
        target: int64 [E].
        nodes: int64 [E].
        sample: int64 [E]; the sample of each prediction, numbered through the rows.
        tokens: how many of the B·L positions are not padding.
        blocks: the mask is for FlexAttention.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    end: torch.Tensor | None
    source: torch.Tensor
    target: torch.Tensor
    nodes: torch.Tensor
    sample: torch.Tensor
    tokens: int
    blocks: bool = False

    def to(self, device: torch.device | str) -> Batch:
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)

    def attention_mask(self) -> torch.Tensor | BlockMask | None:
        """bool [B, 1, L, L], True where a query may see a key; None stands for plain causal attention."""
        if self.end is None:
            return None
        return ancestor_blocks(self.end) if self.blocks else ancestor_mask(self.end)


def ancestor_mask(end: torch.Tensor) -> torch.Tensor:
    """bool [B, 1, L, L] from subtree ends int [B, L]: query q sees key k iff k ≤ q < end[k]."""
    at = torch.arange(end.shape[1], device=end.device)
    return ((at[None, :] <= at[:, None]) & (at[None, :, None] < end[:, None, :])).unsqueeze(1)


def ancestor_blocks(end: torch.Tensor) -> BlockMask:
    """The same mask for FlexAttention, L a multiple of BLOCK: which blocks it computes, and the rule inside them.

    Nothing of size L × L is made. Below the diagonal a block of keys is seen by a block of queries if one of its
    subtrees reaches into it, and needs no rule there if all of them reach past it.
    """
    from torch.nn.attention.flex_attention import BlockMask

    def sees(row: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (query < end[row, key])

    ends = end.unflatten(1, (-1, BLOCK))
    begin = torch.arange(0, end.shape[1], BLOCK, device=end.device)
    below = begin[None, :] < begin[:, None]  # [query blocks, key blocks]
    some = below & (ends.amax(-1)[:, None, :] > begin[:, None])
    all_of_it = below & (ends.amin(-1)[:, None, :] >= begin[:, None] + BLOCK)
    partial = (some & ~all_of_it) | torch.eye(len(begin), dtype=torch.bool, device=end.device)
    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(all_of_it), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(end.shape[1],) * 2
    )


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For bool [B, Q, K], True first: the number of blocks of keys [B, 1, Q] and which they are [B, 1, Q, K]."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


PADDING_MULTIPLE = 8  # fewer distinct shapes, aligned kernels
BLOCK = 128  # of FlexAttention: tokens that are skipped, or not, together


def padded_length(length: int, multiple: int = PADDING_MULTIPLE) -> int:
    """The length that rows get whose longest has `length` tokens."""
    return -(-length // multiple) * multiple


def collate(
    rows: Sequence[Row],
    padding: int,
    branching_only: bool = False,
    multiple: int = PADDING_MULTIPLE,
    blocks_from: int | None = None,
) -> Batch:
    """Pad rows to one length, a multiple of `multiple`.

    Args:
        padding: the token that fills up; padding sees only itself and is seen by nothing.
        branching_only: keep only predictions with more than one valid token.
        blocks_from: rows that branch and whose longest has as many tokens are for FlexAttention, padded to a multiple
            of BLOCK; None = no rows are.
    """
    longest, count = max(map(len, rows)), len(rows)
    chains = all(bool((row.end == len(row)).all()) for row in rows)
    blocks = blocks_from is not None and longest >= blocks_from and not chains
    length = padded_length(longest, BLOCK if blocks else multiple)
    input_ids = np.full((count, length), padding, np.int64)
    position_ids = np.zeros((count, length), np.int64)
    end = np.tile(np.arange(1, length + 1, dtype=np.int64), (count, 1))
    source, target, nodes, sample = [], [], [], []
    samples = 0
    for i, row in enumerate(rows):
        size = len(row)
        input_ids[i, :size] = row.tokens
        position_ids[i, :size] = row.depth
        end[i, :size] = row.end
        kept = row.nodes >= 0 if branching_only else slice(None)
        source.append(row.source[kept].astype(np.int64) + i * length)
        target.append(row.target[kept])
        nodes.append(row.nodes[kept])
        sample.append(row.sample[kept].astype(np.int64) + samples)
        samples += int(row.sample.max(initial=-1)) + 1
    if chains:  # plain causal rows: transformers reads positions that begin anew as packed sequences
        position_ids[:] = np.arange(length)
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(position_ids),
        None if chains else torch.from_numpy(end),
        torch.from_numpy(np.concatenate(source)),
        torch.from_numpy(np.concatenate(target).astype(np.int64)),
        torch.from_numpy(np.concatenate(nodes).astype(np.int64)),
        torch.from_numpy(np.concatenate(sample)),
        sum(map(len, rows)),
        blocks,
    )

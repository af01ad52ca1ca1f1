"""The forward pass of a batch of prompts: what is kept of them is not computed again, and little of it is padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from recommender.backbone.cache import TreeCache
from recommender.backbone.packing import Block, Packing
from recommender.ragged import ragged

if TYPE_CHECKING:
    from recommender.backbone.backbone import Backbone
    from recommender.search.prefixes import Prefixes

# What attention over a further block of rows costs, in tokens of padding: operators on a CPU, launches on a GPU.
_BLOCK = {"cpu": 64}
_BLOCK_ELSEWHERE = 1024


@dataclass(frozen=True)
class Prefilled:
    """Prompts that were run, those with the least to compute first.

    Attributes:
        order: int64 [R]; which of the prompts is in each row.
        hidden: [R, D]; normed, after each one's last token.
        cache: their keys and values; what is appended comes behind the longest one.
    """

    order: Tensor
    hidden: Tensor
    cache: TreeCache


def prefill(backbone: Backbone, prompts: Sequence[np.ndarray], prefixes: Prefixes, headroom: int) -> Prefilled:
    """Run prompts (int32, not empty) on a cache with room for `headroom` further slots."""
    kept = [prefixes.longest(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]) - kept[row][0])
    prompts, kept = [prompts[row] for row in order], [kept[row] for row in order]
    filled = np.array([length for length, _ in kept])
    cache = TreeCache(backbone.num_layers, len(prompts), max(map(len, prompts)) + headroom)
    row = 0
    for _, same in groupby(kept, key=lambda each: (each[0], id(each[1]))):
        (length, states), *others = same
        if length:
            cache.load(slice(row, row + 1 + len(others)), states, length)
        row += 1 + len(others)

    order_of_rows = torch.tensor(order, device=backbone.device)  # before the forward, for which a copy would wait
    hidden = _run(backbone, prompts, filled, cache)
    prefixes.keep(prompts, cache)
    return Prefilled(order_of_rows, hidden, cache)


def _run(backbone: Backbone, prompts: Sequence[np.ndarray], filled: np.ndarray, cache: TreeCache) -> Tensor:
    """Run what follows the first `filled` [rows] tokens of the prompts, those with the least first: [rows, D]."""
    device, ends = backbone.device, np.array([len(prompt) for prompt in prompts])
    missing = ends - filled
    last = missing.cumsum() - 1
    begin = last + 1 - missing
    new = np.concatenate([prompt[length:] for prompt, length in zip(prompts, filled, strict=True)])
    tokens = torch.from_numpy(new).to(device).long()
    filled_of, missing_of, last_of = torch.from_numpy(np.stack([filled, missing, last])).to(device)
    row, place = ragged(missing_of, len(new))
    slot, blocks = filled_of[row] + place, []
    for rows in batches(missing.tolist(), _BLOCK.get(device.type, _BLOCK_ELSEWHERE)):
        own = slice(int(begin[rows.start]), int(last[rows.stop - 1]) + 1)
        width, keys, mask = int(missing[rows.stop - 1]), int(ends[rows].max()), None
        if filled[rows].any():
            first = filled_of[rows, None, None, None]
            mask = torch.arange(keys, device=device) <= first + torch.arange(width, device=device)[:, None]
        blocks.append(Block.of(rows, own, width, keys, mask, row[own] - rows.start, place[own]))
    hidden = backbone.appended(tokens, slot, Packing(row, slot, int(ends.max()), blocks), cache)
    return hidden[last_of]


def batches(lengths: Sequence[int], block: int) -> list[slice]:
    """Divide rows of rising lengths into blocks that cost the least: their padded tokens, and `block` for each."""
    cost, begin = [0], [0]
    for end, longest in enumerate(lengths, start=1):
        best = min(range(end), key=lambda start: cost[start] + (end - start) * longest)
        cost.append(cost[best] + (end - best) * longest + block)
        begin.append(best)
    found, end = [], len(lengths)
    while end:
        found.append(slice(begin[end], end))
        end = begin[end]
    return found[::-1]

"""The forward pass of a batch of prompts: what is kept of them is not computed again, and little of it is padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from recommender.cache import TreeCache

if TYPE_CHECKING:
    from recommender.backbone import Backbone
    from recommender.prefixes import Prefixes

# What a further forward costs, in tokens that it could have computed: its operators on a CPU, its weights on a GPU.
_FORWARD = {"cpu": 64}
_FORWARD_ELSEWHERE = 1024


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
    filled = [length for length, _ in kept]
    missing = [len(prompt) - length for prompt, length in zip(prompts, filled, strict=True)]

    cache = TreeCache(backbone.num_layers, len(prompts), max(filled) + missing[-1] + headroom)
    row = 0
    for _, same in groupby(kept, key=lambda each: (each[0], id(each[1]))):
        (length, states), *others = same
        if length:
            cache.load(slice(row, row + 1 + len(others)), states, length)
        row += 1 + len(others)

    groups = batches(missing, _FORWARD.get(backbone.device.type, _FORWARD_ELSEWHERE))
    hidden = torch.cat([_forward(backbone, prompts[rows], filled[rows], rows, cache) for rows in groups])
    cache.append_at(max(map(len, prompts)))
    prefixes.keep(prompts, cache)
    return Prefilled(torch.tensor(order, device=backbone.device), hidden, cache)


def batches(lengths: Sequence[int], forward: int) -> list[slice]:
    """Divide rows of rising lengths into batches that cost the least: their padded tokens, and `forward` for each."""
    cost, begin = [0], [0]
    for end, longest in enumerate(lengths, start=1):
        best = min(range(end), key=lambda start: cost[start] + (end - start) * longest)
        cost.append(cost[best] + (end - best) * longest + forward)
        begin.append(best)
    found, end = [], len(lengths)
    while end:
        found.append(slice(begin[end], end))
        end = begin[end]
    return found[::-1]


def _forward(
    backbone: Backbone, prompts: Sequence[np.ndarray], filled: Sequence[int], rows: slice, cache: TreeCache
) -> Tensor:
    """Run what follows the first `filled` tokens of the prompts in some rows, right-padded: [rows, D]."""
    missing = [len(prompt) - length for prompt, length in zip(prompts, filled, strict=True)]
    padded = np.zeros((len(prompts), max(missing)), np.int64)
    for row, (prompt, length) in enumerate(zip(prompts, filled, strict=True)):
        padded[row, : missing[row]] = prompt[length:]
    device = backbone.device
    input_ids, start = torch.from_numpy(padded).to(device), torch.tensor(filled, device=device)
    last = torch.tensor(missing, device=device) - 1
    position_ids = start[:, None] + torch.arange(padded.shape[1], device=device)
    mask = None
    if max(filled):
        position_ids = torch.minimum(position_ids, (start + last)[:, None])  # padding stays within the context
        slots = torch.arange(max(filled) + padded.shape[1], device=device)
        mask = (slots <= position_ids[..., None])[:, None]
    cache.write_at(rows, filled, padded.shape[1])
    hidden = backbone.hidden(input_ids, mask, position_ids, cache)
    return hidden[torch.arange(len(prompts), device=device), last]

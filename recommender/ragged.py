"""Ranges of unequal lengths, laid end to end."""

from __future__ import annotations

import torch
from torch import Tensor


def ragged(counts: Tensor, total: int | None = None) -> tuple[Tensor, Tensor]:
    """For ranges of `counts` elements laid end to end: the range of each element, and the place in it; int64.

    Args:
        counts: int64 [N].
        total: their sum, where it is known; without it a GPU has to be waited for.
    """
    owner = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=total)
    before = counts.cumsum(0) - counts
    return owner, torch.arange(len(owner), device=counts.device) - before[owner]

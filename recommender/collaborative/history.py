"""What Caser and BPR know of a user beyond the last items: the mean of the history."""

from __future__ import annotations

import torch
from torch import Tensor


def running_mean(vectors: Tensor) -> Tensor:
    """The mean of the vectors up to each place: [B, T, D] → [B, T, D]."""
    counts = torch.arange(1, vectors.shape[1] + 1, device=vectors.device, dtype=vectors.dtype)
    return vectors.cumsum(1) / counts[:, None]

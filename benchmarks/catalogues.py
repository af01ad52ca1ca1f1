"""Simulated catalogues and collaborative models, of any size."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def random_titles(items: int, vocabulary: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Distinct spelled titles, int32, each closed by token 1."""
    words = rng.permutation(np.arange(2, vocabulary))
    openings = max(items // 6, 2)  # Office: 2,414 items, some 400 first tokens; Games: 16,859 and 2,500
    titles: set[tuple[int, ...]] = set()
    while len(titles) < items:
        opening = int(openings * rng.beta(0.6, 1.6))
        following = (opening * 7 + rng.integers(0, 12, int(rng.integers(2, 7)))) % (vocabulary - 2)
        titles.add((int(words[opening % len(words)]), *map(int, words[following])))
    return [np.array([*title, 1], np.int32) for title in sorted(titles)]


class SimulatedModel(nn.Module):
    """Stands in for a collaborative model: a random embedding a history, Gaussian scores of a given spread."""

    def __init__(self, items: int, width: int, spread: float):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(items, width, generator=generator) * spread / width**0.5)

    def embed_prefixes(self, sequences: Any, lengths: Any) -> Tensor:
        count = sum(map(len, lengths))
        return torch.randn(count, self.table.shape[1], generator=torch.Generator().manual_seed(1))

    def scores(self, embedding: Tensor) -> Tensor:
        return embedding @ self.table.T

"""Caser."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recommender.collaborative.config import CaserConfig
from recommender.collaborative.history import running_mean
from recommender.collaborative.model import CausalModel


class Caser(CausalModel):
    """Convolutional sequence embedding (Tang and Wang, WSDM 2018).

    The last `window` item vectors are an image: horizontal filters of every height, max-pooled over time, find unions
    of items; vertical filters are weighted sums over the window. It differs from the paper in the user's vector, for
    which new users have none: the mean of the history's item vectors stands in for it; and in its loss, a softmax over
    all items where the paper has binary cross-entropies with sampled negatives.
    """

    def __init__(self, config: CaserConfig, items: int):
        super().__init__(config, items)
        self.window = config.window
        self.horizontal = nn.ModuleList(
            nn.Conv1d(config.dim, config.horizontal, height) for height in range(1, config.window + 1)
        )
        self.vertical = nn.Linear(config.window, config.vertical, bias=False)
        self.sequence = nn.Linear(config.window * config.horizontal + config.vertical * config.dim, config.dim)
        self.out = nn.Linear(2 * config.dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def states(self, items: Tensor) -> Tensor:
        vectors = self.dropout(self.vectors(items))
        before = F.pad(vectors, (0, 0, self.window - 1, 0))  # zeros in front of the first item
        images = before.unfold(1, self.window, 1)  # [B, T, dim, window], a view
        tall = [self._found(before, height) for height in range(1, self.window + 1)]
        wide = self.vertical(images).flatten(2)
        sequence = F.relu(self.sequence(self.dropout(torch.cat([*tall, wide], dim=2))))
        return self.out(torch.cat([sequence, running_mean(vectors)], dim=2))

    def _found(self, before: Tensor, height: int) -> Tensor:
        """Filters of one height, max-pooled over the window that ends at each place: [B, T, filters]."""
        found = F.relu(self.horizontal[height - 1](before.transpose(1, 2)))
        return F.max_pool1d(found, self.window - height + 1, stride=1).transpose(1, 2)

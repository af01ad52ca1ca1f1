"""A key-value cache that is written in place: a search appends to it and never copies, expands or reorders it."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class TreeCacheLayer(CacheLayerMixin):
    """One layer's keys and values, `[rows, heads, capacity, head_dim]`, of which the first `length` slots are filled.

    The first `update` (the prompt) reserves `headroom` further slots; a full buffer doubles.
    """

    is_sliding = False

    def __init__(self, headroom: int = 0) -> None:
        super().__init__()
        self.headroom = headroom
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        capacity = key_states.shape[2] + self.headroom
        self.keys = _resized(key_states, 0, capacity)
        self.values = _resized(value_states, 0, capacity)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new slots and return views of all filled ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        start, end = self.length, self.length + key_states.shape[2]
        if end > self.keys.shape[2]:
            self.keys = _resized(self.keys, start, 2 * end)
            self.values = _resized(self.values, start, 2 * end)
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def keep_rows(self, rows: torch.Tensor) -> None:
        assert self.keys is not None
        assert self.values is not None
        self.keys = self.keys.index_select(0, rows)
        self.values = self.values.index_select(0, rows)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class TreeCache(Cache):
    """A cache of :class:`TreeCacheLayer`, one for each of the model's layers."""

    def __init__(self, layers: int, headroom: int) -> None:
        """Reserve `headroom` slots after the prompt."""
        self.tree_layers = [TreeCacheLayer(headroom) for _ in range(layers)]
        super().__init__(layers=[*self.tree_layers])

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Drop all rows but `rows` (int64 [n]): the one copy, worth it when few rows are still searched."""
        for layer in self.tree_layers:
            layer.keep_rows(rows)


def _resized(states: torch.Tensor, filled: int, capacity: int) -> torch.Tensor:
    rows, heads, _, width = states.shape
    resized = states.new_empty(rows, heads, capacity, width)
    resized[:, :, :filled] = states[:, :, :filled]
    return resized

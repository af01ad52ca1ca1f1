"""A key-value cache that is written in place: a search appends to it and never expands or reorders it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, CacheLayerMixin

from recommender.backbone.packing import Packing

States = list[tuple[Tensor, Tensor]]  # for each layer: keys and values [tokens, heads, head_dim] of one row


class TreeCacheLayer(CacheLayerMixin):
    """One layer's keys and values, `[rows, capacity, heads, head_dim]`: the order in which a decoder computes them.

    Slots that nobody wrote to hold zeros: attention gives them no weight, but a NaN would outlive that.
    """

    is_sliding = False

    def __init__(self, count: int, capacity: int) -> None:
        super().__init__()
        self.count, self.capacity = count, capacity
        self.place = torch.empty(0, dtype=torch.int64)  # [T], of what is written next, among rows · capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_zeros(self.count, self.capacity, *states.shape[1:]) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write what is new, [1, heads, T, head_dim], and return all rows, [rows, heads, capacity, head_dim]."""
        new_keys, new_values = key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)
        keys, values = self.buffers(new_keys, new_values)
        keys.flatten(0, 1).index_copy_(0, self.place, new_keys)
        values.flatten(0, 1).index_copy_(0, self.place, new_values)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def buffers(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values; the first call makes room for such as are given, [tokens, heads, head_dim]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.written()

    def written(self) -> tuple[Tensor, Tensor]:
        """All keys and values, of which there are some."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def grow(self, capacity: int) -> None:
        """Make room for so many slots."""
        if self.is_initialized:
            more = (0, 0, 0, 0, 0, capacity - self.capacity)
            self.keys, self.values = (pad(states, more) for states in self.written())
        self.capacity = capacity

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.capacity, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class TreeCache(Cache):
    """A cache of :class:`TreeCacheLayer`, one for each of the model's layers. It takes what a `Packing` describes.

    Args:
        layers: their number.
        rows: sequences.
        capacity: slots of each, to begin with.

    Attributes:
        end: where the latest tokens end, in the row with the most.
    """

    def __init__(self, layers: int, rows: int, capacity: int) -> None:
        self.tree_layers = [TreeCacheLayer(rows, capacity) for _ in range(layers)]
        self.capacity, self.end = capacity, 0
        super().__init__(layers=[*self.tree_layers])

    def write_at(self, packing: Packing) -> None:
        """Let the next update write these tokens. A cache that is full doubles."""
        self.end = packing.end
        if self.end > self.capacity:
            self.capacity = 2 * self.end
            for layer in self.tree_layers:
                layer.grow(self.capacity)
        place = packing.row * self.capacity + packing.slot
        for layer in self.tree_layers:
            layer.place = place

    def load(self, rows: slice, states: States, length: int) -> None:
        """Fill the first `length` slots of the rows `rows` with the first of `states`."""
        for layer, (own_keys, own_values) in zip(self.tree_layers, states, strict=True):
            keys, values = layer.buffers(own_keys, own_values)
            keys[rows, :length] = own_keys[:length]
            values[rows, :length] = own_values[:length]

    def states(self, row: int, length: int) -> States:
        """A copy of the first `length` slots of a row."""
        found = (layer.written() for layer in self.tree_layers)
        return [(keys[row, :length].clone(), values[row, :length].clone()) for keys, values in found]

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows but `rows` (int64 [n]): a copy, worth it when less than half are still searched."""
        for layer in self.tree_layers:
            layer.keys, layer.values = (states.index_select(0, rows) for states in layer.written())

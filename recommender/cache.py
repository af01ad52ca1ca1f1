"""A key-value cache that is written in place: a search appends to it and never copies, expands or reorders it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

States = list[tuple[Tensor, Tensor]]  # for each layer: keys and values [heads, tokens, head_dim] of one row


class TreeCacheLayer(CacheLayerMixin):
    """One layer's keys and values, `[rows, heads, capacity, head_dim]`.

    An update writes to the rows `rows`, from slot `length` on or to the slots `slots` [rows, new]. A full buffer
    doubles. Slots that nobody wrote to hold zeros: attention gives them no weight, but a NaN would outlive that.
    """

    is_sliding = False

    def __init__(self, count: int, capacity: int) -> None:
        super().__init__()
        self.count, self.capacity = count, capacity
        self.rows, self.length = slice(None), 0
        self.slots: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            states.new_zeros(self.count, states.shape[-3], self.capacity, states.shape[-1])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new slots and return views of the rows' slots up to the last new one."""
        keys, values = self.buffers(key_states, value_states)
        start, end = self.length, self.length + key_states.shape[2]
        if end > keys.shape[2]:
            self.keys, self.values = keys, values = _doubled(keys, end), _doubled(values, end)
        keys, values = keys[self.rows], values[self.rows]
        if self.slots is None:
            keys[:, :, start:end] = key_states
            values[:, :, start:end] = value_states
        else:
            row = torch.arange(len(keys), device=keys.device)[:, None]
            keys[row, :, self.slots] = key_states.transpose(1, 2)
            values[row, :, self.slots] = value_states.transpose(1, 2)
        self.length = end
        return keys[:, :, :end], values[:, :, :end]

    def buffers(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values; the first call makes room for such as are given."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1


class TreeCache(Cache):
    """A cache of :class:`TreeCacheLayer`, one for each of the model's layers.

    Args:
        layers: their number.
        rows: sequences.
        capacity: slots of each, to begin with.
    """

    def __init__(self, layers: int, rows: int, capacity: int) -> None:
        self.tree_layers = [TreeCacheLayer(rows, capacity) for _ in range(layers)]
        super().__init__(layers=[*self.tree_layers])

    def write_at(self, rows: slice, filled: Sequence[int], width: int) -> None:
        """Let the next update write `width` slots of the rows `rows`, each behind as many as it has `filled`."""
        slots = None
        if min(filled) < max(filled):
            device = self.tree_layers[0].device
            slots = torch.tensor(filled, device=device)[:, None] + torch.arange(width, device=device)
        for layer in self.tree_layers:
            layer.rows, layer.length, layer.slots = rows, max(filled), slots

    def append_at(self, length: int) -> None:
        """Let all further updates write to all rows, from slot `length` on."""
        for layer in self.tree_layers:
            layer.rows, layer.length, layer.slots = slice(None), length, None

    def load(self, rows: slice, states: States, length: int) -> None:
        """Fill the first `length` slots of the rows `rows` with the first of `states`."""
        for layer, (own_keys, own_values) in zip(self.tree_layers, states, strict=True):
            keys, values = layer.buffers(own_keys, own_values)
            keys[rows, :, :length] = own_keys[:, :length]
            values[rows, :, :length] = own_values[:, :length]

    def states(self, row: int, length: int) -> States:
        """A copy of the first `length` slots of a row."""
        copied = []
        for layer in self.tree_layers:
            assert layer.keys is not None
            assert layer.values is not None
            copied.append((layer.keys[row, :, :length].clone(), layer.values[row, :, :length].clone()))
        return copied

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows but `rows` (int64 [n]): the one copy, worth it when few rows are still searched."""
        for layer in self.tree_layers:
            assert layer.keys is not None
            assert layer.values is not None
            layer.keys = layer.keys.index_select(0, rows)
            layer.values = layer.values.index_select(0, rows)


def _doubled(states: Tensor, filled: int) -> Tensor:
    """Room for twice as many slots as will be filled."""
    rows, heads, capacity, width = states.shape
    larger = states.new_zeros(rows, heads, 2 * filled, width)
    larger[:, :, :capacity] = states
    return larger

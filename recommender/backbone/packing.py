"""Tokens of many rows of a cache in one sequence: no layer but attention computes padding.

A decoder's products, norms and activations know nothing of rows. So a search hands it the new tokens of all rows one
after the other; the cache puts their keys and values into their rows, and attention alone gets rows of one width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Consecutive rows whose new tokens attend together, each row padded to the widest.

    Attributes:
        rows: of the cache.
        tokens: theirs, of the sequence.
        width: tokens of the widest row.
        keys: slots of the cache that they may see, the first.
        mask: bool [rows, 1, width, keys], True where a token may attend; None = plain causal attention over as many
            keys as tokens.
        place: int64 [tokens]; where each is among rows · width. None where that is its own number: nothing is padded.
    """

    rows: slice
    tokens: slice
    width: int
    keys: int
    mask: Tensor | None
    place: Tensor | None

    @classmethod
    def of(
        cls, rows: slice, tokens: slice, width: int, keys: int, mask: Tensor | None, row: Tensor, place: Tensor
    ) -> Block:
        """A block of tokens given by their row (of these, from 0) and their place in it: int64 [tokens] both."""
        is_full = (rows.stop - rows.start) * width == tokens.stop - tokens.start
        return cls(rows, tokens, width, keys, mask, None if is_full else row * width + place)

    def padded(self, tokens: Tensor) -> Tensor:
        """[heads, all tokens, D] as [rows, heads, width, D]; padding is 0."""
        own = tokens[:, self.tokens].transpose(0, 1)
        if self.place is not None:
            count = (self.rows.stop - self.rows.start) * self.width
            own = own.new_zeros(count, *own.shape[1:]).index_copy_(0, self.place, own)
        return own.unflatten(0, (-1, self.width)).transpose(1, 2)

    def packed(self, rows: Tensor) -> Tensor:
        """[rows, width, heads, D] as [tokens, heads, D]."""
        tokens = rows.flatten(0, 1)
        return tokens if self.place is None else tokens.index_select(0, self.place)


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a sequence belong.

    Attributes:
        row: int64 [T]; of the cache. Rows follow each other.
        slot: int64 [T]; of the row.
        end: slots that rows have by then, at most.
        blocks: of all tokens, in order.
    """

    row: Tensor
    slot: Tensor
    end: int
    blocks: Sequence[Block]

    @classmethod
    def of_row(cls, filled: int, end: int, mask: Tensor | None, device: torch.device) -> Packing:
        """The slots `filled` … `end` − 1 of a cache of one row; the mask is as a block's."""
        slot = torch.arange(filled, end, device=device)
        count = end - filled
        block = Block(slice(0, 1), slice(0, count), count, end, mask, None)
        return cls(torch.zeros_like(slot), slot, end, [block])

    def attend(
        self, attention: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor], query: Tensor, keys: Tensor,
        values: Tensor,
    ) -> Tensor:  # fmt: skip
        """Attention block by block: [1, T, heads, D].

        Args:
            attention: of query [rows, heads, width, D], keys and values [rows, heads', keys, D] and a block's mask:
                [rows, width, heads, D].
            query: [1, heads, T, D].
            keys, values: [all rows, heads', slots, D].
        """
        found = []
        for block in self.blocks:
            seen, read = (states[block.rows, :, : block.keys] for states in (keys, values))
            found.append(block.packed(attention(block.padded(query[0]), seen, read, block.mask)))
        return (found[0] if len(found) == 1 else torch.cat(found))[None]

    def as_mask(self, device: torch.device) -> PackedMask:
        """The mask under which a decoder attends like this; see `recommender/backbone/attention.py`."""
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device).as_subclass(PackedMask)
        mask.packing = self
        return mask


class PackedMask(Tensor):
    """What `transformers` takes for a finished mask, as it has four dimensions, and so hands to attention untouched.

    A model that makes another mask of it gets one without a packing.
    """

    packing: Packing | None = None

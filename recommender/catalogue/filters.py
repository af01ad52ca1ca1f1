"""Which items a search may return, for each history of a batch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

Filter = Sequence[Collection[int] | np.ndarray | None]  # items, for each history


@dataclass(frozen=True)
class Allowed:
    """The filters of a batch: each row lists the leaves that it allows, or those that it leaves out."""

    items: int
    lists_allowed: torch.Tensor  # bool [R]
    keys: torch.Tensor  # int64, rising: row · items + leaf of every listed leaf

    @classmethod
    def of(
        cls,
        leaf_of_item: np.ndarray,
        rows: int,
        exclude: Filter | None,
        allow: Filter | None,
        device: torch.device,
    ) -> Allowed | None:
        """The filters of `rows` histories, or None where there are none.

        Raises
        ------
        ValueError
            There are filters for another number of histories.
        """
        exclude, allow = exclude or [()] * rows, allow or [None] * rows
        if len(exclude) != rows or len(allow) != rows:
            raise ValueError(f"filters must be given for each of the {rows} prompts")
        if not any(map(_size, exclude)) and all(only is None for only in allow):
            return None
        items, keys = len(leaf_of_item), []
        for row, (left_out, only) in enumerate(zip(exclude, allow, strict=True)):
            leaves = np.unique(_leaves(leaf_of_item, left_out))
            if only is not None:
                leaves = np.setdiff1d(_leaves(leaf_of_item, only), leaves)
            keys.append(leaves + row * items)
        lists_allowed = torch.tensor([only is not None for only in allow], device=device)
        return cls(items, lists_allowed, torch.from_numpy(np.concatenate(keys)).to(device))

    def within(self, row: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor) -> torch.Tensor:
        """How many of the leaves lo … hi − 1 are allowed: int64 [N]."""
        start = row * self.items
        listed = torch.searchsorted(self.keys, start + hi) - torch.searchsorted(self.keys, start + lo)
        return torch.where(self.lists_allowed[row], listed, hi - lo - listed)


def _leaves(leaf_of_item: np.ndarray, items: Collection[int] | np.ndarray | None) -> np.ndarray:
    listed = items if isinstance(items, np.ndarray) else list(items or ())
    return leaf_of_item[np.asarray(listed, np.int64)].astype(np.int64)


def _size(items: Collection[int] | np.ndarray | None) -> int:
    return 0 if items is None else len(items)

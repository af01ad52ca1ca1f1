"""What any recommender answers, whatever model is behind it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from recommender.bundle import Manifest
from recommender.catalogue.catalogue import Catalogue
from recommender.catalogue.filters import Filter
from recommender.config import SearchConfig

Spelling = list[tuple[str, float]]  # of an item: each of its tokens and its log-probability, then what priors add


@dataclass(frozen=True)
class Recommendation:
    """The top-K for one history.

    Attributes:
        items: item indices, best first; fewer than k when the filters leave fewer.
        scores: of the items, in the same order: log-probabilities, or what an ItemKNN or TF-IDF gives, and priors.
        exact: whether this is proven to be the true top-K of the allowed items.
        expansions: trie nodes that the search expanded; 0 for a model that scores every item.
        prompt_tokens: tokens of the prompt that was run; 0 for a model that reads none.
        spellings: of the items, in the same order, where they were asked for.
    """

    items: list[int]
    scores: list[float]
    exact: bool
    expansions: int
    prompt_tokens: int = 0
    spellings: list[Spelling] | None = None


class AnyRecommender(Protocol):
    """A language model with its search, or one that scores every item: what evaluation and the endpoint ask of them."""

    catalogue: Catalogue
    manifest: Manifest

    def recommend(
        self,
        histories: Sequence[Sequence[int]],
        k: int | Sequence[int] = 10,
        exclude: Sequence[Collection[int]] | None = None,
        allow: Sequence[Collection[int] | None] | None = None,
        search: SearchConfig | None = None,
    ) -> list[Recommendation]:
        """The top-K items for each history.

        Args:
            histories: item indices, oldest first.
            k: how many items, for all or for each.
            exclude: items that may not be recommended, for each history.
            allow: if not None, the only items that may be, for each history.
            search: whose score, mode, width, node budget and priors are kept in place of the recommender's own, where
                it has such.
        """
        ...

    def rank(
        self,
        histories: Sequence[Sequence[int]],
        candidates: Sequence[Sequence[int]],
        search: SearchConfig | None = None,
    ) -> list[list[float]]:
        """The scores of given candidates, as `recommend` would give them: one list for each history.

        Args:
            histories: item indices, oldest first.
            candidates: item indices, at least one for each history.
            search: whose score and priors are taken in place of the recommender's own.
        """
        ...

    def spellings(
        self, history: Sequence[int], items: Sequence[int], search: SearchConfig | None = None
    ) -> list[Spelling] | None:
        """What adds up to the items' scores; None from a model that does not spell items.

        Args:
            history, search: as in `rank`.
            items: item indices, at least one.
        """
        ...

    def tokens(
        self, history: Sequence[int], candidates: Sequence[int] | None = None, search: SearchConfig | None = None
    ) -> int:
        """What one history takes in a batch, counted beforehand; it may be called while another thread computes.

        Args:
            history: item indices, oldest first.
            candidates: to be ranked; None: items are to be recommended.
            search: as in `recommend`.
        """
        ...


def allowed_items(rows: int, items: int, exclude: Filter | None, allow: Filter | None) -> torch.Tensor | None:
    """What the filters leave: bool [rows, items], or None where they leave everything."""
    if not any(left_out is not None and len(left_out) for left_out in exclude or ()) and all(
        only is None for only in allow or ()
    ):
        return None
    allowed = torch.ones(rows, items, dtype=torch.bool)
    for row in range(rows):
        if allow and (only := allow[row]) is not None:
            allowed[row] = False
            allowed[row, _indices(only)] = True
        if exclude and (left_out := exclude[row]) is not None:
            allowed[row, _indices(left_out)] = False
    return allowed


def _indices(items: Collection[int] | np.ndarray) -> torch.Tensor:
    return torch.as_tensor(items if isinstance(items, np.ndarray) else list(items), dtype=torch.int64)

"""A recommender that scores every item, so that its top-K needs no search."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from recommender.bundle import Manifest
from recommender.catalogue.catalogue import Catalogue
from recommender.config import Score, SearchConfig
from recommender.recommendation import Recommendation, allowed_items


class ScoredRecommender(ABC):
    """What a collaborative model and the floors share: the top-K of a row of scores, filters, given candidates.

    Args:
        catalogue: the items, in the order of the scores.
        manifest: name, metrics.
    """

    def __init__(self, catalogue: Catalogue, manifest: Manifest):
        self.catalogue = catalogue
        self.manifest = manifest

    @abstractmethod
    def scores(self, histories: Sequence[Sequence[int] | np.ndarray]) -> Tensor:
        """Scores of all items: float32 [histories, items]; the higher the better.

        Args:
            histories: item indices, oldest first, of any length, 0 included.
        """

    @torch.inference_mode()
    def recommend(
        self,
        histories: Sequence[Sequence[int] | np.ndarray],
        k: int | Sequence[int] = 10,
        exclude: Sequence[Collection[int]] | None = None,
        allow: Sequence[Collection[int] | None] | None = None,
        search: SearchConfig | None = None,
    ) -> list[Recommendation]:
        """The top-K items for each history; filters never change a score.

        Args:
            histories: item indices, oldest first.
            k: how many items, for all or for each.
            exclude: items that may not be recommended, for each history.
            allow: if not None, the only items that may be, for each history.
            search: of no effect: every item is scored.
        """
        scores = self.scores(histories)
        allowed = allowed_items(len(histories), len(self.catalogue), exclude, allow)
        if allowed is not None:
            scores = scores.masked_fill(~allowed.to(scores.device), -torch.inf)
        wanted = [k] * len(histories) if isinstance(k, int) else list(k)
        return [_best(row, wanted[number]) for number, row in enumerate(scores)]

    @torch.inference_mode()
    def rank(
        self,
        histories: Sequence[Sequence[int] | np.ndarray],
        candidates: Sequence[Sequence[int]],
        score: Score | None = None,
    ) -> list[list[float]]:
        """The scores of given candidates, as `recommend` would give them.

        Args:
            histories: as in `recommend`.
            candidates: item indices, for each history.
            score: of no effect: there is one.
        """
        return [row[list(items)].tolist() for row, items in zip(self.scores(histories), candidates, strict=True)]

    def spellings(self, history: Sequence[int], items: Sequence[int], score: Score | None = None) -> None:
        """Nothing: items are not spelled in tokens."""
        return

    def tokens(
        self, history: Sequence[int], candidates: Sequence[int] | None = None, search: SearchConfig | None = None
    ) -> int:
        """Items of the history that are read. Candidates and searches take nothing: every item is scored anyway."""
        return len(history)


def _best(scores: Tensor, k: int) -> Recommendation:
    """The k best finite scores [items]; of equal ones the lower index comes first, which `topk` does not promise."""
    smallest = scores.topk(min(k, len(scores))).values[-1]
    found = ((scores >= smallest) & scores.isfinite()).nonzero().flatten()
    order = scores[found].sort(descending=True, stable=True).indices[:k]
    items = found[order]
    return Recommendation(items.tolist(), scores[items].tolist(), exact=True, expansions=0)

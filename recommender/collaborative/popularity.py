"""The most popular items: the answer for a user of whom nothing is known."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from recommender.recommendation import Recommendation, allowed_items


class MostPopular:
    """Ranks items by how often they occur in the training data; of equal ones the lower index comes first.

    Args:
        counts: int64 [items].
    """

    def __init__(self, counts: np.ndarray):
        self._order = np.argsort(-counts, kind="stable")
        self._scores = np.log((counts + 1) / (counts.sum() + len(counts)))

    def recommend(
        self,
        k: Sequence[int],
        exclude: Sequence[Collection[int]] | None = None,
        allow: Sequence[Collection[int] | None] | None = None,
    ) -> list[Recommendation]:
        """The top-K under filters; scores are log-shares of the training interactions, one added to each count."""
        allowed = allowed_items(len(k), len(self._order), exclude, allow)
        answers = []
        for row, count in enumerate(k):
            left = self._order if allowed is None else self._order[allowed[row].numpy()[self._order]]
            best = left[:count]
            answers.append(Recommendation(best.tolist(), self._scores[best].tolist(), exact=True, expansions=0))
        return answers

    def rank(self, candidates: Sequence[int]) -> list[float]:
        """The scores of given candidates."""
        return self._scores[list(candidates)].tolist()

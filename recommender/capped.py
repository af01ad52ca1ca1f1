"""Lists in which no value of a column comes too often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from recommender.catalogue.columns import Column
from recommender.config import SearchConfig
from recommender.recommendation import AnyRecommender, Recommendation


class CappedList:
    """A list that grows, best item first, until it is full, while no value of a capped column comes too often.

    What the caps leave is found by searching again, for twice as many, without the values that have come often enough:
    filters prune inside the search, so that the list is exact if every search was. All its searches share one node
    budget.

    Args:
        history: item indices, oldest first.
        k: how many items.
        exclude: int64; items that may not be recommended.
        allow: int64; if not None, the only items that may be.
        caps: by the name of one of `columns`, how many items of one value.
        own: the model's score and limits.
        search: those that are asked for in their place.
    """

    def __init__(
        self,
        history: Sequence[int],
        k: int,
        exclude: np.ndarray,
        allow: np.ndarray | None,
        caps: Mapping[str, int],
        columns: Mapping[str, Column],
        own: SearchConfig,
        search: SearchConfig | None = None,
    ):
        self.history, self.k, self.exclude, self.allow = history, k, exclude, allow
        self.complete = False
        self._columns = [(columns[name], cap, Counter[int]()) for name, cap in caps.items()]
        self._items: list[int] = []
        self._scores: list[float] = []
        self._rounds = 0
        self._asked, self._search = search, search or own
        self._exact = True
        self._expansions = self._prompt_tokens = 0

    @property
    def wanted(self) -> int:
        """Items to ask for next."""
        return (self.k - len(self._items)) * 2**self._rounds

    @property
    def budget(self) -> int:
        """Nodes that further searches may expand."""
        return self._search.node_budget - self._expansions

    @property
    def search(self) -> SearchConfig | None:
        """The limits of the next search; None: the model's own."""
        return self._search.model_copy(update={"node_budget": self.budget}) if self._rounds else self._asked

    def add(self, found: Recommendation) -> None:
        """Take in what was found for `wanted` items without those in `exclude`."""
        asked = self.wanted
        out = [self.exclude, np.array(found.items, np.int64)]
        for item, score in zip(found.items, found.scores, strict=True):
            if len(self._items) == self.k:
                break
            values = [
                (column, cap, seen, code) for column, cap, seen in self._columns for code in column.codes_of(item)
            ]
            if any(seen[code] >= cap for _, cap, seen, code in values):
                continue
            self._items.append(item)
            self._scores.append(score)
            for column, cap, seen, code in values:
                seen[code] += 1
                if seen[code] == cap:
                    out.append(column.items_of(code))
        self.exclude = np.concatenate(out)
        self.complete = len(self._items) == self.k or len(found.items) < asked
        self._rounds += 1
        self._exact = self._exact and found.exact
        self._expansions += found.expansions
        self._prompt_tokens += found.prompt_tokens

    def answer(self) -> Recommendation:
        """The list as it is."""
        exact = self._exact and self.complete
        return Recommendation(self._items, self._scores, exact, self._expansions, self._prompt_tokens)


def fill(lists: Sequence[CappedList], find: Callable[[Sequence[CappedList]], list[Recommendation]]) -> None:
    """Let lists grow until they are complete, or their budget is spent.

    Args:
        find: the next search of each of some lists.
    """
    unfinished = list(lists)
    while unfinished:
        for each, found in zip(unfinished, find(unfinished), strict=True):
            each.add(found)
        unfinished = [each for each in unfinished if not each.complete and each.budget > 0]


def search_together(recommender: AnyRecommender, lists: Sequence[CappedList]) -> list[Recommendation]:
    """The next search of each list: together, as far as their limits are the same."""
    found: dict[int, Recommendation] = {}
    groups: dict[str, tuple[SearchConfig | None, list[CappedList]]] = {}
    for each in lists:
        search = each.search
        same = "" if search is None else search.model_dump_json()
        groups.setdefault(same, (search, []))[1].append(each)
    for search, group in groups.values():
        answers = recommender.recommend(
            [each.history for each in group],
            [each.wanted for each in group],
            [each.exclude for each in group],
            [each.allow for each in group],
            search,
        )
        found |= zip(map(id, group), answers, strict=True)
    return [found[id(each)] for each in lists]

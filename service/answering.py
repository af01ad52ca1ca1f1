"""What the search thread does with a batch of queries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from recommender.config import SearchConfig
from recommender.recommendation import Recommendation
from service.queries import Query, RankQuery
from service.served import Served


def answer(served: Served, queries: Sequence[Query | RankQuery]) -> list[Recommendation]:
    """The lists that are asked for."""
    lists = {place: CappedList(served, q) for place, q in enumerate(queries) if isinstance(q, Query)}
    unfinished = list(lists.values())
    while unfinished:
        for each, found in zip(unfinished, _recommend(served, unfinished), strict=True):
            each.add(found)
        unfinished = [each for each in unfinished if not each.complete and each.budget > 0]
    answers = [lists[place].answer() if isinstance(q, Query) else _rank(served, q) for place, q in enumerate(queries)]
    return [
        _spelled(served, query, each) if query.spelled else each for query, each in zip(queries, answers, strict=True)
    ]


def tokens(served: Served, query: Query | RankQuery) -> int:
    """What a query takes of a batch's budget; nothing where the fallback answers."""
    if not query.history:
        return 0
    forwards = 2 if query.spelled else 1
    if isinstance(query, RankQuery):
        return forwards * served.recommender.tokens(query.history, query.candidates)
    return forwards * served.recommender.tokens(query.history, search=query.search)


class CappedList:
    """A list that grows, best item first, until it is full, while no value of a capped column comes too often.

    What the caps leave is found by searching again, for twice as many, without the values that have come often enough:
    filters prune inside the search, so that the list is exact if every search was. All its searches share one node
    budget.
    """

    def __init__(self, served: Served, query: Query):
        self.query = query
        self.exclude = query.exclude
        self.complete = False
        self._columns = [(served.columns[name], cap, Counter[int]()) for name, cap in query.caps.items()]
        self._items: list[int] = []
        self._scores: list[float] = []
        self._rounds = 0
        self._search = query.search or served.recommender.manifest.search
        self._exact = True
        self._expansions = self._prompt_tokens = 0

    @property
    def wanted(self) -> int:
        """Items to ask for next."""
        return (self.query.k - len(self._items)) * 2**self._rounds

    @property
    def budget(self) -> int:
        """Nodes that further searches may expand."""
        return self._search.node_budget - self._expansions

    @property
    def search(self) -> SearchConfig | None:
        """The limits of the next search; None: the model's own."""
        return self._search.model_copy(update={"node_budget": self.budget}) if self._rounds else self.query.search

    def add(self, found: Recommendation) -> None:
        """Take in what was found for `wanted` items without those in `exclude`."""
        asked = self.wanted
        out = [self.exclude, np.array(found.items, np.int64)]
        for item, score in zip(found.items, found.scores, strict=True):
            if len(self._items) == self.query.k:
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
        self.complete = len(self._items) == self.query.k or len(found.items) < asked
        self._rounds += 1
        self._exact = self._exact and found.exact
        self._expansions += found.expansions
        self._prompt_tokens += found.prompt_tokens

    def answer(self) -> Recommendation:
        """The list as it is."""
        exact = self._exact and self.complete
        return Recommendation(self._items, self._scores, exact, self._expansions, self._prompt_tokens)


def _recommend(served: Served, lists: Sequence[CappedList]) -> list[Recommendation]:
    """One search for each list: together, as far as the fallback and the limits of the search are the same."""
    found: dict[int, Recommendation] = {}
    groups: dict[tuple[bool, SearchConfig | None], list[CappedList]] = {}
    for each in lists:
        groups.setdefault((not each.query.history, each.search), []).append(each)
    for (fallback, search), group in groups.items():
        k, exclude, allow = [g.wanted for g in group], [g.exclude for g in group], [g.query.allow for g in group]
        if fallback:
            assert served.popular is not None
            answers = served.popular.recommend(k, exclude, allow)
        else:
            histories = [g.query.history for g in group]
            answers = served.recommender.recommend(histories, k, exclude, allow, search)
        found |= zip(map(id, group), answers, strict=True)
    return [found[id(each)] for each in lists]


def _rank(served: Served, query: RankQuery) -> Recommendation:
    """The candidates, each once; equal scores in the catalogue's order."""
    if query.history:
        [scores] = served.recommender.rank([query.history], [query.candidates], query.score)
    else:
        assert served.popular is not None
        scores = served.popular.rank(query.candidates)
    best = sorted(set(zip([-score for score in scores], query.candidates, strict=True)))
    return Recommendation([item for _, item in best], [-score for score, _ in best], exact=True, expansions=0)


def _spelled(served: Served, query: Query | RankQuery, found: Recommendation) -> Recommendation:
    """With its items' spellings, where a model that has such answered."""
    if not query.history or not found.items:
        return found
    return replace(found, spellings=served.recommender.spellings(query.history, found.items, query.score))

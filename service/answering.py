"""What the search thread does with a batch of queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from recommender.capped import CappedList, fill, search_together
from recommender.recommendation import Recommendation
from service.queries import Query, RankQuery
from service.served import Served


def answer(served: Served, queries: Sequence[Query | RankQuery]) -> list[Recommendation]:
    """The lists that are asked for."""
    lists = {place: _list(served, q) for place, q in enumerate(queries) if isinstance(q, Query)}
    fill(list(lists.values()), partial(_find, served))
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


def _list(served: Served, query: Query) -> CappedList:
    return CappedList(
        query.history,
        query.k,
        query.exclude,
        query.allow,
        query.caps,
        served.columns,
        served.recommender.manifest.search,
        query.search,
    )


def _find(served: Served, lists: Sequence[CappedList]) -> list[Recommendation]:
    """One search for each list; the fallback answers those without a history."""
    without = [each for each in lists if not each.history]
    found: dict[int, Recommendation] = {}
    if without:
        assert served.popular is not None
        k, exclude, allow = zip(*((each.wanted, each.exclude, each.allow) for each in without), strict=True)
        found |= zip(map(id, without), served.popular.recommend(k, exclude, allow), strict=True)
    others = [each for each in lists if each.history]
    found |= zip(map(id, others), search_together(served.recommender, others), strict=True)
    return [found[id(each)] for each in lists]


def _rank(served: Served, query: RankQuery) -> Recommendation:
    """The candidates, each once; equal scores in the catalogue's order."""
    if query.history:
        [scores] = served.recommender.rank([query.history], [query.candidates], query.search)
    else:
        assert served.popular is not None
        scores = served.popular.rank(query.candidates)
    best = sorted(set(zip([-score for score in scores], query.candidates, strict=True)))
    return Recommendation([item for _, item in best], [-score for score, _ in best], exact=True, expansions=0)


def _spelled(served: Served, query: Query | RankQuery, found: Recommendation) -> Recommendation:
    """With its items' spellings, where a model that has such answered."""
    if not query.history or not found.items:
        return found
    return replace(found, spellings=served.recommender.spellings(query.history, found.items, query.search))

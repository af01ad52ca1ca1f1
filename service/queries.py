"""Requests in item indices, checked against the model that is to answer them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from recommender.catalogue.catalogue import Catalogue
from recommender.catalogue.columns import column_named, items_where
from recommender.config import SearchConfig
from recommender.errors import UserError
from service import schema
from service.schema import FieldError
from service.served import Served

_HINTS = 20  # unknown items for which similar titles are looked up


@dataclass(frozen=True, eq=False)
class Query:
    """What to recommend.

    Attributes:
        history: empty where the fallback answers.
        exclude: int64; items that may not be recommended.
        allow: int64; if not None, the only items that may be.
        caps: by column, how many items of one value.
        search: score, limits and priors of the search, or None: the model's own.
        ignored: unknown items of the history.
        spelled: whether the log-probabilities of the items' tokens are wanted.
    """

    history: list[int]
    k: int
    exclude: np.ndarray
    allow: np.ndarray | None = None
    caps: dict[str, int] = field(default_factory=dict)
    search: SearchConfig | None = None
    ignored: list[str] = field(default_factory=list)
    spelled: bool = False


@dataclass(frozen=True, eq=False)
class RankQuery:
    """What to rank; as `Query`."""

    history: list[int]
    candidates: list[int]
    ignored: list[str]
    search: SearchConfig | None = None
    spelled: bool = False


class Resolver:
    """Turns what a request names into indices, and gathers what is wrong with it.

    Args:
        served: the model that is asked.
        prefix: of the names of faulty fields, e.g. "requests[2].".

    Attributes:
        errors: what is wrong so far; queries are only to be used while there is nothing.
    """

    def __init__(self, served: Served, prefix: str = ""):
        self.served = served
        self.errors: list[FieldError] = []
        self._prefix = prefix

    def query(self, asked: schema.RecommendationRequest) -> Query:
        """A request for recommendations."""
        history, ignored = self._history(asked)
        exclude = self._indices("deny", asked.deny or [])
        allow = None if asked.allow is None else self._indices("allow", asked.allow)
        if asked.exclude_seen:
            exclude = history + exclude
        for column in asked.max_per:
            self._has_column("max_per", column)
        return Query(
            history,
            asked.k,
            np.array(exclude, np.int64),
            self._where(asked.where, allow),
            asked.max_per,
            self._search(asked.search, asked.boost),
            ignored,
            asked.log_probabilities,
        )

    def rank_query(self, asked: schema.RankRequest) -> RankQuery:
        """A request for an order of candidates."""
        history, ignored = self._history(asked)
        candidates = self._indices("candidates", asked.candidates)
        search = self._search(None if asked.score is None else schema.SearchRequest(score=asked.score), asked.boost)
        return RankQuery(history, candidates, ignored, search, asked.log_probabilities)

    def _wrong(self, field: str, message: str) -> None:
        self.errors.append(FieldError(field=self._prefix + field, message=message))

    def _history(self, asked: schema.HistoryRequest) -> tuple[list[int], list[str]]:
        catalogue = self.served.catalogue
        ignored = []
        if asked.unknown_items == "ignore":
            found = [(text, catalogue.index_of(text)) for text in asked.history]
            ignored = [text for text, index in found if index is None]
            history = [index for _, index in found if index is not None]
        else:
            history = self._indices("history", asked.history)
        nothing = len(asked.history) == len(ignored)
        if nothing and self.served.popular is None:
            self._wrong(
                "history",
                "holds no known item, and there is no fallback (serving.fallback is none, or the bundle was exported "
                "without popularity); name at least 1 item of the catalogue",
            )
        return history, ignored

    def _indices(self, field: str, texts: Sequence[str]) -> list[int]:
        found = []
        for place, text in enumerate(texts):
            index = self.served.catalogue.index_of(text)
            if index is None:
                hint = len(self.errors) < _HINTS
                self._wrong(f"{field}[{place}]", _unknown(text, self.served.catalogue if hint else None))
            else:
                found.append(index)
        return found

    def _has_column(self, field: str, name: str) -> bool:
        try:
            column_named(self.served.columns, name)
        except UserError as error:
            self._wrong(f"{field}.{name[:80]}", str(error))
            return False
        return True

    def _where(self, where: dict[str, list[schema.Value]], allow: list[int] | None) -> np.ndarray | None:
        """int64, the items that have one of the values in every column and are among `allow`; None: all may be."""
        known = {name: values for name, values in where.items() if self._has_column("where", name)}
        return items_where(self.served.columns, known, allow, len(self.served.catalogue))

    def _search(self, asked: schema.SearchRequest | None, boost: Mapping[str, float]) -> SearchConfig | None:
        if asked is None and not boost:
            return None
        own = self.served.recommender.manifest.search
        for name, weight in boost.items():
            prior, field = (own.priors or {}).get(name), f"boost.{name[:80]}"
            if prior is None:
                self._wrong(field, f"the model has no such prior; it has: {', '.join(own.priors or {}) or 'none'}")
            elif prior.limits is None or not prior.limits[0] <= weight <= prior.limits[1]:
                allowed = (
                    "cannot be changed by requests"
                    if prior.limits is None
                    else "must be {} to {}".format(*prior.limits)
                )
                self._wrong(field, f"the weight of this prior {allowed} (search.priors.{name}.limits)")
        if self.errors:
            return None
        search = own.boosted(boost)
        return search if asked is None else search.model_copy(update=asked.model_dump(exclude_none=True))


def _unknown(text: str, catalogue: Catalogue | None) -> str:
    message = f"unknown item {text[:80]!r}"
    close = catalogue.similar_titles(text) if catalogue else []
    return message + (f"; did you mean {' or '.join(map(repr, close))}?" if close else "")

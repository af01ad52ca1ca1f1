"""What a recommender and its priors say of the items that could come first: read once, for any weights to be tried on.

A pool holds, for each target, the best items of the recommender and of each model prior, and what every one of them
says of each. The top of a blend lies within, unless an item is far down in all of their lists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from recommender.config import PriorConfig
from recommender.priors import Priors, without_priors
from recommender.recommendation import AnyRecommender
from trainer.evaluation.ranking import HeldOut

BASE = "model"


@dataclass(frozen=True)
class Pools:
    """Candidates of M targets, P places each.

    Attributes:
        items: int32 [M, P], rising; −1 fills up.
        scores: float32 [M, P] of the model (`BASE`) and of each prior, of models before their transforms.
        place: int64 [M], where the target is; −1 where it is in no list.
    """

    items: np.ndarray
    scores: dict[str, np.ndarray]
    place: np.ndarray

    def take(self, rows: np.ndarray) -> Pools:
        return Pools(self.items[rows], {n: s[rows] for n, s in self.scores.items()}, self.place[rows])

    def ranks(self, total: np.ndarray) -> np.ndarray:
        """int64 [M], the rank of each target by scores [M, P]; 0 where it is in no list. Ties: the lower item first."""
        rows = np.arange(len(total))
        at = np.maximum(self.place, 0)
        mine, filled = total[rows, at][:, None], self.items >= 0
        before = (total > mine) | ((total == mine) & (np.arange(total.shape[1]) < at[:, None]))
        return np.where(self.place >= 0, 1 + (before & filled).sum(1), 0)


def pools_of(
    recommender: AnyRecommender,
    priors: Priors,
    targets: HeldOut,
    exclude_seen: bool,
    size: int,
    batch: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Pools:
    """Read all lists.

    Args:
        priors: to be weighed; those that the recommender has itself are left out of its scores.
        size: items of each list.
    """
    search = without_priors(recommender)
    plain = {name: _plain(config) for name, config in priors.configs.items()}
    popularity = recommender.catalogue.popularity
    new = np.flatnonzero(popularity == 0) if popularity is not None else np.zeros(0, np.int64)
    rows: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
    for begin in range(0, len(targets), batch):
        histories = targets.histories[begin : begin + batch]
        seen = [set(history.tolist()) if exclude_seen else set() for history in histories]
        found = recommender.recommend(histories, size, seen, search=search)  # type: ignore[arg-type]
        terms = {name: priors.term(name, config, histories).numpy() for name, config in plain.items()}
        candidates = [
            _candidates(found[row].items, [terms[name][row] for name in priors.models], new, seen[row], size)
            for row in range(len(histories))
        ]
        scores = recommender.rank(histories, [each.tolist() for each in candidates], search)  # type: ignore[arg-type]
        for row, items in enumerate(candidates):
            of_priors = {name: term[row if len(term) > 1 else 0, items] for name, term in terms.items()}
            rows.append((items, {BASE: np.array(scores[row], np.float32), **of_priors}))
        progress(min(begin + batch, len(targets)))
    return _padded(rows, targets.targets)


def _plain(config: PriorConfig) -> PriorConfig:
    """Without the logarithm of counts, whose offset is still to be found."""
    return config.model_copy(update={"transform": "none", "scale": 1.0}) if config.kind == "model" else config


def _candidates(listed: list[int], scores: list[np.ndarray], new: np.ndarray, seen: set[int], size: int) -> np.ndarray:
    """int64, rising: the best items of each list, and of those that are new the best half as many again."""
    found = [np.array(listed, np.int64)]
    room = size + len(seen)  # what was seen may come first in every list
    for row in scores:
        found.append(_top(row, room))
        found.append(new[_top(row[new], room // 2)])
    items = np.unique(np.concatenate(found))
    return items[~np.isin(items, np.fromiter(seen, np.int64, len(seen)))]


def _top(scores: np.ndarray, count: int) -> np.ndarray:
    return np.argpartition(-scores, count)[:count] if count < len(scores) else np.arange(len(scores))


def _padded(rows: list[tuple[np.ndarray, dict[str, np.ndarray]]], targets: np.ndarray) -> Pools:
    width = max(len(items) for items, _ in rows)
    items = np.full((len(rows), width), -1, np.int32)
    scores = {name: np.zeros((len(rows), width), np.float32) for name in rows[0][1]}
    place = np.full(len(rows), -1, np.int64)
    for row, (own, of_items) in enumerate(rows):
        items[row, : len(own)] = own
        for name, values in of_items.items():
            scores[name][row, : len(own)] = values
        if len(at := np.flatnonzero(own == targets[row])):
            place[row] = at[0]
    return Pools(items, scores, place)

"""Ranks of held-out targets under a recommender's search: what every evaluation counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from recommender.recommendation import AnyRecommender
from trainer.data.dataset import Dataset
from trainer.parts import Say

_SAID_EVERY = 10  # seconds


@dataclass(frozen=True)
class HeldOut:
    """Held-out targets with their histories.

    Attributes:
        numbers: int64 [M]; rows of the split in the dataset.
        histories: item indices before each target, oldest first: all of them, or those of its published window.
        targets: int64 [M]; item indices.
        candidates: item indices among which each target is to be found, empty where none are given; None: for no one.
    """

    numbers: np.ndarray
    histories: list[np.ndarray]
    targets: np.ndarray
    candidates: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, at: np.ndarray) -> HeldOut:
        candidates = None if self.candidates is None else [self.candidates[i] for i in at]
        return HeldOut(self.numbers[at], [self.histories[i] for i in at], self.targets[at], candidates)


def held_out(dataset: Dataset, split: str, limit: int | None = None, seed: int = 0) -> HeldOut:
    """The targets of a split, or a seeded sample of `limit` of them."""
    numbers = np.arange(len(dataset.targets[split]))
    if limit is not None and limit < len(numbers):
        numbers = np.sort(np.random.default_rng(seed).choice(numbers, limit, replace=False))
    histories = dataset.histories(split)
    whole = HeldOut(
        np.arange(len(histories)), histories, dataset.held_out_items(split), dataset.targets[split].candidates
    )
    return whole.take(numbers)


class Progress:
    """Says every ten seconds how many targets are done, how fast, and how long the others will take.

    Args:
        what: is done to them, e.g. "test: ranked".
        total: how many there are.
    """

    def __init__(self, what: str, total: int, say: Say):
        self._what, self._total, self._say = what, total, say
        self._started = self._said = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self._said > _SAID_EVERY:
            self._said = now
            rate = done / (now - self._started)
            left = (self._total - done) / rate
            self._say(f"{self._what} {done}/{self._total}, {rate:.0f}/s, {left:.0f} s left")


@dataclass(frozen=True)
class Ranking:
    """What the search answered for M targets.

    Attributes:
        ranks: int64 [M]; rank of the target, 0 where it is not among the K.
        exact: bool [M]; whether the list is proven to be the true top-K.
        expansions: int64 [M]; trie nodes expanded.
        items: int32 [M, K]; the listed items, best first, −1 where there are fewer.
        invalid: number of listed items that are not in the catalogue, twice in a list, or excluded.
        chosen: int64 [M]; the best of the target's candidates, −1 where none are given; None: for no one.
    """

    ranks: np.ndarray
    exact: np.ndarray
    expansions: np.ndarray
    items: np.ndarray
    invalid: int
    chosen: np.ndarray | None = None


def ranks_of(
    recommender: AnyRecommender,
    split: HeldOut,
    k: int,
    exclude_seen: bool,
    batch: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Ranking:
    """Search the top-K for every history and look the targets up.

    Histories of similar length are searched together, so that little is padding.
    """
    ranks = np.zeros(len(split), np.int64)
    exact = np.zeros(len(split), bool)
    expansions = np.zeros(len(split), np.int64)
    items = np.full((len(split), k), -1, np.int32)
    invalid = 0
    chosen = None if split.candidates is None else np.full(len(split), -1, np.int64)
    order = np.argsort([-len(h) for h in split.histories], kind="stable")
    for begin in range(0, len(order), batch):
        at = order[begin : begin + batch]
        seen = [set(split.histories[i].tolist()) if exclude_seen else set() for i in at]
        answers = recommender.recommend([split.histories[i] for i in at], k, seen if exclude_seen else None)
        for i, answer, excluded in zip(at, answers, seen, strict=True):
            target = split.targets[i]
            ranks[i] = answer.items.index(target) + 1 if target in answer.items else 0
            exact[i] = answer.exact
            expansions[i] = answer.expansions
            items[i, : len(answer.items)] = answer.items
            listed = set(answer.items)
            outside = sum(not 0 <= item < len(recommender.catalogue) for item in listed)
            invalid += len(answer.items) - len(listed) + outside + len(listed & excluded)
        if chosen is not None:
            chosen[at] = _choose(recommender, split.take(at))
        progress(min(begin + batch, len(order)))
    return Ranking(ranks, exact, expansions, items, invalid, chosen)


def _choose(recommender: AnyRecommender, split: HeldOut) -> np.ndarray:
    """int64 [M]: the candidate of each target with the best score, of equals the first in the catalogue; −1: none."""
    assert split.candidates is not None
    given = [place for place, candidates in enumerate(split.candidates) if len(candidates)]
    lists = [split.candidates[place].tolist() for place in given]
    chosen = np.full(len(split), -1, np.int64)
    if given:
        scores = recommender.rank([split.histories[place].tolist() for place in given], lists)
        chosen[given] = [
            min(zip([-score for score in row], items, strict=True))[1] for row, items in zip(scores, lists, strict=True)
        ]
    return chosen

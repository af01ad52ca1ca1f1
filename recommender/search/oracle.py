"""The search in plain Python, one prefix at a time: what `recommender/search/search.py` does to many nodes in tensors.

>>> model = {(): [0.6, 0.3, 0.1], (0,): [0.2, 0.7, 0.1]}  # probabilities of the next of three tokens
>>> best_items([(0, 0), (0, 1), (1,)], lambda prefix: [math.log(p) for p in model[prefix]], 2, "full").items
[1, 2]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

from recommender.config import Score

Prefix = tuple[int, ...]


class Found(NamedTuple):
    items: list[int]  # best first
    scores: list[float]
    exact: bool  # whether nothing was given up that could be among them
    asked: int  # how often


def best_items(
    identifiers: Sequence[Sequence[int]], log_probabilities: Callable[[Prefix], Sequence[float]], k: int, score: Score,
    allowed: Collection[int] | None = None, budget: float = math.inf,
) -> Found:  # fmt: skip
    """The top-K by log-probabilities [V] of what follows a prefix, which are asked for at most `budget` times."""
    following: dict[Prefix, set[int]] = {}  # the trie; nothing follows a whole identifier
    first: dict[Prefix, int] = {}  # the lowest item under a prefix, of those that are allowed
    for item, tokens in enumerate(map(tuple, identifiers)):
        for end, token in enumerate(tokens):
            following.setdefault(tokens[:end], set()).add(token)
        for end in range(len(tokens) + 1 if allowed is None or item in allowed else 0):
            first.setdefault(tokens[:end], item)
    frontier: list[tuple[float, int, Prefix]] = []  # minus a score, and the lowest item: what all below is at best

    def open_(cost: float, prefix: Prefix) -> None:
        while score == "valid" and len(following.get(prefix, ())) == 1:  # forced tokens add 0
            prefix = (*prefix, *following[prefix])
        if prefix in first:
            heappush(frontier, (cost, first[prefix], prefix))

    open_(0.0, ())
    best, asked, exact = list[tuple[float, int]](), 0, True
    while frontier and len(best) < k:
        cost, item, prefix = heappop(frontier)
        if prefix not in following:  # whole, and nothing that is open can come before it, if nothing was given up
            best.append((cost, item))
        elif asked == budget:
            exact = False
        else:
            logs, asked = log_probabilities(prefix), asked + 1
            total = math.log(sum(math.exp(logs[token]) for token in following[prefix])) if score == "valid" else 0.0
            for token in following[prefix]:
                open_(cost + total - logs[token], (*prefix, token))
    return Found([item for _, item in best], [-cost for cost, _ in best], exact, asked)

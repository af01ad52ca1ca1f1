"""The state of a search: for each history the items that are finished and the nodes that are open, best first.

Shapes are those of `recommender/search/search.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from recommender.catalogue.filters import Allowed
from recommender.search.bounds import Bounds

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

State = TypeVar("State", bound="DataclassInstance")

NOTHING = torch.iinfo(torch.int64).min  # the key of an empty place: below every real key
_LOW = 0x7FFFFFFF


@dataclass(frozen=True)
class Ranking:
    """The answer for one history.

    Attributes
    ----------
    items : int32 [<= k], item indices, best first
    scores : float32 [<= k], their sums of log-probabilities and what was added to them
    exact : whether this is proven to be the true top-k of the allowed items
    expansions : nodes that were run through the backbone after the prompt
    """

    items: np.ndarray
    scores: np.ndarray
    exact: bool
    expansions: int

    def __post_init__(self) -> None:
        assert self.items.shape == self.scores.shape


@dataclass
class Rows:
    """The state of each history. Places are filled with keys, best first: see `keys_of`. int64, unless stated."""

    index: torch.Tensor  # [R], its place in the caller's batch
    prompt_length: torch.Tensor  # [R]
    wanted: torch.Tensor  # [R], items that the answer will have
    finished: torch.Tensor  # [R, K] keys
    open_key: torch.Tensor  # [R, M], of what the best item below may reach
    open_score: torch.Tensor  # float32 [R, M], sums of log-probabilities alone
    open_node: torch.Tensor  # [R, M]
    open_parent: torch.Tensor  # [R, M], ordinal of the parent's expansion
    dropped: torch.Tensor  # [R], the best key that was ever dropped for want of places
    expansions: torch.Tensor  # [R]
    allowed: Allowed | None  # by `index`
    bounds: Bounds | None  # by `index`

    def __post_init__(self) -> None:
        assert self.open_key.shape == self.open_score.shape == self.open_node.shape == self.open_parent.shape
        assert len(self.finished) == len(self.open_key) == len(self)
        assert self.prompt_length.shape == self.wanted.shape == self.dropped.shape == self.expansions.shape

    @classmethod
    def opened(
        cls,
        prompt_lengths: Sequence[int],
        ks: Sequence[int],
        items: int,
        allowed: Allowed | None,
        bounds: Bounds | None,
        device: torch.device,
    ) -> Rows:
        """Histories of which nothing is known yet: no item is finished, and no node is open.

        Parameters
        ----------
        prompt_lengths, ks : of each history, its tokens and the items wanted, both at least 1
        items : of the catalogue; more cannot be wanted
        """
        count = len(ks)
        wanted = torch.tensor([min(k, items) for k in ks], device=device)
        if allowed is not None:
            row, all_leaves = torch.arange(count, device=device), torch.full((count,), items, device=device)
            wanted = torch.minimum(wanted, allowed.within(row, torch.zeros_like(row), all_leaves))
        empty = torch.full((count, 1), NOTHING, device=device)
        return cls(
            index=torch.arange(count, device=device),
            prompt_length=torch.tensor(prompt_lengths, device=device),
            wanted=wanted,
            finished=empty.expand(count, min(max(ks), items)),
            open_key=empty,
            open_score=torch.zeros(count, 1, device=device),
            open_node=torch.zeros_like(empty),
            open_parent=torch.zeros_like(empty),
            dropped=empty[:, 0],
            expansions=torch.zeros(count, dtype=torch.int64, device=device),
            allowed=allowed,
            bounds=bounds,
        )

    def __len__(self) -> int:
        return len(self.index)

    def last_wanted(self) -> torch.Tensor:
        """[R], the key that an open node has to beat. Nothing is beaten where nothing is wanted."""
        key = self.finished.gather(1, (self.wanted - 1).clamp(min=0)[:, None]).squeeze(1)
        return torch.where(self.wanted > 0, key, torch.iinfo(torch.int64).max)

    def is_exact(self) -> torch.Tensor:
        """bool [R], whether nothing that is open, or was dropped, can change the answer."""
        return torch.maximum(self.open_key[:, 0], self.dropped) <= self.last_wanted()

    def keep_open(self, places: int) -> None:
        """Forget all but the first open nodes: the others cannot change an answer any more."""
        self.open_key, self.open_score = self.open_key[:, :places], self.open_score[:, :places]
        self.open_node, self.open_parent = self.open_node[:, :places], self.open_parent[:, :places]

    def add(
        self,
        row: torch.Tensor,
        key: torch.Tensor,
        score: torch.Tensor,
        node: torch.Tensor,
        parent: torch.Tensor,
        is_finished: torch.Tensor,
        widest: int,
        limit: int,
    ) -> None:
        """Merge entries, given row by row, into the finished items and the at most `limit` open nodes.

        Parameters
        ----------
        row, key, node, parent : int64 [E]; `parent` is the ordinal of the expansion that an entry came of
        score : float32 [E], the sum of log-probabilities alone
        is_finished : bool [E], whether it is an item with its whole score
        widest : entries of the row with the most
        """
        place = place_in_row(row, len(self))

        def spread(values: torch.Tensor, fill: float) -> torch.Tensor:
            return values.new_full((len(self), widest), fill).index_put_((row, place), values)

        finished = torch.cat([self.finished, spread(torch.where(is_finished, key, NOTHING), NOTHING)], 1)
        self.finished = finished.topk(self.finished.shape[1], dim=1).values
        keys = torch.cat([self.open_key, spread(torch.where(is_finished, NOTHING, key), NOTHING)], 1)
        keys, order = keys.topk(min(limit + 1, keys.shape[1]), dim=1)
        if keys.shape[1] > limit:
            self.dropped = torch.maximum(self.dropped, keys[:, limit])
        order = order[:, :limit]
        self.open_key = keys[:, :limit]
        self.open_score = torch.cat([self.open_score, spread(score, 0)], 1).gather(1, order)
        self.open_node = torch.cat([self.open_node, spread(node, 0)], 1).gather(1, order)
        self.open_parent = torch.cat([self.open_parent, spread(parent, 0)], 1).gather(1, order)


class Answers:
    """Finished rows, in the caller's order."""

    def __init__(self, rows: Rows) -> None:
        self.finished = rows.finished.clone()
        self.wanted = rows.wanted.clone()
        self.exact = torch.zeros_like(rows.wanted, dtype=torch.bool)
        self.expansions = rows.expansions.clone()

    def store(self, rows: Rows) -> None:
        self.finished[rows.index] = rows.finished
        self.exact[rows.index] = rows.is_exact()
        self.expansions[rows.index] = rows.expansions

    def rankings(self) -> list[Ranking]:
        scores, items = (part.cpu().numpy() for part in decoded(self.finished))
        found = torch.minimum((self.finished > NOTHING).sum(1), self.wanted).tolist()
        exact, expansions = self.exact.tolist(), self.expansions.tolist()
        rankings = []
        for row, count in enumerate(found):
            if np.isnan(scores[row, :count]).any():
                raise FloatingPointError("the backbone returned NaN logits")
            ranked = items[row, :count].astype(np.int32)
            rankings.append(Ranking(ranked, scores[row, :count].copy(), exact[row], expansions[row]))
        return rankings


def selected(state: State, rows: torch.Tensor) -> State:
    """The state of some rows: of all its tensors, which have a place for each."""
    values = {field.name: getattr(state, field.name) for field in fields(state)}
    kept: dict[str, Any] = {name: value[rows] for name, value in values.items() if isinstance(value, torch.Tensor)}
    return replace(state, **kept)


def keys_of(scores: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """int64 keys whose order is: higher score first, then lower item index.

    For a node, `items` is the smallest item under it, so that its key bounds the key of every item below it. The upper
    half is the float32's bits, flipped below zero so that they order as integers; + 0.0 makes one of the two zeros.
    """
    bits = (scores + 0.0).view(torch.int32).long()
    return ((bits ^ ((bits >> 63) & _LOW)) << 32) | (_LOW - items)


def decoded(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The float32 scores and the items of keys."""
    bits = keys >> 32
    return (bits ^ ((bits >> 63) & _LOW)).to(torch.int32).view(torch.float32), _LOW - (keys & _LOW)


def place_in_row(row: torch.Tensor, rows: int) -> torch.Tensor:
    """For entries sorted by row: the place of each among its row's."""
    first = torch.searchsorted(row, torch.arange(rows, device=row.device))
    return torch.arange(len(row), device=row.device) - first[row]

"""From rows to sequences: duplicates, k-core, chronological order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.data.readers import Interactions


def first_of_duplicates(interactions: Interactions) -> np.ndarray:
    """bool [n]: False for rows that repeat the user, item and time of an earlier row.

    Without times nothing tells a repeat from a second purchase, and every row stays.
    """
    n = len(interactions)
    if interactions.time is None:
        return np.ones(n, bool)
    order = np.lexsort((interactions.time, interactions.item, interactions.user))
    repeats = np.zeros(n, bool)
    keys = (interactions.user[order], interactions.item[order], interactions.time[order])
    repeats[1:] = np.logical_and.reduce([key[1:] == key[:-1] for key in keys])
    keep = np.ones(n, bool)
    # The sort is stable: of equal rows the first in the file comes first.
    keep[order[repeats]] = False
    return keep


def k_core(user: np.ndarray, item: np.ndarray, min_user: int, min_item: int) -> np.ndarray:
    """bool [n]: the largest set of rows in which each user has `min_user` rows and each item `min_item`.

    Dropping users can starve items and the other way round, so both are dropped until nothing changes.
    """
    keep = np.ones(len(user), bool)
    while True:
        of_user, of_item = np.bincount(user[keep]), np.bincount(item[keep])
        at = np.flatnonzero(keep)
        starved = (of_user[user[at]] < min_user) | (of_item[item[at]] < min_item)
        if not starved.any():
            return keep
        keep[at[starved]] = False


@dataclass(frozen=True)
class Sequences:
    """Items of users in chronological order.

    Attributes:
        users: [S] user id of each sequence.
        items: int32 [N]; item indices of all sequences, one after the other.
        offsets: int64 [S+1]; sequence s is items[offsets[s]:offsets[s+1]].
        times: int64 or float64 [N]; positions where the source has no time.
    """

    users: list[str]
    items: np.ndarray
    offsets: np.ndarray
    times: np.ndarray

    def __len__(self) -> int:
        return len(self.users)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [S]."""
        return np.diff(self.offsets)

    @property
    def positions(self) -> np.ndarray:
        """int64 [N]; position of each item in its sequence."""
        return np.arange(len(self.items)) - np.repeat(self.offsets[:-1], self.lengths)


def in_order(interactions: Interactions) -> Sequences:
    """One sequence a user, users in order of first appearance; the order in the file breaks ties of time."""
    offsets = np.concatenate([[0], np.cumsum(np.bincount(interactions.user, minlength=len(interactions.users)))])
    if interactions.time is None:
        order = np.argsort(interactions.user, kind="stable")
        times = np.arange(len(order)) - np.repeat(offsets[:-1], np.diff(offsets))
    else:
        order = np.lexsort((interactions.time, interactions.user))
        times = interactions.time[order]
    return Sequences(interactions.users, interactions.item[order].astype(np.int32), offsets.astype(np.int64), times)

"""Ranking metrics. Each is the mean of its per-target values, so that these can be saved, resampled and paired."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def metric_values(ranks: np.ndarray, cutoffs: Sequence[int]) -> dict[str, np.ndarray]:
    """Per-target values of HR@K and NDCG@K.

    With one relevant item, HR@K = [rank ≤ K] and NDCG@K = [rank ≤ K] / log2(rank + 1).

    Args:
        ranks: int [M]; 1 = first, 0 = not in the list.
        cutoffs: the K.

    Returns:
        float64 [M] by metric name, "HR@1", "NDCG@1", ….

    >>> metric_values(np.array([1, 3, 0]), [10])  # NDCG: 1 / log2(2), 1 / log2(4), 0
    {'HR@10': array([1., 1., 0.]), 'NDCG@10': array([1. , 0.5, 0. ])}
    """
    values = {}
    for k in cutoffs:
        hit = (ranks >= 1) & (ranks <= k)
        values[f"HR@{k}"] = hit.astype(np.float64)
        values[f"NDCG@{k}"] = np.where(hit, 1 / np.log2(np.maximum(ranks, 1) + 1.0), 0.0)
    return values


def bootstrap_interval(
    values: np.ndarray, users: np.ndarray, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values` [M] under resampling of users, each with all its targets.

    For a paired comparison of two models hand in the per-target differences: an interval without 0 is a difference.

    Args:
        users: [M]; whose each target is, in any type that can be sorted.

    >>> bootstrap_interval(np.array([1.0, 0.0, 1.0, 0.0]), users=np.array([7, 7, 8, 8]))  # each user's mean is 1/2
    (0.5, 0.5)
    """
    rng = np.random.default_rng(seed)
    _, user = np.unique(users, return_inverse=True)
    of_user = np.stack([np.bincount(user, values), np.bincount(user)], axis=1)  # sum and number of each user's values
    distinct, counts = np.unique(of_user, axis=0, return_counts=True)
    # Resampling users of whom few differ is a multinomial draw: O(distinct) a resample instead of O(users).
    draws = rng.multinomial(len(of_user), counts / len(of_user), size=resamples)
    sums, numbers = (draws @ distinct).T
    low, high = np.percentile(sums / numbers, [2.5, 97.5])
    return float(low), float(high)


def popularity_ranks(popularity: np.ndarray, targets: np.ndarray, seen: Sequence[np.ndarray] | None) -> np.ndarray:
    """Ranks of `targets` [M] in the list of the most popular items, ties in catalogue order.

    Args:
        popularity: int64 [items]; counts in the training interactions.
        targets: int [M]; item indices.
        seen: for each target the items that may not be listed; None = all may be.

    Returns:
        int64 [M]; 1 = first, 0 = the target itself may not be listed.

    >>> nothing, first = np.array([], int), np.array([1])
    >>> popularity_ranks(np.array([5, 9, 5]), np.array([2, 2, 1]), [nothing, first, first])  # 1, 0, 2; 0, 2
    array([3, 2, 0])
    """
    order = np.lexsort((np.arange(len(popularity)), -popularity))
    rank = np.empty(len(popularity), np.int64)
    rank[order] = np.arange(1, len(popularity) + 1)
    ranks = rank[targets]
    if seen is not None:
        above = np.array([int((rank[np.unique(s)] < r).sum()) for s, r in zip(seen, ranks, strict=True)])
        barred = np.array([bool((s == target).any()) for s, target in zip(seen, targets, strict=True)])
        ranks = np.where(barred, 0, ranks - above)
    return ranks


def score_ranks(scores: np.ndarray, targets: np.ndarray, seen: Sequence[np.ndarray] | None) -> np.ndarray:
    """Ranks of `targets` [M] by the scores of all items, ties in catalogue order.

    Args:
        scores: float [M, items].
        targets: int [M]; item indices.
        seen: for each target the items that may not be listed; None = all may be.

    Returns:
        int64 [M]; 1 = first, 0 = the target itself may not be listed.

    Example:
        >>> score_ranks(np.array([[.1, .3, .3], [.1, .3, .3]]), np.array([2, 2]), [np.array([], int), np.array([1])])
        array([2, 1])
    """
    own = scores[np.arange(len(targets)), targets][:, None]
    above = (scores > own) | ((scores == own) & (np.arange(scores.shape[1]) < targets[:, None]))
    if seen is None:
        return 1 + above.sum(1)
    for row, items in enumerate(seen):
        above[row, items] = False
    barred = np.array([bool((items == target).any()) for items, target in zip(seen, targets, strict=True)], bool)
    return np.where(barred, 0, 1 + above.sum(1))

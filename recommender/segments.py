"""For whom lists are good, and what they are made of: pure functions of what an evaluation saves for each target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

OVER_RECOMMENDED = 3  # items whose share of all lists SPRec calls the over-recommendation ratio


def segments(
    popularity: np.ndarray, history_length: np.ndarray, known_user: np.ndarray | None = None
) -> dict[str, dict[str, np.ndarray]]:
    """Targets by kind: masks, bool [M], by segment and label; a label without a target is left out.

    `popularity`: targets unseen in training, and the others in thirds: tail, torso, head. `history`: all targets in
    thirds of the history's length. `user`: new (without training interactions, or without a history) or known.

    Args:
        popularity: int [M]; how often each target occurs in training.
        history_length: int [M].
        known_user: bool [M]; whether training has seen the user; None = not known.

    Example:
        >>> found = segments(np.array([0, 1, 5, 9]), np.array([2, 2, 2, 2]))
        >>> {label: mask.tolist() for label, mask in found["popularity"].items()}    # doctest: +NORMALIZE_WHITESPACE
        {'unseen in training': [True, False, False, False], 'tail: 1 times in training': [False, True, False, False],
         'torso: 5 times in training': [False, False, True, False],
         'head: 9 times in training': [False, False, False, True]}
    """
    unseen = {"unseen in training": popularity == 0} if (popularity == 0).any() else {}
    found = {
        "popularity": unseen | thirds(popularity, popularity > 0, ("tail", "torso", "head"), "times in training"),
        "history": thirds(history_length, history_length >= 0, ("short", "medium", "long"), "items"),
    }
    if known_user is not None:
        known = known_user & (history_length > 0)
        masks = {"new: no training interactions": ~known, "known": known}
        found["user"] = {label: mask for label, mask in masks.items() if mask.any()}
    return found


def thirds(values: np.ndarray, among: np.ndarray, names: Sequence[str], unit: str) -> dict[str, np.ndarray]:
    """Masks of the lowest, middle and highest third of the `values` [M] chosen by `among`; equal values stay together,
    so a third may be larger than another, or missing."""
    if not among.any():
        return {}
    third = np.searchsorted(np.quantile(values[among], [1 / 3, 2 / 3], method="inverted_cdf"), values)
    found = {}
    for place, name in enumerate(names):
        mask = among & (third == place)
        if mask.any():
            low, high = values[mask].min(), values[mask].max()
            found[f"{name}: {low}–{high} {unit}" if low < high else f"{name}: {low} {unit}"] = mask
    return found


def reachable(popularity: np.ndarray, seen: np.ndarray, exclude_seen: bool) -> dict[str, float]:
    """What the best list could reach: shares of the targets.

    Args:
        popularity: int [M]; how often each target occurs in training.
        seen: bool [M]; whether it stands in its own history.
        exclude_seen: whether items of the history are left out of lists.

    Returns:
        unseen: targets that training has not seen, which no model of ids alone can name; seen: targets of which the
        history holds one; known_items: HR@1 of the best list of items that training has seen, under this policy.

    Example:
        >>> reachable(np.array([0, 3, 4, 5]), np.array([False, False, True, False]), exclude_seen=True)
        {'unseen': 0.25, 'seen': 0.25, 'known_items': 0.5}
    """
    known = (popularity > 0) & ~(seen & exclude_seen)
    return {"unseen": float((popularity == 0).mean()), "seen": float(seen.mean()), "known_items": float(known.mean())}


def list_figures(lists: np.ndarray, popularity: np.ndarray) -> dict[str, float]:
    """Popularity and fairness of lists.

    Args:
        lists: int [M, K]; listed items, −1 where a list is shorter.
        popularity: int [items]; how often each occurs in training.

    Returns:
        ARP: mean over lists of their items' mean popularity (Yin et al., VLDB 2012); an empty list does not count.
        coverage: share of the catalogue that is listed at all.
        gini: of how often each item of the catalogue is listed; 0 = all alike, 1 = always the same one.
        unseen: share of the listed that training has not seen.
        ORRatio: share of the listed that are one of the three most listed items; DivRatio: different items, by the
        listed (both SPRec, Gao et al., WWW 2025, as released).

    Example:
        >>> figures = list_figures(np.array([[0, 1], [0, 2]]), popularity=np.array([4, 2, 0, 1]))
        >>> {name: round(value, 3) for name, value in figures.items()}
        {'ARP': 2.5, 'coverage': 0.75, 'gini': 0.375, 'unseen': 0.25, 'ORRatio': 1.0, 'DivRatio': 0.75}
    """
    there = lists >= 0
    listed = lists[there]
    times = np.sort(np.bincount(listed, minlength=len(popularity)))
    number = max(len(listed), 1)
    filled = there.any(1)
    of_list = np.where(there, popularity[np.where(there, lists, 0)], 0).sum(1)[filled] / there.sum(1)[filled]
    place = np.arange(1, len(times) + 1)
    return {
        "ARP": float(of_list.mean()) if filled.any() else 0.0,
        "coverage": float((times > 0).mean()),
        "gini": float(((2 * place - len(times) - 1) * times).sum() / (len(times) * number)),
        "unseen": float((popularity[listed] == 0).sum() / number),
        "ORRatio": float(times[-OVER_RECOMMENDED:].sum() / number),
        "DivRatio": float((times > 0).sum() / number),
    }


def group_unfairness(
    lists: np.ndarray, histories: Sequence[np.ndarray], categories: Sequence[Sequence[str]]
) -> dict[str, float]:
    """How far the shares of categories in the lists are from those in the histories (Jiang et al., WWW 2024).

    GU of a category is its share of the lists − its share of the histories; an item of n categories counts 1/n for
    each, one without any does not count.

    Args:
        lists: int [M, K]; listed items, −1 where a list is shorter.
        histories: items of each history.
        categories: of each item.

    Returns:
        MGU: mean |GU| over the categories; DGU: largest GU − smallest GU.

    Example:
        >>> group_unfairness(np.array([[0, 1]]), [np.array([0, 2])], [["a"], ["a"], ["b"]])
        {'MGU': 0.5, 'DGU': 1.0}
    """
    names = sorted({name for own in categories for name in own})
    if not names:
        return {"MGU": 0.0, "DGU": 0.0}
    number = {name: place for place, name in enumerate(names)}
    item = np.repeat(np.arange(len(categories)), [len(own) for own in categories])
    category = np.array([number[name] for own in categories for name in own], np.int64)
    weight = np.array([1 / len(own) for own in categories for _ in own])

    def shares(times: np.ndarray) -> np.ndarray:
        mass = np.bincount(category, weight * times[item], minlength=len(names))
        return mass / max(mass.sum(), 1e-12)

    count = len(categories)
    in_histories = np.bincount(np.concatenate([*histories, np.zeros(0, np.int64)]).astype(np.int64), minlength=count)
    difference = shares(np.bincount(lists[lists >= 0], minlength=count)) - shares(in_histories)
    return {"MGU": float(np.abs(difference).mean()), "DGU": float(difference.max() - difference.min())}


def choice_figures(chosen: np.ndarray, targets: np.ndarray, candidates: Sequence[np.ndarray]) -> dict[str, float]:
    """S-DPO's candidate ranking: one item is named out of some given ones.

    Args:
        chosen: int [M]; the item that was named, −1 where what was named is no item.
        targets: int [M].
        candidates: for each target the items to choose from.

    Returns:
        HR@1: share of the targets that were named; valid: share of the named that are candidates.

    Example:
        >>> choice_figures(np.array([3, 4, -1, 8]), np.array([3, 5, 6, 9]), [np.array([3, 4])] * 3 + [np.array([9])])
        {'HR@1': 0.25, 'valid': 0.5}
    """
    valid = [bool((among == item).any()) for item, among in zip(chosen, candidates, strict=True)]
    return {"HR@1": float((chosen == targets).mean()), "valid": float(np.mean(valid))}


def means(values: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """The mean of each metric over the targets of each mask, and how many targets that are.

    Example:
        >>> means({"HR@10": np.array([1.0, 0.0, 1.0])}, {"new": np.array([True, True, False])})
        {'new': {'targets': 2, 'HR@10': 0.5}}
    """
    return {
        label: {"targets": int(mask.sum()), **{name: float(each[mask].mean()) for name, each in values.items()}}
        for label, mask in masks.items()
    }

"""An evaluation taken apart: which targets are ranked well, by which system, and what the lists are made of."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from recommender.errors import UserError
from recommender.metrics import metric_values, popularity_ranks
from recommender.segments import choice_figures, group_unfairness, list_figures, means, reachable, segments
from trainer.config import EvaluationConfig
from trainer.data.dataset import Dataset
from trainer.evaluation.floors import kept_floors
from trainer.evaluation.ranking import HeldOut, Ranking, ranks_of
from trainer.parts import Say

_SHOWN = 10  # the K of segments, policies and lists
_POLICIES = {False: "seen allowed", True: "seen left out"}


@dataclass(frozen=True)
class Floors:
    """The floors' answers to the targets of an evaluation.

    Attributes:
        ranks: floor → whether seen items are left out → int64 [M], as `Ranking.ranks`; most_popular's is its rank among
            all items.
        lists: floor → int32 [M, K], under the evaluation's own policy; most_popular has none.
        seconds: floor → wall time of its ranking, both policies together.
        chosen: floor → as `Ranking.chosen`; empty where no candidates are given.
    """

    ranks: dict[str, dict[bool, np.ndarray]]
    lists: dict[str, np.ndarray]
    seconds: dict[str, float]
    chosen: dict[str, np.ndarray]


def rank_floors(
    dataset: Dataset, targets: HeldOut, k: int, config: EvaluationConfig, directory: Path | None, say: Say
) -> Floors:
    """Rank the targets with every floor, seen items allowed and left out.

    Args:
        directory: where floors are kept; None: most-popular alone.
    """
    popularity = dataset.popularity()
    ranks = {
        "most_popular": {
            left_out: popularity_ranks(popularity, targets.targets, targets.histories if left_out else None)
            for left_out in _POLICIES
        }
    }
    lists, seconds, chosen = {}, {}, {}
    if targets.candidates is not None:
        best = [min(of, key=lambda item: (-popularity[item], item), default=-1) for of in targets.candidates]
        chosen["most_popular"] = np.array(best, np.int64)
    floors = {} if directory is None else kept_floors(dataset, config, directory, say)
    for kind, floor in floors.items():
        started = time.monotonic()
        rankings = {left_out: ranks_of(floor, targets, k, left_out, config.batch) for left_out in _POLICIES}
        ranks[kind] = {left_out: ranking.ranks for left_out, ranking in rankings.items()}
        lists[kind] = rankings[config.exclude_seen].items
        if (named := rankings[config.exclude_seen].chosen) is not None:
            chosen[kind] = named
        seconds[kind] = time.monotonic() - started
    return Floors(ranks, lists, seconds, chosen)


def per_target(
    dataset: Dataset,
    split: str,
    targets: HeldOut,
    ranking: Ranking,
    floors: Floors,
    other: np.ndarray | None,
    exclude_seen: bool,
) -> dict[str, Any]:
    """Columns of the per-target file: the floors' ranks, those under the other policy, what segments are made of, and
    with candidates who named the target out of them (null where none are given).

    Args:
        other: int64 [M]; the model's ranks under the other policy, where they are known.
    """
    suffix = _POLICIES[not exclude_seen].replace(" ", "_")
    columns: dict[str, Any] = {f"{floor}_rank": ranks[exclude_seen] for floor, ranks in floors.ranks.items()}
    columns |= {f"{floor}_rank_{suffix}": ranks[not exclude_seen] for floor, ranks in floors.ranks.items()}
    if other is not None:
        columns[f"rank_{suffix}"] = other
    for system, chosen in _choices(ranking, floors).items():
        name = "candidate_hit" if system == "model" else f"{system}_candidate_hit"
        columns[name] = pa.array(chosen == targets.targets, mask=chosen < 0)
    return columns | {"target_in_history": _in_history(targets), "known_user": _known(dataset, split, targets)}


def breakdown(
    dataset: Dataset,
    split: str,
    targets: HeldOut,
    ranking: Ranking,
    floors: Floors,
    other: np.ndarray | None,
    config: EvaluationConfig,
) -> dict[str, Any]:
    """What an evaluation's JSON holds beside the metrics of all targets.

    Returns:
        segments: kind → label → system → HR@10, NDCG@10 and the number of targets; lists: system → figures of its
        lists; reachable: see `recommender.segments.reachable`; policies: "seen allowed", "seen left out" → system →
        HR@10, NDCG@10; candidates: see `_of_candidates`.
    """
    popularity = dataset.popularity()
    of_targets, seen = popularity[targets.targets], _in_history(targets)
    ranks = {system: by_policy[config.exclude_seen] for system, by_policy in floors.ranks.items()}
    values = {system: metric_values(each, [_SHOWN]) for system, each in {"model": ranking.ranks, **ranks}.items()}
    lengths = np.array([len(history) for history in targets.histories])
    masks = segments(of_targets, lengths, _known(dataset, split, targets))
    lists = {"model": ranking.items, **floors.lists}
    figures = {system: list_figures(each[:, :_SHOWN], popularity) for system, each in lists.items()}
    if config.category is not None:
        categories = categories_of(dataset, config.category)
        for system, each in lists.items():
            figures[system] |= group_unfairness(each[:, :_SHOWN], targets.histories, categories)
    policies = {}
    for left_out, name in _POLICIES.items():
        of_model = ranking.ranks if left_out == config.exclude_seen else other
        systems = {} if of_model is None else {"model": of_model}
        systems |= {floor: by_policy[left_out] for floor, by_policy in floors.ranks.items()}
        policies[name] = {system: _means(each) for system, each in systems.items()}
    return {
        "segments": {
            kind: {
                label: {system: means(each, {label: mask})[label] for system, each in values.items()}
                for label, mask in of_kind.items()
            }
            for kind, of_kind in masks.items()
        },
        "lists": figures,
        "reachable": reachable(of_targets, seen, config.exclude_seen),
        "policies": policies,
        "candidates": _of_candidates(targets, _choices(ranking, floors)),
    }


def _choices(ranking: Ranking, floors: Floors) -> dict[str, np.ndarray]:
    """system → what it named out of the candidates; empty where none are given."""
    return {} if ranking.chosen is None else {"model": ranking.chosen, **floors.chosen}


def _of_candidates(targets: HeldOut, choices: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """S-DPO's protocol, over the targets that have candidates.

    Returns:
        targets: how many; items: mean length of a list; systems: system → HR@1, valid. Systems score the candidates and
        name the best, so what they name is always valid: 1. Empty where there are none.
    """
    at = [place for place, of in enumerate(targets.candidates or ()) if len(of)]
    if not at or targets.candidates is None:
        return {}
    lists = [targets.candidates[place] for place in at]
    return {
        "targets": len(at),
        "items": float(np.mean([len(of) for of in lists])),
        "systems": {system: choice_figures(each[at], targets.targets[at], lists) for system, each in choices.items()},
    }


def categories_of(dataset: Dataset, column: str) -> list[list[str]]:
    """The values of each item in a column, as text; a list's are several.

    Raises:
        UserError: there is no such column.
    """
    if column not in dataset.items_table.column_names:
        known = ", ".join(dataset.items_table.column_names)
        raise UserError(f"evaluation.category: the items have no column {column!r}; there are: {known}")
    rows = dataset.items_table[column].to_pylist()
    return [
        sorted({str(value) for value in (row if isinstance(row, list) else [row]) if value is not None}) for row in rows
    ]


def _means(ranks: np.ndarray) -> dict[str, float]:
    return {name: float(each.mean()) for name, each in metric_values(ranks, [_SHOWN]).items()}


def _in_history(targets: HeldOut) -> np.ndarray:
    pairs = zip(targets.histories, targets.targets, strict=True)
    return np.array([bool((history == target).any()) for history, target in pairs], bool)


def _known(dataset: Dataset, split: str, targets: HeldOut) -> np.ndarray:
    """bool [M]: whether training has seen an interaction of the target's user."""
    sequence, _ = dataset.training_interactions()
    known = {dataset.users[number] for number in np.unique(sequence)}
    return np.array([dataset.users[s] in known for s in dataset.targets[split].sequence[targets.numbers]], bool)

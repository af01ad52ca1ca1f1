"""Saved evaluations beside one another: for whom each model is good."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from recommender.metrics import metric_values
from recommender.segments import means, segments
from trainer.evaluation.standing import NAMES

_WHO = ["user_id", "target_item_id"]
_PARTED = {"target_popularity", "history_length"}


def side_by_side(files: Mapping[str, Path], metric: str = "NDCG@10") -> dict[str, dict[str, float]]:
    """The metric of all targets, of those unseen in training and by popularity, from per-target files.

    Args:
        files: by model; those that did not rank the targets of the first are left out.

    Returns:
        label → "targets": how many, and model or floor → mean; empty where no file tells how popular targets are.
    """
    tables = {name: pq.read_table(path) for name, path in files.items()}
    parted = next((table for table in tables.values() if set(table.column_names) >= _PARTED), None)
    if parted is None:
        return {}
    tables = {name: table for name, table in tables.items() if table.select(_WHO).equals(parted.select(_WHO))}
    ranks = {name: table["rank"] for name, table in tables.items()}
    for floor, title in NAMES.items():
        given = [table[f"{floor}_rank"] for table in tables.values() if f"{floor}_rank" in table.column_names]
        if given:
            ranks[title] = given[0]
    cutoff = int(metric.partition("@")[2])
    values = {name: metric_values(each.to_numpy(), [cutoff])[metric] for name, each in ranks.items()}
    popularity, length = parted["target_popularity"].to_numpy(), parted["history_length"].to_numpy()
    masks = {"all targets": np.ones(len(parted), bool), **segments(popularity, length)["popularity"]}
    return means(values, masks)

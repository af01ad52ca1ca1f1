"""The prepared dataset: a directory of Parquet and JSON that is complete or absent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recommender.errors import UserError
from recommender.files import digest
from trainer.data.cleaning import Sequences, first_of_duplicates, in_order, k_core
from trainer.data.config import DataConfig, InteractionsData, WindowsData
from trainer.data.readers import Problems, read_interactions, read_items, read_windows, stream
from trainer.data.splits import SPLITS, Targets, chronological, every_position, from_windows, leave_one_out
from trainer.parts import make_part

SCHEMA_VERSION = 1
_STATS_VERSION = 2  # datasets whose stats.json says less stay where they are, and are read
ABOUT = "dataset.json"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Dataset:
    """Items, sequences and targets.

    Attributes:
        path: the directory.
        items_table: item_id, title (as in the source), then every further column; row number = item index.
        users: [S] user id of each sequence; a user of published windows may own several.
        flat_items: int32 [N]; item indices of all sequences, one after the other, each in chronological order.
        offsets: int64 [S+1]; sequence s is flat_items[offsets[s]:offsets[s+1]].
        targets: by split: train, validation, test.
        stats: what stats.json holds.
        fingerprint: SHA-256 of the config and of the source files.
        protocol: leave_one_out, chronological or windows.
    """

    path: Path
    items_table: pa.Table
    users: list[str]
    flat_items: np.ndarray
    offsets: np.ndarray
    targets: dict[str, Targets]
    stats: dict[str, Any]
    fingerprint: str
    protocol: str = "leave_one_out"

    @cached_property
    def item_ids(self) -> list[str]:
        return self.items_table["item_id"].to_pylist()

    @cached_property
    def titles(self) -> list[str]:
        return self.items_table["title"].to_pylist()

    def history(self, sequence: int, position: int, limit: int) -> np.ndarray:
        """int32 [≤ limit]: the last `limit` items of a sequence before a position, oldest first."""
        begin = self.offsets[sequence]
        return self.flat_items[begin + max(0, position - limit) : begin + position]

    def histories(self, split: str) -> list[np.ndarray]:
        """int32 [M][t]: what stands before each target, oldest first: all of it, or its published window."""
        targets = self.targets[split]
        begin = self.offsets[targets.sequence]
        starts = begin if targets.start is None else begin + targets.start
        return [self.flat_items[a:b] for a, b in zip(starts, begin + targets.position, strict=True)]

    def held_out_items(self, split: str) -> np.ndarray:
        """int64 [M]: the targets of a split."""
        targets = self.targets[split]
        return self.flat_items[self.offsets[targets.sequence] + targets.position].astype(np.int64)

    def training_interactions(self) -> tuple[np.ndarray, np.ndarray]:
        """What training may see: whose sequence each interaction is, int64 [n], rising, and its item, int32 [n], oldest
        first within a sequence.
        """
        sequence = np.repeat(np.arange(len(self.users)), np.diff(self.offsets))
        return sequence[self.seen_in_training], self.flat_items[self.seen_in_training]

    def popularity(self) -> np.ndarray:
        """int64 [items]: how often each item occurs in what training may see."""
        return np.bincount(self.flat_items[self.seen_in_training], minlength=len(self.items_table)).astype(np.int64)

    @cached_property
    def seen_in_training(self) -> np.ndarray:
        """bool [N]: what training may see, that is up to the last training target of each sequence."""
        last = np.full(len(self.users), -1, np.int64)
        np.maximum.at(last, self.targets["train"].sequence, self.targets["train"].position)
        lengths = np.diff(self.offsets)
        position = np.arange(len(self.flat_items)) - np.repeat(self.offsets[:-1], lengths)
        return position <= np.repeat(last, lengths)

    @cached_property
    def times(self) -> np.ndarray:
        """int64 [N], of all sequences as `flat_items`; places in a sequence where the source gives no times."""
        return _flat(pq.read_table(self.path / "sequences.parquet", columns=["timestamps"])["timestamps"])[0]

    def trained_until(self) -> str:
        """The latest time of what training may see, ISO 8601 in UTC; "" where the data give no points in time."""
        latest = int(self.times[self.seen_in_training].max(initial=0))
        for power in (0, 3, 6, 9):  # seconds since 1970, or thousandths, … of them; smaller numbers are no such times
            if 10 ** (8 + power) <= latest < 10 ** (11 + power):
                return datetime.fromtimestamp(latest // 10**power, UTC).isoformat()
        return ""

    @classmethod
    def load(cls, path: str | Path) -> Dataset:
        """Load a prepared dataset.

        Raises:
            UserError: there is none at this path, it is damaged, or another version of this program made it.
        """
        path = Path(path)
        made_by = _read_about(path)
        if made_by is None:
            raise UserError(f"{path}: no prepared dataset; run `ilrec prepare` first")
        if made_by.get("schema_version") != SCHEMA_VERSION:
            raise UserError(
                f"{path}: made with dataset version {made_by.get('schema_version')}, this program reads version "
                f"{SCHEMA_VERSION}; run `ilrec prepare` again"
            )
        try:
            sequences = pq.read_table(path / "sequences.parquet", columns=["user_id", "items"])
            targets = pq.read_table(path / "targets.parquet")
            items = pq.read_table(path / "items.parquet")
            stats = json.loads((path / "stats.json").read_text(encoding="utf-8"))
        except (OSError, pa.ArrowException, ValueError) as error:
            raise UserError(
                f"{path}: the prepared dataset is damaged ({error}); remove this directory, and `ilrec prepare` again"
            ) from None
        flat, offsets = _flat(sequences["items"])
        return cls(
            path=path,
            items_table=items,
            users=sequences["user_id"].to_pylist(),
            flat_items=flat,
            offsets=offsets,
            targets={split: _load_targets(targets, split) for split in SPLITS},
            stats=stats,
            fingerprint=made_by["fingerprint"],
            protocol=made_by["protocol"],
        )


def prepare_dataset(config: DataConfig, datasets: Path, progress: Progress = print) -> Dataset:
    """Read, clean, split and write a dataset, or load the one that the same config and files made before.

    Args:
        datasets: the directory that holds the dataset, under a name for its config and the content of its files.

    Raises:
        UserError: a source file cannot be used, or nothing is left after cleaning.
    """
    fingerprint = _fingerprint(config)
    directory = Path(datasets) / digest(fingerprint, SCHEMA_VERSION, _STATS_VERSION)

    def write(aside: Path) -> None:
        _write_dataset(config, fingerprint, aside, progress)

    if not make_part(directory, ABOUT, write, progress):
        progress(f"data: {directory} has been prepared from the same files and settings")
    dataset = Dataset.load(directory)
    stats = dataset.stats
    progress(
        f"{stats['users']:,} users, {stats['items']:,} items, {stats['interactions']:,} interactions; targets: "
        + ", ".join(f"{stats[split]:,} {split}" for split in SPLITS)
    )
    return dataset


def _write_dataset(config: DataConfig, fingerprint: str, directory: Path, progress: Progress) -> None:
    problems = Problems(config.on_error, progress)
    if isinstance(config, InteractionsData):
        items, sequences, targets, steps = _from_interactions(config, problems, progress)
    else:
        items, sequences, targets, steps = _from_windows(config, problems, progress)
    if config.train_targets == "every_position":
        targets = every_position(sequences, targets)
    if not len(targets["train"]):
        raise UserError("the data give no training target: no user has two interactions for training; add data")
    made = Dataset(directory, items, sequences.users, sequences.items, sequences.offsets, targets, {}, fingerprint)
    stats = _stats(items, sequences, targets) | {
        "held_out": {split: _held_out_stats(made, split) for split in SPLITS[1:] if len(targets[split])},
        "problems": problems.found,
        "steps": steps,
    }
    about = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": fingerprint,
        "protocol": config.protocol if isinstance(config, InteractionsData) else "windows",
        "config": config.model_dump(mode="json"),
        "sources": _sources(config),
    }
    _write(directory, items, sequences, targets, stats, about)


# -- Making it --------------------------------------------------------------------------------------------------------

Made = tuple[pa.Table, Sequences, dict[str, Targets], list[dict[str, Any]]]


def _from_interactions(config: InteractionsData, problems: Problems, progress: Progress) -> Made:
    items = read_items(config.items, config.item_columns, problems)
    item_ids = items["item_id"].combine_chunks()
    interactions = read_interactions(config.interactions, config.columns, item_ids, problems)
    steps: list[dict[str, Any]] = []

    def done(step: str) -> None:
        steps.append(
            {
                "step": step,
                "interactions": len(interactions),
                "users": len(interactions.users),
                "items": len(np.unique(interactions.item)),
            }
        )
        progress(f"{step}: {len(interactions):,} interactions of {len(interactions.users):,} users")

    done("read")
    if config.duplicates == "drop":
        interactions = interactions.where(first_of_duplicates(interactions))
        done("duplicates dropped")
    if config.min_user_interactions or config.min_item_interactions:
        core = k_core(interactions.user, interactions.item, config.min_user_interactions, config.min_item_interactions)
        if not core.any():
            raise UserError(
                f"{config.interactions}: of {len(core)} interactions none is left when every user has "
                f"{config.min_user_interactions} and every item {config.min_item_interactions}; lower "
                "data.min_user_interactions or data.min_item_interactions"
            )
        interactions = interactions.where(core)
        if config.min_item_interactions:
            kept, renumbered = np.unique(interactions.item, return_inverse=True)
            items = items.take(kept)
            interactions = replace(interactions, item=renumbered)
        done("k-core")
    sequences = in_order(interactions)
    if config.protocol == "leave_one_out":
        short = int((sequences.lengths < 3).sum())
        steps.append({"step": "leave_one_out", "users_for_training_only": short})
        return items, sequences, leave_one_out(sequences), steps
    steps.append({"step": "chronological", "users_without_target": int((sequences.lengths < 2).sum())})
    return items, sequences, chronological(sequences, config.max_window), steps


def _from_windows(config: WindowsData, problems: Problems, progress: Progress) -> Made:
    items = read_items(config.items, config.item_columns, problems)
    item_ids = items["item_id"].combine_chunks()
    windows = {
        split: read_windows(getattr(config, split), config.columns, config.history_separator, item_ids, problems)
        for split in SPLITS
    }
    sequences, targets = from_windows(windows, config.histories)
    longest = max(len(history) for part in windows.values() for history in part.histories)
    joined = {"sequences": len(sequences), "users": len(set(sequences.users))}
    steps: list[dict[str, Any]] = [
        {"step": "read", **{split: len(windows[split]) for split in SPLITS}},
        {"step": "windows joined", **joined, "histories": config.histories, "longest_window": longest},
    ]
    progress(f"read: {sum(len(part) for part in windows.values()):,} windows, joined to {len(sequences):,} sequences")
    return items, sequences, targets, steps


def _stats(items: pa.Table, sequences: Sequences, targets: Mapping[str, Targets]) -> dict[str, Any]:
    titles = items["title"].to_pylist()
    filled = [title for title in titles if title.strip()]
    users, interactions = len(set(sequences.users)), len(sequences.items)
    return {
        "users": users,
        "items": len(items),
        "interactions": interactions,
        "sequences": len(sequences),
        **{split: len(targets[split]) for split in SPLITS},
        "density": interactions / (users * len(items)),
        "sequence_length": _summary(sequences.lengths),
        "title_chars": _summary(np.array([len(title) for title in titles])),
        "title_words": _summary(np.array([len(title.split()) for title in titles])),
        "duplicate_titles": len(filled) - len(set(filled)),
        "empty_titles": len(titles) - len(filled),
        "items_without_interactions": len(items) - len(np.unique(sequences.items)),
    }


def _held_out_stats(made: Dataset, split: str) -> dict[str, float]:
    """Shares of a split's targets: `unseen` in training, and those that are `seen`, in their own history; and the
    longest history."""
    items, histories = made.held_out_items(split), made.histories(split)
    seen = [bool((history == item).any()) for history, item in zip(histories, items, strict=True)]
    return {
        "unseen": float((made.popularity()[items] == 0).mean()),
        "seen": float(np.mean(seen)),
        "longest_history": max(map(len, histories)),
    }


def _summary(values: np.ndarray) -> dict[str, float]:
    return {
        "min": int(values.min()),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "p95": float(np.percentile(values, 95)),
        "max": int(values.max()),
    }


# -- Files ------------------------------------------------------------------------------------------------------------


def _sources(config: DataConfig) -> list[str]:
    if isinstance(config, InteractionsData):
        return [config.interactions, config.items]
    return [config.train, config.validation, config.test, config.items]


_PATHS = {"interactions", "items", "train", "validation", "test"}


def _fingerprint(config: DataConfig) -> str:
    values = config.model_dump(mode="json", exclude=_PATHS)
    if values.get("histories") == "joined":  # which came later: what was trained before is still of these data
        del values["histories"]
    whole = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for file in _sources(config):
        content = hashlib.sha256()
        for chunk in stream(file):
            content.update(chunk)
        whole.update(content.digest())
    return whole.hexdigest()


def _read_about(path: Path) -> dict[str, Any] | None:
    try:
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return about if isinstance(about, dict) else None


def _write(
    directory: Path,
    items: pa.Table,
    sequences: Sequences,
    targets: Mapping[str, Targets],
    stats: Mapping[str, Any],
    about: Mapping[str, Any],
) -> None:
    offsets = pa.array(sequences.offsets.astype(np.int32))
    pq.write_table(items, directory / "items.parquet")
    pq.write_table(
        pa.table(
            {
                "user_id": pa.array(sequences.users, pa.string()),
                "items": pa.ListArray.from_arrays(offsets, pa.array(sequences.items, pa.int32())),
                "timestamps": pa.ListArray.from_arrays(offsets, pa.array(sequences.times.astype(np.int64))),
            }
        ),
        directory / "sequences.parquet",
    )
    columns = {
        "split": pa.array(np.repeat(SPLITS, [len(targets[split]) for split in SPLITS])),
        "sequence": pa.array(np.concatenate([targets[split].sequence for split in SPLITS]), pa.int32()),
        "position": pa.array(np.concatenate([targets[split].position for split in SPLITS]), pa.int32()),
    }
    if any(targets[split].candidates is not None for split in SPLITS):
        lists: list[np.ndarray | None] = []
        for split in SPLITS:
            candidates = targets[split].candidates
            lists += [None] * len(targets[split]) if candidates is None else candidates
        columns["candidates"] = pa.array(lists, pa.list_(pa.int32()))
    if any(targets[split].start is not None for split in SPLITS):
        starts = [targets[split].start for split in SPLITS]
        nothing = [[None] * len(targets[split]) if s is None else s for split, s in zip(SPLITS, starts, strict=True)]
        columns["start"] = pa.array([start for each in nothing for start in each], pa.int32())
    pq.write_table(pa.table(columns), directory / "targets.parquet")
    _write_json(directory / "stats.json", stats)
    _write_json(directory / ABOUT, about)  # last: with it the dataset is complete


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _flat(lists: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    lengths = pc.list_value_length(lists).to_numpy()
    return pc.list_flatten(lists).to_numpy(), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _load_targets(table: pa.Table, split: str) -> Targets:
    rows = table.filter(pc.equal(table["split"], split))
    candidates = None
    if "candidates" in rows.column_names and rows["candidates"].null_count < len(rows):
        candidates = [np.array(c or [], np.int32) for c in rows["candidates"].to_pylist()]
    start = None
    if "start" in rows.column_names and rows["start"].null_count < len(rows):
        start = rows["start"].to_numpy()
    return Targets(rows["sequence"].to_numpy(), rows["position"].to_numpy(), candidates, start)

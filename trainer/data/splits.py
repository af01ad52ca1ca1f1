"""Which positions of which sequences are targets for training, validation and test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from trainer.data.cleaning import Sequences
from trainer.data.config import Histories
from trainer.data.readers import Windows

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Targets:
    """Targets of one split: items[position] of a sequence, given the items before it.

    Attributes:
        sequence: int32 [M].
        position: int32 [M]; at least 1.
        candidates: [M] item indices among which the target is ranked (empty: none given), or None.
        start: int32 [M]; position of the first item that is given before the target; None: all items are.
    """

    sequence: np.ndarray
    position: np.ndarray
    candidates: list[np.ndarray] | None = None
    start: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.position)


def leave_one_out(sequences: Sequences) -> dict[str, Targets]:
    """The last item of a user is the test target, the one before it the validation target, the others but the first
    are training targets. A user with fewer than three items is for training only.
    """
    length = np.repeat(sequences.lengths, sequences.lengths)
    sequence = np.repeat(np.arange(len(sequences)), sequences.lengths)
    position = sequences.positions
    long = length >= 3
    test = long & (position == length - 1)
    validation = long & (position == length - 2)
    train = (position >= 1) & ~test & ~validation
    masks = {"train": train, "validation": validation, "test": test}
    return {split: _targets(sequence[mask], position[mask]) for split, mask in masks.items()}


def chronological(sequences: Sequences, max_window: int) -> dict[str, Targets]:
    """MSL's split (Section 5.1 and its published files): a user with at most `max_window` items gives one window, whose
    target is the last item; a longer one gives a window that ends at each position from max_window − 1. The windows
    are sorted by target time, ties in order of users and positions, and cut at int(.8 N) and int(.9 N).
    """
    length = np.repeat(sequences.lengths, sequences.lengths)
    sequence = np.repeat(np.arange(len(sequences)), sequences.lengths)
    position = sequences.positions
    is_target = (position >= 1) & (position >= np.minimum(length, max_window) - 1)
    sequence, position = sequence[is_target], position[is_target]
    order = np.argsort(sequences.times[is_target], kind="stable")
    cuts = [int(0.8 * len(order)), int(0.9 * len(order))]
    return {
        split: _targets(sequence[at], position[at]) for split, at in zip(SPLITS, np.split(order, cuts), strict=True)
    }


def every_position(sequences: Sequences, targets: Mapping[str, Targets]) -> dict[str, Targets]:
    """Train on every position of a sequence up to its last training target, save those that are held out."""
    last = np.zeros(len(sequences), np.int64)
    np.maximum.at(last, targets["train"].sequence, targets["train"].position)
    position = sequences.positions
    train = (position >= 1) & (position <= np.repeat(last, sequences.lengths))
    for split in ("validation", "test"):
        train[sequences.offsets[targets[split].sequence] + targets[split].position] = False
    sequence = np.repeat(np.arange(len(sequences)), sequences.lengths)
    return {**targets, "train": _targets(sequence[train], position[train])}


def from_windows(
    windows: Mapping[str, Windows], histories: Histories = "joined"
) -> tuple[Sequences, dict[str, Targets]]:
    """Join published windows into sequences; each split keeps the order of its file.

    A user's windows are taken by time, or where a file has no times by split (and time within a split that has them).
    A window whose history ends the user's sequence so far adds its target to it; any other begins a new sequence, so
    that the last items before a target are always those of its window. With `published` histories, held-out targets
    are given these alone.

    Times of items that are no target are unknown: they get the time of the next target.
    """
    parts = [windows[split] for split in SPLITS]
    users = [user for part in parts for user in part.users]
    before = [history for part in parts for history in part.histories]
    items = np.concatenate([part.targets for part in parts]).tolist()
    split = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    time = np.concatenate([np.zeros(len(part)) if part.time is None else part.time for part in parts])
    all_timed = all(part.time is not None for part in parts)
    order = np.argsort(time, kind="stable") if all_timed else np.lexsort((time, split))

    latest: dict[str, int] = {}
    owners: list[str] = []
    joined: list[list[int]] = []
    times: list[list[float]] = []
    sequence, position = np.zeros(len(users), np.int32), np.zeros(len(users), np.int32)
    for window in order.tolist():
        user, history = users[window], before[window]
        number = latest.get(user)
        if number is None or joined[number][-len(history) :] != history:
            number = latest[user] = len(joined)
            owners.append(user)
            joined.append(list(history))
            times.append([time[window]] * len(history))
        sequence[window], position[window] = number, len(joined[number])
        joined[number].append(items[window])
        times[number].append(time[window])

    offsets = np.concatenate([[0], np.cumsum([len(one) for one in joined])]).astype(np.int64)
    flat = np.array([item for one in joined for item in one], np.int32)
    sequences = Sequences(owners, flat, offsets, np.array([t for one in times for t in one]))
    if not all_timed:
        sequences = Sequences(owners, flat, offsets, sequences.positions)
    targets = {}
    for number, (name, part) in enumerate(zip(SPLITS, parts, strict=True)):
        mine = split == number
        candidates = None if part.candidates is None else [np.array(c, np.int32) for c in part.candidates]
        start = None
        if histories == "published" and name != "train":
            start = position[mine] - np.array([len(history) for history in part.histories], np.int32)
        targets[name] = Targets(sequence[mine], position[mine], candidates, start)
    _check(sequences, targets, windows)
    return sequences, targets


def _check(sequences: Sequences, targets: Mapping[str, Targets], windows: Mapping[str, Windows]) -> None:
    """Every window must be found again in the sequences."""
    flat = sequences.items.tolist()
    for split, of_split in targets.items():
        ends = (sequences.offsets[of_split.sequence] + of_split.position).tolist()
        part = windows[split]
        for end, history, target in zip(ends, part.histories, part.targets.tolist(), strict=True):
            assert flat[end - len(history) : end + 1] == [*history, target], f"{split}: {history} → {target}"


def _targets(sequence: np.ndarray, position: np.ndarray) -> Targets:
    return Targets(sequence.astype(np.int32), position.astype(np.int32))

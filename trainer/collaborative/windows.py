"""What collaborative models learn from: windows of sequences, and which of their items are training targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from recommender.collaborative.model import TrainingBatch
from trainer.data.dataset import Dataset


@dataclass(frozen=True)
class Epoch:
    """The windows of one epoch.

    Attributes:
        start: int64 [W]; where each begins in the dataset's flat items.
        length: int64 [W]; from 2 to max_length + 1.
        draws: float32 [N]; a random number for each of the dataset's flat items.
        steps: for each optimiser step its windows.
    """

    start: np.ndarray
    length: np.ndarray
    draws: np.ndarray
    steps: list[np.ndarray]


class TrainingWindows:
    """Each sequence up to its last training target: in one piece or, where it is too long, cut anew for each epoch.

    Every training target is the target of exactly one window of an epoch, and no other item is. What a window holds
    beside its targets are items that precede a training target. An epoch depends on seed and number alone, not on
    workers.

    Args:
        dataset: prepared.
        max_length: items that a model reads before a target.
        batch: windows of an optimiser step.
        seed: of cuts, order and draws.

    Attributes:
        targets: how many training targets there are.
    """

    def __init__(self, dataset: Dataset, max_length: int, batch: int, seed: int):
        train = dataset.targets["train"]
        self._items = dataset.flat_items
        self._max_length, self._batch, self._seed = max_length, batch, seed
        self._is_target = np.zeros(len(self._items), bool)
        self._is_target[dataset.offsets[train.sequence] + train.position] = True
        last = np.zeros(len(dataset.users), np.int64)
        np.maximum.at(last, train.sequence, train.position)
        self._offset, self._last = dataset.offsets[:-1][last > 0], last[last > 0]
        self.targets = int(self._is_target.sum())

    def epoch(self, number: int) -> Epoch:
        """The windows of an epoch, in order."""
        rng = np.random.default_rng([self._seed, number])
        room, last = self._max_length, self._last
        # A sequence's first window ends at position `first`, each further one `room` later. Cuts differ from epoch to
        # epoch, so that a target is learnt from histories of all lengths.
        first = np.where(last <= room, last, rng.integers(1, room + 1, len(last)))
        count = 1 + -(-(last - first) // room)
        owner = np.repeat(np.arange(len(last)), count)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
        begin = np.where(place == 0, 0, first[owner] + (place - 1) * room)
        end = np.minimum(first[owner] + place * room, last[owner])
        start = self._offset[owner] + begin
        before = np.concatenate([[0], np.cumsum(self._is_target)])
        useful = before[start + end - begin + 1] > before[start + 1]
        start, length = start[useful], (end - begin + 1)[useful]
        steps = np.array_split(rng.permutation(len(start)), max(1, round(len(start) / self._batch)))
        return Epoch(start, length, rng.random(len(self._items), np.float32), steps)

    def collate(self, epoch: Epoch, windows: np.ndarray, negatives: torch.Tensor | None) -> TrainingBatch:
        """Pad windows on the right."""
        start, length = epoch.start[windows], epoch.length[windows]
        place = np.arange(length.max())
        inside = place < length[:, None]
        at = np.where(inside, start[:, None] + place, 0)
        return TrainingBatch(
            items=torch.from_numpy(np.where(inside, self._items[at], 0).astype(np.int64)),
            lengths=torch.from_numpy(length),
            targets=torch.from_numpy(inside & (place > 0) & self._is_target[at]),
            draws=torch.from_numpy(epoch.draws[at]),
            negatives=negatives,
        )


def pieces(length: np.ndarray, width: int, most: int) -> Iterator[np.ndarray]:
    """Deal rows to forward passes: similar lengths (to a factor of two) together, and not too many at once.

    Args:
        length: int64 [R]; of each row.
        width: scores of each item of a row.
        most: scores of one pass.

    Yields:
        Row numbers, longest first.
    """
    order = np.argsort(-length, kind="stable")
    while len(order):
        longest = int(length[order[0]])
        similar = int((2 * length[order] > longest).sum())
        rows = min(similar, max(1, most // (longest * width)))
        yield order[:rows]
        order = order[rows:]

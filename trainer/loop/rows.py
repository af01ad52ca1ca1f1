"""Training rows: the targets of a dataset, grouped so that targets whose histories share a start share a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from objectives.rewards import Histories
from recommender.backbone.tree import Row, Sample, build_row
from recommender.items.identifiers import Identifiers
from recommender.items.item_space import ItemSpace
from recommender.items.prompt import Prompt
from trainer.config import TrainingConfig
from trainer.data.dataset import Dataset


def window_starts(positions: np.ndarray, history: int, rule: str, stride: int | None = None) -> np.ndarray:
    """Where the history of each target starts: int64 [M].

    sliding: the last `history` items, start = max(0, p − H).
    anchored: windows start at multiples of the stride S and hold H items, so that consecutive targets share a start:
    the smallest multiple of S that leaves at most H items before p.

    Args:
        positions: [M] positions p of the targets in their sequences.
        history: H, the most items of a history.
        rule: "sliding" or "anchored".
        stride: S, default H / 2; anchored histories of long sequences hold between H − S + 1 and H items.
    """
    first = np.maximum(positions.astype(np.int64) - history, 0)
    if rule == "sliding":
        return first
    step = min(stride or max(history // 2, 1), history)
    return -(-first // step) * step


@dataclass(frozen=True)
class RowSources:
    """Which targets each row holds: those of one sequence whose histories start at the same item.

    Attributes:
        start: int64 [R]; index into the dataset's flat items at which a row's histories start.
        offsets: int64 [R + 1]; row r has targets offsets[r] to offsets[r + 1].
        lengths: int64 [M]; history lengths, rising within a row; the target follows its history.
    """

    start: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    def of(self, number: int) -> tuple[int, np.ndarray]:
        """Start and lengths of one row."""
        return int(self.start[number]), self.lengths[self.offsets[number] : self.offsets[number + 1]]


def group_targets(dataset: Dataset, split: str, history: int, rule: str, stride: int | None) -> RowSources:
    """Group a split's targets into rows, in the dataset's order."""
    targets = dataset.targets[split]
    position = targets.position.astype(np.int64)
    start = window_starts(position, history, rule, stride)
    order = np.lexsort((position, start, targets.sequence))
    sequence, position, start = targets.sequence[order], position[order], start[order]
    opens = np.ones(len(order), bool)
    opens[1:] = (np.diff(sequence) != 0) | (np.diff(start) != 0)
    first = np.flatnonzero(opens)
    return RowSources(dataset.offsets[sequence[first]] + start[first], np.append(first, len(order)), position - start)


class TrainingRows:
    """All rows of an epoch, in a fixed order; `rows[number]` builds one.

    What is needed of all of them at once is counted without building any.

    Args:
        dataset: prepared.
        space: spells items and prompts.
        training: the history rule.
        branching_only: count only predictions with more than one valid token.

    Attributes:
        lengths: int64 [R]; tokens of each row.
        counted: int64 [R]; predictions of each row that the loss counts.
        targets: int32 [M]; the items that are to be predicted, row by row.
        sample_lengths: int64 [M]; tokens of each target's prompt and response, as many as in a row of its own.
    """

    def __init__(self, dataset: Dataset, space: ItemSpace, training: TrainingConfig, branching_only: bool):
        self._items, self._space, self._nodes = dataset.flat_items, space, space.trie.prediction_nodes()
        prompt, offsets = space.prompt, space.identifiers.offsets
        self._sources = group_targets(dataset, "train", prompt.config.history, training.windows, training.stride)
        first, samples = self._sources.offsets[:-1], np.diff(self._sources.offsets)
        begin = np.repeat(self._sources.start, samples)
        end = begin + self._sources.lengths
        self.targets = self._items[end]

        predictions = np.add.reduceat(self._nodes >= 0, offsets[:-1], dtype=np.int64)
        self.counted = np.add.reduceat((predictions if branching_only else np.diff(offsets))[self.targets], first)

        title = np.diff(offsets) - 1  # the end token is predicted, but not laid out
        before = np.concatenate([[0], np.cumsum(prompt.piece_lengths[self._items])])
        history = len(prompt.prefix) + before[end] - before[begin]
        branch = len(prompt.suffix) + title[self.targets]
        self.sample_lengths = history + branch
        last = self._sources.offsets[1:] - 1
        if np.array_equal(prompt.separator, prompt.suffix):  # a sample is how the next one begins
            self.lengths = self.sample_lengths[last]
        elif (shared := _shared_start(prompt, space.identifiers)) is not None:
            self.lengths = history[last] + np.add.reduceat(branch, first) - (samples - 1) * shared
        else:
            self.lengths = np.array([len(row) for row in self], np.int64)

    def __len__(self) -> int:
        return len(self._sources)

    def __iter__(self) -> Iterator[Row]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Row:
        start, lengths = self._sources.of(number)
        items = self._items[start : start + int(lengths[-1]) + 1]
        trunk, cuts = self._space.prompt.trunk(items[:-1])
        suffix, identifiers = self._space.prompt.suffix, self._space.identifiers
        return build_row(
            [
                Sample(
                    np.concatenate([trunk[: cuts[length]], suffix]),
                    identifiers.spelled(items[length]),
                    self._nodes[identifiers.offsets[items[length]] : identifiers.offsets[items[length] + 1]],
                )
                for length in lengths
            ]
        )

    def histories(self, numbers: np.ndarray) -> Histories:
        """The items that the samples of some rows have seen, and their targets."""
        sources = [self._sources.of(number) for number in numbers]
        windows = [self._items[start : start + int(lengths[-1]) + 1] for start, lengths in sources]
        return Histories(
            [window[:-1] for window in windows],
            [lengths for _, lengths in sources],
            [window[lengths] for window, (_, lengths) in zip(windows, sources, strict=True)],
        )


def _shared_start(prompt: Prompt, identifiers: Identifiers) -> int | None:
    """How many tokens a suffix has in common with what the history goes on with, wherever it is put.

    None where that depends on the items: one of separator and suffix begins with the other, and an identifier may go on
    as the longer one does.
    """
    shorter, longer = sorted((prompt.separator, prompt.suffix), key=len)
    differs = np.flatnonzero(shorter != longer[: len(shorter)])
    if len(differs):
        return int(differs[0])
    opens_an_item = (identifiers.tokens[identifiers.offsets[:-1]] == longer[len(shorter)]).any()
    return None if opens_an_item else len(shorter)

"""Training rows: the targets of a dataset, grouped so that targets whose histories share a start share a row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from objectives.rewards import Histories
from recommender.items import ItemSpace
from recommender.tree import Row, Sample, build_row
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
class RowSource:
    """One row's targets: those of one sequence whose histories start at the same item.

    Attributes:
        start: index into the dataset's flat items at which the histories start.
        lengths: int64 [t]; history lengths, rising; the target follows its history.
    """

    start: int
    lengths: np.ndarray


def group_targets(dataset: Dataset, split: str, history: int, rule: str, stride: int | None) -> list[RowSource]:
    """Group a split's targets into rows, in the dataset's order."""
    targets = dataset.targets[split]
    position = targets.position.astype(np.int64)
    start = window_starts(position, history, rule, stride)
    order = np.lexsort((position, start, targets.sequence))
    sequence, position, start = targets.sequence[order], position[order], start[order]
    if not len(order):
        return []
    breaks = np.flatnonzero((np.diff(sequence) != 0) | (np.diff(start) != 0)) + 1
    flat_start = dataset.offsets[sequence] + start
    return [
        RowSource(int(flat_start[group[0]]), position[group] - start[group])
        for group in np.split(np.arange(len(order)), breaks)
    ]


class TrainingRows:
    """All rows of an epoch.

    Args:
        dataset: prepared.
        space: spells items and prompts.
        training: the history rule.
        branching_only: count only predictions with more than one valid token.

    Attributes:
        rows: the trees, in a fixed order; about 20 bytes a token.
        lengths: int64 [R]; tokens of each row.
        counted: int64 [R]; predictions of each row that the loss counts.
        targets: number of targets in all rows.
    """

    def __init__(self, dataset: Dataset, space: ItemSpace, training: TrainingConfig, branching_only: bool):
        self._items = dataset.flat_items
        self._space = space
        nodes = space.trie.prediction_nodes()
        self._nodes = [
            nodes[a:b] for a, b in zip(space.identifiers.offsets, space.identifiers.offsets[1:], strict=False)
        ]
        sources = group_targets(dataset, "train", space.prompt.config.history, training.windows, training.stride)
        self.rows = [self._row(source) for source in sources]
        self._sources = sources
        self.lengths = np.array([len(row) for row in self.rows], np.int64)
        self.counted = np.array(
            [int((row.nodes >= 0).sum()) if branching_only else len(row.nodes) for row in self.rows], np.int64
        )
        self.targets = sum(len(source.lengths) for source in sources)

    def __len__(self) -> int:
        return len(self.rows)

    def histories(self, numbers: np.ndarray) -> Histories:
        """The items that the samples of some rows have seen, and their targets."""
        sources = [self._sources[number] for number in numbers]
        windows = [self._items[s.start : s.start + int(s.lengths[-1]) + 1] for s in sources]
        return Histories(
            [window[:-1] for window in windows],
            [source.lengths for source in sources],
            [window[source.lengths] for window, source in zip(windows, sources, strict=True)],
        )

    def _row(self, source: RowSource) -> Row:
        items = self._items[source.start : source.start + int(source.lengths[-1]) + 1]
        trunk, cuts = self._space.prompt.trunk(items[:-1])
        suffix = self._space.prompt.suffix
        return build_row(
            [
                Sample(
                    np.concatenate([trunk[: cuts[length]], suffix]),
                    self._space.identifiers.spelled(items[length]),
                    self._nodes[items[length]],
                )
                for length in source.lengths
            ]
        )

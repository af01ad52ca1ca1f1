"""The global batch plan: which rows each optimiser step takes, and what its loss is divided by.

It depends on the rows, the seed and the step size, never on the number of workers; ranks take slices of it. So the
same plan runs on any number of workers, and to resume is to know one integer, the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Step:
    """One optimiser step.

    Attributes:
        rows: row numbers, longest first.
        counted: predictions that the loss of this step counts, over all ranks and micro-batches.
    """

    rows: np.ndarray
    counted: int

    def micro_batches(self, world: int, accumulation: int) -> list[list[np.ndarray]]:
        """Deal the rows: [micro-batch][rank] → row numbers, with token counts as even as a snake makes them.

        Some are empty where there are fewer rows than places; every rank still runs the same number of micro-batches.
        """
        places = world * accumulation
        lap, at = np.divmod(np.arange(len(self.rows)), places)
        place = np.where(lap % 2 == 0, at, places - 1 - at)
        dealt = [self.rows[place == p] for p in range(places)]
        return [dealt[micro * world : (micro + 1) * world] for micro in range(accumulation)]


class BatchPlan:
    """Deterministic batches by token budget.

    Rows of similar length share a step, so that little is padding; which rows meet is drawn anew each epoch.

    Args:
        lengths: int64 [R]; tokens of each row.
        counted: int64 [R]; counted predictions of each row.
        batch_tokens: tokens of one optimiser step, on average.
        seed: of the order.

    Attributes:
        steps_per_epoch: the same in every epoch.
    """

    def __init__(self, lengths: np.ndarray, counted: np.ndarray, batch_tokens: int, seed: int):
        self._lengths, self._counted, self._seed = lengths, counted, seed
        self.steps_per_epoch = int(min(max(1, round(lengths.sum() / batch_tokens)), len(lengths)))

    def epoch(self, epoch: int) -> list[Step]:
        """The steps of an epoch, in order."""
        rng = np.random.default_rng([self._seed, epoch])
        blurred = self._lengths * np.exp(rng.uniform(-0.05, 0.05, len(self._lengths)))
        order = np.argsort(-blurred, kind="stable")
        tokens = np.cumsum(self._lengths[order])
        # A row belongs to the step in which its middle token falls; the clip below leaves no step empty.
        step = ((tokens - self._lengths[order] / 2) * self.steps_per_epoch / tokens[-1]).astype(np.int64)
        rank = np.arange(len(order))
        step = np.clip(step, 0, np.minimum(rank, self.steps_per_epoch - 1))
        step = np.maximum(np.maximum.accumulate(step), self.steps_per_epoch - (len(order) - rank))
        groups = np.split(order, np.searchsorted(step, np.arange(1, self.steps_per_epoch)))
        rng.shuffle(groups)
        return [self._step(rows) for rows in groups]

    def _step(self, rows: np.ndarray) -> Step:
        rows = rows[np.argsort(-self._lengths[rows], kind="stable")]
        return Step(rows, int(self._counted[rows].sum()))

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.loop.plan import BatchPlan


@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(1, 400), st.integers(0, 3))
def test_every_row_is_taken_once_an_epoch_and_no_step_is_empty(lengths: list[int], budget: int, epoch: int) -> None:
    plan = BatchPlan(np.array(lengths), np.array(lengths) * 2, budget, seed=1)
    steps = plan.epoch(epoch)
    assert len(steps) == plan.steps_per_epoch
    assert all(len(step.rows) for step in steps)
    assert sorted(np.concatenate([step.rows for step in steps])) == list(range(len(lengths)))
    assert all(step.counted == 2 * sum(lengths[row] for row in step.rows) for step in steps)


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 4), (3, 2)])
def test_ranks_share_a_step_whatever_their_number(world: int, accumulation: int) -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 301)
    for step in BatchPlan(lengths, lengths, 4000, seed=0).epoch(0):
        micro = step.micro_batches(world, accumulation)
        assert len(micro) == accumulation
        assert all(len(ranks) == world for ranks in micro)
        dealt = np.concatenate([rows for ranks in micro for rows in ranks])
        assert sorted(dealt) == sorted(step.rows)


def test_plan_is_a_function_of_seed_and_epoch() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 300)

    def rows(seed: int, epoch: int) -> list[list[int]]:
        return [step.rows.tolist() for step in BatchPlan(lengths, lengths, 4000, seed).epoch(epoch)]

    assert rows(0, 1) == rows(0, 1)
    assert rows(0, 1) != rows(0, 2)
    assert rows(0, 1) != rows(1, 1)


def test_rows_of_similar_length_share_a_step() -> None:
    lengths = np.random.default_rng(0).integers(5, 400, 5000)
    steps = BatchPlan(lengths, lengths, 8000, seed=0).epoch(0)
    padded = sum(lengths[step.rows].max() * len(step.rows) for step in steps)
    assert padded < 1.25 * lengths.sum()
    tokens = [lengths[step.rows].sum() for step in steps]
    assert max(tokens) < 1.2 * min(tokens)

"""Curves as TensorBoard reads them."""

from __future__ import annotations

from pathlib import Path

from tests.event_files import points
from trainer.reporting.curves import Curves


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    first = Curves(tmp_path, 0, 0)
    for step in (1, 2, 3, 4):
        first.add("training", {"loss": float(step)}, step)
    first.add("epoch", {"validation_NDCG@10": 0.5}, 3)
    again = Curves(tmp_path, 0, 2)  # the latest checkpoint was that of step 2
    for step in (3, 4, 5):
        again.add("training", {"loss": float(10 * step)}, step)
    again.add("epoch", {"validation_NDCG@10": 0.25}, 3)
    assert points(tmp_path / "tensorboard") == {
        "training/loss": [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)],
        "epoch/validation_NDCG_10": [(3, 0.25)],
    }


def test_only_rank_0_writes_and_only_if_there_is_something(tmp_path: Path) -> None:
    Curves(tmp_path, 0, 0)
    Curves(tmp_path, 1, 0).add("training", {"loss": 1.0}, 1)
    assert not list(tmp_path.iterdir())

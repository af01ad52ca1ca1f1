"""Curves as TensorBoard reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.event_files import points
from trainer.evaluation.evaluation import Report
from trainer.experiment import Experiment
from trainer.reporting.curves import Curves, add_evaluation, add_floors


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


def test_floors_and_evaluations_join_the_curves(tiny_experiment: Experiment, tmp_path: Path) -> None:
    systems = {"model": 0.5, "itemknn": 0.25}
    metrics = {system: {"NDCG@10": value, "HR@10": 2 * value} for system, value in systems.items()}
    labels = {"unseen in training": metrics, "tail: 1–3 times in training": metrics}
    report = Report(
        split="test",
        targets=4,
        metrics=metrics,
        intervals={},
        differences={},
        invalid_rate=0,
        exact_rate=1,
        expansions=0,
        seconds=0,
        evaluated_at="",
        floor_seconds={},
        segments={"popularity": labels},
        lists={},
        reachable={},
        policies={},
    )
    add_evaluation(tiny_experiment, tmp_path, report, pytest.fail)
    assert not list(tmp_path.iterdir())  # it has no curves
    (tmp_path / "training.json").write_text(json.dumps([{"step": 3}, {"step": 6}]))
    curves = Curves(tmp_path, 0, 0)
    for step in (3, 6):
        curves.add("epoch", {"validation_NDCG@10": 0.5}, step)
    add_floors(tiny_experiment, tmp_path, metrics, pytest.fail)
    add_evaluation(tiny_experiment, tmp_path, report, pytest.fail)
    found = points(tmp_path / "tensorboard")
    assert found["epoch/validation_NDCG_10"] == [(3, 0.5), (6, 0.5)]
    assert {name: curve for name, curve in found.items() if "epoch" not in name} == {
        "validation/itemknn/NDCG_10": [(6, 0.25)],
        "validation/itemknn/HR_10": [(6, 0.5)],
        "test/NDCG_10": [(6, 0.5)],
        "test/HR_10": [(6, 1.0)],
        "test/itemknn/NDCG_10": [(6, 0.25)],
        "test/itemknn/HR_10": [(6, 0.5)],
        "test/unseen/NDCG_10": [(6, 0.5)],
        "test/unseen/itemknn/NDCG_10": [(6, 0.25)],
        "test/tail/NDCG_10": [(6, 0.5)],
        "test/tail/itemknn/NDCG_10": [(6, 0.25)],
    }

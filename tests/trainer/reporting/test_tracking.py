"""MLflow and Weights & Biases, which are optional: what needs them is skipped where they are not installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from recommender.errors import UserError
from trainer.config import ClusterConfig, MLflowConfig, TrackingConfig
from trainer.experiment import Experiment, load_experiment
from trainer.reporting.curves import Curves, add_floors
from trainer.reporting.tracking import Tracking, check_tracking, open_runs, tracked
from trainer.run import TRACKING
from trainer.world.config import WorldConfig


def experiment(directory: Path, **services: Any) -> Experiment:
    return Experiment(
        name="tracked",
        world=WorldConfig(),
        cluster=ClusterConfig(storage=str(directory)),
        tracking=TrackingConfig.model_validate(services),
    )


def train_twice(run: Experiment) -> None:
    """Three steps; then, gone on from the second, two more. What is said is an error here."""
    for first, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        open_runs(run, run.storage)
        curves = Curves(run.storage, 0, first, Tracking(run, run.storage, pytest.fail))
        for step in steps:
            curves.add("epoch", {"validation_NDCG@10": step / 10}, step)
    curves.close()


def mlflow_run(directory: Path) -> tuple[Experiment, Callable[[], tuple[Any, Any]]]:
    """A tracked experiment, and what MLflow has of it: a client and the run."""
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow, which is optional")
    pytest.importorskip("sqlalchemy", reason="needs sqlalchemy, for a database of MLflow's")
    uri = f"sqlite:///{directory}/ml.db"

    def found() -> tuple[Any, Any]:
        client = mlflow.MlflowClient(uri)
        [run] = client.search_runs([client.get_experiment_by_name("ilrec").experiment_id])
        return client, run

    return experiment(directory, mlflow={"uri": uri}), found


def test_a_run_that_fails_or_is_stopped_does_not_seem_to_go_on(tmp_path: Path) -> None:
    run, found = mlflow_run(tmp_path)
    for error, status in ((UserError("out of memory"), "FAILED"), (SystemExit(0), "KILLED")):
        with suppress(type(error)), tracked(run, run.storage):
            Tracking(run, run.storage, pytest.fail)
            assert found()[1].info.status == "RUNNING"
            raise error
        assert found()[1].info.status == status


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(tmp_path: Path) -> None:
    run, ask = mlflow_run(tmp_path)
    train_twice(run)
    client, found = ask()
    assert found.info.run_name == "tracked"
    assert found.info.status == "FINISHED"
    assert found.data.params["objective.kind"] == "ilrec"
    history = client.get_metric_history(found.info.run_id, "epoch/validation_NDCG_10")
    assert {point.step: point.value for point in history} == {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4}
    (run.storage / "training.json").write_text('[{"step": 4}]')
    add_floors(run, run.storage, {"model": {}, "itemknn": {"NDCG@10": 0.5}}, pytest.fail)
    client, found = ask()
    assert (found.data.metrics["validation/itemknn/NDCG_10"], found.info.status) == (0.5, "FINISHED")


def test_a_resumed_run_goes_on_in_the_same_offline_wandb_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="needs wandb, which is optional")
    run = experiment(tmp_path, wandb={})
    train_twice(run)
    name = json.loads((run.storage / TRACKING).read_text())["wandb"]
    assert list((run.storage / "wandb").glob(f"offline-run-*-{name}/*.wandb"))


@pytest.mark.parametrize(("name", "values"), [("mlflow", {"uri": "http://tracking:5000"}), ("wandb", {})])
def test_a_missing_package_is_named_before_anything_starts(tmp_path: Path, name: str, values: dict[str, str]) -> None:
    if find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    run = experiment(tmp_path, **{name: values})
    with pytest.raises(UserError, match=f"tracking.{name}: the package is missing: pip install {name}"):
        check_tracking(run.tracking)
    with pytest.raises(UserError, match="is missing"):
        open_runs(run, run.storage)
    assert not list(tmp_path.iterdir())


def test_a_service_that_fails_does_not_stop_training(tmp_path: Path) -> None:
    run = experiment(tmp_path, mlflow={"uri": "sqlite:////nowhere/at/all.db"})
    (run.storage / TRACKING).write_text('{"mlflow": "1"}')
    said: list[str] = []
    curves = Curves(run.storage, 0, 0, Tracking(run, run.storage, said.append))
    curves.add("training", {"loss": 1.0}, 1)
    curves.add("training", {"loss": 1.0}, 2)
    curves.close()
    [warning] = said
    assert warning.startswith("warning: tracking.mlflow failed (")


def test_wandb_online_needs_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs wandb, which is optional")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match="WANDB_API_KEY"):
        check_tracking(experiment(tmp_path, wandb={"mode": "online"}).tracking)


def test_a_password_is_refused_and_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("name: my\nworld: {}\ntracking: {mlflow: {uri: 'https://me:secret@tracking:5000'}}\n")
    with pytest.raises(UserError, match="MLFLOW_TRACKING_USERNAME") as caught:
        load_experiment(path)
    assert "secret" not in str(caught.value)


def test_relative_databases_are_refused() -> None:
    with pytest.raises(ValidationError, match="absolute"):
        MLflowConfig(uri="sqlite:///ml.db")

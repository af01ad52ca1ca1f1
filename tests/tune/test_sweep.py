"""A sweep as users run it: Ray Tune over Ray Train jobs, stopped early, interrupted, resumed."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from objectives.config import MSLConfig
from recommender.bundle import read_manifest
from recommender.errors import UserError
from recommender.loading import load_recommender
from trainer.config import ClusterConfig
from trainer.experiment import Experiment, load_experiment
from trainer.run import prepared_of, version_of
from trainer.sweep_config import SweepConfig
from tune.sweep import concurrency, sweep

GOOD, BAD = 5e-3, [1e-8, 2e-8, 3e-8]  # the bad ones do not move the weights
EPOCHS = 8  # a trial runs on for some seconds until it is stopped


@pytest.fixture(scope="module")
def experiment(tiny_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Four trials, two at once."""
    values = tiny_experiment.model_dump(mode="json") | {
        "name": "sweep",
        "objective": MSLConfig().model_dump(),
        "cluster": {"workers": 1, "storage": str(tmp_path_factory.mktemp("sweeps"))},
        "sweep": {
            "parameters": {"training.learning_rate": {"kind": "grid", "values": [GOOD, *BAD]}},
            "scheduler": {"kind": "asha", "grace_period": 1, "reduction_factor": 2},
            "concurrent": 2,
        },
    }
    values["training"] |= {"epochs": EPOCHS, "batch_tokens": 400, "patience": EPOCHS}
    return Experiment.model_validate(values)


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def swept(ray_cluster: None, experiment: Experiment, said: list[str]) -> Path:
    """The directory of the finished sweep."""
    return sweep(experiment, said.append).directory


@pytest.fixture(scope="module")
def trials(swept: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((swept / "tune" / "trials.json").read_text())
    return found


def learning_rate(trial: dict[str, Any]) -> float:
    [(_, value)] = trial["parameters"].items()
    return float(value)


def test_bad_trials_are_stopped_early(trials: list[dict[str, Any]]) -> None:
    assert sorted(map(learning_rate, trials)) == sorted([GOOD, *BAD])
    outcomes = {learning_rate(trial): trial["outcome"] for trial in trials}
    assert outcomes[GOOD] == "finished"
    stopped = [trial for trial in trials if trial["outcome"] == "stopped"]
    assert len(stopped) >= 2  # the one that comes to an epoch first may go on
    for trial in stopped:
        assert 1 <= len(trial["history"]) < EPOCHS


def test_stopped_trials_leave_nothing_running(swept: Path) -> None:
    import ray

    for _ in range(60):
        if ray.available_resources().get("CPU") == 4:
            return
        time.sleep(0.5)
    pytest.fail(f"of 4 CPUs {ray.available_resources().get('CPU')} are free")


def test_the_best_trial_is_the_bundle(swept: Path, trials: list[dict[str, Any]]) -> None:
    best = max(trials, key=lambda trial: max(epoch["validation_NDCG@10"] for epoch in trial["history"]))
    assert learning_rate(best) == GOOD
    manifest = read_manifest(swept / "bundle")
    assert manifest.metrics["validation_NDCG@10"] == max(e["validation_NDCG@10"] for e in best["history"])
    assert json.loads((swept / "training.json").read_text()) == best["history"]
    assert len(load_recommender(swept / "bundle").recommend([[1, 2]], 5)[0].items) == 5


def test_the_best_config_loads_and_has_a_run_of_its_own(swept: Path, experiment: Experiment) -> None:
    best = load_experiment(swept / "best.yaml")
    assert best.name == "sweep-best"
    assert best.sweep is None
    assert best.training.learning_rate == GOOD
    assert best.objective == experiment.objective


def test_the_report_stands_alone(swept: Path, trials: list[dict[str, Any]]) -> None:
    page = (swept / "tune" / "report.html").read_text()
    assert "http" not in page
    assert "<script" not in page
    assert page.count("<polyline class=") == len(trials)
    run = sum(len(trial["history"]) for trial in trials)
    assert f"{run} epochs were run" in page


def test_progress_is_said(swept: Path, said: list[str]) -> None:
    text = "\n".join(said)
    assert f"4 trials, 2 at once, of at most {EPOCHS} epochs each" in text
    assert re.search(r"epoch 1, validation NDCG@10 0\.\d+; best so far .* min left", text)


def test_a_finished_sweep_is_left_as_it_is_and_one_without_its_bundle_concluded_again(
    swept: Path, experiment: Experiment, trials: list[dict[str, Any]]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in swept.rglob("*")}
    said: list[str] = []
    assert sweep(experiment, said.append).directory == swept
    assert "sweep@1 is a finished sweep" in said[-1]
    assert {path: path.stat().st_mtime_ns for path in swept.rglob("*")} == before

    logs = {path: path.read_text() for path in swept.glob("tune/ray/*/train.log")}
    (swept / "best.yaml").unlink()
    shutil.rmtree(swept / "bundle")
    again: list[str] = []
    assert sweep(experiment, again.append).directory == swept
    assert not [line for line in again if "validation NDCG@10" in line]
    assert {path: path.read_text() for path in swept.glob("tune/ray/*/train.log")} == logs
    assert json.loads((swept / "tune" / "trials.json").read_text()) == trials
    assert (swept / "best.yaml").exists()
    assert (swept / "bundle" / "recommender.json").exists()


def test_another_sweep_or_a_training_is_another_version(swept: Path, experiment: Experiment) -> None:
    """So nothing of the sweep is mixed with them; here only what tells them apart is asked."""
    fingerprint = prepared_of(swept / "bundle").fingerprint
    assert experiment.sweep is not None
    owner = experiment.model_copy(update={"sweep": None})
    assert version_of(owner, fingerprint, experiment.sweep) == experiment.model.versions[0]
    assert version_of(owner, fingerprint, experiment.sweep.model_copy(update={"seed": 7})) is None
    assert version_of(owner, fingerprint) is None


@pytest.mark.usefixtures("ray_cluster")
def test_optuna_draws_the_trials(experiment: Experiment) -> None:
    pytest.importorskip("optuna", reason="needs optuna, which is optional")
    draw = {"recommender.learning_rate": {"kind": "loguniform", "low": 1e-4, "high": 1e-1}}
    values = experiment.model_dump(mode="json") | {
        "name": "optuna",
        "recommender": {"kind": "bpr", "dim": 8, "epochs": 1},
        "sweep": {"parameters": draw, "trials": 2, "search": "optuna"},
    }
    run = sweep(Experiment.model_validate(values), lambda text: None).directory
    found = json.loads((run / "tune" / "trials.json").read_text())
    assert [trial["outcome"] for trial in found] == ["finished"] * 2
    assert len({learning_rate(trial) for trial in found}) == 2


@pytest.mark.usefixtures("ray_cluster")
def test_as_many_trials_run_as_there_is_room_for() -> None:
    grid = {"kind": "grid", "values": list(range(9))}
    config = SweepConfig.model_validate({"parameters": {"training.seed": grid}})
    assert concurrency(ClusterConfig(workers=1), config) == 4
    assert concurrency(ClusterConfig(workers=3), config) == 1
    assert concurrency(ClusterConfig(workers=1), config.model_copy(update={"concurrent": 3})) == 3
    with pytest.raises(UserError, match=r"5 workers x 1 CPU need 5, the Ray cluster has 4"):
        concurrency(ClusterConfig(workers=5), config)
    with pytest.raises(UserError, match=r"sweep\.concurrent 3: .*or lower sweep\.concurrent"):
        concurrency(ClusterConfig(workers=2), config.model_copy(update={"concurrent": 3}))

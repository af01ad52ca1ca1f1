"""What a sweep tries is checked before anything is prepared or started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from recommender.errors import UserError
from tests.test_cli import HEAVY, ilrec, imported
from trainer.experiment import Experiment, load_experiment, with_fields
from trainer.sweep_config import SweepConfig
from tune.space import check_sweep, trial_experiment

SWEEPS = sorted((Path(__file__).parents[2] / "configs" / "sweeps").glob("*.yaml"))


def experiment(parameters: dict[str, Any], **sections: Any) -> Experiment:
    every_grid = all(parameter["kind"] == "grid" for parameter in parameters.values())
    sweep = {"parameters": parameters, "trials": None if every_grid else 4}
    return Experiment.model_validate({"name": "s", "world": {}, "sweep": sweep, **sections})


def choice(*values: Any) -> dict[str, Any]:
    return {"kind": "choice", "values": values}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_sweeps_that_we_ship_are_valid(path: Path) -> None:
    config, corners = check_sweep(load_experiment(path))
    assert config.total == config.trials
    assert len(corners) > len(config.parameters)


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"objective.betta": choice(0.1)}, r"objective\.ilrec\.betta: unknown field; did you mean 'beta'\?"),
        ({"objectiv.beta": choice(0.1)}, r"objectiv: unknown field; did you mean 'objective'\?"),
        ({"training.learning_rate": choice(1e-3, -1.0)}, r"learning_rate: .*greater than 0 \(given: -1\.0\)"),
        ({"training.dropout": {"kind": "uniform", "low": 0, "high": 1}}, r"dropout: .*less than 1 \(given: 1\.0\)"),
        ({"objective.k": {"kind": "uniform", "low": 1, "high": 3}}, r"k: .*valid integer"),
        ({"objective.k": choice(1, 4)}, r"objective\.k=4: objective: layers \[0\] are not intermediate layers"),
        ({"training.windows": choice("anchored", "sliding"), "training.stride": choice(5)}, "stride is of windows"),
        ({"prompt.history": choice(10, 20)}, r"prompt\.history: a sweep's trials share prepared data"),
        ({"cluster.workers": choice(1, 2)}, r"cluster\.workers: a sweep's trials"),
        ({"backbone.vocabulary": choice(4096)}, r"backbone\.vocabulary: a sweep's trials share prepared data"),
        ({"objective.kind": choice("ilrec")}, r"objective\.kind: another kind has other fields"),
        ({"training.epochs": choice(0, 3)}, r"epochs: .*greater than or equal to 1"),
    ],
)
def test_what_cannot_be_tried_is_refused_by_field(parameters: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=rf"(?s)^sweep\.parameters: .*{says}"):
        check_sweep(experiment(parameters))


def test_values_that_are_only_wrong_together_are_found() -> None:
    parameters = {name: choice(0.1, 0.2) for name in ("objective.alpha", "objective.beta", "training.dropout")}
    check_sweep(experiment(parameters))
    with pytest.raises(UserError, match="give k or layers, not both"):
        check_sweep(experiment(parameters | {"objective.k": choice(None, 2), "objective.layers": choice(None, [1])}))


def test_a_grace_period_beyond_the_epochs_is_refused() -> None:
    run = with_fields(experiment({"training.epochs": choice(2, 5)}), {"sweep.scheduler.grace_period": 3})
    with pytest.raises(UserError, match="grace_period: 3 is more than the 2 epochs"):
        check_sweep(run)


def test_a_collaborative_model_is_tuned_by_its_own_fields() -> None:
    sasrec = {"recommender": {"kind": "sasrec"}}
    check_sweep(experiment({"recommender.learning_rate": choice(1e-3, 2e-3)}, **sasrec))
    with pytest.raises(UserError, match="differ in recommender only"):
        check_sweep(experiment({"objective.beta": choice(0.1)}, **sasrec))


def test_no_sweep_is_named() -> None:
    with pytest.raises(UserError, match="has no `sweep:` section"):
        check_sweep(Experiment.model_validate({"name": "s", "world": {}}))


@pytest.mark.parametrize(
    ("sweep", "says"),
    [
        ({"parameters": {"a": {"kind": "grid", "values": [1]}}, "trials": 3}, "all parameters are grids"),
        ({"parameters": {"a": {"kind": "choice", "values": [1]}}}, "how many samples"),
        ({"parameters": {"a": {"kind": "grid", "values": [1]}}, "search": "optuna"}, "walks no grid; .*for a"),
        ({"parameters": {"a": {"kind": "uniform", "low": 2, "high": 2}}, "trials": 1}, "low must be less"),
        ({"parameters": {"a": {"kind": "loguniform", "low": 0, "high": 2}}, "trials": 1}, "greater than 0"),
        ({"parameters": {"a": {"kind": "choice", "values": [1, 1]}}, "trials": 1}, "each value once"),
        ({"parameters": {}, "trials": 1}, "at least 1"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(sweep: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        SweepConfig.model_validate(sweep)


def test_samples_are_drawn_for_each_point_of_the_grid() -> None:
    grid = {"kind": "grid", "values": [1, 2, 3]}
    parameters = {"objective.k": grid, "training.epochs": choice(2, 3)}
    assert SweepConfig.model_validate({"parameters": parameters, "trials": 4}).total == 12
    assert SweepConfig.model_validate({"parameters": {"objective.k": grid}}).total == 3


def test_a_trial_is_the_experiment_with_other_values() -> None:
    trial = trial_experiment(experiment({"objective.beta": choice(0.1)}), {"objective.beta": 0.3, "training.epochs": 2})
    assert trial.sweep is None
    assert trial.training.epochs == 2
    assert trial.model_dump()["objective"]["beta"] == 0.3


def test_a_bad_sweep_is_refused_before_anything_heavy(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(
        "name: my\nworld: {}\nsweep: {parameters: {objective.bata: {kind: choice, values: [1]}}, trials: 2}\n"
    )
    text = ilrec("tune", str(path), status=2)
    assert "did you mean 'beta'?" in text
    assert not HEAVY & imported(text)
    path.write_text("name: my\nworld: {}\nsweep: {parameters: {objective.beta: {kind: uniform, lo: 1}}}\n")
    assert "lo: unknown field; did you mean 'low'?" in ilrec("tune", str(path), status=2)

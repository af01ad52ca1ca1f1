"""What a sweep tries, checked before anything is prepared or started. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations, product
from typing import Any

from recommender.collaborative.config import CollaborativeModelConfig
from recommender.errors import UserError
from recommender.floors.config import ItemKNNConfig, TfidfConfig
from trainer.config import LanguageModelConfig
from trainer.experiment import Experiment, with_fields
from trainer.sweep_config import SweepConfig

# Trials share what `ilrec prepare` writes and are judged alike; these sections change neither.
_LANGUAGE_MODEL = ("objective", "training", "backbone.lora", "backbone.size")
_COLLABORATIVE = ("recommender",)


def check_sweep(experiment: Experiment) -> tuple[SweepConfig, list[Experiment]]:
    """The experiment's sweep, and the experiments at its corners.

    Every two parameters are tried at all pairs of their corners: both ends of a range and a value between them, each
    value of a choice or grid. So a value that the experiment refuses is found now, also where it depends on another.

    Raises:
        UserError: there is no sweep, a field is unknown or cannot be tuned, or a value is refused.
    """
    sweep, base = experiment.sweep, experiment.model_copy(update={"sweep": None})
    if sweep is None:
        raise UserError("the experiment has no `sweep:` section, which says what to tune; see configs/sweeps/demo.yaml")
    if isinstance(experiment.recommender, ItemKNNConfig | TfidfConfig):
        raise UserError(
            f"recommender.kind: {experiment.recommender.kind} chooses its settings by itself; give the values to try "
            "as lists (--set 'recommender.decay=[0.3, 0.6]') and run ilrec train"
        )
    corners = {path: parameter.corners for path, parameter in sweep.parameters.items()}
    first = {path: values[0] for path, values in corners.items()}
    found = []
    for paths in combinations(corners, min(2, len(corners))):
        for values in product(*(corners[path] for path in paths)):
            try:
                found.append(with_fields(base, first | dict(zip(paths, values, strict=True))))
            except UserError as error:
                raise UserError(f"sweep.parameters: {error}") from None
    for path in corners:
        _check_tunable(experiment, path)
    epochs = min(epochs_of(corner) for corner in found)
    if sweep.scheduler is not None and sweep.scheduler.grace_period > epochs:
        raise UserError(
            f"sweep.scheduler.grace_period: {sweep.scheduler.grace_period} is more than the {epochs} epochs of a trial"
        )
    return sweep, found


def _check_tunable(experiment: Experiment, path: str) -> None:
    language_model = isinstance(experiment.recommender, LanguageModelConfig)
    tunable = _LANGUAGE_MODEL if language_model else _COLLABORATIVE
    if path.split(".")[-1] == "kind":
        raise UserError(
            f"sweep.parameters: {path}: another kind has other fields; give each its own sweep (--set {path}=… --set "
            "name=…)"
        )
    if not any(path == each or path.startswith(f"{each}.") for each in tunable):
        raise UserError(
            f"sweep.parameters: {path}: a sweep's trials share prepared data and are judged alike, and differ in "
            f"{', '.join(tunable)} only; for other fields run one sweep a value (--set {path}=… --set name=…)"
        )


def trial_experiment(experiment: Experiment, parameters: Mapping[str, Any]) -> Experiment:
    """What a trial with these values trains."""
    return with_fields(experiment.model_copy(update={"sweep": None}), parameters)


def epochs_of(experiment: Experiment) -> int:
    """The most epochs that training runs."""
    recommender = experiment.recommender
    return recommender.epochs if isinstance(recommender, CollaborativeModelConfig) else experiment.training.epochs


def shown(parameters: Mapping[str, Any]) -> str:
    """Values as a person reads them: objective.beta=0.1, training.learning_rate=0.00123."""
    return ", ".join(
        f"{path}={value:.4g}" if isinstance(value, float) else f"{path}={value}" for path, value in parameters.items()
    )

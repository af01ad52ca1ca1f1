"""What a sweep found: its trials, the best of them, and the files that say so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from recommender.errors import UserError
from trainer.experiment import Experiment
from tune.files import FAILED, FINISHED, PARAMETERS, TRIALS
from tune.progress import METRIC
from tune.space import epochs_of, shown, trial_experiment


@dataclass(frozen=True)
class Trial:
    """One trial of a sweep.

    Attributes:
        name: of its directory under `ray/`.
        parameters: values by the path of their field.
        outcome: finished: training ended by itself; stopped: by the scheduler; failed: `error` says why.
        planned: the most epochs that it would have run.
        history: what each epoch that it ran reported.
    """

    name: str
    parameters: dict[str, Any]
    outcome: Literal["finished", "stopped", "failed"]
    planned: int
    history: list[dict[str, Any]]
    error: str | None = None

    @property
    def curve(self) -> list[float]:
        """Validation NDCG@10 by epoch."""
        return [epoch[METRIC] for epoch in self.history]

    @property
    def best(self) -> float:
        return max(self.curve)


def read_trials(experiment: Experiment, results: Any, directory: Path) -> list[Trial]:
    """The trials of a sweep that is over, in the order in which they began.

    Args:
        results: Tune's.
        directory: of the sweep.
    """
    begun = [path.parent.name for path in sorted(directory.glob(f"{TRIALS}/*/{PARAMETERS}"), key=_time)]
    found = {}
    for result in results:
        place = Path(result.path)
        ended = (place / FINISHED).exists()  # perhaps before it could be stopped
        seen = (place / FINISHED).read_text() if ended else (result.metrics or {}).get("history", "[]")
        history, error = json.loads(seen), None
        planned = epochs_of(trial_experiment(experiment, result.config))
        if result.error is not None:
            error = (place / FAILED).read_text() if (place / FAILED).exists() else str(result.error)
        ended = ended or len(history) == planned
        outcome: Any = "failed" if error is not None else "finished" if ended else "stopped"
        found[place.name] = Trial(place.name, result.config, outcome, planned, history, error)
    return [found[name] for name in begun if name in found]


def _time(path: Path) -> float:
    return path.stat().st_mtime


def best_of(trials: Sequence[Trial]) -> Trial:
    """The trial with the best epoch; of equals the first.

    Raises:
        UserError: no trial has finished an epoch.
    """
    validated = [trial for trial in trials if trial.curve]
    if not validated:
        reasons = "\n".join(f"  {trial.name} ({shown(trial.parameters)}): {trial.error}" for trial in trials)
        raise UserError(f"no trial of the sweep has finished an epoch:\n{reasons}")
    return max(validated, key=lambda trial: trial.best)


def write_trials(trials: list[Trial], path: Path) -> None:
    """All trials as JSON."""
    path.write_text(json.dumps([asdict(trial) for trial in trials], indent=2))


def write_best(experiment: Experiment, best: Trial, of: int, path: Path) -> None:
    """The best trial's experiment as a file that `ilrec train` takes; named <name>-best, so it has its own run."""
    values = trial_experiment(experiment, best.parameters).model_dump(mode="json", exclude={"sweep"})
    head = (
        f"# The best of {of} trials of the sweep {experiment.name}: validation NDCG@10 {best.best:.4f} at epoch "
        f"{best.curve.index(best.best) + 1}, with\n#   {shown(best.parameters)}\n"
    )
    values["name"] = f"{experiment.name}-best"
    path.write_text(head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")

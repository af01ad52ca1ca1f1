"""A trial: what a Tune worker runs. It takes no CPU itself; it starts a Ray Train job and waits for it."""

from __future__ import annotations

import json
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.trainable import wrap_function

from objectives.config import needs_rewards
from trainer.cluster import connect
from trainer.collaborative import worker as collaborative_worker
from trainer.config import LanguageModelConfig
from trainer.experiment import Experiment
from trainer.loop import worker
from trainer.loop.launch import run_to_best, torch_trainer
from trainer.parts import Prepared
from trainer.reporting.tracking import tracked
from trainer.run import FAILURE
from trainer.run import LOG as RUN_LOG
from tune.callbacks import EpochReports, StopOnRequest
from tune.files import FAILED, FINISHED, PARAMETERS, STOP
from tune.space import trial_experiment

_STOP_SECONDS = 30  # for a job to let go of its workers

_is_over = threading.Event()


def trainable(experiment: Experiment, trials: Path, prepared: Prepared, collaborative: Path | None) -> Any:
    """What Tune runs for each trial.

    Args:
        trials: where their directories go.
        prepared: where the data lie.
        collaborative: the bundle that rewards come from; trials that need none do not read it.
    """
    run = partial(
        run_trial,
        experiment=experiment.model_dump_json(),
        trials=str(trials),
        prepared=prepared,
        collaborative=None if collaborative is None else str(collaborative),
    )

    class Trial(wrap_function(run, name="trial")):  # type: ignore[misc]
        def cleanup(self) -> None:
            end_job(trials / self.trial_id)
            super().cleanup()

    return tune.with_resources(Trial, {"CPU": 0, "memory": 1})  # a byte: Tune wants a trial to ask for something


def run_trial(
    parameters: dict[str, Any], experiment: str, trials: str, prepared: Prepared, collaborative: str | None
) -> None:
    """Train with some values, in `<trials>/<trial>`; go on from the latest checkpoint if the trial was begun before.

    Each epoch is reported to Tune, the last one once more when training is over. Why it failed is left in a file.
    """
    connect()
    directory = Path(trials) / tune.get_context().get_trial_id()
    directory.mkdir(parents=True, exist_ok=True)
    for left in (FAILED, FAILURE, STOP):
        (directory / left).unlink(missing_ok=True)
    if not (directory / PARAMETERS).exists():
        (directory / PARAMETERS).write_text(json.dumps(parameters))
    try:
        if not (directory / FINISHED).exists():
            trial = trial_experiment(Experiment.model_validate_json(experiment), parameters)
            history = _train(trial, directory, prepared, Path(collaborative) if collaborative else None)
            (directory / FINISHED).write_text(json.dumps(history, indent=2))
    except Exception as error:
        (directory / FAILED).write_text(str(error))
        raise
    finally:
        _is_over.set()
    history = json.loads((directory / FINISHED).read_text())
    tune.report({**history[-1], "history": json.dumps(history)})


def end_job(directory: Path) -> None:
    """Have the job of this process's trial end itself in good order, if it is not over, and wait for that.

    Left alone, Ray would kill the job's controller together with the trial, and leave it to a helper to give back the
    job's placement group. The helper asks Ray's dashboard whether the controller is gone; where there is none, the
    workers' CPUs are never free again.
    """
    if not _is_over.is_set():
        (directory / STOP).touch()
        _is_over.wait(_STOP_SECONDS)
    (directory / STOP).unlink(missing_ok=True)


class Farewell(tune.Callback):
    """Lets the jobs of the last trials end before Tune does, which would kill them after five seconds.

    Args:
        trials: where the trials' directories are.
    """

    def __init__(self, trials: Path):
        self._trials = trials

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Ask for its end, which its process will then wait for."""
        (self._trials / trial.trial_id / STOP).touch()

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        """Wait if this was the last step: until no job has a request to end any more."""
        deadline = time.monotonic() + _STOP_SECONDS
        while all(trial.is_finished() for trial in trials) and time.monotonic() < deadline:
            if not any((self._trials / trial.trial_id / STOP).exists() for trial in trials):
                return
            time.sleep(0.1)


def _train(trial: Experiment, directory: Path, prepared: Prepared, collaborative: Path | None) -> list[Any]:
    cluster = trial.cluster.model_copy(update={"min_workers": None})  # room is planned
    trial = trial.model_copy(update={"name": f"{trial.name}-{directory.name}", "cluster": cluster})
    log = directory / RUN_LOG
    if isinstance(trial.recommender, LanguageModelConfig):
        rewards = collaborative if needs_rewards(trial.objective) else None
        loop, too_large = worker.train_worker, worker.TOO_LARGE
    else:
        rewards, loop, too_large = None, collaborative_worker.train_worker, collaborative_worker.TOO_LARGE
    callbacks = [EpochReports(), StopOnRequest(directory / STOP)]
    job = torch_trainer(trial, prepared, log, loop, rewards, callbacks)
    with tracked(trial, directory):
        try:
            return run_to_best(job, log, lambda line: None, too_large).history
        except Exception:  # of which kind depends on what the end interrupted
            if (directory / STOP).exists():
                sys.exit(0)
            raise

"""What a run measures, sent to MLflow and Weights & Biases as well, where the experiment's `tracking` asks for it.

The driver opens the runs there, so that what is wrong is said at once; rank 0 adds to them. Their ids stay in the run's
directory, and a resumed run goes on in the same ones. Neither package is a dependency of ours.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from recommender.errors import UserError
from recommender.files import read_json, write_json
from trainer.config import TrackingConfig
from trainer.experiment import Experiment
from trainer.run import TRACKING

_SETTINGS = ("recommender", "prompt", "backbone", "objective", "training", "cluster")  # none of them holds a secret


class _Tracker(Protocol):
    def add(self, values: Mapping[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class Tracking:
    """The runs that the driver opened, for rank 0, and for an evaluation afterwards.

    Args:
        run: the version's directory.
        say: told when a service fails. That ends the tracking there until training starts again, not the training.
    """

    def __init__(self, experiment: Experiment, run: Path, say: Callable[[str], None]):
        _send_nothing_else()
        self._say = say
        self._trackers: dict[str, _Tracker] = {}
        kinds: dict[str, Callable[[Experiment, Path, str], _Tracker]] = {"mlflow": _MLflow, "wandb": _Wandb}
        ids = read_json(run / TRACKING) or {}
        for name in (name for name in kinds if name in ids and getattr(experiment.tracking, name) is not None):
            self._try(name, partial(self._start, name, kinds[name], experiment, run, ids[name]))

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Add the values that were measured after `step`."""
        for name, tracker in list(self._trackers.items()):
            self._try(name, partial(tracker.add, values, step))

    def close(self) -> None:
        """Training is over."""
        for name, tracker in list(self._trackers.items()):
            self._try(name, tracker.close)

    def _start(
        self, name: str, kind: Callable[..., _Tracker], experiment: Experiment, directory: Path, run: str
    ) -> None:
        self._trackers[name] = kind(experiment, directory, run)

    def _try(self, name: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # of many kinds, with addresses and more in their texts
            self._trackers.pop(name, None)
            self._say(f"warning: tracking.{name} failed ({type(error).__name__}) and is left out from here on")


def _send_nothing_else() -> None:
    """Neither statistics of use nor crash reports. Before the packages are imported."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


def check_tracking(tracking: TrackingConfig) -> None:
    """Refuse what can be seen without a connection.

    Raises:
        UserError: a package or a key is missing.
    """
    for name, package in (("mlflow", "mlflow-skinny"), ("wandb", "wandb")):  # MLflow's client, and not its server
        if getattr(tracking, name) is not None and find_spec(name) is None:
            raise UserError(f"tracking.{name}: the package is missing: pip install {package}")
    if tracking.wandb is not None and tracking.wandb.mode == "online" and not os.environ.get("WANDB_API_KEY"):
        raise UserError("tracking.wandb: mode online takes its key from WANDB_API_KEY, which is not set")


@contextmanager
def tracked(experiment: Experiment, directory: Path) -> Iterator[None]:
    """Train in the block, on the driver: runs are open at each service, and do not seem to go on where training fails.

    Raises:
        UserError: a package or a key is missing, or MLflow does not answer.
    """
    open_runs(experiment, directory)
    try:
        yield
    except BaseException as error:
        if experiment.tracking.mlflow is not None:
            _end_mlflow_run(experiment, directory, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise


def open_runs(experiment: Experiment, directory: Path) -> None:
    """Open a run of the experiment's name at each service, unless it was opened before.

    Raises:
        UserError: a package or a key is missing, or MLflow does not answer.
    """
    _send_nothing_else()
    tracking, path = experiment.tracking, directory / TRACKING
    check_tracking(tracking)
    ids: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    if tracking.mlflow is not None and "mlflow" not in ids:
        ids["mlflow"] = _new_mlflow_run(experiment)
    if tracking.wandb is not None:
        ids.setdefault("wandb", secrets.token_hex(4))
    if ids:
        write_json(path, ids)


def _new_mlflow_run(experiment: Experiment) -> str:
    from mlflow import MlflowClient
    from mlflow.entities import Param

    config = experiment.tracking.mlflow
    assert config is not None
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    try:
        client = MlflowClient(config.uri)
        found = client.get_experiment_by_name(config.experiment)
        run = client.create_run(
            found.experiment_id if found else client.create_experiment(config.experiment), run_name=experiment.name
        )
        client.log_batch(run.info.run_id, params=[Param(name, str(value)) for name, value in _settings(experiment)])
    except Exception as error:
        raise UserError(f"tracking.mlflow: no run could be opened at {config.uri}: {error}") from None
    return str(run.info.run_id)


def _end_mlflow_run(experiment: Experiment, directory: Path, status: str) -> None:
    """Say that training is over; why it failed matters more than that MLflow does not answer."""
    from mlflow import MlflowClient

    assert experiment.tracking.mlflow is not None
    with suppress(Exception):
        run = json.loads((directory / TRACKING).read_text())["mlflow"]
        MlflowClient(experiment.tracking.mlflow.uri).set_terminated(run, status)


def _settings(experiment: Experiment) -> list[tuple[str, Any]]:
    sections = experiment.model_dump(mode="json", include=set(_SETTINGS))
    return [(f"{section}.{name}", value) for section, values in sections.items() for name, value in values.items()]


class _MLflow:
    def __init__(self, experiment: Experiment, directory: Path, run: str):
        from mlflow import MlflowClient

        assert experiment.tracking.mlflow is not None
        self._client, self._run = MlflowClient(experiment.tracking.mlflow.uri), run
        self._client.update_run(run, "RUNNING")  # again, where it failed before

    def add(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run)


class _Wandb:
    def __init__(self, experiment: Experiment, directory: Path, run: str):
        import wandb

        config = experiment.tracking.wandb
        assert config is not None
        self._run = wandb.init(
            project=config.project,
            mode=config.mode,
            id=run,
            name=experiment.name,
            resume="allow",
            dir=str(directory),
            config=dict(_settings(experiment)),
            settings=wandb.Settings(silent=True, console="off", disable_code=True, disable_git=True),
        )
        self._run.define_metric("*", step_metric="step")

    def add(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()

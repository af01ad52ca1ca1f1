"""Curves for TensorBoard: event files under `<run>/tensorboard`. What is known after training joins them."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from recommender.files import read_json
from trainer.experiment import Experiment
from trainer.parts import Say
from trainer.reporting.tracking import Tracking
from trainer.run import HISTORY

if TYPE_CHECKING:
    from trainer.evaluation.evaluation import Report

_DIRECTORY = "tensorboard"


class Curves:
    """Scalars by optimiser step, from rank 0.

    Args:
        run: the run's directory; an event file appears in `tensorboard/` with the first scalars.
        step: after which the run goes on: what an earlier attempt wrote of later steps is no longer shown.
        tracking: where rank 0's scalars go as well; None on other ranks.
    """

    def __init__(self, run: Path, rank: int, step: int, tracking: Tracking | None = None):
        self._directory = run / _DIRECTORY if rank == 0 else None
        self._step, self._tracking = step, tracking
        self._file: EventsWriter | None = None

    def add(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Add a point to the curve `group/name` of each value; `step` counts the steps that are done.

        It is in the file when the call returns: workers may end without a word. `SummaryWriter` writes from a thread.
        """
        if self._directory is None:
            return
        named = {f"{group}/{name}".replace("@", "_"): value for name, value in values.items()}
        points = [Summary.Value(tag=name, simple_value=value) for name, value in named.items()]
        with suppress(OSError):  # a full disk stops training where a checkpoint cannot be saved, and not here
            file = self._opened()
            file.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=points)))
            file.flush()
        if self._tracking is not None:
            self._tracking.add(named, step)

    def close(self) -> None:
        """Training is over."""
        if self._tracking is not None:
            self._tracking.close()

    def _opened(self) -> EventsWriter:
        assert self._directory is not None
        if self._file is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            suffix = f".after-{self._step}-{time.time_ns()}"  # the time in a file's name is in whole seconds
            self._file = EventsWriter(str(self._directory / "events"), suffix)
            start = SessionLog(status=SessionLog.START)
            self._file.write_event(Event(wall_time=time.time(), step=self._step + 1, session_log=start))
        return self._file


def add_floors(experiment: Experiment, run: Path, metrics: Mapping[str, Mapping[str, float]], say: Say) -> None:
    """Add the floors' validation metrics to a version's curves: `validation/itemknn/NDCG_10`.

    Args:
        metrics: system → metric → mean.
    """
    _add(experiment, run, "validation", _named({s: of for s, of in metrics.items() if s != "model"}), say)


def add_evaluation(experiment: Experiment, run: Path, report: Report, say: Say) -> None:
    """Add an evaluation to a version's curves: `test/NDCG_10`, `test/itemknn/NDCG_10`, and by kind of target
    `test/unseen/NDCG_10`, `test/tail/itemknn/NDCG_10`."""
    values = _named(report.metrics)
    for labels in report.segments.values():
        for label, of in labels.items():
            segment = re.split(r"\W", label)[0]
            metrics = {system: {"NDCG@10": found["NDCG@10"]} for system, found in of.items()}
            values |= {f"{segment}/{name}": value for name, value in _named(metrics).items()}
    _add(experiment, run, report.split, values, say)


def _named(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Flat: the model's metrics by their own name, others behind the system's."""
    return {
        name if system == "model" else f"{system}/{name}": value
        for system, of in metrics.items()
        for name, value in of.items()
    }


def _add(experiment: Experiment, run: Path, group: str, values: Mapping[str, float], say: Say) -> None:
    """At the last step, here and wherever the version is tracked; a version without curves gets none."""
    if not (run / _DIRECTORY).is_dir() or not (history := read_json(run / HISTORY)):
        return
    step = int(history[-1]["step"])
    curves = Curves(run, 0, step, Tracking(experiment, run, say))
    curves.add(group, values, step)
    curves.close()

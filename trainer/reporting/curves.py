"""Curves for TensorBoard: event files under `<run>/tensorboard`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from trainer.reporting.tracking import Tracking


class Curves:
    """Scalars by optimiser step, from rank 0.

    Args:
        run: the run's directory; an event file appears in `tensorboard/` with the first scalars.
        step: after which the run goes on: what an earlier attempt wrote of later steps is no longer shown.
        tracking: where rank 0's scalars go as well; None on other ranks.
    """

    def __init__(self, run: Path, rank: int, step: int, tracking: Tracking | None = None):
        self._directory = run / "tensorboard" if rank == 0 else None
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
            suffix = f".after-{self._step}"  # the time in a file's name is in whole seconds
            self._file = EventsWriter(str(self._directory / "events"), suffix)
            start = SessionLog(status=SessionLog.START)
            self._file.write_event(Event(wall_time=time.time(), step=self._step + 1, session_log=start))
        return self._file

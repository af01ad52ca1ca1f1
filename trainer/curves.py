"""Curves for TensorBoard: event files under `<run>/tensorboard`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary


class Curves:
    """Scalars by optimiser step, from rank 0.

    Args:
        run: the run's directory; an event file appears in `tensorboard/` with the first scalars.
        step: after which the run goes on: what an earlier attempt wrote of later steps is no longer shown.
    """

    def __init__(self, run: Path, rank: int, step: int):
        self._directory = run / "tensorboard" if rank == 0 else None
        self._step = step
        self._file: EventsWriter | None = None

    def add(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Add a point to the curve `group/name` of each value; `step` counts the steps that are done.

        It is in the file when the call returns: workers may end without a word. `SummaryWriter` writes from a thread.
        """
        if self._directory is None:
            return
        points = [
            Summary.Value(tag=f"{group}/{name}".replace("@", "_"), simple_value=value) for name, value in values.items()
        ]
        with suppress(OSError):  # a full disk stops training where a checkpoint cannot be saved, and not here
            file = self._opened()
            file.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=points)))
            file.flush()

    def _opened(self) -> EventsWriter:
        assert self._directory is not None
        if self._file is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            suffix = f".after-{self._step}"  # the time in a file's name is in whole seconds
            self._file = EventsWriter(str(self._directory / "events"), suffix)
            start = SessionLog(status=SessionLog.START)
            self._file.write_event(Event(wall_time=time.time(), step=self._step + 1, session_log=start))
        return self._file

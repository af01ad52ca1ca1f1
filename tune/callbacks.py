"""What runs in the controller of a trial's Ray Train job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.tune.integration.ray_train import TuneReportCallback


class EpochReports(TuneReportCallback):
    """Passes the job's epochs on to Tune; checkpoints between epochs have no validation, and are not."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if "history" in metrics[0]:
            super().after_report(run_context, metrics, checkpoint)


class StopOnRequest(WorkerGroupCallback):
    """Ends the job, as Ctrl-C would, once a file appears: its workers go and their resources are free."""

    def __init__(self, request: Path):
        self._request = request

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        if self._request.exists():
            ray.get_runtime_context().current_actor.abort.remote()

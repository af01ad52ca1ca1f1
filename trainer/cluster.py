"""The connection to Ray."""

from __future__ import annotations

import logging
import os
from typing import Any

from recommender.errors import UserError
from trainer.config import ClusterConfig


def connect(num_cpus: int | None = None) -> None:
    """Join the Ray cluster at RAY_ADDRESS, or start one on this machine, unless connected already.

    No usage statistics are sent. Workers' output stays in Ray's own logs: progress comes through the run's log, and
    errors through exceptions.

    Args:
        num_cpus: of a Ray started here; None = the machine's.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how long a report waits for the controller
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    import ray

    if ray.is_initialized():
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {}
    if not os.environ.get("RAY_ADDRESS"):
        options = {"include_dashboard": False, "address": "local", "num_cpus": num_cpus}
    ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)


def check_resources(cluster: ClusterConfig, workers: int) -> None:
    """Refuse at once what the connected Ray cannot run, instead of waiting for it for ever.

    Raises:
        UserError: `workers` of `cluster`'s kind need more than there is.
    """
    import ray

    has = ray.cluster_resources()
    for resource, each in (("CPU", cluster.cpus_per_worker), ("GPU", cluster.gpus_per_worker)):
        if each * workers > has.get(resource, 0):
            raise UserError(
                f"cluster: {workers} workers x {each:g} {resource} need {each * workers:g}, the Ray cluster has "
                f"{has.get(resource, 0):g}; lower cluster.workers, or join more nodes"
            )

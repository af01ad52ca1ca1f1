"""The connection to Ray."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Mapping
from typing import Any

from recommender.errors import UserError
from recommender.quiet import quiet
from trainer.config import ClusterConfig


def connect(num_cpus: int | None = None) -> None:
    """Join the Ray cluster at RAY_ADDRESS, or start one on this machine, unless connected already.

    No usage statistics are sent. Workers' output stays in Ray's own logs: progress comes through the run's log, and
    errors through exceptions.

    Args:
        num_cpus: of a Ray started here; None = the machine's.

    Raises:
        UserError: see `check_address`.
    """
    quiet()
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how long a report waits for the controller
    import ray

    if ray.is_initialized():
        return
    options: dict[str, Any] = {}
    check_address()
    if not os.environ.get("RAY_ADDRESS"):
        options = {"include_dashboard": False, "address": "local", "num_cpus": num_cpus}
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    except Exception as error:  # of which kind depends on what did not answer
        address = os.environ.get("RAY_ADDRESS")
        what = f"RAY_ADDRESS={address}: cannot be joined" if address else "Ray did not start on this machine"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"{what}: {reason}; on a busy machine the same command may do next time") from error
    if threading.current_thread() is threading.main_thread():
        # How a job server or a service manager says Ctrl-C, on which Ray Train ends its workers; Ray would abort.
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's way to start what it puts behind
            signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


def check_address() -> None:
    """Refuse a RAY_ADDRESS such as ray://head:10001: neither code nor files would be where the workers are.

    Raises:
        UserError: says how to run there.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if "://" in address:
        raise UserError(
            f"RAY_ADDRESS={address}: this has to run on a machine of the cluster; send it there: ilrec submit VERB "
            "CONFIG --address ray://<head>:10001, or as a job: --address http://<head>:8265"
        )


def check_resources(cluster: ClusterConfig, workers: int) -> None:
    """Refuse at once what the connected Ray cannot run, instead of waiting for it for ever.

    Raises:
        UserError: `workers` of `cluster`'s kind need more than there is.
    """
    import ray

    check_fits(cluster, workers, ray.cluster_resources())


def check_fits(cluster: ClusterConfig, workers: int, has: Mapping[str, float]) -> None:
    """Refuse `workers` of `cluster`'s kind where a Ray cluster's total resources `has` are fewer.

    Raises:
        UserError: says what is missing.
    """
    for resource, each in (("CPU", cluster.cpus_per_worker), ("GPU", cluster.gpus_per_worker)):
        if each * workers > has.get(resource, 0):
            raise UserError(
                f"cluster: {workers} workers x {each:g} {resource} need {each * workers:g}, the Ray cluster has "
                f"{has.get(resource, 0):g}; lower cluster.workers, or join more nodes"
            )

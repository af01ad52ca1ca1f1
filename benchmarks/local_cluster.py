"""A Ray cluster of several nodes on this machine, parts of which can be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

ILREC = Path(__file__).parents[1] / "ilrec.py"
_STORE = 80 * 2**20  # of a node, for objects


class LocalCluster:
    """A head without CPUs, and nodes with one CPU each: a node holds one worker. Leaving the block ends all of it.

    Args:
        nodes: besides the head.
    """

    def __init__(self, nodes: int):
        self._nodes = nodes
        self._drivers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> LocalCluster:
        # Workers inherit these from their node. Each step is said, and a node that is gone is missed after seconds.
        self._before = dict(os.environ)
        os.environ |= {
            "ILREC_PROGRESS_SECONDS": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ILREC.parent),
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        health = {
            "health_check_initial_delay_ms": 0,
            "health_check_period_ms": 500,
            "health_check_failure_threshold": 4,
        }
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "object_store_memory": _STORE,
                "include_dashboard": False,
                "_system_config": health,
            },
        )
        for _ in range(self._nodes):
            self.add_node()
        return self

    def __exit__(self, *_: object) -> None:
        for driver in self._drivers:
            driver.kill()
            driver.wait()
        self._cluster.shutdown()
        os.environ.clear()
        os.environ.update(self._before)

    def ilrec(self, arguments: Sequence[str], output: Path) -> subprocess.Popen[bytes]:
        """Start an `ilrec` command as a driver on the head; what it says is appended to `output`."""
        with output.open("ab") as file:
            driver = subprocess.Popen(
                [sys.executable, str(ILREC), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "RAY_ADDRESS": self._cluster.address},
            )
        self._drivers.append(driver)
        return driver

    def add_node(self) -> None:
        """Join a further node."""
        self._cluster.add_node(num_cpus=1, object_store_memory=_STORE)

    def _training(self) -> list[tuple[Any, int]]:
        """The nodes that training workers run on, and the workers' process ids."""
        nodes = {
            process.process.pid: node for node in self._cluster.worker_nodes for process in node.all_processes["raylet"]
        }
        return [
            (nodes[process.info["ppid"]], process.info["pid"])
            for process in psutil.process_iter(["pid", "ppid", "cmdline"])
            if process.info["ppid"] in nodes and (process.info["cmdline"] or [""])[0].startswith("ray::RayTrainWorker")
        ]

    def wait_for_no_worker(self) -> None:
        """Return when no training worker is left."""
        while self._training():
            time.sleep(0.1)

    def kill_worker(self, number: int) -> None:
        """Kill one of the training workers' processes."""
        pids = [pid for _, pid in self._training()]
        os.kill(pids[number % len(pids)], signal.SIGKILL)

    def kill_node(self, number: int) -> None:
        """Kill one of the nodes with a training worker on it, and all of its processes."""
        nodes = [node for node, _ in self._training()]
        self._cluster.remove_node(nodes[number % len(nodes)], allow_graceful=False)

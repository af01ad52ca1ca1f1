"""`ilrec` commands as processes on one Ray, which is started once for all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from recommender.errors import UserError
from trainer.cluster import check_resources, connect
from trainer.config import ClusterConfig

ILREC = Path(__file__).parents[1] / "ilrec.py"
GRACE = 20  # seconds that an interrupted process has to let go of its workers


class Commands:
    """Starts `ilrec` commands; leaving the block ends those that still run.

    Args:
        cluster: what one command needs.
        jobs: how many run at once.
    """

    def __init__(self, cluster: ClusterConfig, jobs: int):
        self._cluster, self._jobs = cluster, jobs
        self._environment: dict[str, str] | None = None
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *_: object) -> None:
        running = [process for process in self._started if process.poll() is None]
        for process in running:
            process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + GRACE
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()

    def __call__(self, arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start one command; what it says is appended to `log`.

        Raises:
            UserError: Ray has too little for `jobs` of them.
        """
        environment = self._on_one_ray()
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, str(ILREC), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches this process alone, which ends the others in good order
            )
        self._started.append(process)
        return process

    def _on_one_ray(self) -> dict[str, str]:
        """The environment in which commands join one Ray: the one at RAY_ADDRESS, or else one that is started here."""
        if self._environment is None:
            import ray

            connect()
            try:
                check_resources(self._cluster, self._jobs * self._cluster.workers)
            except UserError as error:
                raise UserError(f"--jobs {self._jobs}: {error}; or give fewer --jobs") from None
            self._environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        return self._environment

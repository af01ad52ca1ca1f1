"""A Ray cluster of several nodes on this machine, parts of which can be killed."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from recommender.errors import UserError

ILREC = Path(__file__).parents[1] / "ilrec.py"
_SETTINGS = {  # what workers inherit from their node: each step is said, and who is gone is missed soon
    "ILREC_PROGRESS_SECONDS": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ILREC.parent),
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
}
_RAY = (sys.executable, "-m", "ray.scripts.scripts")
_DEADLINE = 180  # seconds for a node to start


class LocalCluster:
    """A head without CPUs, and nodes with one CPU each: a node holds one worker. Leaving the block ends all of it.

    Its nodes are processes of their own, so that a Ray of this process is left alone.

    Args:
        nodes: besides the head.
    """

    def __init__(self, nodes: int):
        self._number = nodes
        self._started: list[subprocess.Popen[bytes]] = []  # the head and all nodes that ever were
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._drivers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> LocalCluster:
        self._directory = Path(tempfile.mkdtemp(prefix="ray-"))  # Ray's sockets lie below: no long names
        self._log = self._directory / "nodes.log"
        # A token of its own: Ray listens to the network, and this user's token, if there is one, is for other clusters.
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self._environment = inherited | _SETTINGS | token
        head = ["--head", "--port=0", "--num-cpus=0", "--include-dashboard=false", "--disable-usage-stats"]
        head += [f"--ray-client-server-port={_free_port()}", f"--temp-dir={self._directory / 'r'}"]
        try:
            self._start(head)
            self._wait_for(1)
            self._address = re.findall(r"--address='([\d.:]+)'", self._log.read_text())[0]
            for _ in range(self._number):
                self.add_node()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self._drivers, *reversed(self._started)]:
            _kill(process)
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        """In which a process joins this cluster as a driver."""
        return self._environment | {"RAY_ADDRESS": self._address}

    def ilrec(self, arguments: Sequence[str], output: Path) -> subprocess.Popen[bytes]:
        """Start an `ilrec` command as a driver on the head; what it says is appended to `output`."""
        command = [sys.executable, str(ILREC), *arguments]
        driver = _process(command, output, self.environment)
        self._drivers.append(driver)
        return driver

    def add_node(self) -> None:
        """Join a further node."""
        with self._training_paused():
            self._nodes.append(self._start_node())
            self._wait_for(len(self._started))

    def wait_for_no_worker(self) -> None:
        """Return when no training worker is left.

        Raises:
            UserError: one does not go.
        """
        deadline = time.monotonic() + _DEADLINE
        while self._training():
            if time.monotonic() > deadline:
                raise UserError("training workers outlive their driver")
            time.sleep(0.1)

    def kill_worker(self, number: int) -> None:
        """Kill one of the training workers' processes."""
        pids = [pid for _, pid in self._training()]
        os.kill(pids[number % len(pids)], signal.SIGKILL)

    def kill_node(self, number: int) -> None:
        """Kill one of the nodes with a training worker on it: all of its processes."""
        node = self._node(number)
        self._nodes.remove(node)
        _kill(node)

    def take_node(self, number: int, notice: int) -> None:
        """Give one of the nodes with a training worker on it `notice` seconds, then kill it.

        Raises:
            UserError: its worker is still there.
        """
        node = self._node(number)
        raylets = [each for each in psutil.Process(node.pid).children() if _title(each).endswith("raylet")]
        [[identity]] = [re.findall(r"--node_id=(\w+)", " ".join(each.cmdline())) for each in raylets]
        command = [*_RAY, "drain-node", f"--address={self._address}", f"--node-id={identity}"]
        command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=reclaimed"]
        with self._training_paused():
            subprocess.run([*command, f"--deadline-remaining-seconds={notice}"], env=self._environment, check=True)
        deadline = time.monotonic() + notice
        while node in [each for each, _ in self._training()]:
            if time.monotonic() > deadline:
                raise UserError(f"a worker has not left its node within {notice} s")
            time.sleep(0.1)
        self._nodes.remove(node)
        _kill(node)

    def _node(self, number: int) -> subprocess.Popen[bytes]:
        """One of the nodes with a training worker on it."""
        nodes = [node for node, _ in self._training()]
        return nodes[number % len(nodes)]

    @contextmanager
    def _training_paused(self) -> Iterator[None]:
        """Let training stand still meanwhile: Ray's commands take seconds, in which a small run would end."""
        workers = [psutil.Process(pid) for _, pid in self._training()]
        for worker in workers:
            worker.suspend()
        try:
            yield
        finally:
            for worker in workers:
                worker.resume()

    def _training(self) -> list[tuple[subprocess.Popen[bytes], int]]:
        """The nodes that training workers run on, and the workers' process ids."""
        return [
            (node, process.pid)
            for node in self._nodes
            for process in psutil.Process(node.pid).children(recursive=True)
            if _title(process).startswith("ray::RayTrainWorker")
        ]

    def _start_node(self) -> subprocess.Popen[bytes]:
        return self._start([f"--address={self._address}", "--num-cpus=1"])

    def _start(self, options: Sequence[str]) -> subprocess.Popen[bytes]:
        command = [*_RAY, "start", "--block", "--node-ip-address=127.0.0.1"]
        command += [f"--object-store-memory={80 * 2**20}", "--min-worker-port=0", "--max-worker-port=0"]
        command += ["--dashboard-agent-listen-port=0", *options]
        self._started.append(_process(command, self._log, self._environment))
        return self._started[-1]

    def _wait_for(self, nodes: int) -> None:
        """Return when so many nodes have started, the head among them.

        Raises:
            UserError: one did not.
        """
        deadline = time.monotonic() + _DEADLINE
        while self._log.read_text().count("Ray runtime started") < nodes:
            if time.monotonic() > deadline or any(node.poll() is not None for node in self._nodes):
                raise UserError(f"a node of the local cluster does not start:\n{self._log.read_text()}")
            time.sleep(0.2)


def _process(command: Sequence[str], output: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with output.open("ab") as file:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all below it."""
    if process.poll() is None:
        below = psutil.Process(process.pid).children(recursive=True)
        for each in [*below, process]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error, IndexError):
        return str(process.cmdline()[0])
    return ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

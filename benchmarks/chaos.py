"""Does training survive? Kills workers, nodes and drivers at random, and compares with a run that nobody disturbed.

    python -m benchmarks.chaos --kills 3 --seed 0

A Ray cluster of several nodes is started on this machine. On it `ilrec train` runs twice on a small simulated world:
once left alone, and once disturbed at random moments. Before a node is killed, or taken after a notice, another joins;
a killed driver (kill -9) is started again by the same command. The table says what was killed, after which step, how
long it took until the next step was done, and how many steps had to be done again. Both runs must end with the same
loss.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.local_cluster import LocalCluster
from recommender.errors import UserError

_STEP = re.compile(r"^epoch \d+/\d+ step (\d+)/(\d+): ", re.MULTILINE)
_RESUMED = re.compile(r"^resumed at step (\d+) of ", re.MULTILINE)
_DEADLINE = 600  # seconds without a step, after which a run is taken for dead
_TO_THE_END = 1200.0  # seconds for the whole of a run
_NOTICE = 300  # seconds that a node is given after a notice; it goes as soon as its worker has left


def experiment(name: str, storage: Path) -> dict[str, Any]:
    """A run of 48 steps, with a checkpoint every other one."""
    return {
        "name": name,
        "world": {
            "items": 200,
            "users": 60,
            "kinds": 10,
            "brands": 8,
            "uses": 3,
            "mean_length": 8,
            "min_length": 5,
            "max_length": 20,
        },
        "prompt": {"history": 8},
        "backbone": {"kind": "preset", "size": "tiny", "vocabulary": 400},
        "objective": {"kind": "msl"},
        "training": {"epochs": 8, "batch_tokens": 700, "checkpoint_every": 2, "patience": 8},
        "cluster": {"workers": 2, "storage": str(storage), "max_failures": 100},
    }


class Job:
    """An `ilrec train` on a cluster, watched through its log.

    Args:
        values: the experiment's.
        directory: for its config and its output.
    """

    def __init__(self, cluster: LocalCluster, values: dict[str, Any], directory: Path):
        self._cluster = cluster
        self._config, self._output = directory / f"{values['name']}.yaml", directory / f"{values['name']}.out"
        self._config.write_text(yaml.safe_dump(values))
        self.run = Path(values["cluster"]["storage"]) / values["name"] / "1"
        self.start()

    def start(self) -> None:
        """Start the command, for the first time or again."""
        self.driver = self._cluster.ilrec(["train", str(self._config)], self._output)

    @property
    def log(self) -> str:
        """All that workers have said."""
        path = self.run / "train.log"
        return path.read_text() if path.exists() else ""

    @property
    def output(self) -> str:
        """All that drivers have said."""
        return self._output.read_text()

    def step(self) -> int:
        """The last step that was done."""
        steps = _STEP.findall(self.log)
        return int(steps[-1][0]) if steps else 0

    def until(self, true: Callable[[], Any]) -> None:
        """Wait for something of a job that runs.

        Raises:
            UserError: the job ended first, or stands still.
        """
        deadline = time.monotonic() + _DEADLINE
        while not true():
            if self.driver.poll() is not None:
                raise UserError(f"{self.run.name} ended with status {self.driver.returncode}:\n{self.output}")
            if time.monotonic() > deadline:
                raise UserError(f"{self.run.name} stands still; what it said last:\n{self.log[-2000:]}\n{self.output}")
            time.sleep(0.1)

    def until_step(self, step: int) -> None:
        """Wait until a step is done."""
        self.until(lambda: self.step() >= step)

    def finish(self) -> list[dict[str, Any]]:
        """Wait for the end.

        Returns:
            The metrics of all epochs.

        Raises:
            UserError: training failed.
        """
        if self.driver.wait(_TO_THE_END):
            raise UserError(f"{self.run.name} ended with status {self.driver.returncode}:\n{self.output}")
        history: list[dict[str, Any]] = json.loads((self.run / "training.json").read_text())
        return history


@dataclass(frozen=True)
class Kill:
    """What a kill cost.

    Attributes:
        what: "worker", "node", "notice" (of a node's end) or "driver".
        step: the last one that was done before.
        seconds: until another one was done.
        lost: steps that were done again.
    """

    what: str
    step: int
    seconds: float
    lost: int


def kill(cluster: LocalCluster, job: Job, what: str, victim: int) -> Kill:
    """Kill a part of a running job and wait until it trains again.

    Args:
        victim: which of the workers or nodes.
    """
    if what in ("node", "notice"):
        cluster.add_node()  # to spare, as the one is that takes over
    before, step, started = len(job.log), job.step(), time.monotonic()
    if what == "worker":
        cluster.kill_worker(victim)
    elif what == "node":
        cluster.kill_node(victim)
    elif what == "notice":
        cluster.take_node(victim, _NOTICE)
    else:
        job.driver.kill()
        job.driver.wait()
        job.start()
    # Workers may say another step or two before they miss the one that is gone; who starts says this first.
    job.until(lambda: _STEP.search(job.log[before:].partition(" steps an epoch on ")[2]))
    seconds = time.monotonic() - started
    since = job.log[before:]
    done = [int(each) for each, _ in _STEP.findall(since.partition(" steps an epoch on ")[0])]
    step = max([step, *done])
    resumed = _RESUMED.search(since)
    return Kill(what, step, seconds, step - (int(resumed[1]) if resumed else 0))


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of what is killed, and when")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as directory, LocalCluster(3) as cluster:
        storage = Path(directory) / "runs"
        alone = Job(cluster, experiment("alone", storage), Path(directory)).finish()
        job = Job(cluster, experiment("disturbed", storage), Path(directory))
        kills = []
        for step in sorted(rng.choices(range(1, alone[-1]["step"] - 10), k=args.kills)):
            job.until_step(step)
            time.sleep(rng.random() / 2)  # in the middle of a step, a validation or a checkpoint
            kills.append(kill(cluster, job, rng.choice(["worker", "node", "notice", "driver"]), rng.randrange(2)))
        disturbed = job.finish()
    table = Table("killed", "after step", "trained again after, s", "steps done again")
    for each in kills:
        table.add_row(each.what, str(each.step), f"{each.seconds:.1f}", str(each.lost))
    Console(width=100).print(table)
    for name, history in (("undisturbed", alone), ("disturbed", disturbed)):
        print(f"{name}: loss {history[-1]['loss']:.6f} after step {history[-1]['step']}")
    sys.exit(abs(alone[-1]["loss"] - disturbed[-1]["loss"]) > 1e-4)


if __name__ == "__main__":
    try:
        main()
    except (UserError, subprocess.SubprocessError) as error:
        sys.exit(f"error: {error}")

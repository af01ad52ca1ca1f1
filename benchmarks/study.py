"""Does it work? Methods tuned with the same budget, trained with several seeds, tested once, compared with intervals.

    python -m benchmarks.study benchmarks/studies/world.yaml --jobs 2

Each trial of each method is trained with the first seed; the one with the best validation is the method, and is trained
with the other seeds as well. An ablation takes over the trial of the method that it is an ablation of. Only then, and
once, is anything tested. The floors stand in the tables as well, from the same evaluations.

Interrupted, or a run failed? The same command goes on, and repeats nothing that is finished. Everything lies in
<storage>/<study>: the report, and a directory and a log for each run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from benchmarks.commands import Commands
from benchmarks.config import load_study
from benchmarks.report import as_markdown, make_report, write_report
from benchmarks.runs import Run, Study
from recommender.errors import UserError

TAIL = 15  # lines of a failed run's log that are shown

Say = Callable[[str], None]


class Process(Protocol):
    """A command that was started."""

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""
        ...


Start = Callable[[Sequence[str], Path], Process]


class Work:
    """Runs commands, `jobs` at a time, and says how it goes.

    Attributes:
        failed: names of the runs that failed.
    """

    def __init__(self, start: Start, jobs: int, metric: str, say: Say):
        self._start, self._jobs, self._metric, self._say = start, jobs, metric, say
        self._seconds: dict[str, list[float]] = {"train": [], "evaluate": []}
        self.failed: list[str] = []

    def carry_out(self, verb: str, runs: Sequence[Run], later: dict[str, int]) -> None:
        """`ilrec <verb>` for all runs; one that fails is shown, and the others go on.

        Args:
            later: the commands of each verb that are still to come afterwards.
        """
        waiting = deque(runs)
        running: list[tuple[Process, Run, float]] = []
        while waiting or running:
            while waiting and len(running) < self._jobs:
                run = waiting.popleft()
                run.claim()
                running.append((self._start(run.command(verb), run.log), run, time.monotonic()))
                self._say(f"{verb} {run.name}: started ({run.log})")
            ended = [entry for entry in running if entry[0].poll() is not None]
            running = [entry for entry in running if entry not in ended]
            for process, run, started in ended:
                self._seconds[verb].append(time.monotonic() - started)
                left = later | {verb: later.get(verb, 0) + len(waiting) + len(running)}
                self._tell(verb, run, process.poll(), left)
            if not ended:
                time.sleep(0.1)

    def _tell(self, verb: str, run: Run, status: int | None, left: dict[str, int]) -> None:
        """One line on a run that ended, and the end of its log if it failed."""
        done = f"{verb} {run.name}: "
        if status == 0 and verb == "train":
            done += f"validation {self._metric} {run.validation(self._metric):.4f}"
        elif status == 0:
            done += "done"  # what it found is in the report, beside what it is compared with
        else:
            self.failed.append(run.name)
            done += f"FAILED with status {status}"
        self._say(f"{done} in {self._seconds[verb][-1]:.0f} s; {self._outlook(left)}")
        if status != 0:
            lines = run.log.read_text(errors="replace").splitlines() if run.log.exists() else []
            self._say("\n".join(f"    {line}" for line in lines[-TAIL:]))

    def _outlook(self, left: dict[str, int]) -> str:
        """How many commands are left and how long they will take, by the mean of those seen."""
        if not any(left.values()):
            return "none left"
        seen = [seconds for each in self._seconds.values() for seconds in each]
        minutes = 0.0
        for verb, number in left.items():
            like = self._seconds[verb] or seen
            minutes += number * sum(like) / len(like) / self._jobs / 60
        return f"{sum(left.values())} left, about {minutes:.0f} min"


def conduct(study: Study, start: Start, jobs: int, say: Say) -> list[str]:
    """Tune, train, test and report, as far as it is not done yet.

    Returns:
        The names of the runs that failed.

    Raises:
        UserError: runs ranked different targets.
    """
    config = study.config
    methods = list(config.methods)
    work = Work(start, jobs, config.metric, say)
    finals = len(methods) * len(config.seeds)

    tuned = [method for method in methods if config.methods[method].trials]
    trials = [run for method in tuned for run in study.trials(method)]
    untrained = [run for run in trials if not run.is_trained]
    say(f"{study.name}: {len(trials)} tuning runs, {len(trials) - len(untrained)} of them done")
    work.carry_out("train", untrained, {"train": finals - len(tuned), "evaluate": finals})

    for method in tuned:
        if (trial := study.choice(method)) is not None:
            values = ", ".join(f"{run.validation(config.metric):.4f}" for run in study.trials(method))
            say(f"{method}: trial {trial} of validation {config.metric} {values}")
    runs = [run for method in methods for run in study.finals(method)]
    work.carry_out("train", [run for run in runs if not run.is_trained], {"evaluate": len(runs)})
    work.carry_out("evaluate", [run for run in runs if run.is_trained and not run.is_tested], {})

    report = make_report(study)
    write_report(report, study.directory)
    say("\n" + as_markdown(report))
    say(f"saved: {study.directory}/report.md, report.json")
    return work.failed


def main() -> None:
    """The command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, help="a YAML file, see benchmarks/studies; its name is the study's")
    parser.add_argument("--storage", type=Path, default=Path("runs/studies"), help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="commands at once; default: %(default)s")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error("--jobs: at least 1")
    try:
        study = Study(load_study(arguments.study), arguments.study.stem, arguments.storage.expanduser().absolute())
        with Commands(study.cluster, arguments.jobs) as start:
            failed = conduct(study, start, arguments.jobs, _say)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on")
        sys.exit(130)
    if failed:
        _say(
            f"failed: {', '.join(failed)}. Mend the cause that the log names, then run the same command again: it goes "
            f"on with these. To give a run other settings, remove its directory in {study.directory}."
        )
        sys.exit(1)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()

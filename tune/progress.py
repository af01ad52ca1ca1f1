"""What a sweep tells the user while it runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import ray.tune

from tune.files import FAILED, FINISHED, LOG, TRIALS
from tune.space import shown

METRIC = "validation_NDCG@10"


def ending(outcome: str, epochs: int) -> str:
    """How a trial ended, in words."""
    if outcome == "stopped":
        return f"stopped by the scheduler after epoch {epochs}: others do better"
    return f"trained to its end, epoch {epochs}"


def history_of(trial: Any) -> list[dict[str, Any]]:
    """The epochs that Tune has seen of one of its trials."""
    history: list[dict[str, Any]] = json.loads((trial.last_result or {}).get("history", "[]"))
    return history


class Progress(ray.tune.Callback):
    """Writes a line for everything that happens to a trial, the best so far and the time left.

    Tune stores it with the sweep and brings it back when that is resumed, so it writes to a file, which whoever drives
    the sweep follows.

    Args:
        directory: of the sweep.
        trials: how many there will be.
        epochs: the most that each of them runs.
    """

    def __init__(self, directory: Path, trials: int, epochs: int):
        self._directory, self._trials, self._epochs = directory, trials, epochs

    def setup(self, *_: Any, **__: Any) -> None:
        self._started, self._run = time.monotonic(), 0

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._say(f"{trial.trial_id}: {shown(trial.config)}")

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if result["epoch"] <= len(history_of(trial)):
            return  # a trial's last epoch, once more
        self._run += 1
        histories = {each.trial_id: history_of(each) for each in trials}
        histories[trial.trial_id] = json.loads(result["history"])  # which Tune has not stored yet
        values = [(epoch[METRIC], name) for name, history in histories.items() for epoch in history]
        best, holder = max(values)
        finished = [each for each in trials if each.is_finished()]
        left = sum(self._epochs - len(histories[each.trial_id]) for each in trials if each not in finished)
        left += self._epochs * (self._trials - len(trials))
        minutes = left * (time.monotonic() - self._started) / self._run / 60
        self._say(
            f"{trial.trial_id}: epoch {result['epoch']}, validation NDCG@10 {result[METRIC]:.4f}; best so far "
            f"{best:.4f} ({holder}); {len(finished)} of {self._trials} trials done, at most {minutes:.1f} min left"
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        epochs = len(history_of(trial))
        ended = (self._directory / TRIALS / trial.trial_id / FINISHED).exists() or epochs == self._epochs
        self._say(f"{trial.trial_id}: {ending('finished' if ended else 'stopped', epochs)}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        reason = self._directory / TRIALS / trial.trial_id / FAILED
        self._say(f"{trial.trial_id}: FAILED: {reason.read_text() if reason.exists() else 'its process was lost'}")

    def _say(self, line: str) -> None:
        with (self._directory / LOG).open("a") as file:
            file.write(line + "\n")

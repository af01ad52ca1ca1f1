"""Asynchronous successive halving that survives its driver."""

from __future__ import annotations

from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler

from tune.progress import history_of


class ResumableAsha(AsyncHyperBandScheduler):
    """Ray's ASHA. Tune forgets its rungs when a sweep is resumed, so they are filled from the trials' histories."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        for epoch in history_of(trial):
            self.on_trial_result(tune_controller, trial, epoch)

"""Early stopping goes on after an interruption where it was."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import TrialScheduler

from tune.progress import METRIC
from tune.scheduler import ResumableAsha


def trial(name: str, *curve: float) -> Any:
    epochs = [{"epoch": number, METRIC: value} for number, value in enumerate(curve, 1)]
    last = {"history": json.dumps(epochs)} if epochs else None
    return SimpleNamespace(trial_id=name, last_result=last, config={}, is_finished=lambda: False)


def asha() -> ResumableAsha:
    scheduler = ResumableAsha(time_attr="epoch", max_t=8, grace_period=1, reduction_factor=2)
    scheduler.set_search_properties(METRIC, "max")
    return scheduler


def verdict(scheduler: ResumableAsha, value: float) -> str:
    new = trial("new")
    scheduler.on_trial_add(None, new)
    return str(scheduler.on_trial_result(None, new, {"epoch": 1, METRIC: value}))


def test_a_resumed_sweep_knows_what_earlier_trials_reached() -> None:
    resumed = asha()
    for each in (trial("a", 0.3, 0.4), trial("b", 0.2)):
        resumed.on_trial_add(None, each)
    assert verdict(resumed, 0.1) == TrialScheduler.STOP
    assert verdict(resumed, 0.9) == TrialScheduler.CONTINUE
    assert verdict(asha(), 0.1) == TrialScheduler.CONTINUE  # the first to come to an epoch

"""How training ends: what is returned, what is raised, and what is tried again."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from recommender.errors import UserError
from trainer.experiment import Experiment
from trainer.loop.launch import run_to_best, torch_trainer
from trainer.loop.outcome import forget, outcome_of, refuse_to_repeat
from trainer.loop.preemption import Preempted

REMEDY = "take less"


def fail(error: BaseException | None) -> None:
    if error is not None:
        raise error


@pytest.mark.parametrize(
    ("raised", "error", "preempted"),
    [
        (None, None, False),
        (UserError("wrong data"), "wrong data", False),
        (FloatingPointError("no loss"), "no loss", False),
        (Preempted(), None, True),
    ],
)
def test_what_a_restart_would_repeat_is_returned(
    raised: BaseException | None, error: str | None, preempted: bool, tmp_path: Path
) -> None:
    found = outcome_of(partial(fail, raised), tmp_path / "train.log", REMEDY)
    assert found == {"error": error, "preempted": preempted}
    refuse_to_repeat(tmp_path / "train.log")


def test_memory_that_ran_out_is_noted_until_the_user_tries_again(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    with pytest.raises(RuntimeError, match=REMEDY):
        outcome_of(partial(fail, torch.OutOfMemoryError("CUDA out of memory")), log, REMEDY)
    assert outcome_of(partial(refuse_to_repeat, log), log, REMEDY) == {"error": REMEDY, "preempted": False}
    forget(log)
    refuse_to_repeat(log)


def _short_of_memory(config: dict[str, Any]) -> dict[str, Any]:
    log = Path(config["log"])

    def train() -> None:
        with (log.parent / "attempts").open("a") as attempts:
            attempts.write(".")
        refuse_to_repeat(log)
        raise torch.OutOfMemoryError("CUDA out of memory")

    return outcome_of(train, log, REMEDY)


@pytest.mark.usefixtures("ray_cluster")
def test_a_job_without_memory_is_not_tried_again_and_again(tiny_experiment: Experiment, tmp_path: Path) -> None:
    cluster = tiny_experiment.cluster.model_copy(update={"workers": 1, "storage": str(tmp_path)})
    experiment = tiny_experiment.model_copy(update={"name": "large", "cluster": cluster})
    assert cluster.max_failures == 2
    log = tmp_path / "large" / "train.log"
    log.parent.mkdir()
    trainer = torch_trainer(experiment, tmp_path, log, _short_of_memory)
    with pytest.raises(UserError, match=f"^{REMEDY}$"):
        run_to_best(trainer, log, lambda text: None, REMEDY)
    assert (log.parent / "attempts").read_text() == ".."

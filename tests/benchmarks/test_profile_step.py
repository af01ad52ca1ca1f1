from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import profile_step
from objectives.objective import build_objective
from recommender.errors import UserError
from recommender.items.item_space import ItemSpace
from trainer.data.dataset import Dataset
from trainer.experiment import Experiment
from trainer.loop import worker
from trainer.loop.module import TrainedModel
from trainer.loop.rows import TrainingRows
from trainer.parts import Prepared


def test_operations_belong_to_the_part_that_they_are_called_in(
    tiny_experiment: Experiment, tiny_prepared: Prepared
) -> None:
    space = ItemSpace.load(tiny_prepared.items)
    backbone = worker.starting_backbone(tiny_experiment, space)
    objective = build_objective(tiny_experiment.objective, backbone.num_layers, space.trie)
    module = TrainedModel(backbone, objective, space.trie, dropout=0.1)
    rows = TrainingRows(Dataset.load(tiny_prepared.dataset), space, tiny_experiment.training, False)
    engine = SimpleNamespace(step=lambda: [parameter.grad.square_() for parameter in module.parameters()])

    def run() -> None:
        module(worker.micro_batch(module, rows, np.arange(8))).backward()
        engine.step()

    before = worker.micro_batch
    found = profile_step.profiled(run, engine)
    assert worker.micro_batch is before, "what was marked is as it was"
    assert found.keys() <= set(profile_step.PARTS)
    products = found[profile_step.PRODUCTS] + found[profile_step.HEAD_PRODUCTS]
    assert products.keys() <= set(profile_step._PRODUCTS)
    assert products["aten::mm"] > 0
    assert not any("mm" in name for name in found[profile_step.OTHER])
    assert any("backward" in name for name in found[profile_step.ATTENTION])
    assert found[profile_step.ROWS][profile_step.ROWS] > 0, "Python's own time"
    assert found[profile_step.OPTIMISER].keys() >= {profile_step.OPTIMISER}
    assert found[profile_step.HEAD]
    shown = profile_step.table(found, 1, "a step")
    assert shown.row_count == len(profile_step.PARTS) + 1


def test_rewards_are_refused() -> None:
    with pytest.raises(UserError, match="crr_weight=0"):
        profile_step.load("configs/demo.yaml", ["objective={kind: ilrec, crr_weight: 0.01}"])

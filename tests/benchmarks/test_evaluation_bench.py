from __future__ import annotations

import numpy as np
import pytest

from benchmarks import evaluation
from recommender.items.item_space import ItemSpace
from trainer.data.dataset import Dataset
from trainer.evaluation.ranking import held_out
from trainer.experiment import Experiment
from trainer.parts import Prepared


def test_wholes_are_extrapolated(tiny_prepared: Prepared, tiny_experiment: Experiment) -> None:
    dataset, space = Dataset.load(tiny_prepared.dataset), ItemSpace.load(tiny_prepared.items)
    targets, whole = held_out(dataset, "test", 6), len(dataset.targets["test"].position)
    made = evaluation.evaluations(tiny_experiment, space, targets, whole, [4])
    made += evaluation.epochs(tiny_experiment, dataset, space, 2)
    for each in made:
        each()
        assert 0 < each.part < each.whole
    float32, bfloat16, sliding, anchored = made
    assert sliding.whole > anchored.whole
    for each in (float32, bfloat16):
        assert each.ranking is not None
        assert each.ranking.invalid == 0
    table = evaluation.seconds_table(made, [[0.5, 1.0], [0.25, 0.5], [2.0, 4.0], [1.0, 2.0]])
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    minutes = [float(str(row[4]).split("/")[1]) for row in rows]
    expected = [0.75 * whole / 6 / 60, 0.375 * whole / 6 / 60]
    expected += [3.0 * sliding.whole / sliding.part / 60, 1.5 * anchored.whole / anchored.part / 60]
    np.testing.assert_allclose(minutes, expected, atol=0.06)
    assert [float(str(row[-3])) for row in rows][-1] == pytest.approx(1.0)

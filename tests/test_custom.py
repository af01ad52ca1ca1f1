"""Objectives and prompts by import path: what is refused at once, what travels, what a bundle says without them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy import jobs
from objectives.config import CustomConfig
from objectives.objective import check_custom
from recommender.config import CustomClass, PromptConfig
from recommender.custom import made
from recommender.errors import UserError
from recommender.items.item_space import ItemSpace
from recommender.items.prompt import Wording
from trainer.config import TrainingConfig
from trainer.data.dataset import Dataset
from trainer.experiment import Experiment
from trainer.fit import check_model
from trainer.loop.rows import TrainingRows
from trainer.parts import Prepared
from trainer.prepare import prepare
from trainer.run import identity

MODULE = "tests.custom_classes"


def objective(path: str, **options: Any) -> CustomConfig:
    return CustomConfig.model_validate({"class": path, "options": options})


def branded(**options: Any) -> PromptConfig:
    return PromptConfig.model_validate({"template": {"class": f"{MODULE}:Branded", "options": options}, "history": 8})


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (objective("tests.custom:Focal"), r"there is no module tests\.custom; start from the directory"),
        (objective("nowhere.at.all:Focal"), r"there is no module nowhere\.at\.all"),
        (objective(f"{MODULE}:Focl"), "holds no Focl; did you mean Focal?"),
        (objective(f"{MODULE}:Branded"), r"is no subclass of objectives\.objective\.TokenObjective"),
        (objective(f"{MODULE}:cross_entropy"), "is no subclass"),
        (objective(f"{MODULE}:Focal", gama=1.0), r"objective\.options: .* refuses them: TypeError: .*'gama'"),
        (objective(f"{MODULE}:Deep"), r"its layers \(9,\) are not all intermediate ones, 1 … 3"),
        (objective(f"{MODULE}:Summed"), r"'loss' of shape \(\) for 3 positions"),
        (objective(f"{MODULE}:Still"), "its loss has no gradient"),
        (objective(f"{MODULE}:Silent"), 'leave out "loss"'),
    ],
)
def test_an_objective_that_could_not_train_is_refused_at_once(
    tiny_experiment: Experiment, config: CustomConfig, says: str
) -> None:
    with pytest.raises(UserError, match=says.replace("?", r"\?")):
        check_model(tiny_experiment.model_copy(update={"objective": config}))


def test_what_is_right_passes_and_its_code_decides_whether_a_run_goes_on(
    tiny_experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_custom(objective(f"{MODULE}:Focal", gamma=1.5), 4)
    monkeypatch.chdir(tmp_path)
    module = tmp_path / "own_losses.py"
    module.write_text("from tests.custom_classes import Focal\n")
    run = tiny_experiment.model_copy(update={"objective": objective("own_losses:Focal")})
    check_model(run)
    before = identity(run, "data")
    module.write_text("from tests.custom_classes import Focal  # changed\n")
    assert {field for field, value in identity(run, "data").items() if before[field] != value} == {"objective.code"}


def test_a_wording_speaks_of_items_and_rows_are_counted_with_it(tiny_experiment: Experiment) -> None:
    said = prepare(tiny_experiment.model_copy(update={"prompt": branded()}), lambda text: None)
    space, dataset = ItemSpace.load(said.items), Dataset.load(said.dataset)
    text = space.tokenizer.decode(space.prompt.encode([3, 50]))
    assert space.catalogue.columns is not None
    brands = [space.catalogue.columns["brand"][item].as_py() for item in (3, 50)]
    assert all(re.search(rf" by {brand} ?\n", text) for brand in brands), text
    assert text.rstrip().endswith("Next:\n-")
    assert space.prompt.length([3, 50]) == len(space.prompt.encode([3, 50]))
    rows = TrainingRows(dataset, space, TrainingConfig(), branching_only=True)
    assert np.array_equal(rows.lengths, [len(row) for row in rows])


def test_a_prompt_whose_module_is_missing_is_said(tiny_prepared: Prepared, tmp_path: Path) -> None:
    shutil.copytree(tiny_prepared.items, tmp_path / "items")
    path = tmp_path / "items" / "items.json"
    values = json.loads(path.read_text())
    values["prompt"]["template"] = {"class": "gone.prompts:Mine", "options": {}}
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"prompt\.template\.class: there is no module gone\.prompts"):
        ItemSpace.load(tmp_path / "items")
    with pytest.raises(UserError, match="refuses them"):
        made(CustomClass.model_validate({"class": f"{MODULE}:Branded", "options": {"end": 1}}), Wording, "prompt")


def test_a_job_takes_the_module_along(
    tiny_experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").touch()
    (tmp_path / "own" / "losses.py").write_text("class Focal: pass\n")
    (tmp_path / "own_words.py").touch()
    (tmp_path / "there").mkdir()
    prompt = PromptConfig.model_validate({"template": {"class": "own_words:Mine"}})
    named = {"objective": objective("own.losses:Focal"), "prompt": prompt}
    jobs._copy_own(tiny_experiment.model_copy(update=named), tmp_path / "there")
    assert sorted(path.relative_to(tmp_path / "there").as_posix() for path in (tmp_path / "there").rglob("*.py")) == [
        "own/__init__.py",
        "own/losses.py",
        "own_words.py",
    ]
    with pytest.raises(UserError, match="there is no module own_lost"):
        jobs._copy_own(tiny_experiment.model_copy(update={"objective": objective("own_lost:Focal")}), tmp_path)

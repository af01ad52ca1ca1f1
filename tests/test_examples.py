"""The examples in docstrings, formulas worked out by hand; those of docs/python.md; docs/tour.py."""

from __future__ import annotations

import doctest
import runpy
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from tests.conftest import add_version
from trainer.experiment import Experiment

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize(
    "module",
    [
        "objectives.losses",
        "objectives.rewards",
        "objectives.temperature",
        "recommender.metrics",
        "recommender.search.logits",
        "recommender.search.oracle",
        "service.batching",
    ],
)
def test_examples_hold(module: str) -> None:
    found = doctest.testmod(import_module(module))
    assert found.attempted
    assert not found.failed


def test_the_page_on_python_holds(
    tiny_experiment: Experiment, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ILREC_STORAGE", raising=False)
    version = add_version(tmp_path / "runs", "shop", tiny_bundle).parent
    (version / "version.json").write_bytes((tiny_bundle.parent / "version.json").read_bytes())
    (version / "config.yaml").write_bytes((tiny_bundle.parent / "config.yaml").read_bytes())
    (tmp_path / "runs" / "parts").symlink_to(tiny_experiment.parts)
    values = tiny_experiment.model_dump(mode="json") | {"name": "my"}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(values))
    found = doctest.testfile(str(DOCS / "python.md"), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert found.attempted > 20
    assert not found.failed


def test_the_tour_runs(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(DOCS / "tour.py"))
    assert found["best"].exact
    assert found["why"].score == pytest.approx(found["best"][0].score, abs=1e-4)
    said = capsys.readouterr().out
    assert "the name stands for tour@1 of ['tour@1', 'tour@2']" in said
    assert said.rstrip().rpartition("\n")[2] == "<tour@1, language_model, 200 items>"
    assert "<tour@2, itemknn, 200 items>" in said

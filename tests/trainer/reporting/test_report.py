"""The page of a run, from hand-made epochs and a small evaluation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recommender.collaborative.config import SASRecConfig
from tests.versions import directory_of
from trainer.data.dataset import Dataset
from trainer.evaluation.evaluation import evaluate
from trainer.evaluation.standing import standing
from trainer.experiment import Experiment
from trainer.parts import Prepared
from trainer.reporting import figures
from trainer.reporting.report import rates, segments, write_report


def epoch(number: int, validation: float, **more: float) -> dict[str, float]:
    return {
        "epoch": number,
        "step": 6 * number,
        "loss": 3.0 / number,
        **more,
        "train_seconds": 2.0,
        "tokens_per_second": 1000.0,
        "validation_NDCG@10": validation,
        "validation_HR@10": 2 * validation,
    }


HISTORY = [
    epoch(1, 0.1, cpd_2=0.5, cpd_10=0.2, negatives=4.0, novel_term=1.0),
    epoch(2, 0.3, cpd_2=0.4, cpd_10=0.1, negatives=3.0, novel_term=2.0),
    epoch(3, 0.2, cpd_2=0.3, cpd_10=0.1, negatives=2.0, novel_term=3.0),
]


def run_with(experiment: Experiment, storage: Path, history: Any, **fields: Any) -> Experiment:
    """An experiment in a storage of its own, whose epochs were `history`."""
    cluster = experiment.cluster.model_copy(update={"storage": str(storage)})
    run = experiment.model_copy(update={"cluster": cluster, **fields})
    (run.model.begin().directory / "training.json").write_text(json.dumps(history))
    return run


Draw = Callable[[Experiment], str]


@pytest.fixture
def draw(tiny_prepared: Prepared) -> Draw:
    """The page of an experiment's latest version."""
    return lambda run: write_report(run, directory_of(run), tiny_prepared).read_text()


def panels(page: str) -> dict[str, ElementTree.Element]:
    """The small figures by their titles."""
    found = re.findall(r"<figcaption><b>(.*?)</b>.*?</figcaption>(<svg.*?</svg>)", page, re.DOTALL)
    return {title: ElementTree.fromstring(drawing) for title, drawing in found}


@pytest.fixture
def trained(tiny_experiment: Experiment, tmp_path: Path) -> Experiment:
    return run_with(tiny_experiment, tmp_path, HISTORY, name="a.b")


def test_every_quantity_has_its_panel(trained: Experiment, draw: Draw) -> None:
    drawn = panels(draw(trained))
    assert {"Loss", "CPD", "Negatives", "novel_term", "Learning rate", "Throughput", "Validation NDCG@10"} <= set(drawn)
    assert "CRR" not in drawn
    for drawing in drawn.values():
        assert drawing.find("polyline") is not None
    layers = [each.text for each in drawn["CPD"].findall("text")]
    assert {"layer 2", "layer 10"} <= set(layers)
    assert len(drawn["CPD"].findall("polyline")) == 2
    heights = [float(dot.attrib["cy"]) for dot in drawn["Loss"].findall("circle")]
    assert heights == sorted(heights)  # it falls, and y grows downwards


def test_the_chosen_epoch_is_marked(trained: Experiment, draw: Draw) -> None:
    page = draw(trained)
    validation = panels(page)["Validation NDCG@10"]
    (mark,) = (line for line in validation.findall("line") if line.get("class") == "chosen")
    best = min(validation.findall("circle"), key=lambda dot: float(dot.attrib["cy"]))
    assert mark.attrib["x1"] == best.attrib["cx"]
    assert "Marked: epoch 2" in page
    assert "Epoch 2 of 3 is the best: validation NDCG@10 0.3000." in page


def test_the_page_fetches_nothing(trained: Experiment, draw: Draw) -> None:
    page = draw(trained)
    assert "<script" not in page
    assert "://" not in page
    assert "<link" not in page


def test_it_shows_data_and_config(trained: Experiment, draw: Draw, tiny_prepared: Prepared) -> None:
    page = draw(trained)
    interactions = Dataset.load(tiny_prepared.dataset).stats["interactions"]
    assert f"<td>interactions<td>{interactions:,} (density" in page
    assert "vocabulary: 400" in page
    assert '<a href="training.json">' in page
    assert '<a href="ray">' not in page  # it is not there


def test_one_epoch_is_enough(tiny_experiment: Experiment, draw: Draw, tmp_path: Path) -> None:
    run = run_with(tiny_experiment, tmp_path, HISTORY[:1])
    page = draw(run)
    assert "nan" not in page
    assert len(panels(page)["Loss"].findall("circle")) == 1


def test_a_collaborative_model_has_its_page(tiny_experiment: Experiment, draw: Draw, tmp_path: Path) -> None:
    run = run_with(tiny_experiment, tmp_path, HISTORY, recommender=SASRecConfig())
    page = draw(run)
    assert "A collaborative model, sasrec." in page
    assert "Learning rate" not in panels(page)


def test_the_rate_is_that_of_the_whole_schedule(trained: Experiment) -> None:
    stopped = rates(trained, HISTORY[:2])  # of three epochs
    assert [step for step, _ in stopped] == list(range(1, 13))
    assert stopped == rates(trained, HISTORY)[:12]
    assert rates(trained, HISTORY)[-1][1] < 0.05 * trained.training.learning_rate


@pytest.mark.usefixtures("ray_cluster")
def test_an_evaluation_is_shown(trained: Experiment, draw: Draw, tiny_prepared: Prepared, tiny_bundle: Path) -> None:
    dataset, bundle = Dataset.load(tiny_prepared.dataset), directory_of(trained) / "bundle"
    bundle.symlink_to(tiny_bundle)
    found, saved = evaluate(bundle, dataset.path, "test", trained.evaluation, trained.cluster, lambda text: None)
    table = pq.read_table(saved.per_target)
    columns = (table[name].to_pylist() for name in ("target_item_id", "rank", "recommended"))
    for item, rank, listed in zip(*columns, strict=True):
        assert (listed.index(item) + 1 if item in listed else 0) == rank
        assert len(listed) == 20
    page = draw(trained)
    model = found.metrics["model"]["NDCG@10"]
    assert f"Test NDCG@10 {model:.4f}; {escape(standing(found.metrics, found.differences))}." in page
    assert figures.interval(model, *found.intervals["model"]["NDCG@10"]) in page
    first = dataset.titles[dataset.item_ids.index(table["recommended"][0].as_py()[0])]
    assert first in page.partition("Some of its lists")[2].partition("<h2>")[0]
    assert re.search(r"head: \d+–\d+ times in training \(\d+ targets\)", page)


def test_segments_part_the_targets() -> None:
    columns = {
        "rank": [1, 0, 2, 0, 1, 1, 3],
        "most_popular_rank": [9, 9, 1, 1, 1, 1, 1],
        "target_popularity": [0, 1, 1, 2, 5, 8, 9],
        "history_length": [3, 3, 3, 3, 3, 3, 3],
        "user_id": list("abcdefg"),
    }
    drawings = [ElementTree.fromstring(part) for part in segments(pa.table(columns)) if part.startswith("<svg")]
    labels = [[text.text for text in drawing.findall("text")] for drawing in drawings]
    for label in ("unseen in training (1 targets)", "tail: 1 times in training (2 targets)"):
        assert label in labels[0]
    assert "short: 3 items (7 targets)" in labels[1]
    assert figures.interval(1, 1, 1) in labels[0]  # the unseen one was found first

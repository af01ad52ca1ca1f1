"""What a sweep says of its trials."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from recommender.errors import UserError
from tune.report import association, parallel_coordinates, saving, write_report
from tune.results import Trial, best_of


def trial(name: str, outcome: Any, curve: list[float], **parameters: Any) -> Trial:
    error = "the loss of step 3 is <not> finite\nmore" if outcome == "failed" else None
    history = [{"epoch": number, "validation_NDCG@10": value} for number, value in enumerate(curve, 1)]
    return Trial(name, parameters, outcome, 4, history, error)


TRIALS = [
    trial("a", "finished", [0.1, 0.3, 0.4, 0.35], rate=0.01, kind="x"),
    trial("b", "stopped", [0.05], rate=1.0, kind="y"),
    trial("c", "stopped", [0.2, 0.2], rate=0.1, kind="y"),
    trial("d", "failed", [], rate=3.0, kind="x"),
    trial("e", "finished", [0.0, 0.1, 0.1], rate=0.5, kind="x"),  # by its own patience
]


def test_the_best_epoch_of_any_trial_wins() -> None:
    assert best_of(TRIALS).name == "a"
    with pytest.raises(UserError, match=r"(?s)no trial .* d \(rate=3, kind=x\): the loss"):
        best_of([TRIALS[3]])


def test_only_early_stopping_saves() -> None:
    assert saving(TRIALS) == ("Early stopping ended 2 of 5 trials: 10 epochs were run, 5 at most were not (33%).")


def test_association_is_that_of_ranks() -> None:
    assert association([1, 10, 100], [0.1, 0.2, 0.9]) == pytest.approx(1)
    assert association([1, 10, 100], [0.3, 0.2, 0.1]) == pytest.approx(-1)
    assert association([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9487, abs=1e-4)  # scipy.stats.spearmanr
    assert association(["x", "x", "y", "y"], [1, 2, 8, 9]) == pytest.approx((4 / 5) ** 0.5)
    assert association([True, False], [1, 2]) == pytest.approx(1)
    assert association([2, 2], [1, 2]) == association(["x", "x"], [1, 2]) == association([1, 2], [3, 3]) == 0


def test_every_trial_is_drawn_or_listed(tmp_path: Path) -> None:
    write_report("s<1>", TRIALS, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<not>" not in page
    assert "s&lt;1&gt;" in page
    drawing = ElementTree.fromstring(parallel_coordinates([t for t in TRIALS if t.curve]))
    lines = drawing.findall("polyline")
    assert len(lines) == 4
    assert sum("stroke-dasharray" in line.attrib for line in lines) == 2
    heights = {line[0].text[0]: float(line.attrib["points"].split(",")[-1]) for line in lines if line[0].text}
    assert sorted(heights, key=heights.__getitem__) == ["a", "c", "e", "b"]  # the higher, the better


def test_how_a_trial_ended_is_said_in_words(tmp_path: Path) -> None:
    write_report("sweep", TRIALS, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "stopped by the scheduler after epoch 1: others do better" in page
    assert "trained to its end, epoch 3" in page


def test_one_trial_is_enough_for_a_report(tmp_path: Path) -> None:
    write_report("s", TRIALS[1:2], tmp_path / "report.html")
    assert "nan" not in (tmp_path / "report.html").read_text()

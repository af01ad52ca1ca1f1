"""Segments and lists by hand and against the plain definitions."""

from __future__ import annotations

import doctest
from collections import Counter

import numpy as np
import pytest

import recommender.floors.model
import recommender.metrics
import recommender.segments
from recommender.metrics import score_ranks
from recommender.segments import choice_figures, group_unfairness, list_figures, reachable, segments, thirds


@pytest.mark.parametrize("module", [recommender.segments, recommender.metrics, recommender.floors.model])
def test_examples_are_true(module: object) -> None:
    found = doctest.testmod(module)  # type: ignore[arg-type]
    assert found.attempted
    assert not found.failed


def test_every_target_is_in_one_segment_of_each_kind() -> None:
    rng = np.random.default_rng(0)
    popularity, length = rng.integers(0, 40, 300), rng.integers(0, 9, 300)
    known = rng.random(300) < 0.8
    found = segments(popularity, length, known)
    assert list(found) == ["popularity", "history", "user"]
    for masks in found.values():
        assert (np.sum(list(masks.values()), axis=0) == 1).all()
        assert all(mask.any() for mask in masks.values())
    assert (found["popularity"]["unseen in training"] == (popularity == 0)).all()
    assert (found["user"]["new: no training interactions"] == (~known | (length == 0))).all()
    assert [label.split(":")[0] for label in found["popularity"]] == ["unseen in training", "tail", "torso", "head"]
    assert "user" not in segments(popularity, length)


def test_thirds_keep_equal_values_together() -> None:
    values = np.array([0, 1, 1, 1, 2, 7])
    found = thirds(values, values > 0, ("low", "middle", "high"), "x")
    assert {label: np.flatnonzero(mask).tolist() for label, mask in found.items()} == {
        "low: 1 x": [1, 2, 3],
        "middle: 2 x": [4],
        "high: 7 x": [5],
    }


@pytest.mark.parametrize("seed", range(3))
def test_list_figures_are_those_of_the_definitions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    popularity = rng.integers(0, 6, 20)
    lists = np.array([rng.choice(20, 5, replace=False) for _ in range(8)])
    lists[0, 3:] = -1
    lists[1] = -1
    rows = [[item for item in row if item >= 0] for row in lists.tolist()]
    listed = [item for row in rows for item in row]
    times = Counter(listed)
    found = list_figures(lists, popularity)
    assert found["ARP"] == pytest.approx(np.mean([np.mean(popularity[row]) for row in rows if row]))
    assert found["coverage"] == len(times) / 20
    every = [times[item] for item in range(20)]
    gini = sum(abs(a - b) for a in every for b in every) / (2 * 20 * sum(every))
    assert found["gini"] == pytest.approx(gini)
    assert found["unseen"] == pytest.approx(np.mean(popularity[listed] == 0))
    assert found["ORRatio"] == pytest.approx(sum(count for _, count in times.most_common(3)) / len(listed))
    assert found["DivRatio"] == len(times) / len(listed)


def test_lists_of_nothing_have_figures() -> None:
    figures = list_figures(np.full((2, 3), -1), np.ones(4, int))
    assert set(figures.values()) == {0.0}
    assert group_unfairness(np.array([[0]]), [np.array([], int)], [[]]) == {"MGU": 0.0, "DGU": 0.0}


def test_an_item_of_several_categories_counts_for_each() -> None:
    """Lists: a 1/2 + 1, b 1/2 of 2. Histories: a 0, b 1 of 1; item 3 has no category."""
    found = group_unfairness(np.array([[0, 1], [3, -1]]), [np.array([2, 3])], [["a", "b"], ["a"], ["b"], []])
    assert found == {"MGU": pytest.approx(0.75), "DGU": pytest.approx(1.5)}


def test_what_can_be_reached_depends_on_the_policy() -> None:
    popularity, seen = np.array([0, 3, 4, 5, 0]), np.array([True, False, True, False, False])
    assert reachable(popularity, seen, True)["known_items"] == 2 / 5
    assert reachable(popularity, seen, False) == {"unseen": 2 / 5, "seen": 2 / 5, "known_items": 3 / 5}


def test_a_choice_outside_the_candidates_is_not_valid() -> None:
    given = [np.array([1, 2])] * 3
    assert choice_figures(np.array([1, 2, 7]), np.array([1, 1, 1]), given) == {"HR@1": 1 / 3, "valid": 2 / 3}


def test_score_ranks_equal_brute_force() -> None:
    rng = np.random.default_rng(1)
    scores, targets = rng.integers(0, 4, (50, 30)).astype(float), rng.integers(0, 30, 50)
    seen = [rng.integers(0, 30, 6) for _ in targets]
    for left_out, given in ((seen, seen), ([[]] * 50, None)):
        expected = []
        for row, target, out in zip(scores, targets, left_out, strict=True):
            order = sorted((i for i in range(30) if i not in out), key=lambda i: (-row[i], i))
            expected.append(order.index(target) + 1 if target in order else 0)
        assert score_ranks(scores, targets, given).tolist() == expected

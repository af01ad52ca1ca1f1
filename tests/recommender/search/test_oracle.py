"""The search against the oracle, and the oracle against enumeration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from recommender.config import Score
from recommender.search.oracle import Prefix, best_items
from tests.recommender.search.test_search import catalogue, histories, llama, scores_of_all_items, tree_search

SCORES: list[Score] = ["valid", "full"]


def asked(model: PreTrainedModel, prompt: list[int], temperature: float = 1.0) -> Callable[[Prefix], Sequence[float]]:
    """What the oracle asks for: one plain forward of prompt and prefix."""

    @cache
    @torch.no_grad()
    def log_probabilities(prefix: Prefix) -> list[float]:
        logits = model(torch.tensor([[*prompt, *prefix]])).logits[0, -1].double()
        return (logits / temperature).log_softmax(0).tolist()

    return log_probabilities


@pytest.mark.parametrize("score", SCORES)
def test_the_oracle_equals_enumeration(score: Score) -> None:
    model, identifiers, (prompt, *_) = llama(), catalogue(0), histories(0)
    scores = scores_of_all_items(model, prompt, identifiers, score, 1.5)
    for allowed in (None, {3, 7, 8, 20}, set[int]()):
        found = best_items(identifiers, asked(model, prompt, 1.5), 5, score, allowed)
        order = [item for item in np.argsort(-scores) if allowed is None or item in allowed]
        assert found.exact
        assert found.items == order[:5]
        np.testing.assert_allclose(found.scores, scores[found.items], atol=1e-4)


@pytest.mark.parametrize("score", SCORES)
def test_the_search_equals_the_oracle(score: Score) -> None:
    for seed, width in enumerate((1, 3, 40)):
        model, identifiers, prompts = llama(seed), catalogue(seed, opening=(9, 8)[:seed]), histories(seed)
        ks, allow = [1, 5, 10, 100], [None, np.arange(0, 30, 3), [4, 9], None]
        rankings = tree_search(model, identifiers, score=score, width=width).search(prompts, ks, allow=allow)
        for prompt, k, only, ranking in zip(prompts, ks, allow, rankings, strict=True):
            found = best_items(identifiers, asked(model, prompt), k, score, only)
            assert ranking.exact
            assert ranking.items.tolist() == found.items
            np.testing.assert_allclose(ranking.scores, found.scores, atol=2e-4)


def test_a_node_at_a_time_the_search_asks_as_often_as_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `valid`, where nothing forced is asked for: so both have found the same when their budgets are spent."""
    monkeypatch.setattr("recommender.search.search._STEPS_OF_A_WIDTH", 10**6)
    outcomes = set()
    for seed in range(3):
        model, identifiers = llama(seed, scale=2.0), catalogue(seed, items=40, alphabet=2)
        for prompt in histories(seed, count=2):
            for budget in (1, 3, 8, 100):
                (ranking,) = tree_search(model, identifiers, width=1, node_budget=budget).search([prompt], 5)
                found = best_items(identifiers, asked(model, prompt), 5, "valid", budget=1 + budget)  # with the root
                assert ranking.items.tolist() == found.items
                assert (ranking.exact, ranking.expansions) == (found.exact, found.asked - 1)
                outcomes.add(ranking.exact)
    assert outcomes == {True, False}


@pytest.mark.parametrize("score", SCORES)
def test_equal_scores_come_in_the_order_of_the_catalogue(score: Score) -> None:
    """Words of two letters, all as probable: every item ties with all others of its length."""
    generator = np.random.default_rng(0)
    words = [[1 + (word >> bit & 1) for bit in range(length)] for length in (3, 4) for word in range(2**length)]
    spelled = [[10 + len(word), *word] for word in words]
    identifiers = [spelled[place] for place in generator.permutation(len(spelled))]
    model, (prompt, *_) = llama(), histories(0)
    model.lm_head.weight.data.zero_()
    for k in (1, 5, 20):
        found = best_items(identifiers, asked(model, prompt), k, score)
        (ranking,) = tree_search(model, identifiers, score=score).search([prompt], k)
        assert found.exact
        assert ranking.exact
        assert found.items == ranking.items.tolist()
        for first, second in zip(found.items, found.items[1:], strict=False):
            assert first < second or len(identifiers[first]) < len(identifiers[second])

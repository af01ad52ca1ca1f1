"""What is kept of prompts changes what is computed, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from recommender.config import PromptConfig, SearchConfig
from recommender.items.item_space import ItemSpace
from recommender.recommender import Recommender
from recommender.search.frontier import Ranking
from recommender.search.prefill import batches
from recommender.search.prefixes import Prefixes
from recommender.search.search import TreeSearch
from tests.recommender.search.test_search import VOCABULARY, Counting, build, catalogue, llama, scaled

Prompt = np.ndarray


def gpt2() -> PreTrainedModel:
    """Its positions are learned: 64 of them, and no more."""
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return scaled(GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, initializer_range=0.2, **shape)), 8.0)


def search(
    model: PreTrainedModel, instruction: Prompt, suffix: int = 0, max_bytes: int = 0, score: str = "valid"
) -> TreeSearch:
    backbone = Counting(model)
    config = SearchConfig.model_validate({"score": score})
    return TreeSearch(backbone, build(catalogue(3)), config, Prefixes(backbone, instruction, suffix, max_bytes))


def tokens(generator: np.random.Generator, length: int) -> Prompt:
    return generator.integers(1, VOCABULARY, length).astype(np.int32)


def assert_same(ours: Sequence[Ranking], plain: Sequence[Ranking]) -> None:
    for one, other in zip(ours, plain, strict=True):
        assert one.items.tolist() == other.items.tolist()
        np.testing.assert_allclose(one.scores, other.scores, atol=2e-4)
        assert (one.exact, one.expansions) == (other.exact, other.expansions)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("score", ["valid", "full"])
def test_a_shared_instruction_changes_no_answer(make: type, score: str) -> None:
    model, generator = make(), np.random.default_rng(0)
    plain = search(model, tokens(generator, 0), score=score)
    for length in (0, 3, 8, 20):
        instruction = tokens(generator, length)
        sharing = search(model, instruction, score=score)
        for _ in range(3):
            rests = [tokens(generator, n) for n in generator.integers(0, 40 - length, generator.integers(1, 8))]
            prompts = [np.concatenate([instruction, rest]) for rest in rests]
            prompts.append(tokens(generator, 30))  # of another template
            prompts = [prompt if len(prompt) else tokens(generator, 1) for prompt in prompts]
            assert_same(sharing.search(prompts, 5), plain.search(prompts, 5))


def test_the_instruction_is_computed_once() -> None:
    generator = np.random.default_rng(1)
    instruction = tokens(generator, 10)
    sharing = search(llama(), instruction)
    prompts = [np.concatenate([instruction, tokens(generator, rest)]) for rest in (3, 0, 5)]
    backbone = sharing.backbone
    assert isinstance(backbone, Counting)
    sharing.search(prompts, 3)
    assert backbone.forwards[:2] == [10, 3 + 1 + 5]  # a prompt that is the instruction alone has its last token run
    expanding, backbone.forwards = backbone.forwards[2:], []
    sharing.search(prompts, 3)
    assert backbone.forwards == [3 + 1 + 5, *expanding]


def test_rows_are_batched_where_that_costs_least() -> None:
    generator = np.random.default_rng(2)
    for forward in (1, 20, 500):
        for _ in range(10):
            lengths = sorted(generator.integers(1, 100, generator.integers(1, 8)).tolist())
            found = batches(lengths, forward)
            assert [row for rows in found for row in range(len(lengths))[rows]] == list(range(len(lengths)))
            cuts = [c for n in range(len(lengths)) for c in combinations(range(1, len(lengths)), n)]
            costs = []
            for cut in cuts:
                ends = [*cut, len(lengths)]
                costs.append(
                    sum((end - begin) * lengths[end - 1] + forward for begin, end in zip([0, *cut], ends, strict=True))
                )
            assert sum((rows.stop - rows.start) * lengths[rows.stop - 1] + forward for rows in found) == min(costs)
    assert batches([3, 4, 90, 100], 64) == [slice(0, 2), slice(2, 4)]


@pytest.mark.parametrize("make", [llama, gpt2])
def test_growing_histories_are_answered_as_if_they_were_new(make: type) -> None:
    model, generator = make(), np.random.default_rng(3)
    instruction, suffix = tokens(generator, 9), tokens(generator, 2)
    keeping, plain = search(model, instruction, 2, 10**6), search(model, tokens(generator, 0))
    tight = search(model, instruction, 2, 30_000)
    histories = [tokens(generator, 0) for _ in range(6)]
    for _ in range(12):
        users = generator.integers(0, 6, generator.integers(1, 6))
        for user in users:
            if len(histories[user]) < 30 and generator.random() < 0.7:
                histories[user] = np.concatenate([histories[user], tokens(generator, generator.integers(1, 5))])
        prompts = [np.concatenate([instruction, histories[user], suffix]) for user in users]
        expected = plain.search(prompts, 5)
        assert_same(keeping.search(prompts, 5), expected)
        assert_same(tight.search(prompts, 5), expected)
        assert 0 < tight.prefixes.bytes <= 30_000
    assert keeping.prefixes.bytes > 30_000


def test_a_history_that_grew_by_an_item_computes_the_item() -> None:
    generator = np.random.default_rng(4)
    one, other, suffix = tokens(generator, 12), tokens(generator, 7), tokens(generator, 2)
    keeping = search(llama(), tokens(generator, 0), suffix=2, max_bytes=10**6)
    backbone = keeping.backbone
    assert isinstance(backbone, Counting)

    def prefilled(*histories: Prompt) -> int:
        backbone.forwards = []
        keeping.search([np.concatenate([history, suffix]) for history in histories], 1)
        return backbone.forwards[0]

    item = tokens(generator, 4)
    assert prefilled(one, other) == 14 + 9
    assert prefilled(one, other) == 2 * 2  # the suffix
    assert prefilled(one, np.concatenate([other, item])) == 2 + 6  # suffix; item and suffix
    assert prefilled(np.concatenate([one[4:], item])) == 14  # a window that slid


def test_the_history_that_was_not_used_for_longest_makes_room() -> None:
    generator = np.random.default_rng(5)
    a, b, c = (tokens(generator, 10) for _ in range(3))
    size = 2 * 2 * 2 * 10 * 8 * 4  # layers, keys and values, heads, tokens, width, bytes
    keeping = search(llama(), tokens(generator, 0), max_bytes=2 * size)
    for prompt in (a, b, a, c):
        keeping.search([prompt], 1)
    assert keeping.prefixes.bytes == 2 * size
    keeping.search([tokens(generator, 21)], 1)  # there will never be room for it
    assert [keeping.prefixes.longest(prompt)[0] for prompt in (a, b, c)] == [9, 0, 9]


@pytest.mark.parametrize("history_cache", [0, 10**7])
def test_ranks_candidates_behind_a_shared_instruction(tiny_bundle: Path, history_cache: int) -> None:
    plain = Recommender.load(tiny_bundle)
    own = plain.space
    for texts in ({}, {"suffix": ""}, {"prefix": ""}):
        config = PromptConfig.model_validate({"template": "products"} | texts)
        space = ItemSpace(own.catalogue, own.tokenizer, own.identifiers, own.trie, own.identifier_config, config)
        sharing = Recommender(space, plain.backbone, plain.manifest, history_cache)
        for history in ([3, 50, 7], [3, 50, 7, 9], [120]):
            for _ in range(2):
                [found] = sharing.recommend([history], 200, search=SearchConfig(node_budget=1000))
                [scores] = sharing.rank([history], [found.items])
                np.testing.assert_allclose(scores, found.scores, atol=1e-4)
                [single] = sharing.rank([history], [found.items[:1]])
                assert single == pytest.approx(scores[:1], abs=1e-4)

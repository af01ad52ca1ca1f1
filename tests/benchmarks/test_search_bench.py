from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import profile_search
from benchmarks import search as benchmark
from benchmarks.beams import GenerateBeams, MaskedBeams, TokenTrie
from benchmarks.catalogues import extended_titles
from recommender.backbone.backbone import Backbone
from recommender.config import SearchConfig
from recommender.items.trie import RadixTrie
from recommender.search.search import TreeSearch
from tests.recommender.search.test_search import (
    END,
    Identifiers,
    build,
    catalogue,
    histories,
    llama,
    scores_of_all_items,
)

CPU = torch.device("cpu")
BEAMS = (benchmark.MASKED, benchmark.GENERATE)


def backbone(seed: int, scale: float = 8.0) -> Backbone:
    tokenizer: Any = SimpleNamespace(pad_token_id=END, eos_token_id=END)
    return Backbone(llama(seed, scale=scale), tokenizer)


def prompts(seed: int, count: int = 4) -> list[np.ndarray]:
    return [np.array(history, np.int32) for history in histories(seed, count)]


def spelled(identifiers: Identifiers) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate(identifiers).astype(np.int32), np.cumsum([0, *map(len, identifiers)])


def true_order(model: Backbone, prompt: np.ndarray, identifiers: Identifiers, score: str) -> list[int]:
    return np.argsort(-scores_of_all_items(model.model, prompt.tolist(), identifiers, score), kind="stable").tolist()


@pytest.mark.parametrize("beams", [1, 3, 10])
def test_masked_beams_find_what_generate_finds(beams: int) -> None:
    missed = 0
    for seed in range(4):
        model, identifiers = backbone(seed, scale=3.0), catalogue(seed, items=60)
        trie, asked = build(identifiers), prompts(seed)
        theirs = GenerateBeams(model, trie, beams, END).search(asked)
        ours = MaskedBeams(model, TokenTrie(trie, CPU), beams, END, "full").search(asked)
        assert [each.tolist() for each in ours] == [each.tolist() for each in theirs]
        truth = [true_order(model, prompt, identifiers, "full")[:beams] for prompt in asked]
        missed += sum(mine.tolist() != true for mine, true in zip(ours, truth, strict=True))
    assert missed, "these cases are too easy: beams found the true top everywhere"


@pytest.mark.parametrize("score", ["full", "valid"])
def test_enough_beams_find_every_item_in_order(score: str) -> None:
    identifiers = catalogue(5, items=10)
    model, trie = backbone(5), build(identifiers)
    found = MaskedBeams(model, TokenTrie(trie, CPU), 12, END, score, temperature=1.0).search(prompts(5))
    assert [each.tolist() for each in found] == [true_order(model, p, identifiers, score) for p in prompts(5)]


def test_the_token_trie_leads_to_every_item() -> None:
    identifiers = catalogue(0, items=40)
    trie = TokenTrie(build(identifiers), CPU)
    prefixes = {tuple(each[:depth]) for each in identifiers for depth in range(len(each) + 1)}
    assert len(trie.item) == len(prefixes) == len(trie.token) + 1
    for item, tokens in enumerate(identifiers):
        node = torch.tensor(0)
        for token in tokens:
            assert token in trie.token[trie.begin[node] : trie.begin[node + 1]]
            node = trie.child(node, torch.tensor(token))
        assert trie.item[node] == item
        assert trie.begin[node] == trie.begin[node + 1]


def test_forwards_and_tokens_are_counted() -> None:
    identifiers, asked = [[1, 2, END], [1, 3, END], [4, END]], [np.array([5, 6, 7]), np.array([8])]
    model, trie = backbone(0), build(identifiers)
    tally = benchmark.Tally(model)

    def work(search: Any) -> tuple[int, int]:
        contender = benchmark.Contender("", "", "", search)
        contender.run([asked, asked[:1]], tally)
        return contender.forwards, contender.tokens

    first, second = 2 * 3, 1 * 3
    padded, packed = benchmark.prefills(model)
    assert work(padded.search) == (2, first + second)
    assert work(packed.search) == (2, 3 + 1 + second)
    for one, other in zip(padded.search(asked), packed.search(asked), strict=True):
        torch.testing.assert_close(one, other)
    # Both items that begin with 1 are told apart after one more forward of that token.
    exact = TreeSearch(model, trie, SearchConfig())
    assert work(lambda part: exact.search(part, 3)) == (4, 3 + 1 + 2 + second + 1)
    # A beam of two runs 1 and 4, then 2 and 3, whose end is forced but asked for.
    masked = MaskedBeams(model, TokenTrie(trie, CPU), 3, END, "full")
    assert work(masked.search) == (6, first + 2 * 2 * 3 + second + 2 * 3)
    assert tally.take() == (0, 0)


@pytest.mark.parametrize("score", ["full", "valid"])
def test_recall_of_the_exact_search_is_one(score: str) -> None:
    identifiers, asked = catalogue(1, items=60), prompts(1)
    model, trie, config = backbone(1, scale=3.0), build(identifiers), SearchConfig(score=score, node_budget=1)
    truth = benchmark.true_top(model, trie, config, asked, 10, trie.nodes)
    assert [each.tolist() for each in truth if each is not None] == [
        true_order(model, p, identifiers, score)[:10] for p in asked
    ]
    budgeted = benchmark.Contender("", "", score, lambda part: TreeSearch(model, trie, config).search(part, 10))
    budgeted.run([asked], benchmark.Tally(model))
    assert benchmark.recall(budgeted.items, truth, 10) < 1.0
    assert benchmark.certainty(budgeted.rankings) == ("1.0/1", "0.0%")
    served = TreeSearch(model, trie, config.model_copy(update={"node_budget": trie.nodes})).search(asked, 10)
    assert benchmark.recall([ranking.items for ranking in served], truth, 10) == 1.0
    assert benchmark.true_top(model, trie, config, asked, 10, 1) == [None] * len(asked)


@pytest.mark.parametrize("score", ["full", "valid"])
def test_the_truth_can_be_scored_item_by_item(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "_SCORED_AT_ONCE", 7)
    identifiers, (prompt, *_) = catalogue(1, items=60), prompts(1)
    model = backbone(1, scale=3.0)
    found = benchmark.scored_top(model, build(identifiers), SearchConfig(score=score), prompt, 10)
    assert found.tolist() == true_order(model, prompt, identifiers, score)[:10]


def test_recall_and_ranks() -> None:
    found = [np.array([3, 1]), np.array([], int)]
    truth = [np.array([1, 2]), np.array([5, 6])]
    assert benchmark.recall(found, truth, 2) == 0.25
    assert benchmark.recall(found, truth, 1) == 0.5
    assert benchmark.recall(found, [truth[0], None], 1) == 1.0
    assert benchmark.recall(found, [None, None], 1) is None
    assert benchmark.ranks_of(found, np.array([1, 5])).tolist() == [2, 0]


def test_extended_titles_go_on_from_real_ones() -> None:
    identifiers = catalogue(2, items=40)
    more, ends = extended_titles(*spelled(identifiers), 300, np.random.default_rng(0))
    titles = [more[a:b].tolist() for a, b in pairwise(ends.tolist())]
    assert titles[:40] == identifiers
    assert len({tuple(title) for title in titles}) == 300
    assert len(RadixTrie.build(more, ends)) == 300
    pairs = {pair for title in identifiers for pair in pairwise(title)}
    assert {pair for title in titles for pair in pairwise(title)} <= pairs
    assert all(title[-1] == END and END not in title[:-1] for title in titles)
    assert max(map(len, titles)) <= max(map(len, identifiers))
    with pytest.raises(ValueError, match="make no more than"):
        extended_titles(*spelled([[1, 2, END], [1, 3, END]]), 100, np.random.default_rng(0))


def test_all_tables_of_a_bundle(tiny_bundle: Path) -> None:
    served = benchmark.Served.load(tiny_bundle, tiny_bundle, 4, "cpu")
    cases = [benchmark.make_case(served, items, 4, 5, 600) for items in (None, 300)]
    assert [len(case.trie) for case in cases] == [200, 300]
    latency = benchmark.latency_table(served, cases, 2, 5, 4, 1, with_generate=True)
    rows = list(zip(*(column.cells for column in latency.columns), strict=True))
    assert len(rows) == 2 + 2 * 6
    certificates = [row[-2:] for row in rows if row[1] == benchmark.EXACT]
    assert ("100.0%", "1.0000") in certificates
    assert all(recall == "1.0000" for exact, recall in certificates if exact == "100.0%")
    masked, generate = ([row[-1] for row in rows if row[1:3] == (name, "full")] for name in BEAMS)
    assert masked == generate
    assert benchmark.quality_table(served, cases[0], [10], [5], 2, 1).row_count == 2 + 2 * 4
    assert benchmark.catalogues_table(cases).row_count == 2


def test_a_profile_puts_every_matrix_product_where_it_belongs(tiny_bundle: Path) -> None:
    served = benchmark.Served.load(tiny_bundle, tiny_bundle, 4, "cpu")
    backbone = profile_search.SpannedBackbone(served.backbone.model, served.backbone.tokenizer)
    search = profile_search.SpannedSearch(backbone, served.recommender.space.trie, served.configs["valid"])
    spent, operators, _ = profile_search.profiled(lambda: search.search(served.prompts, 5), 1)
    assert set(spent) == {(part, kind) for part in profile_search.PARTS for kind in profile_search.KINDS}
    with_products = {part for part in profile_search.PARTS if spent[part, profile_search.PRODUCTS]}
    assert {profile_search.PREFILLS, profile_search.EXPANSIONS} <= with_products
    assert with_products <= {profile_search.PREFILLS, profile_search.EXPANSIONS, profile_search.LOGITS}
    assert all(operators[part] for part in profile_search.PARTS)

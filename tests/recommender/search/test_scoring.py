"""Candidates in one prompt tree score as the search scores them; golden requests; popularity."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from recommender import golden
from recommender.bundle import MANIFEST, Manifest, read_manifest
from recommender.catalogue.catalogue import Catalogue
from recommender.catalogue.columns import columns_of
from recommender.catalogue.title_search import TitleSearch
from recommender.collaborative.config import SASRecConfig
from recommender.collaborative.popularity import MostPopular
from recommender.collaborative.recommender import CollaborativeRecommender, build_model
from recommender.config import PromptConfig, Score, SearchConfig
from recommender.errors import UserError
from recommender.items.item_space import ItemSpace
from recommender.loading import load_recommender
from recommender.recommender import Recommender


@pytest.fixture(scope="module")
def collaborative() -> CollaborativeRecommender:
    torch.manual_seed(0)
    catalogue = Catalogue([f"i{i}" for i in range(30)], [f"Title {i}" for i in range(30)])
    return CollaborativeRecommender(
        catalogue, build_model(SASRecConfig(dim=8), 30), Manifest(name="cf", recommender={"kind": "sasrec"})
    )


@pytest.mark.parametrize("score", ["valid", "full"])
@pytest.mark.parametrize("temperature", [None, 0.7])
def test_ranking_every_item_gives_the_scores_of_the_search(
    tiny_bundle: Path, score: str, temperature: float | None
) -> None:
    search = SearchConfig.model_validate({"score": score, "temperature": temperature, "node_budget": 1000})
    recommender = Recommender.load(tiny_bundle, search=search)
    histories = [[3, 50, 7], [], [120]]
    items = len(recommender.catalogue)
    ranked = recommender.rank(histories, [list(range(items))] * 3)
    for history, scores in zip(histories, ranked, strict=True):
        [found] = recommender.recommend([history], items)
        assert found.exact
        assert len(found.items) == items
        np.testing.assert_allclose(np.array(scores)[found.items], found.scores, atol=1e-4)


def test_both_scores_are_at_hand_and_tokens_add_up_to_them(tiny_bundle: Path) -> None:
    own = Recommender.load(tiny_bundle)
    scores: list[Score] = ["valid", "full", "valid"]
    for score in scores:
        search = SearchConfig(score=score, node_budget=1000)
        by_itself = Recommender.load(tiny_bundle, search=search)
        [expected] = by_itself.recommend([[3, 50]], 7)
        assert own.recommend([[3, 50]], 7, search=search) == [expected]
        candidates = [expected.items[4], 120, 120, 3]
        assert own.rank([[3, 50]], [candidates], search) == by_itself.rank([[3, 50]], [candidates])
        for item, spelling, total in zip(
            candidates,
            own.spellings([3, 50], candidates, search),
            own.rank([[3, 50]], [candidates], search)[0],
            strict=True,
        ):
            assert "".join(text for text, _ in spelling) == f" {own.catalogue.titles[item]}</s>"
            assert sum(value for _, value in spelling) == pytest.approx(total, abs=1e-4)
            assert all(value <= 0 for _, value in spelling)
            forced = own.space.trie.prediction_nodes()[slice(*own.space.identifiers.offsets[item : item + 2])] < 0
            assert score == "full" or all(value == 0 for (_, value), no in zip(spelling, forced, strict=True) if no)
        assert own.spellings([3, 50], candidates) == own.spellings([3, 50], candidates, SearchConfig(score="valid"))


def test_the_score_of_a_candidate_does_not_depend_on_the_others(tiny_bundle: Path) -> None:
    recommender = Recommender.load(tiny_bundle)
    together, alone, again = recommender.rank([[3, 50]] * 3, [[9, 4, 9, 120], [120], [4, 9]])
    np.testing.assert_allclose(together, [again[1], again[0], again[1], alone[0]], atol=1e-5)


def test_collaborative_models_rank_candidates_too(collaborative: CollaborativeRecommender) -> None:
    [found] = collaborative.recommend([[3, 5]], 30)
    [scores] = collaborative.rank([[3, 5]], [list(range(30))], SearchConfig(score="full"))
    assert collaborative.spellings([3, 5], [1, 2]) is None
    np.testing.assert_allclose(np.array(scores)[found.items], found.scores, atol=1e-6)


def test_limits_of_one_call_leave_the_recommender_as_it_is(tiny_bundle: Path) -> None:
    recommender = Recommender.load(tiny_bundle)
    [whole] = recommender.recommend([[3]], 20)
    [starved] = recommender.recommend([[3]], 20, search=SearchConfig(width=1, node_budget=1))
    assert (whole.exact, starved.exact, starved.expansions) == (True, False, 1)
    assert recommender.recommend([[3]], 20)[0] == whole


@pytest.mark.parametrize("prompt", [PromptConfig(history=8), PromptConfig(template="products", history=3)])
def test_what_a_batch_takes_is_counted_beforehand(tiny_bundle: Path, prompt: PromptConfig) -> None:
    loaded = Recommender.load(tiny_bundle)
    space = loaded.space
    space = ItemSpace(space.catalogue, space.tokenizer, space.identifiers, space.trie, space.identifier_config, prompt)
    recommender = Recommender(space, loaded.backbone, loaded.manifest)
    histories: list[list[int]] = [[], [3], [3, 50, 7], list(range(40))]
    for history, answer in zip(histories, recommender.recommend(histories, 1), strict=True):
        assert recommender.tokens(history) == answer.prompt_tokens + 128
        spelled = len(space.identifiers.spelled(9)) + len(space.identifiers.spelled(120))
        assert recommender.tokens(history, [9, 120]) == answer.prompt_tokens + spelled
    greedy = recommender.manifest.search.model_copy(update={"node_budget": 5000, "score": "full"})
    [answer] = recommender.recommend([[3]], 100, search=greedy)
    slots = recommender.tokens([3], search=greedy) - answer.prompt_tokens
    assert slots == math.ceil(5000 * space.trie.mean_chain) > answer.expansions
    less = recommender.manifest.search.model_copy(update={"node_budget": 20, "width": 3})
    assert recommender.tokens([3], search=less) == recommender.tokens([3])
    loaded.backbone.context = 50
    assert recommender.tokens(list(range(40))) == min(50, space.prompt.length(range(40))) + 128


# ---- The golden request ----------------------------------------------------------------------------------------------


def test_a_bundle_that_answers_otherwise_fails_its_golden_request(tiny_bundle: Path, tmp_path: Path) -> None:
    golden.check(Recommender.load(tiny_bundle))
    other = shutil.copytree(tiny_bundle, tmp_path / "other")
    manifest = json.loads((other / MANIFEST).read_text())
    manifest["golden"]["items"].reverse()
    (other / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="golden request"):
        golden.check(Recommender.load(other))
    golden.check(Recommender.load(other, search=SearchConfig(score="full")))  # scores that were never recorded
    hurried = Recommender.load(tiny_bundle).manifest.search.model_copy(update={"mode": "beam", "width": 1})
    golden.check(Recommender.load(tiny_bundle, search=hurried))  # which lists others, and scores them alike
    manifest["golden"] = None
    (other / MANIFEST).write_text(json.dumps(manifest))
    golden.check(Recommender.load(other))


def test_collaborative_bundles_hold_a_golden_request_and_popularity(
    collaborative: CollaborativeRecommender, tmp_path: Path
) -> None:
    catalogue = Catalogue(collaborative.catalogue.item_ids, collaborative.catalogue.titles, popularity=np.arange(30))
    CollaborativeRecommender(catalogue, collaborative.model, collaborative.manifest).save(tmp_path / "bundle")
    loaded = load_recommender(tmp_path / "bundle")
    golden.check(loaded)
    assert read_manifest(tmp_path / "bundle").golden is not None
    assert loaded.catalogue.popularity is not None
    assert loaded.catalogue.popularity.tolist() == list(range(30))
    assert columns_of(loaded.catalogue) == {}


# ---- Popularity, columns, titles -------------------------------------------------------------------------------------


def test_the_most_popular_under_filters() -> None:
    first, second = MostPopular(np.array([1, 5, 0, 5])).recommend([2, 9], [{1}, ()], [None, [0, 2]])
    assert (first.items, second.items) == ([3, 0], [0, 2])
    np.testing.assert_allclose(np.exp(first.scores), [6 / 15, 2 / 15])


def test_columns_lead_from_values_to_items_and_back() -> None:
    table = pa.table(
        {
            "kind": ["tent", None, "stove", "tent"],
            "year": [2001, 2002, 2001, None],
            "tags": [["a", "b"], [], None, ["b"]],
            "blob": pa.array([b"x"] * 4),
        }
    )
    columns = columns_of(Catalogue(list("wxyz"), list("wxyz"), table))
    assert sorted(columns) == ["kind", "tags", "year"]
    assert columns["kind"].items_with("tent").tolist() == [0, 3]
    assert columns["kind"].items_with("boat").tolist() == []
    assert columns["year"].items_with(2001).tolist() == [0, 2]
    assert columns["tags"].items_with("b").tolist() == [0, 3]
    assert [len(columns["tags"].codes_of(item)) for item in range(4)] == [2, 0, 0, 1]
    [code] = columns["kind"].codes_of(2)
    assert columns["kind"].items_of(code).tolist() == [2]


def test_titles_are_found_by_opening_then_by_words() -> None:
    titles = ["Red Trail Tent", "Tent, blue", "Trail Mix", "Tent", "Gas Stove"]
    search = TitleSearch(Catalogue(list("01234"), titles))
    assert search.search("tent", 10) == [3, 1, 0]
    assert search.search("tent", 2) == [3, 1]
    assert search.search("tent tra", 10) == [0]
    assert search.search("tra", 10) == [2, 0]
    assert search.search("stove gas", 10) == [4]
    assert search.search("gas tent", 10) == search.search("zz", 10) == search.search("  ", 10) == []


def test_words_before_one_that_may_grow_into_thousands() -> None:
    titles = [f"big lamp a{number}" for number in range(3000)] + ["big lamp oil", "big sofa"]
    search = TitleSearch(Catalogue([str(number) for number in range(len(titles))], titles))
    assert search.search("lamp a", 3) == [0, 1, 2]
    assert search.search("lamp a29", 200) == [29, *range(290, 300), *range(2900, 3000)]
    assert search.search("sofa a", 5) == search.search("chair a", 5) == []
    assert search.search("lamp oi", 5) == [3000]

"""What a request may ask for beside a plain list: columns, caps, batches, ranks, items, other models, the fallback."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

from recommender.catalogue.catalogue import Catalogue
from recommender.config import NewPrior, PriorConfig
from recommender.recommendation import Recommendation
from service.answering import answer
from service.config import ServingConfig
from service.metrics import Metrics
from service.models import Models
from service.queries import Query
from tests.service.test_api import ITEMS, URL, StandIn, ids, refused, serving


@pytest.fixture
def recommender() -> StandIn:
    return StandIn()


@pytest.fixture
def client(recommender: StandIn) -> Iterator[TestClient]:
    with serving({"stand-in": recommender}) as client:
        yield client


def test_items_are_filtered_by_the_values_of_columns(client: TestClient) -> None:
    body: dict[str, Any] = {"history": ["B10"], "k": 4}
    assert ids(client.post(URL, json=body | {"where": {"kind": ["stove"]}})) == ["B29"]
    assert ids(client.post(URL, json=body | {"where": {"decade": [0, 2]}})) == ["B09", "B08", "B07", "B06"]
    assert ids(client.post(URL, json=body | {"where": {"tags": ["rare"]}})) == ["B05", "B15", "B25"]
    both = body | {"where": {"decade": [0], "tags": ["even", "rare"]}}
    assert ids(client.post(URL, json=both)) == ["B08", "B06", "B05", "B04"]
    assert ids(client.post(URL, json=both | {"allow": ["B06", "B07", "B12"]})) == ["B06"]
    nothing = client.post(URL, json=body | {"where": {"kind": ["boat"]}})
    assert (ids(nothing), nothing.json()["complete"]) == ([], False)


def capped(history: int, k: int, caps: dict[str, int]) -> list[int]:
    """The ranking of the stand-in, gone through from the top: what the caps leave of it."""
    columns = StandIn().catalogue.columns
    assert columns is not None
    seen: dict[Any, int] = {}
    kept: list[int] = []
    for item in sorted(set(range(ITEMS)) - {history}, key=lambda i: (abs(i - history), i)):
        groups = []
        for column in caps:
            value = columns[column][item].as_py()
            groups += [(column, v) for v in (value if isinstance(value, list) else [value]) if v is not None]
        if len(kept) < k and all(seen.get(group, 0) < caps[group[0]] for group in groups):
            kept.append(item)
            seen |= {group: seen.get(group, 0) + 1 for group in groups}
    return kept


@pytest.mark.parametrize("caps", [{"decade": 2}, {"tags": 1}, {"kind": 3}, {"decade": 3, "tags": 2}, {"kind": 20}])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_capped_lists_are_those_of_the_whole_ranking(client: TestClient, caps: dict[str, int], k: int) -> None:
    for history in (0, 10, 29):
        expected = capped(history, k, caps)
        answer = client.post(URL, json={"history": [f"B{history:02}"], "k": k, "max_per": caps})
        assert ids(answer) == [f"B{item:02}" for item in expected]
        assert answer.json()["exact"] is True
        assert answer.json()["complete"] is (len(expected) == k)


def test_values_are_what_they_are() -> None:
    """Truth values are no numbers, a date is what the item shows, and an item counts once for a value it has twice."""
    stand_in = StandIn()
    columns = pa.table(
        {
            "stock": [True, False, True],
            "size": [1, 0, 2],
            "since": pa.array([0, 86_400, 0], pa.timestamp("s")),
            "tags": [["a", "a"], ["a"], ["b"]],
        }
    )
    stand_in.catalogue = Catalogue(["0", "1", "2"], ["x", "y", "z"], columns)
    with serving({"a": stand_in}) as client:

        def found(**asked: Any) -> list[str]:
            return ids(client.post(URL, json={"history": ["0"], "k": 3, "exclude_seen": False, **asked}))

        assert found(where={"stock": [True]}) == ["0", "2"]
        assert found(where={"stock": [1]}) == found(where={"size": [True]}) == []
        since = client.get("/v1/items/1").json()["columns"]["since"]
        assert found(where={"since": [since]}) == ["1"]
        assert found(max_per={"tags": 2}) == ["0", "1", "2"]


def test_caps_go_down_the_whole_ranking() -> None:
    """Item after item of one brand comes before the next brand; the fallback too."""
    brands = np.repeat(np.arange(20), 15)
    stand_in = StandIn()
    names = [str(i) for i in range(300)]
    stand_in.catalogue = Catalogue(names, names, pa.table({"brand": brands}), np.arange(300)[::-1].copy())
    with serving({"a": stand_in}) as client:
        for history in ([], ["0"]):
            body = {"history": history, "k": 20, "max_per": {"brand": 1}, "exclude_seen": False}
            answer = client.post(URL, json=body).json()
            assert [brands[int(item["item_id"])] for item in answer["items"]] == list(range(20))
            assert (answer["complete"], answer["exact"], answer["fallback"]) == (True, True, not history)


def test_searches_of_a_capped_list_share_a_node_budget() -> None:
    class Slow(StandIn):
        """Each search expands 40 nodes."""

        def recommend(self, *arguments: Any) -> list[Recommendation]:
            return [replace(each, expansions=40) for each in super().recommend(*arguments)]

    slow = Slow()
    body = {"history": ["B00"], "k": 20, "max_per": {"decade": 1}}
    with serving({"a": slow}) as client:
        for budget, searched, exact in ((60, [60, 20], True), (40, [40], False)):
            slow.searches.clear()
            answer = client.post(URL, json=body | {"search": {"node_budget": budget}}).json()
            assert [each.node_budget for each in slow.searches if each is not None] == searched
            assert (answer["complete"], answer["exact"]) == (False, exact)


def test_caps_and_columns_over_a_real_search(tiny_bundle: Path) -> None:
    """Against the ranking of the whole catalogue, in one batch with a plain query."""
    models = Models(ServingConfig(), Metrics())
    asyncio.run(models.swap({"tiny": str(tiny_bundle)}))
    [served] = models.served
    table = served.catalogue.columns
    assert table is not None
    kinds, brands = table["kind"].to_pylist(), table["brand"].to_pylist()
    [whole] = served.recommender.recommend([[3, 50]], 200)
    nothing = np.empty(0, np.int64)
    allowed = served.columns["kind"].items_with(kinds[0])
    plain, spread, narrow = answer(
        served,
        [
            Query([3, 50], 7, nothing),
            Query([3, 50], 30, nothing, caps={"brand": 4, "kind": 5}),
            Query([3, 50], 5, nothing, allow=allowed, caps={"brand": 1}),
        ],
    )
    assert isinstance(spread, Recommendation)
    assert isinstance(narrow, Recommendation)
    expected: list[int] = []
    for item in whole.items:
        full = [brands[i] for i in expected].count(brands[item]) == 4
        if not full and [kinds[i] for i in expected].count(kinds[item]) < 5:
            expected.append(item)
    assert spread.items == expected[:30]
    assert spread.exact
    first_of_brand = {brands[item]: item for item in reversed(whole.items) if kinds[item] == kinds[0]}
    assert narrow.items == [item for item in whole.items if item in first_of_brand.values()][:5]
    np.testing.assert_allclose(spread.scores, [whole.scores[whole.items.index(i)] for i in spread.items], atol=1e-4)
    assert plain == served.recommender.recommend([[3, 50]], 7)[0]


def test_a_search_may_be_bounded(client: TestClient, recommender: StandIn) -> None:
    bounded = {"history": ["B10"], "search": {"width": 7, "mode": "beam", "score": "full"}}
    assert client.post(URL, json=bounded).status_code == 200
    assert client.post(URL, json={"history": ["B10"]}).status_code == 200
    first, second = recommender.searches
    assert first is not None
    assert (first.width, first.mode, first.score, first.node_budget, second) == (7, "beam", "full", 400, None)


def test_priors_may_be_weighed_within_their_limits(client: TestClient, recommender: StandIn) -> None:
    priors: dict[str, PriorConfig] = {
        "margin": NewPrior(kind="new", weight=1.0, limits=(0.0, 2.0)),
        "fixed": NewPrior(kind="new", weight=3.0),
    }
    recommender.manifest.search = recommender.manifest.search.model_copy(update={"priors": priors})
    assert client.post(URL, json={"history": ["B10"], "boost": {"margin": 2}}).status_code == 200
    [search] = recommender.searches
    assert search is not None
    assert {name: config.weight for name, config in (search.priors or {}).items()} == {"margin": 2.0, "fixed": 3.0}
    rank = {"history": ["B10"], "candidates": ["B12"], "boost": {"margin": 0.5}, "score": "full"}
    assert client.post("/v1/rank", json=rank).status_code == 200
    for boost, said in (
        ({"margin": 2.1}, "must be 0.0 to 2.0"),
        ({"fixed": 3.0}, "cannot be changed by requests"),
        ({"stock": 1.0}, "no such prior; it has: margin, fixed"),
    ):
        for path, body in ((URL, {}), ("/v1/rank", {"candidates": ["B12"]})):
            problem = refused(client.post(path, json={"history": ["B10"], "boost": boost, **body}), 422)
            assert problem["errors"][0]["field"] == f"boost.{next(iter(boost))}"
            assert said in problem["errors"][0]["message"]
    nan, json_type = '{"history": ["B10"], "boost": {"margin": NaN}}', {"content-type": "application/json"}
    refused(client.post(URL, content=nan, headers=json_type), 422)
    models = client.get("/v1/models").json()["models"]
    assert models[0]["search"]["priors"]["margin"]["limits"] == [0.0, 2.0]


def test_tokens_and_their_log_probabilities_come_when_asked_for(client: TestClient, recommender: StandIn) -> None:
    asked = {"history": ["B10"], "k": 2, "log_probabilities": True, "search": {"score": "full"}}
    items = client.post(URL, json=asked).json()["items"]
    texts = [{"text": "Trail", "log_probability": 0.0}, {"text": " Tent 9", "log_probability": -1.0}]
    assert (items[0]["tokens"], items[1]["tokens"][1]["text"]) == (texts, " Tent 11")
    rank = {"history": ["B10"], "candidates": ["B12", "B09", "B12"], "log_probabilities": True}
    items = client.post("/v1/rank", json=rank).json()["items"]
    assert [item["tokens"][1]["text"] for item in items] == [" Tent 9", " Tent 12"]
    items = client.post("/v1/rank", json=rank | {"score": "full", "log_probabilities": False}).json()["items"]
    assert [sorted(item) for item in items] == [["item_id", "rank", "score", "title"]] * 2
    # Of `spellings`, and the stand-in's own call of `rank` in it; of `rank`; …
    assert recommender.scores == ["full", None, None, None, None, "full"]
    for without in ({"history": []}, {"history": ["B15"]}, {"allow": []}):
        answer = client.post(URL, json=asked | without)
        assert answer.status_code == 200
        assert not any("tokens" in item for item in answer.json()["items"])
    mixed = [asked, {"history": ["B10"], "k": 1}]
    first, second = client.post(f"{URL}/batch", json={"requests": mixed}).json()["answers"]
    assert ("tokens" in first["items"][0], "tokens" in second["items"][0]) == (True, False)


def test_a_batch_is_answered_in_order_or_not_at_all(client: TestClient, recommender: StandIn) -> None:
    url = f"{URL}/batch"
    asked = [{"history": ["B03"], "k": 2}, {"history": [], "k": 1}, {"history": ["B20"], "k": 3}]
    first, second, third = client.post(url, json={"requests": asked}).json()["answers"]
    assert [i["item_id"] for i in first["items"]] == ["B02", "B04"]
    assert (second["fallback"], len(second["items"]), len(third["items"])) == (True, 1, 3)
    assert recommender.batches == [2]
    faulty = [*asked, {"history": ["B01", "nope"], "where": {"colour": []}}]
    problem = refused(client.post(url, json={"requests": faulty}), 422)
    assert [error["field"] for error in problem["errors"]] == ["requests[3].history[1]", "requests[3].where.colour"]
    assert refused(client.post(url, json={"requests": asked * 2}), 422)["errors"][0]["field"] == "requests"
    assert refused(client.post(url, json={"requests": []}), 422)["errors"][0]["field"] == "requests"
    shape = refused(client.post(url, json={"requests": [{"history": ["B01"], "k": 0}]}), 422)
    assert shape["errors"][0]["field"] == "requests[0].k"
    assert recommender.batches == [2]


def test_candidates_are_ordered(client: TestClient) -> None:
    url = "/v1/rank"
    answer = client.post(url, json={"history": ["B10"], "candidates": ["B01", "Trail Tent 11", "B20", "B09", "B01"]})
    assert ids(answer) == ["B09", "B11", "B01", "B20"]
    assert [item["score"] for item in answer.json()["items"]] == [-1.0, -1.0, -9.0, -10.0]
    popular = client.post(url, json={"history": [], "candidates": ["B00", "B06", "B01"]}).json()
    assert ([item["item_id"] for item in popular["items"]], popular["fallback"]) == (["B06", "B01", "B00"], True)
    for faulty, field in [
        ({"history": ["B10"], "candidates": []}, "candidates"),
        ({"history": ["B10"], "candidates": ["B01"] * 11}, "candidates"),
        ({"history": ["B10"], "candidates": ["B01", "nope"]}, "candidates[1]"),
        ({"history": ["B10"]}, "candidates"),
    ]:
        assert refused(client.post(url, json=faulty), 422)["errors"][0]["field"] == field


def test_whoever_is_unknown_gets_the_most_popular_under_the_filters(client: TestClient, recommender: StandIn) -> None:
    answer = client.post(URL, json={"history": [], "k": 3, "where": {"decade": [1]}, "deny": ["B13"]})
    assert ids(answer) == ["B12", "B19", "B11"]
    assert (answer.json()["fallback"], answer.json()["exact"]) == (True, True)
    unknown = client.post(URL, json={"history": ["x", "y"], "unknown_items": "ignore", "max_per": {"decade": 1}})
    assert ids(unknown) == ["B06", "B13", "B20"]
    assert (unknown.json()["ignored"], unknown.json()["complete"]) == (["x", "y"], False)
    mixed = client.post(URL, json={"history": ["x", "B10"], "unknown_items": "ignore", "k": 1}).json()
    assert (mixed["items"][0]["item_id"], mixed["ignored"], mixed["fallback"]) == ("B09", ["x"], False)
    assert recommender.batches == [1]
    refused(client.post(URL, json={"history": ["x", "B10"]}), 422)


def test_without_a_fallback_a_history_is_needed(recommender: StandIn) -> None:
    with serving({"a": recommender}, fallback="none") as client:
        problem = refused(client.post(URL, json={"history": []}), 422)
        assert problem["errors"][0]["field"] == "history"
        assert "no fallback" in problem["detail"]
    old = recommender.catalogue
    recommender.catalogue = Catalogue(old.item_ids, old.titles)  # a bundle from before popularity
    with serving({"a": recommender}) as client:
        problem = refused(client.post(URL, json={"history": ["x"], "unknown_items": "ignore"}), 422)
        assert "without popularity" in problem["detail"]
        assert client.get("/v1/models").json()["models"][0]["fallback"] is False


def test_several_models_behind_one_endpoint(recommender: StandIn) -> None:
    other = StandIn()
    other.catalogue = Catalogue(["x1", "x2", "x3"] + [f"y{i}" for i in range(ITEMS)], ["Boat"] * (ITEMS + 3))
    with serving({"tents": recommender, "boats": other}) as client:
        assert client.post(URL, json={"history": ["B01"]}).json()["model"] == "tents"
        answer = client.post(URL, json={"history": ["x2"], "k": 1, "model": "boats"}).json()
        assert (answer["model"], answer["items"][0]["item_id"]) == ("boats", "x1")
        assert (recommender.batches, other.batches) == ([1], [1])
        assert [model["name"] for model in client.get("/v1/models").json()["models"]] == ["tents", "boats"]
        assert client.get("/v1/items/x3?model=boats").json()["columns"] == {}
        both = [{"history": ["B01"], "k": 1}, {"history": ["x2"], "k": 1, "model": "boats"}]
        answers = client.post(f"{URL}/batch", json={"requests": both}).json()["answers"]
        assert [answer["model"] for answer in answers] == ["tents", "boats"]
        both[1]["model"] = "?"
        problem = refused(client.post(f"{URL}/batch", json={"requests": both}), 422)
        assert problem["errors"][0]["field"] == "requests[1].model"


def test_items_are_found(client: TestClient) -> None:
    assert client.get("/v1/items/B29").json() == {
        "item_id": "B29",
        "title": "Gas Stove",
        "columns": {"kind": "stove", "decade": 2, "tags": None},
        "popularity": 1,
    }
    assert "B99" in refused(client.get("/v1/items/B99"), 404)["detail"]
    found = client.get("/v1/items/search", params={"q": "tent 1", "limit": 3})
    assert [item["title"] for item in found.json()["items"]] == ["Trail Tent 1", "Trail Tent 10", "Trail Tent 11"]
    assert client.get("/v1/items/search?q=zzz").json() == {"items": []}
    for query in ("", "?q=", "?q=a&limit=0", "?q=a&limit=1000", "?q=a&model=x"):
        problem = refused(client.get(f"/v1/items/search{query}"), 422)
        assert problem["errors"][0]["field"] in ("q", "limit", "model")

"""The HTTP interface around a stand-in recommender: what is answered, and how bad requests are refused."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from httpx import Response

from recommender.bundle import Manifest
from recommender.catalogue.catalogue import Catalogue
from recommender.config import Score, SearchConfig
from recommender.errors import UserError
from recommender.recommendation import Recommendation, Spelling
from service.api import create_api
from service.config import ServingConfig
from service.metrics import Metrics
from service.models import Models

ITEMS = 30
URL = "/v1/recommendations"


class StandIn:
    """Ranks items by the distance of their index to the last item of the history; remembers its batches."""

    def __init__(self) -> None:
        titles = [f"Trail Tent {i}" for i in range(ITEMS - 1)] + ["Gas Stove"]
        columns = pa.table(
            {
                "kind": ["tent"] * (ITEMS - 1) + ["stove"],
                "decade": [i // 10 for i in range(ITEMS)],
                "tags": [["even"] if i % 2 == 0 else ["odd", "rare"] if i % 5 == 0 else None for i in range(ITEMS)],
            }
        )
        popularity = np.array([i % 7 for i in range(ITEMS)])
        self.catalogue = Catalogue([f"B{i:02}" for i in range(ITEMS)], titles, columns, popularity)
        self.manifest = Manifest(name="stand-in", version=7, metrics={"NDCG@10": 0.5}, data_fingerprint="f00")
        self.batches: list[int] = []
        self.searches: list[SearchConfig | None] = []
        self.scores: list[Score | None] = []
        self.gate = threading.Event()
        self.gate.set()

    def recommend(
        self,
        histories: Sequence[Sequence[int]],
        k: Sequence[int],
        exclude: Sequence[Collection[int]],
        allow: Sequence[Collection[int] | None],
        search: SearchConfig | None = None,
    ) -> list[Recommendation]:
        self.gate.wait(10)
        self.batches.append(len(histories))
        self.searches.append(search)
        if any(13 in history for history in histories):
            raise UserError("this history is unlucky")
        if any(14 in history for history in histories):
            raise RuntimeError("secret of the house")
        answers = []
        for history, count, no, only in zip(histories, k, exclude, allow, strict=True):
            items = [i for i in range(len(self.catalogue)) if i not in no and (only is None or i in only)]
            items = sorted(items, key=lambda i: (abs(i - history[-1]), i))[:count]
            answers.append(Recommendation(items, [-float(abs(i - history[-1])) for i in items], True, 1))
        return answers

    def rank(
        self,
        histories: Sequence[Sequence[int]],
        candidates: Sequence[Sequence[int]],
        search: SearchConfig | None = None,
    ) -> list[list[float]]:
        self.scores.append(None if search is None else search.score)
        return [[-float(abs(i - h[-1])) for i in items] for h, items in zip(histories, candidates, strict=True)]

    def spellings(
        self, history: Sequence[int], items: Sequence[int], search: SearchConfig | None = None
    ) -> list[Spelling] | None:
        self.scores.append(None if search is None else search.score)
        if 15 in history:  # as a collaborative model
            return None
        [scores] = self.rank([history], [items])
        return [[("Trail", 0.0), (f" Tent {i}", score)] for i, score in zip(items, scores, strict=True)]

    def tokens(
        self, history: Sequence[int], candidates: Sequence[int] | None = None, search: SearchConfig | None = None
    ) -> int:
        return 1


@pytest.fixture
def recommender() -> StandIn:
    return StandIn()


CONFIG: dict[str, Any] = {
    "max_k": 20,
    "max_history": 8,
    "max_filter": 6,
    "max_body_bytes": 2048,
    "max_batch_tokens": 8,
    "max_requests": 4,
    "max_candidates": 10,
    "max_width": 50,
}


@contextmanager
def serving(recommenders: dict[str, Any], **settings: Any) -> Iterator[TestClient]:
    models = Models(ServingConfig.model_validate(CONFIG | settings), Metrics())
    models.replace(recommenders)
    with TestClient(create_api(models), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def client(recommender: StandIn) -> Iterator[TestClient]:
    with serving({"stand-in": recommender}) as client:
        yield client


def ids(response: Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [item["item_id"] for item in response.json()["items"]]


def test_answer(client: TestClient) -> None:
    answer = client.post(URL, json={"history": ["B03", "B10"], "k": 3}).json()
    assert answer.pop("latency_ms") > 0
    assert answer == {
        "items": [
            {"rank": 1, "item_id": "B09", "title": "Trail Tent 9", "score": -1.0},
            {"rank": 2, "item_id": "B11", "title": "Trail Tent 11", "score": -1.0},
            {"rank": 3, "item_id": "B08", "title": "Trail Tent 8", "score": -2.0},
        ],
        "exact": True,
        "complete": True,
        "fallback": False,
        "ignored": [],
        "model": "stand-in",
        "model_version": 7,
    }


def test_titles_name_items_and_ten_are_the_default(client: TestClient) -> None:
    by_title = client.post(URL, json={"history": ["trail  TENT 3", "Trail Tent 10"]})
    assert ids(by_title) == ids(client.post(URL, json={"history": ["B03", "B10"]}))
    assert len(ids(by_title)) == 10


def test_filters(client: TestClient) -> None:
    body = {"history": ["B10", "B05"], "k": 4, "exclude_seen": False}
    assert ids(client.post(URL, json=body)) == ["B05", "B04", "B06", "B03"]
    assert ids(client.post(URL, json=body | {"exclude_seen": True})) == ["B04", "B06", "B03", "B07"]
    assert ids(client.post(URL, json=body | {"deny": ["B04", "Trail Tent 6"]})) == ["B05", "B03", "B07", "B02"]
    both = client.post(URL, json=body | {"allow": ["B05", "B06", "Gas Stove"], "deny": ["B06"]})
    assert ids(both) == ["B05", "B29"]
    assert both.json()["complete"] is False
    assert ids(client.post(URL, json=body | {"allow": []})) == []


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        ({}, "history", "required"),
        ({"history": None}, "history", "array"),
        ({"history": "B01"}, "history", "array"),
        ({"history": {"B01": 1}}, "history", "array"),
        ({"history": ["B01", 7]}, "history[1]", "string"),
        ({"history": ["B01", None]}, "history[1]", "string"),
        ({"history": ["B01", ["B02"]]}, "history[1]", "string"),
        ({"history": ["B01"] * 9}, "history", "at most 8"),
        ({"history": ["B01", "Trail Tnt 3"]}, "history[1]", "did you mean 'Trail Tent"),
        ({"history": ["\u0000"]}, "history[0]", "unknown item"),
        ({"history": ["B01"], "k": 0}, "k", "greater than or equal to 1"),
        ({"history": ["B01"], "k": 21}, "k", "less than or equal to 20"),
        ({"history": ["B01"], "k": 10**9}, "k", "less than or equal to 20"),
        ({"history": ["B01"], "k": 10**400}, "k", "less than or equal to 20"),
        ({"history": ["B01"], "k": "10"}, "k", "integer"),
        ({"history": ["B01"], "k": True}, "k", "integer"),
        ({"history": ["B01"], "k": None}, "k", "integer"),
        ({"history": ["B01"], "k": 2.5}, "k", "integer"),
        ({"history": ["B01"], "k": float("nan")}, "k", "integer"),
        ({"history": ["B01"], "k": float("inf")}, "k", "integer"),
        ({"history": ["B01"], "exclude_seen": "yes"}, "exclude_seen", "boolean"),
        ({"history": ["B01"], "allow": "B02"}, "allow", "array"),
        ({"history": ["B01"], "allow": ["B02", "nope"]}, "allow[1]", "unknown item 'nope'"),
        ({"history": ["B01"], "deny": ["nope"]}, "deny[0]", "unknown item 'nope'"),
        ({"history": ["B01"], "deny": ["B02"] * 7}, "deny", "at most 6"),
        ({"history": ["B01"], "K": 5}, "K", "unknown field"),
        ({"history": ["B13"]}, "history", "unlucky"),
        ({"history": ["B01"], "model": "other"}, "model", "no model 'other'; there are: stand-in"),
        ({"history": ["B01"], "unknown_items": "maybe"}, "unknown_items", "'error' or 'ignore'"),
        ({"history": ["B01"], "where": {"colour": ["red"]}}, "where.colour", "columns .* by: decade, kind, tags"),
        ({"history": ["B01"], "where": {"kind": "tent"}}, "where.kind", "array"),
        ({"history": ["B01"], "where": {"kind": ["tent"] * 7}}, "where.kind", "at most 6"),
        ({"history": ["B01"], "where": {"kind": ["tent", None]}}, "where.kind[1]", "a text, a number, true or false"),
        ({"history": ["B01"], "max_per": {"colour": 1}}, "max_per.colour", "unknown column"),
        ({"history": ["B01"], "max_per": {"kind": 0}}, "max_per.kind", "greater than 0"),
        ({"history": ["B01"], "search": {"width": 51}}, "search.width", "less than or equal to 50"),
        ({"history": ["B01"], "search": {"mode": "fast"}}, "search.mode", "'exact' or 'beam'"),
        ({"history": ["B01"], "search": {"score": "best"}}, "search.score", "'valid' or 'full'"),
        ({"history": ["B01"], "search": {"temperature": 2}}, "search.temperature", "unknown field"),
        ({"history": ["B01"], "log_probabilities": 1}, "log_probabilities", "boolean"),
    ],
)
def test_faulty_fields_are_named(client: TestClient, body: dict[str, Any], field: str, says: str) -> None:
    response = client.post(URL, content=json.dumps(body), headers={"content-type": "application/json"})
    problem = refused(response, 422)
    assert [error["field"] for error in problem["errors"]] == [field]
    assert re.search(says, problem["errors"][0]["message"])
    assert field in problem["detail"]


def refused(response: Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["type"] == "about:blank"
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    return problem


def test_every_unknown_item_is_counted_and_the_first_are_named(client: TestClient) -> None:
    body = {"history": ["x", "B01", "y"], "allow": ["z"], "deny": ["w" * 500]}
    problem = refused(client.post(URL, json=body), 422)
    assert [e["field"] for e in problem["errors"]] == ["history[0]", "history[2]", "deny[0]", "allow[0]"]
    assert len(problem["errors"][2]["message"]) < 150
    assert problem["detail"].endswith("and 1 more")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"history": ["B01"]} {}',
        b"\xff\xfe",
        b'{"history": ["\\ud800"]}',
        b'{"\\ud800": 1}',
        b'{"history": ["B01"], "k": ' + b"9" * 1900 + b".}",
        b"[" * 2000,
        b'{"history": ' + b'[{"a":' * 300 + b"1",
    ],
)
def test_malformed_json(client: TestClient, body: bytes) -> None:
    response = client.post(URL, content=body, headers={"content-type": "application/json"})
    assert "JSON" in refused(response, 400)["detail"]


@pytest.mark.parametrize("body", [b"null", b"[]", b'"x"', b"3"])
def test_json_that_is_no_object(client: TestClient, body: bytes) -> None:
    response = client.post(URL, content=body, headers={"content-type": "application/json"})
    assert refused(response, 422)["errors"][0]["field"] == "body"


def test_content_type(client: TestClient) -> None:
    form = client.post(URL, data={"history": "B01"})
    assert "send application/json" in refused(form, 415)["detail"]
    with_charset = {"content-type": "Application/JSON; charset=utf-8"}
    assert ids(client.post(URL, content=b'{"history": ["B01"], "k": 1}', headers=with_charset)) == ["B00"]


def test_oversize_body_declared_and_streamed(client: TestClient, recommender: StandIn) -> None:
    just_fits = json.dumps({"history": ["B01"], "k": 1}).encode().ljust(2048)
    headers = {"content-type": "application/json"}
    assert ids(client.post(URL, content=just_fits, headers=headers)) == ["B00"]
    problem = refused(client.post(URL, content=just_fits + b" ", headers=headers), 413)
    assert problem["errors"][0]["field"] == "body"
    assert "2048 bytes" in problem["detail"]

    chunks = (just_fits[i : i + 100] for i in range(0, 2048, 100))
    assert ids(client.post(URL, content=chunks, headers=headers)) == ["B00"]
    endless = (b"x" * 100 for _ in range(10_000))
    refused(client.post(URL, content=endless, headers=headers), 413)
    refused(client.post(URL, content=b"{}", headers=headers | {"content-length": "9" * 5000}), 413)
    assert recommender.batches == [1, 1]


def test_a_failing_recommender_is_a_500_without_its_secrets(client: TestClient) -> None:
    problem = refused(client.post(URL, json={"history": ["B14"]}), 500)
    assert "secret" not in json.dumps(problem)
    assert ids(client.post(URL, json={"history": ["B01"], "k": 1})) == ["B00"]


def test_unknown_route_and_method(client: TestClient) -> None:
    refused(client.get("/v2/everything"), 404)
    response = client.get(URL)
    refused(response, 405)
    assert response.headers["allow"] == "POST"


def test_requests_that_wait_are_searched_together_and_health_stays_free(
    client: TestClient, recommender: StandIn
) -> None:
    recommender.gate.clear()
    with ThreadPoolExecutor(14) as threads:
        first = threads.submit(client.post, URL, json={"history": ["B00"], "k": 1})
        time.sleep(0.1)  # the first is being searched now, the others wait
        unlucky = threads.submit(client.post, URL, json={"history": ["B13"]})
        others = [threads.submit(client.post, URL, json={"history": [f"B{i:02}"], "k": i}) for i in range(1, 12)]
        started = time.monotonic()
        assert client.get("/health").json() == {"status": "ok"}
        assert time.monotonic() - started < 1
        time.sleep(0.2)
        recommender.gate.set()
        assert ids(first.result()) == ["B01"]
        for i, other in enumerate(others, 1):
            answer = ids(other.result())
            assert len(answer) == i
            assert answer[0] == f"B{i - 1:02}"
        # One query that fails does not fail its neighbours.
        refused(unlucky.result(), 422)
    assert recommender.batches[0] == 1
    assert max(recommender.batches) == 8


def test_models(client: TestClient) -> None:
    answer = client.get("/v1/models").json()
    [model] = answer["models"]
    assert answer["failed"] is None
    assert (model["columns"], model["fallback"]) == (["decade", "kind", "tags"], True)
    assert (model["name"], model["version"], model["data_fingerprint"]) == ("stand-in", 7, "f00")
    assert (model["exported_at"], model["trained_until"]) == (None, None)
    assert model["checksum"] == Manifest(name="another").checksum  # of no files
    assert model["items"] == ITEMS
    assert model["metrics"] == {"NDCG@10": 0.5}
    assert model["search"]["mode"] == "exact"


def test_openapi_shows_the_limits_and_the_problems(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    post = document["paths"][URL]["post"]
    schemas = document["components"]["schemas"]
    assert post["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/RecommendationRequest")
    request = schemas["RecommendationRequest"]
    assert request["required"] == ["history"]
    assert request["additionalProperties"] is False
    assert request["properties"]["history"]["maxItems"] == 8
    assert request["properties"]["k"] == {
        "default": 10,
        "description": "How many items to recommend.",
        "maximum": 20,
        "minimum": 1,
        "title": "K",
        "type": "integer",
    }
    assert all("description" in field for field in request["properties"].values())
    assert schemas["BatchRequest"]["properties"]["requests"]["maxItems"] == 4
    assert schemas["RankRequest"]["properties"]["candidates"]["maxItems"] == 10
    for status in ("400", "413", "415", "422", "503", "504"):
        assert list(post["responses"][status]["content"]) == ["application/problem+json"]
    for reference in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)):
        assert reference in schemas
    example = request["examples"][0]
    assert refused(client.post(URL, json=example), 422)["errors"][0]["message"].startswith("unknown item")
    assert all(
        "examples" in schemas[name] for name in ("BatchRequest", "RankRequest", "RankResponse", "Items", "Ready")
    )
    assert client.get("/docs").status_code == 200

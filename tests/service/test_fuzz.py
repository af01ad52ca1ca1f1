"""Requests that nobody means well with: each is answered, or refused with a problem document; none makes it fail.

Some are made by hand, some by Schemathesis from the OpenAPI document: 440 or, with ILREC_FULL_PRODUCT=1 in the
environment, 2,750.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
from collections.abc import Iterator
from decimal import Decimal
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from recommender.catalogue.catalogue import Catalogue
from recommender.recommender import Recommender
from service import schema
from service.api import create_api
from service.config import ServingConfig
from service.metrics import Metrics
from service.models import Models
from tests.service.test_api import CONFIG, StandIn

EXAMPLES = 250 if os.environ.get("ILREC_FULL_PRODUCT") else 40  # of each property
ANSWERS: dict[str, type[BaseModel]] = {
    "/v1/recommendations": schema.RecommendationResponse,
    "/v1/recommendations/batch": schema.BatchResponse,
    "/v1/rank": schema.RankResponse,
}
REFUSALS = {400, 404, 405, 413, 415, 422, 503, 504}
JSON = {"content-type": "application/json"}
LONG_CHARACTER = "&#" + "9" * 5000 + ";"


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Endpoint:
    """An application, asked below HTTP: whatever a server would hand on can be said."""

    def __init__(self, api: FastAPI) -> None:
        self.api = api
        self.document = api.openapi()
        self._runner = asyncio.Runner()

    def ask(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None, query: bytes = b""
    ) -> Answer:
        """What is answered; `path` is percent-encoded."""
        given = {"host": "here", "content-length": str(len(body))} | (headers or {})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "method": method,
            "path": unquote(path),
            "raw_path": path.encode(),
            "query_string": query,
            "root_path": "",
            "headers": [(name.encode(), value.encode("latin-1")) for name, value in given.items()],
            "client": ("127.0.0.1", 1),
            "server": ("here", 80),
        }
        sent: list[dict[str, Any]] = []
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if not waiting:
                await asyncio.Event().wait()
            return waiting.pop()

        async def send(message: Any) -> None:
            sent.append(message)

        self._runner.run(self.api(scope, receive, send))
        start = sent[0]
        names = {name.decode(): value.decode("latin-1") for name, value in start["headers"]}
        return Answer(start["status"], names, b"".join(message.get("body", b"") for message in sent[1:]))

    def post(self, path: str, body: Any) -> Answer:
        """What a JSON body is answered with."""
        return self.ask("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode(), JSON)

    def close(self) -> None:
        self._runner.close()


def odd_stand_in() -> StandIn:
    """A stand-in whose catalogue has columns of every kind."""
    stand_in = StandIn()
    catalogue, rows = stand_in.catalogue, range(len(stand_in.catalogue))
    columns = {
        "price": pa.array([(np.nan, np.inf, -0.0, None, 1.5)[i % 5] for i in rows]),
        "cost": pa.array([Decimal(i) / 100 for i in rows]),
        "since": pa.array([i * 10**15 for i in rows], pa.timestamp("us")),
        "beyond": pa.array([i * 10**17 for i in rows], pa.timestamp("us")),
        "exactly": pa.array([i * 10**15 + 1 for i in rows], pa.timestamp("ns")),
        "took": pa.array([i * 10**9 + 1 for i in rows], pa.duration("ns")),
        "days": pa.array([[i, None] for i in rows], pa.list_(pa.date32())),
        "raw": pa.array([b"\xff\x00"] * len(rows)),
        "raws": pa.array([[b"\xff\x00"]] * len(rows)),
        "maker": pa.array([{"name": "Norvik", "photo": b"\xff", "rating": np.nan}] * len(rows)),
        "sizes": pa.array([[], [None], [1.0, np.nan]] * 10),
        "nothing": pa.nulls(len(rows)),
    }
    table = catalogue.columns
    assert table is not None
    for name, values in columns.items():
        table = table.append_column(name, values)
    ids = [f"i{i}" for i in rows]  # as in the tiny world
    stand_in.catalogue = Catalogue(ids, catalogue.titles, table, catalogue.popularity)
    return stand_in


@pytest.fixture(scope="module")
def endpoint(tiny_bundle: Path) -> Iterator[Endpoint]:
    models = Models(ServingConfig.model_validate(CONFIG | {"max_body_bytes": 64 * 1024}), Metrics())
    recommenders: dict[str, Any] = {"tiny": Recommender.load(tiny_bundle), "odd": odd_stand_in()}
    models.replace(recommenders)
    endpoint = Endpoint(create_api(models))
    yield endpoint
    endpoint.close()


def sound(answer: Answer) -> Answer:
    """The answer, if it is one, or a refusal that says what is wrong."""
    if answer.status >= 400:
        assert answer.status in REFUSALS, answer
        assert answer.headers["content-type"] == "application/problem+json"
        problem = schema.Problem.model_validate_json(answer.body)
        assert (problem.status, problem.title) == (answer.status, HTTPStatus(answer.status).phrase)
        assert problem.detail
        assert len(answer.body) < 20_000
    elif answer.headers.get("content-type") == "application/json":
        json.loads(answer.body, parse_constant=pytest.fail)
    assert answer.headers["x-request-id"]
    return answer


# ---- By hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ANSWERS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x00",
        b"\xef\xbb\xbf{}",
        b'{"history": [' + b"[" * 30_000,
        b'{"history": ' + b'{"a":' * 9_000 + b"1" + b"}" * 9_001,
        b'{"history": ["i1"], "k": 1' + b"0" * 60_000 + b"}",
        b'{"history": ["i1"], "k": 1e400}',
        b'{"history": ["i1"], "k": -Infinity}',
        b'{"history": ["i1"], "model": NaN}',
        b'{"history": ["\\udfff\\ud800"]}',
        b'{"history": ["\xed\xa0\x80"]}',
        b'{"history": ["i1"], "history": 1}',
        b'{"' + b"x" * 60_000 + b'": 1}',
        b'{"history": ["' + b"x" * 2**20 + b'"]}',
    ],
    ids=range(14),
)
def test_bodies_that_are_hardly_json(endpoint: Endpoint, path: str, body: bytes) -> None:
    answer = sound(endpoint.post(path, body))
    assert answer.status in (400, 413, 422)


@pytest.mark.parametrize("field", ["history", "allow", "deny", "candidates", "model"])
@pytest.mark.parametrize(
    "text",
    ["", " ", "\x00", "\u2028", "\U0010ffff", "x" * 60_000, "&" * 60_000, "&amp;" * 12_000, LONG_CHARACTER, "&#xD800;"],
    ids=range(10),
)
def test_texts_that_name_nothing(endpoint: Endpoint, field: str, text: str) -> None:
    body: dict[str, Any] = {"history": ["i1"], "model": "odd"}
    body[field] = text if field == "model" else [text]
    path = "/v1/rank" if field == "candidates" else "/v1/recommendations"
    assert sound(endpoint.post(path, body)).status == 422


@pytest.mark.parametrize(
    "changes",
    [
        {"history": ["i1"] * 8},
        {"history": []},
        {"history": ["?"] * 8, "unknown_items": "ignore"},
        {"allow": [], "deny": ["i2", "i2"], "max_per": {"tags": 10**300, "sizes": 1}},
        {"where": {"price": [1.5, float("nan"), float("inf"), -0.0, 10**300]}},
        {"where": {"sizes": [1, True, "1"], "since": ["1970-01-01 00:00:00.000000"], "tags": []}},
        {"where": {"kind": ["tent", LONG_CHARACTER]}, "max_per": {"price": 1}},
        {"model": "tiny", "k": 20, "search": {"width": 1, "node_budget": 1}},
        {"model": None, "allow": None, "deny": None, "search": None},
        {"where": {"kind": [10**4000]}},
        {"search": {}},
    ],
    ids=range(11),
)
def test_odd_requests_that_are_answered(endpoint: Endpoint, changes: dict[str, Any]) -> None:
    answer = sound(endpoint.post("/v1/recommendations", {"history": ["i1"], "model": "odd"} | changes))
    assert answer.status == 200, answer.body


@pytest.mark.parametrize(
    "changes",
    [
        {"k": 10**9},
        {"k": -(10**300)},
        {"k": 1.5},
        {"where": {"kind": [[]]}},
        {"where": {f"column {i}": ["x"] for i in range(2000)}},
        {"where": {"kind": ["x"] * 7}},
        {"where": {"raw": ["x"]}},
        {"where": {"": [""]}},
        {"max_per": {"kind": 1e300}},
        {"max_per": {f"column {i}": 1 for i in range(2000)}},
        {"search": {"width": 10**18}},
        {"search": []},
        {"x" * 10_000: 1},
        {"__class__": {}},
    ],
    ids=range(14),
)
def test_requests_that_are_refused(endpoint: Endpoint, changes: dict[str, Any]) -> None:
    body = {"history": ["i1"], "model": "odd"} | changes
    assert sound(endpoint.post("/v1/recommendations", body)).status == 422


@pytest.mark.parametrize(
    "content_type", ["", "application/x-www-form-urlencoded", "text/plain", "é", ";", "application/json, text/html"]
)
def test_content_types(endpoint: Endpoint, content_type: str) -> None:
    answer = endpoint.ask("POST", "/v1/rank", b"{}", {"content-type": content_type})
    assert sound(answer).status == 415


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/recommendations"),
        ("FOO", "/v1/recommendations"),
        ("GET", "/nowhere"),
        ("GET", "/v1/items/"),
        ("GET", "/v1/items/%00"),
        ("GET", "/v1/items/%ff%fe"),
        ("GET", "/v1/items/%ED%A0%80"),
        ("GET", "/v1/items/../../etc/passwd"),
        ("GET", "/v1/items/" + "x" * 50_000),
        ("GET", "//"),
        ("GET", "/%2e%2e/%0d%0aset-cookie:x"),
        ("DELETE", "/"),
        ("POST", "/metrics"),
    ],
)
@pytest.mark.parametrize("host", ["here", "[", "]:x", "a b", "é", "here:99999999"])
def test_paths(endpoint: Endpoint, method: str, path: str, host: str) -> None:
    assert sound(endpoint.ask(method, path, headers={"host": host})).status in (404, 405)


@pytest.mark.parametrize(
    "query",
    [
        b"",
        b"q=",
        b"q=%",
        b"q=%ff%fe",
        b"q=%00&limit=1",
        b"q=a&limit=0",
        b"q=a&limit=" + b"9" * 5000,
        b"q=a&limit=NaN",
        b"q=a&limit=1&limit=2",
        b"q=a&model=" + b"x" * 5000,
        b"q=" + b"a" * 5000,
        b"q=%26%23" + b"9" * 190 + b"%3B",
        b"q[]=a&q[$ne]=b",
        b"\xff\xfe",
        b"&" * 5000,
        b"=" * 5000,
    ],
    ids=range(16),
)
def test_query_strings(endpoint: Endpoint, query: bytes) -> None:
    sound(endpoint.ask("GET", "/v1/items/search", query=query))
    sound(endpoint.ask("GET", "/v1/items/i1", query=query))


def test_items_with_columns_of_every_kind(endpoint: Endpoint) -> None:
    found = sound(endpoint.ask("GET", "/v1/items/search", query=b"q=trail&limit=100&model=odd"))
    assert len(schema.Items.model_validate_json(found.body).items) == 29
    shown = json.loads(sound(endpoint.ask("GET", "/v1/items/i3", query=b"model=odd")).body)["columns"]
    assert not {"raw", "raws", "maker"} & set(shown)
    for column in ("since", "beyond", "exactly", "took", "days"):  # what is shown can be filtered by
        value = shown[column][0] if column == "days" else shown[column]
        body = {"history": ["i1"], "model": "odd", "where": {column: [value]}}
        answer = sound(endpoint.post("/v1/recommendations", body))
        assert [item["item_id"] for item in json.loads(answer.body)["items"]] == ["i3"]


# ---- Generated -------------------------------------------------------------------------------------------------------

ITEMS = ["i0", "i1", "i2", "i9", "trail tent 7", "unknown"]
NAMES = dict.fromkeys(("history", "allow", "deny", "candidates", "item_id"), ITEMS) | {"model": ["tiny", "odd"]}
COLUMNS = ["kind", "tags", "price", "unknown"]


def narrowed(part: Any, names: list[str] | None = None) -> Any:
    """A part of the OpenAPI document in which texts are names that the catalogue holds, or nearly, so that what is
    made of it gets past the first checks. `names`: for the texts in this part."""
    if isinstance(part, list):
        return [narrowed(each, names) for each in part]
    if not isinstance(part, dict):
        return part
    if "in" in part:  # a parameter
        return part | {"schema": narrowed(part["schema"], NAMES.get(part["name"]))}
    if part.get("type") == "string" and names is not None:
        return {"type": "string", "enum": names}
    if part.get("type") == "object" and "properties" not in part:  # values by column
        return part | {"propertyNames": {"enum": COLUMNS}}
    if "properties" in part:
        fields = {name: narrowed(field, NAMES.get(name)) for name, field in part["properties"].items()}
        return part | {"properties": fields}
    return {key: narrowed(value, names) for key, value in part.items()}


def generated(endpoint: Endpoint, path: str, method: str, mode: GenerationMode) -> st.SearchStrategy[Case]:
    """What Schemathesis makes of the OpenAPI document for one operation: as it says, or against it."""
    document = copy.deepcopy(endpoint.document)
    if mode is GenerationMode.POSITIVE:
        document["paths"] = narrowed(document["paths"])
        schemas = document["components"]["schemas"]
        schemas |= {name: narrowed(schemas[name]) for name in schemas if name.endswith("Request")}
    described = schemathesis.openapi.from_dict(document)
    described.app = endpoint.api
    return described[path][method].as_strategy(generation_mode=mode)


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize(
    ("method", "path"),
    [*(("POST", path) for path in ANSWERS), ("GET", "/v1/items/search"), ("GET", "/v1/items/{item_id}")],
)
def test_the_document_holds(endpoint: Endpoint, method: str, path: str, mode: GenerationMode) -> None:
    """Statuses, content types and bodies are those that the document declares; what it forbids is refused."""
    statuses: set[int] = set()

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(generated(endpoint, path, method, mode))
    def check(case: Case) -> None:
        response = case.call()
        case.validate_response(response, excluded_checks=[positive_data_acceptance])  # what is unknown is refused
        statuses.add(int(response.status_code))
        if response.status_code >= 400:
            sound(
                Answer(response.status_code, {k.lower(): v[0] for k, v in response.headers.items()}, response.content)
            )
        elif path == "/v1/rank":
            for item in schema.RankResponse.model_validate_json(response.content).items:
                if item.tokens is not None:
                    assert abs(sum(token.log_probability for token in item.tokens) - item.score) < 1e-3
        elif path == "/v1/recommendations":
            answer = schema.RecommendationResponse.model_validate_json(response.content)
            items, wanted = [item.item_id for item in answer.items], case.body.get("k", 10)
            assert len(items) == len(set(items)) <= wanted
            assert answer.complete == (len(items) == wanted)

    check()
    assert 200 in statuses or mode is GenerationMode.NEGATIVE


def test_generated_bytes(endpoint: Endpoint) -> None:
    types = st.sampled_from(["application/json", "APPLICATION/JSON;x", "text/json", ""])

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(st.sampled_from(list(ANSWERS)), st.binary(), types)
    def check(path: str, body: bytes, content_type: str) -> None:
        sound(endpoint.ask("POST", path, body, {"content-type": content_type}))

    check()

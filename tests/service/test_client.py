"""The client against a real HTTP server: the endpoint on uvicorn, behind a gate that can refuse and hang up."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn

from service.api import create_api
from service.client import Client, Refused
from service.config import ServingConfig
from service.metrics import Metrics
from service.models import Models
from service.schema import BatchRequest, RankRequest, RecommendationRequest
from tests.service.test_api import StandIn

ASKED = RecommendationRequest(history=["B10"], k=2)


class Gate:
    """Lets requests pass, once it has done to them what `moods` says: a status to answer with, or None to hang up."""

    def __init__(self, api: Any) -> None:
        self.api = api
        self.moods: list[int | None] = []
        self.asked: list[dict[str, str]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            self.asked.append({name.decode(): value.decode() for name, value in scope["headers"]})
            if self.moods:
                mood = self.moods.pop(0)
                headers = [(b"retry-after", b"1"), (b"content-length", b"9")]
                await send({"type": "http.response.start", "status": mood or 200, "headers": headers})
                return await send({"type": "http.response.body", "body": b"come back" if mood else b""})
        await self.api(scope, receive, send)


@pytest.fixture(scope="module")
def gate() -> Gate:
    models = Models(ServingConfig(), Metrics())
    models.replace({"stand-in": StandIn()})  # type: ignore[dict-item]
    return Gate(create_api(models))


@contextmanager
def listening(api: Any) -> Iterator[str]:
    """The address of an ASGI application on uvicorn."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(api, log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def url(gate: Gate) -> Iterator[str]:
    with listening(gate) as url:
        yield url


def test_typed_answers(url: str, gate: Gate) -> None:
    with Client(url, token="secret") as client:
        answer = client.recommend(ASKED, request_id="shop-1")
        assert [item.item_id for item in answer.items] == ["B09", "B11"]
        assert (gate.asked[-1]["authorization"], gate.asked[-1]["x-request-id"]) == ("Bearer secret", "shop-1")
        first, second = client.recommend_batch(BatchRequest(requests=[ASKED, RecommendationRequest(history=[])]))
        assert (first.items, second.fallback) == (answer.items, True)
        assert client.rank(RankRequest(history=["B10"], candidates=["B01", "B09"])).items[0].item_id == "B09"
        assert [item.item_id for item in client.search_items("gas")] == ["B29"]
        [model] = client.models().models
        assert (model.name, model.version, answer.model, answer.model_version) == ("stand-in", 7, "stand-in", 7)


def test_a_refusal_names_the_field_and_is_not_repeated(url: str, gate: Gate) -> None:
    before = len(gate.asked)
    with Client(url) as client, pytest.raises(Refused, match=r"422: history\[0\]: unknown item") as refused:
        client.recommend(RecommendationRequest(history=["?"]))
    assert refused.value.problem.errors[0].field == "history[0]"
    assert len(gate.asked) == before + 1


def test_what_may_pass_is_tried_again(url: str, gate: Gate) -> None:
    before = len(gate.asked)
    gate.moods = [None, 503]
    started = time.monotonic()
    with Client(url) as client:
        assert client.recommend(ASKED).items[0].item_id == "B09"
    assert time.monotonic() - started >= 1  # what Retry-After said
    assert len(gate.asked) == before + 3
    assert len({asked["x-request-id"] for asked in gate.asked[before:]}) == 1


def test_a_bare_500_is_a_proxy_whose_replica_died(url: str, gate: Gate) -> None:
    gate.moods = [500, 502]
    with Client(url) as client:
        assert client.recommend(ASKED).items[0].item_id == "B09"
        with pytest.raises(Refused, match="500: the server failed"):  # this one is the endpoint's own
            client.recommend(RecommendationRequest(history=["B14"]))
    assert gate.moods == []


def test_retries_end(url: str, gate: Gate) -> None:
    gate.moods = [429]
    with Client(url, retries=0) as client, pytest.raises(Refused, match="429: come back"):
        client.recommend(ASKED)
    gate.moods = [None, None]
    with Client(url, retries=1) as client, pytest.raises(ConnectionError):
        client.recommend(ASKED)
    assert gate.moods == []
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with Client(address, retries=1) as client, pytest.raises(ConnectionError, match="ConnectError"):
            client.models()


def test_an_answer_that_is_late_is_not_asked_for_again() -> None:
    with socket.socket() as silent:  # accepts, never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        silent.settimeout(0.5)
        with Client(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.2) as client:
            with pytest.raises(ConnectionError, match="ReadTimeout"):
                client.recommend(ASKED)
            silent.accept()[0].close()
            with pytest.raises(TimeoutError):
                silent.accept()

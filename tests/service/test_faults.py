"""What goes wrong around an endpoint, done to one on a real Ray Serve; `-s` prints how long it took to recover."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from recommender.backbone.backbone import load_backbone
from recommender.bundle import MANIFEST
from recommender.models import Model
from recommender.recommender import Recommender
from service.app import _start
from service.client import Client, Refused
from service.config import ServingConfig
from service.schema import RecommendationRequest
from tests.conftest import add_version
from tests.service.test_app import deploy, free_port, get, until
from trainer.experiment import Experiment

PATH = "/v1/recommendations"
REPLICAS = 2
K = 5
# Little room, so that little load is too much; seconds enough for a busy machine.
SERVING = {
    "replicas": REPLICAS,
    "max_queue": 8,
    "max_requests": 8,
    "max_batch_tokens": 640,
    "timeout_seconds": 5,
    "follow_seconds": 0.2,
}
ROOM = REPLICAS * 8


Lists = dict[tuple[str, int], tuple[str, ...]]


class Answer(NamedTuple):
    """What a client got: a status, 0 for a connection that broke; of a 200 the model (name@version) and its items."""

    status: int
    retry_after: str | None
    model: str
    items: tuple[str, ...]


@pytest.fixture(scope="module")
def other_bundle(tiny_bundle: Path, tiny_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same items, other weights: its lists are others."""
    tiny = Recommender.load(tiny_bundle)
    backbone = load_backbone(tiny_experiment.backbone, tiny.space.tokenizer, seed=2)
    bundle = tmp_path_factory.mktemp("bundles") / "other"
    Recommender(tiny.space, backbone, tiny.manifest).save(bundle)
    return bundle


@pytest.fixture(scope="module")
def histories(tiny_bundle: Path) -> list[list[str]]:
    ids = Recommender.load(tiny_bundle).catalogue.item_ids
    return [[ids[item], ids[(7 * item + 3) % len(ids)]] for item in range(12)]


@pytest.fixture(scope="module")
def right(tiny_bundle: Path, other_bundle: Path, histories: list[list[str]]) -> Lists:
    """The lists by model and place of the history."""
    lists = {}
    for names, bundle in ((("tiny", "shop@1"), tiny_bundle), (("other", "shop@2"), other_bundle)):
        recommender = Recommender.load(bundle)
        seen = [recommender.catalogue.indices_of(history) for history in histories]
        for place, found in enumerate(recommender.recommend(seen, K, seen)):
            for name in names:
                lists[name, place] = tuple(recommender.catalogue.item_ids[item] for item in found.items)
    assert all(lists["tiny", place] != lists["other", place] for place in range(len(histories)))
    return lists


@pytest.fixture(scope="module")
def shop(tiny_bundle: Path, other_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model of three versions; the first is promoted, the third repeats its golden request wrongly."""
    storage = tmp_path_factory.mktemp("models")
    for bundle in (tiny_bundle, other_bundle, other_bundle):
        latest = add_version(storage, "shop", bundle)
    spoil(latest)
    return Model(storage, "shop")


@pytest.fixture(scope="module")
def settings(shop: Model) -> dict[str, Any]:
    return SERVING | {"storage": str(shop.storage)}


def spoil(bundle: Path) -> None:
    """Have a bundle say that it once answered otherwise."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["golden"]["items"].reverse()
    (bundle / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def url(ray_cluster: None, tiny_bundle: Path, settings: dict[str, Any]) -> Iterator[str]:
    from ray import serve

    config = ServingConfig(port=free_port())
    _start(config)
    url = f"http://127.0.0.1:{config.port}"
    deploy({"tiny": str(tiny_bundle)}, settings)
    until(lambda: len(pids(url)) == REPLICAS)
    yield url
    serve.shutdown()


def pids(url: str) -> set[int]:
    """Processes of the replicas that answer."""
    found = set()
    for _ in range(6 * REPLICAS):  # the proxy draws one each time
        try:
            with urllib.request.urlopen(f"{url}/metrics", timeout=60) as response:
                found |= {int(pid) for pid in re.findall(r'replica="[^"]*-(\d+)"', response.read().decode())}
        except urllib.error.HTTPError:
            return set()
    return found


def plain(url: str, history: list[str]) -> Answer:
    """Ask once."""
    body = json.dumps({"history": history, "k": K}).encode()
    request = urllib.request.Request(f"{url}{PATH}", body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
            items = tuple(item["item_id"] for item in answer["items"])
            version = f"@{answer['model_version']}" if "model_version" in answer else ""
            return Answer(response.status, None, answer["model"] + version, items)
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.headers["retry-after"], error.read().decode(), ())
    except OSError as error:
        return Answer(0, None, repr(error), ())


def retrying(client: Client, history: list[str]) -> Answer:
    """Ask as often as `service.client` does."""
    try:
        answer = client.recommend(RecommendationRequest(history=history, k=K))
    except (Refused, ConnectionError) as error:
        return Answer(0, None, repr(error), ())
    return Answer(200, None, answer.model, tuple(item.item_id for item in answer.items))


class Seen:
    """What clients got while they asked, by arrival: place of the history, answer, when it was asked for."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, Answer, float]] = []

    def statuses(self) -> Counter[int]:
        return Counter(answer.status for _, answer, _ in self.answers)

    def check(self, right: Lists) -> None:
        """No wrong answer, and no failure but the announced 503."""
        for place, answer, _ in self.answers:
            if answer.status == 200:
                assert answer.items == right[answer.model, place]
            else:
                assert answer.status == 503, answer
                assert int(answer.retry_after or 0) >= 1, answer


@contextmanager
def asking(clients: int, ask: Callable[[list[str]], Answer], histories: list[list[str]]) -> Iterator[Seen]:
    """Clients that ask without a pause, until the end of the block."""
    seen, stop = Seen(), threading.Event()

    def client(number: int) -> None:
        place = number
        while not stop.is_set():
            place = (place + 1) % len(histories)
            asked = time.monotonic()
            seen.answers.append((place, ask(histories[place]), asked))

    with ThreadPoolExecutor(clients) as threads:
        running = [threads.submit(client, number) for number in range(clients)]
        try:
            until(lambda: len(seen.answers) >= clients)
            yield seen
        finally:
            stop.set()
        for each in running:
            each.result()


def all_is_well(url: str, histories: list[list[str]], right: Lists) -> None:
    """As many requests as a queue holds are all answered: none of its places is lost."""
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda history: plain(url, history), histories))
    assert [answer.status for answer in answers] == [200] * len(histories), answers
    assert [answer.items for answer in answers] == [right["tiny", place] for place in range(len(histories))]


def test_a_killed_replica(url: str, histories: list[list[str]], right: Lists) -> None:
    victim = min(pids(url))
    with (
        Client(url, timeout=60) as client,
        asking(5, lambda history: plain(url, history), histories) as plainly,
        asking(3, lambda history: retrying(client, history), histories) as patiently,
    ):
        held = [slow_client(url) for _ in range(4 * REPLICAS)]  # some of them by the victim
        time.sleep(0.5)
        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        said = [each.recv(10_000) for each in held]
        until(lambda: len(pids(url)) == REPLICAS)
        whole = time.monotonic() - killed
    assert victim not in pids(url)
    assert {each.split(b" ")[1] for each in said} <= {b"503", b"408"}  # by who held them, which Serve decides
    assert all(b"\r\nretry-after: 1\r\n" in each for each in said if b" 503 " in each)
    plainly.check(right)
    patiently.check(right)
    assert set(patiently.statuses()) == {200}
    asked = f"{plainly.statuses()} plainly, {patiently.statuses()} with retries"
    print(f"\na replica killed: {asked}; both answered again after {whole:.1f} s")


def test_bundles_swapped_under_load(
    url: str,
    tiny_bundle: Path,
    other_bundle: Path,
    histories: list[list[str]],
    right: Lists,
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    """To another bundle; then to some that are no good, which change nothing but `/ready` and `/v1/models`."""
    damaged = shutil.copytree(other_bundle, tmp_path / "damaged")
    weights = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    wrong = shutil.copytree(other_bundle, tmp_path / "wrong")
    spoil(wrong)

    def everywhere(holds: Callable[[dict[str, Any]], bool]) -> Callable[[], bool]:
        return on_all_replicas(url, holds)

    with asking(3, lambda history: plain(url, history), histories) as seen:
        began = time.monotonic()
        deploy({"other": str(other_bundle)}, settings)
        until(everywhere(lambda models: [model["name"] for model in models["models"]] == ["other"]))
        swapped = time.monotonic()
        for models, says in [
            ({"tiny": str(tiny_bundle), "other": str(damaged)}, r"model\.safetensors: differs from its checksum"),
            ({"other": str(wrong)}, "golden request"),
            ({"other": str(tmp_path / "absent")}, "absent: no bundle"),
            ({}, "at least 1 item"),
        ]:
            deploy(models, settings)
            until(everywhere(lambda models, says=says: re.search(says, str(models["failed"])) is not None))
        assert get(f"{url}/ready")["swapped"] is False
    seen.check(right)
    assert set(seen.statuses()) == {200}
    assert {answer.model for _, answer, _ in seen.answers} == {"tiny", "other"}
    assert {answer.model for _, answer, asked in seen.answers if asked > swapped} == {"other"}
    print(f"\nbundles swapped after {swapped - began:.1f} s, in {len(seen.answers)} requests")
    deploy({"tiny": str(tiny_bundle)}, settings)
    until(everywhere(lambda models: models["failed"] is None and models["models"][0]["name"] == "tiny"))


def on_all_replicas(url: str, holds: Callable[[dict[str, Any]], bool]) -> Callable[[], bool]:
    """Asks /v1/models so often that each replica should have answered."""
    return lambda: all(holds(get(f"{url}/v1/models")) for _ in range(6 * REPLICAS))


def test_versions_promoted_under_load(
    url: str, tiny_bundle: Path, shop: Model, settings: dict[str, Any], histories: list[list[str]], right: Lists
) -> None:
    """A name is served: it is promoted, promoted to what is no good, and rolled back twice. No request fails."""
    _, second, wrong = shop.complete

    def served(version: int, failed: str | None = None) -> Callable[[], bool]:
        def holds(models: dict[str, Any]) -> bool:
            as_told = models["failed"] is None if failed is None else failed in str(models["failed"])
            return as_told and [(each["name"], each["version"]) for each in models["models"]] == [("shop", version)]

        return on_all_replicas(url, holds)

    deploy({"shop": "shop"}, settings | {"timeout_seconds": 60})  # on a busy machine an answer takes seconds
    until(served(1))
    with asking(3, lambda history: plain(url, history), histories) as seen:
        began = time.monotonic()
        shop.promote(second)
        until(served(2))
        followed = time.monotonic()
        shop.promote(wrong)
        until(served(2, "golden request"))
        assert get(f"{url}/ready")["swapped"] is False
        shop.rollback()
        until(served(2))
        undone = time.monotonic()
        shop.rollback()
        until(served(1))
        until_first = time.monotonic()
        time.sleep(0.5)
    seen.check(right)
    assert set(seen.statuses()) == {200}
    assert {answer.model for _, answer, _ in seen.answers} == {"shop@1", "shop@2"}
    assert {answer.model for _, answer, asked in seen.answers if followed < asked < undone} == {"shop@2"}
    assert {answer.model for _, answer, asked in seen.answers if asked > until_first} == {"shop@1"}
    print(f"\na promotion was followed after {followed - began:.1f} s, in {len(seen.answers)} requests")
    deploy({"tiny": str(tiny_bundle)}, settings)
    until(on_all_replicas(url, lambda models: [each["name"] for each in models["models"]] == ["tiny"]))


def test_a_slow_client(url: str, histories: list[list[str]], right: Lists) -> None:
    """One that sends a byte at a time, while others are answered."""
    slow = slow_client(url)
    with asking(3, lambda history: plain(url, history), histories) as seen:
        began = time.monotonic()
        said = send_slowly(slow)
        held = time.monotonic() - began
    while more := slow.recv(10_000):  # until the connection is closed
        said += more
    assert said.startswith(b"HTTP/1.1 408 "), said
    assert b"problem+json" in said
    assert b"did not arrive within 5 s" in said
    seen.check(right)
    assert set(seen.statuses()) == {200}
    print(f"\na slow client was cut off after {held:.1f} s")


def slow_client(url: str) -> socket.socket:
    """A connection with a request whose body has only begun."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    head = f"POST {PATH} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n"
    connection.sendall(head.encode() + b"{")
    return connection


def send_slowly(connection: socket.socket) -> bytes:
    """Send a byte at a time, until there is an answer: its bytes."""
    connection.settimeout(0.1)
    for _ in range(600):
        connection.sendall(b" ")
        try:
            return connection.recv(10_000)
        except TimeoutError:
            pass
    raise AssertionError("not cut off")


def test_clients_that_leave(url: str, histories: list[list[str]], right: Lists) -> None:
    """More of them than there are places: with their requests half sent, and while they are answered."""
    for number in range(2 * ROOM):
        slow_client(url).close()
        body = {"history": histories[number % len(histories)], "k": K}
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{url}{PATH}", json=body, timeout=httpx.Timeout(60, read=0.001))
    left = time.monotonic()
    until(lambda: plain(url, histories[0]).status == 200)
    print(f"\n{4 * ROOM} clients left; the next was answered after {time.monotonic() - left:.2f} s")
    all_is_well(url, histories, right)


def test_overload(url: str, histories: list[list[str]], right: Lists) -> None:
    """Ten times as many clients as there is room for, that come back at once whatever they are told."""
    with asking(10 * ROOM, lambda history: plain(url, history), histories) as seen:
        time.sleep(4)
    over = time.monotonic()
    answer = plain(url, histories[0])
    recovered = time.monotonic() - over
    assert (answer.status, answer.items) == (200, right["tiny", 0])
    all_is_well(url, histories, right)
    seen.check(right)
    assert set(seen.statuses()) == {200, 503}
    waits = Counter(answer.retry_after for _, answer, _ in seen.answers if answer.status == 503)
    print(f"\n10 × overload: {seen.statuses()}, Retry-After {waits}; the next was answered after {recovered:.2f} s")

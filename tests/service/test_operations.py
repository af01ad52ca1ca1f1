"""Tokens, back-pressure, clients that leave, metrics, logs, self-checks and swaps, without Serve."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from pydantic import ValidationError

from recommender.bundle import MANIFEST, Manifest
from recommender.catalogue.catalogue import Catalogue
from recommender.errors import UserError
from recommender.floors.config import ItemKNNSettings
from recommender.floors.itemknn import ItemKNN
from recommender.floors.recommender import FloorRecommender
from recommender.models import Model
from recommender.recommender import Recommender, merge_adapter
from service.api import create_api
from service.auth import read_tokens
from service.config import ServingConfig
from service.metrics import Metrics
from service.models import Models
from tests.conftest import add_version
from tests.recommender.test_bundle import adapted_bundle
from tests.service.test_api import ITEMS, URL, StandIn, ids, refused, serving

ASKED: dict[str, Any] = {"history": ["B10"], "k": 1}


# ---- Tokens ----------------------------------------------------------------------------------------------------------


def test_only_known_tokens_may_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokens").write_text("first-secret\n\nsecond-secret\n")
    monkeypatch.setenv("MORE_TOKENS", "third-secret")
    settings = {"token_file": str(tmp_path / "tokens"), "token_variable": "MORE_TOKENS"}
    with serving({"a": StandIn()}, **settings) as client:
        for token in ("first-secret", "second-secret", "third-secret"):
            assert client.post(URL, json=ASKED, headers={"authorization": f"Bearer {token}"}).status_code == 200
        for header in ("", "Bearer", "Bearer ", "Bearer first", "Basic first-secret", "first-secret", "Bearer é"):
            response = client.post(URL, json=ASKED, headers={"authorization": header.encode()})
            assert response.headers["www-authenticate"] == "Bearer"
            assert "secret" not in refused(response, 401)["detail"]
        refused(client.post(URL, json=ASKED), 401)
        for path in ("/v1/models", "/metrics", "/v1/items/B01", "/docs/v1/models", "/nowhere"):
            refused(client.get(path), 401)
        for path in ("/", "/docs", "/docs/swagger-ui.css", "/openapi.json", "/health", "/ready"):
            response = client.get(path)
            assert response.status_code == 200
            assert "secret" not in response.text
            assert "Trail Tent 1" not in response.text


def test_a_source_without_tokens_opens_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text(" \n")
    for settings, says in [
        ({"token_file": str(tmp_path / "empty")}, "empty holds no token"),
        ({"token_file": str(tmp_path / "absent")}, "absent cannot be read"),
        ({"token_variable": "ILREC_NO_SUCH_VARIABLE"}, "ILREC_NO_SUCH_VARIABLE holds no token"),
    ]:
        with pytest.raises(UserError, match=says):
            create_api(Models(ServingConfig.model_validate(settings), Metrics()))
    assert read_tokens(ServingConfig()) == []


# ---- Back-pressure ---------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    recommender = StandIn()
    recommender.gate.clear()
    with serving({"a": recommender}, max_queue=4) as client, ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(client.post, URL, json=ASKED) for _ in range(4)]
        time.sleep(0.3)
        started = time.monotonic()
        response = client.post(URL, json=ASKED)
        assert time.monotonic() - started < 2
        assert int(response.headers["retry-after"]) >= 1
        assert "too many requests" in refused(response, 503)["detail"]
        recommender.gate.set()
        assert [each.result().status_code for each in waiting] == [200] * 4
        assert client.post(URL, json=ASKED).status_code == 200
        assert 'ilrec_refused_total{reason="busy"' in client.get("/metrics").text


def test_what_takes_too_long_is_given_up() -> None:
    recommender = StandIn()
    recommender.gate.clear()
    with serving({"a": recommender}, timeout_seconds=0.2) as client:
        assert "within 0.2 s" in refused(client.post(URL, json=ASKED), 504)["detail"]
        refused(client.post(URL, json=ASKED), 504)  # waits behind the first, and is never computed
        recommender.gate.set()
        assert ids(client.post(URL, json=ASKED | {"k": 2})) == ["B09", "B11"]
        assert recommender.batches == [1, 1]


@pytest.fixture
def floor(tmp_path: Path) -> str:
    """An ItemKNN over the stand-in's items but the first five, in another order: each third one follows another."""
    item_ids = [f"B{i:02}" for i in reversed(range(5, ITEMS))]
    settings = ItemKNNSettings(normalisation="cosine", shrinkage=0, backward=0, window=1, neighbours=5)
    places = np.arange(len(item_ids), dtype=np.int32)
    chains = np.concatenate([places[start::3] for start in range(3)])
    model = ItemKNN.fit(settings, chains % 3, chains, len(item_ids))
    manifest = Manifest(name="floor", recommender={"kind": "itemknn"})
    FloorRecommender(Catalogue(item_ids, item_ids), model, 0.5, manifest).save(tmp_path / "floor")
    return str(tmp_path / "floor")


def test_a_floor_answers_where_there_is_no_room_or_no_time(floor: str) -> None:
    recommender = StandIn()
    recommender.gate.clear()
    with serving({"a": recommender}, timeout_seconds=0.2, fallback=floor) as client:
        late = client.post(URL, json=ASKED).json()
        assert (late["items"][0]["item_id"], late["fallback"], late["model"]) == ("B07", True, "a")
        filtered = client.post(URL, json=ASKED | {"history": ["B01", "B10"], "k": 3, "allow": ["B07", "B00", "B10"]})
        assert ids(filtered) == ["B07", "B00"]  # B00 it does not know, and B10 has been seen
        asked = [ASKED, {"history": [], "k": 1}]
        answers = client.post(f"{URL}/batch", json={"requests": asked}).json()["answers"]
        assert [answer["items"][0]["item_id"] for answer in answers] == ["B07", "B06"]  # popularity, as ever
        assert [answer["fallback"] for answer in answers] == [True, True]
        assert 'ilrec_lists_total{exact="true",fallback="true",model="a"' in client.get("/metrics").text
        recommender.gate.set()
        assert client.post(URL, json=ASKED).json()["fallback"] is False
    recommender.gate.clear()
    with serving({"a": recommender}, max_queue=4, fallback=floor) as client, ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(client.post, URL, json=ASKED) for _ in range(4)]
        time.sleep(0.3)
        assert client.post(URL, json=ASKED).json()["fallback"] is True
        ranked = client.post("/v1/rank", json={"history": ["B10"], "candidates": ["B00", "B08", "B07"]}).json()
        assert ([item["item_id"] for item in ranked["items"]], ranked["fallback"]) == (["B07", "B08", "B00"], True)
        recommender.gate.set()
        assert [each.result().json()["fallback"] for each in waiting] == [False] * 4


def test_only_a_floor_answers_in_place_of_a_model(tiny_bundle: Path, tmp_path: Path) -> None:
    for fallback, says in [
        (str(tiny_bundle), "holds language_model, which takes time itself; name an itemknn or a tfidf"),
        ("nowhere", "nowhere: no model of this name"),
    ]:
        models = Models(ServingConfig(fallback=fallback, storage=str(tmp_path)), Metrics())
        with pytest.raises(UserError, match=says):
            asyncio.run(models.swap({"a": str(tiny_bundle)}))
    assert ServingConfig(fallback="./floor").fallback == str(Path("floor").absolute())
    assert ServingConfig(fallback="floor@2").floor == "floor@2"


def test_limits_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"max_queue \(8\) must hold a batch of max_requests \(32\)"):
        ServingConfig(max_queue=8)
    with pytest.raises(ValidationError, match=r"max_replicas \(1\) is less than replicas \(2\)"):
        ServingConfig(replicas=2, max_replicas=1)


def test_a_client_that_leaves_frees_its_place() -> None:
    async def main() -> None:
        recommender = StandIn()
        recommender.gate.clear()
        models = Models(ServingConfig(max_queue=32), Metrics())
        models.replace({"a": recommender})  # type: ignore[dict-item]
        api = create_api(models)
        body = json.dumps(ASKED).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        scope = {"type": "http", "method": "POST", "path": URL, "headers": headers, "query_string": b""}
        leave = asyncio.Event()
        sent: list[Any] = []

        async def request(leaves: bool) -> None:
            messages = [{"type": "http.request", "body": body}]

            async def receive() -> Any:
                if messages:
                    return messages.pop()
                await (leave if leaves else asyncio.Event()).wait()
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                sent.append(message)

            await api(dict(scope), receive, send)

        stays = asyncio.create_task(request(leaves=False))
        await asyncio.sleep(0.1)
        others = [asyncio.create_task(request(leaves=True)) for _ in range(3)]
        await asyncio.sleep(0.1)
        leave.set()
        await asyncio.gather(*others)  # although nothing was answered
        assert not sent
        recommender.gate.set()
        await stays
        assert recommender.batches == [1]
        assert [message["status"] for message in sent if "status" in message] == [200]
        assert 'status="499"' in models.metrics.exposition().decode()

    asyncio.run(main())


# ---- What can be seen ------------------------------------------------------------------------------------------------


def test_metrics_tell_what_was_asked_and_answered() -> None:
    with serving({"a": StandIn()}) as client:
        client.post(URL, json=ASKED)
        client.post(URL, json=ASKED | {"history": []})
        client.post(URL, json={})
        client.get("/v1/items/B01")
        client.get("/nowhere")
        text = client.get("/metrics").text
    for line in (
        f'ilrec_requests_total{{replica=R,route="{URL}",status="200"}} 2.0',
        f'ilrec_requests_total{{replica=R,route="{URL}",status="422"}} 1.0',
        'ilrec_requests_total{replica=R,route="/v1/items/{item_id:path}",status="200"} 1.0',
        'ilrec_requests_total{replica=R,route="unknown",status="404"} 1.0',
        'ilrec_lists_total{exact="true",fallback="false",model="a",replica=R} 1.0',
        'ilrec_lists_total{exact="true",fallback="true",model="a",replica=R} 1.0',
        'ilrec_batch_size_count{model="a",replica=R} 2.0',
        'ilrec_expansions_sum{model="a",replica=R} 1.0',
    ):
        assert line in [without_replica(each) for each in text.splitlines()], text


def without_replica(line: str) -> str:
    head, mark, rest = line.partition('replica="')
    return head + (f"replica=R{rest.partition(chr(34))[2]}" if mark else "")


def test_requests_have_ids_and_histories_stay_out_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ilrec.requests")
    logging.getLogger("ilrec.requests").propagate = True
    with serving({"a": StandIn()}) as client:
        given = client.post(URL, json=ASKED, headers={"x-request-id": "shop-7"})
        made = client.post(URL, json=ASKED, headers={"x-request-id": "new\tline"})
        crashed = client.post(URL, json={"history": ["B14"]}, headers={"x-request-id": "shop-8"})
    assert given.headers["x-request-id"] == "shop-7"
    assert len(made.headers["x-request-id"]) == 32
    assert "shop-8" in refused(crashed, 500)["detail"]
    first, second, third = (json.loads(record.getMessage()) for record in caplog.records)
    assert (first["request_id"], first["route"], first["status"], first["models"]) == ("shop-7", URL, 200, ["a"])
    assert "B10" not in json.dumps([first, second])
    assert (third["status"], caplog.records[2].levelname) == (500, "ERROR")
    assert "secret of the house" in third["traceback"]
    caplog.clear()
    with serving({"a": StandIn()}, log="histories") as client:
        client.post(URL, json=ASKED)
    assert json.loads(caplog.records[0].getMessage())["histories"] == [["B10"]]
    caplog.clear()
    with serving({"a": StandIn(), "b": StandIn()}) as client:
        client.post(f"{URL}/batch", json={"requests": [ASKED | {"model": name} for name in ("b", "a", "b")]})
    logged = json.loads(caplog.records[0].getMessage())
    assert (logged["models"], logged["requests"]) == (["b", "a"], 3)


def test_what_was_served_is_written_down_if_asked(tmp_path: Path) -> None:
    with serving({"a": StandIn()}, feedback_log=str(tmp_path / "served")) as client:
        client.post(URL, json=ASKED, headers={"x-request-id": "shop-7"})
        client.post(f"{URL}/batch", json={"requests": [ASKED, {"history": []}]})
        client.post(URL, json={})
    [file] = (tmp_path / "served").iterdir()
    first, second, third = (json.loads(line) for line in file.read_text().splitlines())
    assert (first["request_id"], first["model"], first["items"], first["fallback"]) == ("shop-7", "a", ["B09"], False)
    assert first["model_version"] == 7
    assert second["request_id"] == third["request_id"]
    assert third["fallback"] is True


# ---- Bundles ---------------------------------------------------------------------------------------------------------


def test_weights_are_served_in_the_precision_and_histories_kept_in_the_memory_that_are_asked_for(
    tiny_bundle: Path,
) -> None:
    models = Models(ServingConfig(precision="bfloat16", history_cache_bytes=10_000_000), Metrics())
    asyncio.run(models.swap({"half": str(tiny_bundle)}))
    served = models.get("half")
    assert served is not None
    recommender = served.recommender
    assert isinstance(recommender, Recommender)
    assert recommender.backbone.dtype == torch.bfloat16
    recommender.recommend([[3, 50, 7]], 5)
    assert recommender.prefixes.bytes > 0
    with pytest.raises(ValidationError, match="history_cache_bytes"):
        ServingConfig(history_cache_bytes=-1)


def test_bundles_replace_each_other_whole_or_not_at_all(tiny_bundle: Path, tmp_path: Path) -> None:
    wrong = shutil.copytree(tiny_bundle, tmp_path / "wrong")
    manifest = json.loads((wrong / MANIFEST).read_text())
    manifest["golden"]["scores"][0] -= 1
    (wrong / MANIFEST).write_text(json.dumps(manifest))
    models = Models(ServingConfig(), Metrics())

    def names() -> list[str]:
        return [served.name for served in models.served]

    with pytest.raises(RuntimeError, match="no model is loaded"):
        models.check()
    with pytest.raises(UserError, match="golden request"):
        asyncio.run(models.swap({"wrong": str(wrong)}))
    assert names() == []
    asyncio.run(models.swap({"first": str(tiny_bundle)}))
    models.check()
    assert (names(), models.failed) == (["first"], None)
    kept = models.get("first")
    for bundles, says in [
        ({"first": str(tiny_bundle), "wrong": str(wrong)}, "golden request"),
        ({"absent": str(tmp_path / "absent")}, "absent: no bundle"),
    ]:
        asyncio.run(models.swap(bundles))
        assert says in str(models.failed)
        assert models.served == [kept]
    asyncio.run(models.swap({"second": str(tiny_bundle)}))
    assert (names(), models.failed) == (["second"], None)


def test_adapters_are_served_over_one_base_that_a_swap_keeps_or_frees(tiny_bundle: Path, tmp_path: Path) -> None:
    adapters = [str(adapted_bundle(tiny_bundle, tmp_path / f"adapter-{seed}", seed)) for seed in range(3)]
    merge_adapter(adapters[0], tmp_path / "merged")
    models = Models(ServingConfig(), Metrics())

    def weights(name: str) -> set[int]:
        served = models.get(name)
        assert served is not None
        assert isinstance(served.recommender, Recommender)
        return {each.data_ptr() for each in served.recommender.backbone.model.parameters()}

    bundles = {"first": adapters[0], "second": adapters[1], "plain": str(tiny_bundle)}
    asyncio.run(models.swap(bundles | {"merged": str(tmp_path / "merged")}))
    base = weights("plain")
    assert base < weights("first")
    assert base < weights("second")
    assert not base & weights("merged")
    with TestClient(create_api(models)) as client:
        body = {"history": ["i3", "i50"], "k": 5}
        for name, bundle in bundles.items():
            [expected] = Recommender.load(bundle).recommend([[3, 50]], 5, [[3, 50]])
            found = client.post(URL, json=body | {"model": name}).json()["items"]
            assert [item["score"] for item in found] == pytest.approx(expected.scores)

    old = models.get("first")
    assert old is not None
    freed = weakref.ref(old.recommender)
    del old
    asyncio.run(models.swap({"third": adapters[2]}))
    assert base < weights("third")
    assert freed() is None
    kept = weakref.ref(models._bases.load(str(tiny_bundle), None, "cpu", None).__dict__["shares_with"])
    assert kept() is not None
    asyncio.run(models.swap({"merged": str(tmp_path / "merged")}))
    assert kept() is None


def test_names_are_followed_and_versions_and_paths_are_not(tiny_bundle: Path, tmp_path: Path) -> None:
    shop, books = Model(tmp_path, "shop"), Model(tmp_path, "books")
    for name in ("shop", "shop", "shop", "books", "books"):
        add_version(tmp_path, name, tiny_bundle)
    first, second, wrong = shop.complete
    manifest = json.loads((wrong.bundle / MANIFEST).read_text())
    manifest["golden"]["scores"][0] -= 1
    (wrong.bundle / MANIFEST).write_text(json.dumps(manifest))
    models = Models(ServingConfig(storage=str(tmp_path), follow_seconds=0.02), Metrics())
    references = {"shop": "shop", "books": "books", "pinned": "shop@1", "path": str(first.bundle)}

    def versions() -> list[int | None]:
        return [served.version for served in models.served]

    def failures() -> str:
        return re.findall(r'ilrec_swaps_total{outcome="failed".*', models.metrics.exposition().decode())[0]

    async def until(holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not holds():
                await asyncio.sleep(0.02)

    async def main() -> None:
        await models.swap(references)
        assert versions() == [1, 1, 1, 1]
        books_served = models.get("books")
        following = asyncio.create_task(models.follow())
        shop.promote(second)
        await until(lambda: versions() == [2, 1, 1, 1])
        assert models.get("books") is books_served  # what did not change is not opened again

        shop.promote(wrong)
        await until(lambda: "golden request" in str(models.failed))
        tried = failures()
        await asyncio.sleep(0.5)
        assert failures() == tried  # once
        books.promote(books.complete[1])  # and does not hold up others
        await until(lambda: versions() == [2, 2, 1, 1])
        assert "golden request" in str(models.failed)
        shop.rollback()
        await until(lambda: models.failed is None)
        shop.rollback()
        await until(lambda: versions() == [1, 2, 1, 1])

        events = (shop.home / "model.json").read_text()
        (shop.home / "model.json").write_text("{")
        await until(lambda: "model.json: damaged" in str(models.failed))
        (shop.home / "model.json").write_text(events)
        await until(lambda: models.failed is None)

        await models.swap(references | {"more": "more"})  # there is no such model yet
        assert "more" in str(models.failed)
        assert versions() == [1, 2, 1, 1]
        add_version(tmp_path, "more", tiny_bundle)
        await until(lambda: versions() == [1, 2, 1, 1, 1])
        assert models.failed is None
        assert not following.done()
        following.cancel()

    asyncio.run(main())


def test_nobody_looks_where_names_are_not_to_be_followed(tiny_bundle: Path, tmp_path: Path) -> None:
    add_version(tmp_path, "shop", tiny_bundle)
    models = Models(ServingConfig(storage=str(tmp_path), follow_seconds=0), Metrics())
    asyncio.run(models.swap({"shop": "shop"}))
    asyncio.run(models.follow())


def test_until_there_is_a_model_nothing_is_ready() -> None:
    with serving({}) as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert "no model is loaded" in refused(client.get("/ready"), 503)["detail"]
        assert client.post(URL, json=ASKED).headers["retry-after"] == "5"
        assert client.get("/v1/models").json() == {"models": [], "failed": None}
    with serving({"a": StandIn()}) as client:
        assert client.get("/ready").json() == {"status": "ready", "models": ["a"], "swapped": True}

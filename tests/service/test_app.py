"""The endpoint on a real Ray Serve, and what keeps it from starting."""

from __future__ import annotations

import io
import json
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.load import Measured, Open, Plan, measure
from benchmarks.serving import soak
from recommender.bundle import MANIFEST, read_manifest
from recommender.errors import UserError
from recommender.recommender import Recommender
from service.app import (
    Arguments,
    Endpoint,
    UserConfig,
    _greeting,
    _named,
    _reason,
    _with_storage,
    application,
    build,
    run,
)
from service.config import ServingConfig
from tests.conftest import add_version

PATH = "/v1/recommendations"
SERVE_YAML = Path(__file__).parents[2] / "deploy" / "serve.yaml"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def post(url: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture(scope="module")
def storage(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions of the model `tiny`, the first of them promoted."""
    storage = tmp_path_factory.mktemp("models")
    for _ in range(2):
        add_version(storage, "tiny", tiny_bundle)
    return storage


@pytest.fixture(scope="module")
def url(ray_cluster: None, storage: Path) -> Iterator[str]:
    from ray import serve

    port = free_port()
    with redirect_stdout(io.StringIO()) as said:
        run(["tiny", "other=tiny@2"], ServingConfig(port=port, max_k=50, storage=str(storage)), blocking=False)
    assert said.getvalue() == ""  # whoever calls it knows, and may end it soon
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def test_models_are_served_by_name_and_version(url: str, tiny_bundle: Path) -> None:
    first, second = get(f"{url}/v1/models")["models"]
    assert [(each["name"], each["version"]) for each in (first, second)] == [("tiny", 1), ("other", 2)]
    assert first["checksum"] == read_manifest(tiny_bundle).checksum
    history = Recommender.load(tiny_bundle).catalogue.item_ids[:2]
    for name, version in (("tiny", 1), ("other", 2)):
        _, answer = post(f"{url}/v1/recommendations", {"history": history, "model": name})
        assert (answer["model"], answer["model_version"]) == (name, version)


def test_it_answers_as_the_recommender_does(url: str, tiny_bundle: Path) -> None:
    recommender = Recommender.load(tiny_bundle)
    catalogue = recommender.catalogue
    histories = [[item, (item * 3 + 1) % len(catalogue)] for item in range(8)]

    def ask(history: list[int]) -> tuple[int, dict[str, Any]]:
        body = {"history": [catalogue.item_ids[i] for i in history], "k": 1 + history[0], "exclude_seen": True}
        return post(f"{url}/v1/recommendations", body)

    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(ask, histories))
    for history, (status, answer) in zip(histories, answers, strict=True):
        expected = recommender.recommend([history], 1 + history[0], [history])[0]
        assert status == 200
        assert [item["item_id"] for item in answer["items"]] == [catalogue.item_ids[i] for i in expected.items]
        assert [item["title"] for item in answer["items"]] == [catalogue.titles[i] for i in expected.items]
        assert [item["score"] for item in answer["items"]] == pytest.approx(expected.scores, abs=1e-4)
        assert answer["exact"] == expected.exact
        assert answer["model"] == recommender.manifest.name
    items = list(range(len(catalogue)))[:100]
    ranked = post(f"{url}/v1/rank", {"history": [catalogue.item_ids[3]], "candidates": catalogue.item_ids[:100]})[1]
    [scores] = recommender.rank([[3]], [items])
    found = {item["item_id"]: item["score"] for item in ranked["items"]}
    assert [found[catalogue.item_ids[i]] for i in items] == pytest.approx(scores, abs=1e-4)


def test_request_ids_pass_the_proxy_once(url: str) -> None:
    request = urllib.request.Request(f"{url}/ready", headers={"X-Request-ID": "mine-1"})
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.headers.get_all("x-request-id") == ["mine-1"]


def test_bad_requests_are_refused_through_the_proxy(url: str, tiny_bundle: Path) -> None:
    known = Recommender.load(tiny_bundle).catalogue.item_ids[0]
    target = f"{url}/v1/recommendations"
    assert post(target, {"history": [known], "k": 51})[1]["errors"][0]["field"] == "k"
    assert post(target, {"history": ["?"]})[1]["errors"][0]["field"] == "history[0]"
    status, problem = post(target, {"history": ["x" * 100_000]})
    assert (status, problem["errors"][0]["field"]) == (413, "body")
    with urllib.request.urlopen(f"{url}/health") as response:
        assert json.load(response)["status"] == "ok"


def test_a_soak_watches_every_process_of_serve(url: str, tiny_bundle: Path) -> None:
    history = Recommender.load(tiny_bundle).catalogue.item_ids[:3]

    def ask(seconds: float) -> Measured:
        port, bodies = int(url.rpartition(":")[2]), [json.dumps({"history": history})]
        loop = Open(rate=20)
        return measure(
            Plan(host="127.0.0.1", port=port, path=PATH, bodies=bodies, loop=loop, warm_up=0, seconds=seconds)
        )

    minutes, *_, refused, endpoint, proxy, controller = soak(ask, minutes=0.05).columns
    headers = [column.header for column in (endpoint, proxy, controller)]
    assert headers == ["Endpoint MiB", "ProxyActor MiB", "ServeController MiB"]
    assert list(minutes.cells) == ["warm-up", "1", "growth after warm-up"]
    assert list(refused.cells) == ["0", "0", ""]
    for column in (endpoint, proxy, controller):
        before, after, growth = column.cells
        assert float(after) / float(before) - 1 == pytest.approx(float(growth.rstrip("%")) / 100, abs=0.002)


def test_a_second_serve_on_the_cluster_is_refused(url: str, tiny_bundle: Path) -> None:
    with pytest.raises(UserError, match="already"):
        run([tiny_bundle], ServingConfig(port=free_port()), blocking=False)
    with urllib.request.urlopen(f"{url}/health") as response:  # and does the first no harm
        assert json.load(response)["status"] == "ok"


def deploy(models: dict[str, str], serving: dict[str, Any] | None = None) -> None:
    """What `serve deploy` does with deploy/serve.yaml, once Ray's dashboard has handed it on."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    values = yaml.safe_load(SERVE_YAML.read_text())
    values["applications"][0]["deployments"][0]["user_config"]["models"] = models
    values["applications"][0]["name"] = "default"
    if serving is not None:
        values["applications"][0]["args"]["serving"] = serving
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(values))


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def get(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=60) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def test_bundles_that_cannot_be_served_are_refused_before_serve_starts(
    tmp_path: Path, tiny_bundle: Path, storage: Path
) -> None:
    with pytest.raises(UserError, match="nothing: no bundle"):
        run([tmp_path / "nothing"], ServingConfig(), blocking=False)
    with pytest.raises(UserError, match=r"no model of this name in .*there are: tiny"):
        run(["tinny"], ServingConfig(storage=str(storage)), blocking=False)
    with pytest.raises(UserError, match="there is no such version; there are tiny@1, tiny@2"):
        run(["tiny@3"], ServingConfig(storage=str(storage)), blocking=False)
    with pytest.raises(UserError, match=r"both are called tiny; .*: ilrec serve tiny other=tiny@2"):
        run(["tiny", "tiny@2"], ServingConfig(storage=str(storage)), blocking=False)
    damaged = shutil.copytree(tiny_bundle, tmp_path / "damaged")
    with (damaged / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"model\.safetensors: differs from its checksum"):
        run([tiny_bundle, f"new={damaged}"], ServingConfig(), blocking=False)
    (damaged / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="damaged"):
        run([damaged], ServingConfig(), blocking=False)
    with pytest.raises(UserError, match=r"token_file: .*nowhere cannot be read"):
        run([tiny_bundle], ServingConfig(token_file=str(tmp_path / "nowhere")), blocking=False)


def test_only_bare_names_are_followed(storage: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ILREC_STORAGE", str(storage))
    config = _with_storage(ServingConfig())
    models = _named(["tiny", "old=tiny@1", "new=tiny@latest", f"path={tiny_bundle}"], config)
    old, new = (str(storage / "tiny" / number / "bundle") for number in ("1", "2"))
    assert models == {"tiny": "tiny", "old": old, "new": new, "path": str(tiny_bundle)}
    monkeypatch.chdir(storage)
    assert ServingConfig(storage="here").storage == str(storage / "here")
    greeting = _greeting(config, models)
    assert f"ready: http://127.0.0.1:{config.port} " in greeting
    assert "Ctrl-C" in greeting
    assert f"old  ({old})" in greeting


def test_what_a_replica_raised_is_reported() -> None:
    user = "failed 3 times. Error:\nTraceback:\n  File: x\nrecommender.errors.UserError: a/b: too long\nsay less\n"
    assert _reason(user, "a/b") == "a/b: too long\nsay less"
    other = "failed 3 times. Error:\nRuntimeError: Traceback\n  File x, line 1\nsafetensors.SafetensorError: header\n"
    assert _reason(other, "a/b") == "a/b: cannot be served: safetensors.SafetensorError: header"


def test_what_serve_itself_refuses_says_when_to_come_back() -> None:
    deployment = application(ServingConfig(), None)._bound_deployment
    assert deployment.backpressure_config.status_code == 503
    assert deployment.backpressure_config.retry_after_s == 1


def test_the_serve_config_file_fits() -> None:
    from ray.serve.schema import ServeDeploySchema

    deployed = ServeDeploySchema.model_validate(yaml.safe_load(SERVE_YAML.read_text()))
    [application] = deployed.applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    Arguments.model_validate(application.args)
    [deployment] = application.deployments
    assert deployment.name == Endpoint.__name__
    UserConfig.model_validate(deployment.user_config)

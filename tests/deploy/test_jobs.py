"""Jobs on a Ray cluster of their own, with a token, as a person submits, follows and stops them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import client, jobs
from recommender.errors import UserError
from trainer.cluster import check_address
from trainer.experiment import Experiment, load_experiment, read_values

ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef0123456789abcdef"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(true: Callable[[], Any], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.3)


@dataclass
class Cluster:
    """A head with two CPUs, spoken to from other processes only: this one may hold a Ray of its own."""

    address: str
    client: str
    environment: dict[str, str]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "ilrec", *arguments],
            cwd=ROOT,
            env=self.environment | {"RAY_API_SERVER_ADDRESS": self.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background lacks
        )

    def ilrec(self, *arguments: str, status: int = 0) -> str:
        """Its output; asserts the status and that there is no traceback."""
        process = self.start(*arguments)
        text, _ = process.communicate(timeout=180)
        assert process.returncode == status, text
        assert "Traceback" not in text
        return text

    def actors(self, name: str, state: str) -> list[dict[str, Any]]:
        request = urllib.request.Request(
            f"{self.address}/api/v0/actors?detail=1", headers={"Authorization": f"Bearer {TOKEN}"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            found = json.load(response)["data"]["result"]["result"]
        return [actor for actor in found if (actor["class_name"], actor["state"]) == (name, state)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    directory = tempfile.mkdtemp(prefix="ray-")  # pytest's own are too long for Ray's sockets
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": directory,
        "COLUMNS": "120",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    }
    port = free_port()
    ports = {"port": 0, "dashboard-port": port, "dashboard-agent-listen-port": 0, "ray-client-server-port": free_port()}
    command = ["ray", "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={directory}/r"]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"]
    with open(f"{directory}/head.log", "w") as log:
        head = subprocess.Popen(
            [*command, *(f"--{name}={number}" for name, number in ports.items())],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        until(lambda: head.poll() is not None or "Ray runtime started" in Path(log.name).read_text())
        assert head.poll() is None, Path(log.name).read_text()
        over_client = f"ray://127.0.0.1:{ports['ray-client-server-port']}"
        yield Cluster(f"http://127.0.0.1:{port}", over_client, environment)
    finally:
        head.terminate()
        try:
            head.wait(10)
        except subprocess.TimeoutExpired:  # Ray Client's server looks up every 30 s only
            os.killpg(head.pid, signal.SIGKILL)
            head.wait(10)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def config(tiny_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that would go on for long, in epochs of a second. It learns nothing, so that patience can end it."""
    directory = tmp_path_factory.mktemp("jobs")
    long = {"epochs": 1000, "patience": 1000, "batch_tokens": 700, "learning_rate": 1e-9}
    values = tiny_experiment.model_dump(mode="json", include={"name", "world", "prompt", "backbone", "evaluation"})
    values |= {"objective": {"kind": "msl"}, "training": long, "cluster": {"workers": 2, "storage": str(directory)}}
    path = directory / "my.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_job_is_the_command_run_elsewhere(cluster: Cluster, config: Path) -> None:
    text = cluster.ilrec("submit", "prepare", str(config), "--set", "name=other")
    [job] = re.findall(r"^submitted: (other-prepare-\w+)$", text, re.MULTILINE)
    assert "200 items, 60 users" in text
    assert f"{job}: SUCCEEDED" in text
    assert len(list(config.parent.glob("parts/datasets/*/stats.json"))) == 1
    assert re.search(rf"{job} .* SUCCEEDED", cluster.ilrec("jobs", "list", "--address", cluster.address))


def test_a_failed_job_says_why_and_has_its_status(cluster: Cluster, config: Path) -> None:
    text = cluster.ilrec("submit", "evaluate", str(config), "--", "--split", "validation", status=2)
    assert "tiny: no version in" in text
    assert re.search(r"^tiny-evaluate-\w+: FAILED$", text, re.MULTILINE)


def test_a_training_is_stopped_and_goes_on(cluster: Cluster, config: Path) -> None:
    run = config.parent / "tiny" / "1"
    follower = cluster.start("submit", "train", str(config))
    until(lambda: follower.poll() is not None or len(list((run / "ray").glob("step-*/state.json"))) > 1)
    follower.send_signal(signal.SIGINT)
    text, _ = follower.communicate(timeout=60)
    assert follower.returncode == 130, text
    [job] = re.findall(r"^submitted: (.*)$", text, re.MULTILINE)
    assert f"{job} goes on. Follow it: ilrec jobs logs {job} --follow" in text
    assert "RUNNING" in cluster.ilrec("jobs", "status", job)
    workers = cluster.actors("RayTrainWorker", "ALIVE")
    assert len(workers) == 2

    assert f"{job}: STOPPED" in cluster.ilrec("jobs", "stop", job)
    assert "has ended already: STOPPED" in cluster.ilrec("jobs", "stop", job)
    until(lambda: not any(Path(f"/proc/{worker['pid']}").exists() for worker in workers), 20)
    assert not cluster.actors("RayTrainWorker", "ALIVE")
    log = cluster.ilrec("jobs", "logs", job)
    assert "SIGTERM received" not in log  # an abort of Ray, with its stack

    text = cluster.ilrec("submit", "train", str(config), "--set", "training.patience=1")
    assert "resumed at step " in text
    assert (run / "bundle" / "recommender.json").exists()


def test_ray_client_runs_the_command_elsewhere(cluster: Cluster, config: Path) -> None:
    text = cluster.ilrec("submit", "prepare", str(config), "--address", cluster.client, "--set", "name=third")
    assert "60 users, 200 items" in text
    assert len(list(config.parent.glob("parts/datasets/*/stats.json"))) == 1  # the same data
    text = cluster.ilrec("submit", "evaluate", str(config), "--address", cluster.client, "--set", "name=4th", status=2)
    assert "4th: no version in" in text


def test_over_ray_client_ctrl_c_ends_the_training(cluster: Cluster, config: Path) -> None:
    run = config.parent / "fifth" / "1"
    follower = cluster.start("submit", "train", str(config), "--address", cluster.client, "--set", "name=fifth")
    until(lambda: follower.poll() is not None or len(list((run / "ray").glob("step-*/state.json"))) > 1)
    assert follower.poll() is None
    workers = cluster.actors("RayTrainWorker", "ALIVE")
    assert len(workers) == 2
    follower.send_signal(signal.SIGINT)
    text, _ = follower.communicate(timeout=60)
    assert follower.returncode == 130, text
    assert "Traceback" not in text
    assert "epoch 1/1000" in text
    until(lambda: not any(Path(f"/proc/{worker['pid']}").exists() for worker in workers), 20)
    assert len(list((run / "ray").glob("step-*/state.json"))) > 1


def test_what_cannot_run_is_refused_before_it_is_sent(cluster: Cluster, config: Path) -> None:
    text = cluster.ilrec("submit", "train", str(config), "--set", "cluster.workers=9", status=2)
    assert "9 workers x 1 CPU need 9, the Ray cluster has 2" in text
    assert "submitted" not in text
    assert "No such option: --frsh" in cluster.ilrec("submit", "train", str(config), "--", "--frsh", status=2)


def test_a_job_or_token_that_is_not_known(cluster: Cluster) -> None:
    for command in (["logs", "--follow"], ["stop"]):
        assert "Job nowhere does not exist" in cluster.ilrec("jobs", *command, "nowhere", status=2)
    stranger = Cluster(cluster.address, cluster.client, cluster.environment | {"RAY_AUTH_TOKEN": "f" * 32})
    text = stranger.ilrec("jobs", "list", status=2)
    assert "Invalid authentication token" in text
    assert TOKEN not in text
    nobody = Cluster(cluster.address, cluster.client, cluster.environment | {"RAY_AUTH_MODE": "disabled"})
    assert "Set RAY_AUTH_MODE=token" in nobody.ilrec("jobs", "list", status=2)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("head:8265", "http://<head>:8265"),
        ("ray://head:10001", "http://<head>:8265"),
        ("http://", "http://<head>:8265"),
        ("http://nowhere.invalid:8265", "no connection"),
        ("http://127.0.0.1:99999", "no connection"),
    ],
)
def test_an_address_without_a_job_server(address: str, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"--address {address}: ")) as caught:
        jobs.connect(address)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("address", "says"), [("ray://", "ray://<head>:10001"), ("ray://nowhere.invalid:10001", "no connection")]
)
def test_an_address_without_a_ray_client_server(address: str, says: str, tiny_experiment: Experiment) -> None:
    with pytest.raises(UserError, match=re.escape(f"--address {address}: ")) as caught:
        client.run(address, "train", tiny_experiment, {}, [], None, print)
    assert says in str(caught.value)


def test_ray_client_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(UserError, match="ilrec submit"):
        check_address()


def test_paths_of_this_machine_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama").mkdir()
    path = tmp_path / "my.yaml"
    path.write_text(
        "name: my\n"
        "data: {interactions: s3://bucket/clicks.parquet, items: data/items.csv}\n"
        "backbone: {kind: pretrained, path: llama}\n"
        "init_from: ~/bundle\n"
        "collaborative: {kind: bundle, path: /mnt/sasrec/bundle}\n"
    )
    with pytest.raises(UserError) as caught:
        jobs.check_paths(read_values(path), "runs")
    named = re.findall(r"^  (\S+): ", str(caught.value), re.MULTILINE)
    assert named == ["cluster.storage", "data.items", "backbone.path", "init_from"]
    hub = ["backbone.path=meta-llama/Llama-3.2-1B", "init_from=/mnt/b", "data.items=/mnt/items.csv"]
    jobs.check_paths(read_values(path, hub), "/mnt/runs")


def test_what_travels_is_what_is_imported(tmp_path: Path) -> None:
    jobs._copy_code(None, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"ilrec.py", "recommender", "trainer", "service", "deploy"}
    assert not {path.name for path in tmp_path.iterdir()} & {"tests", "benchmarks", "runs", ".git", ".venv", "docs"}
    assert not list(tmp_path.rglob("__pycache__"))
    assert 0 < jobs._checked_size(tmp_path) < 5 * 2**20
    with (tmp_path / "trainer" / "weights.bin").open("wb") as file:
        file.truncate(200 * 2**20)
    with pytest.raises(UserError, match=r"100 are allowed; the largest file is trainer/weights\.bin"):
        jobs._checked_size(tmp_path)


def test_a_wheel_travels_instead(tmp_path: Path) -> None:
    wheel = tmp_path / "ilrec-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("ilrec.py", "print('from the wheel')")
    jobs._copy_code(wheel, tmp_path / "out")
    assert "from the wheel" in (tmp_path / "out" / "ilrec.py").read_text()
    wheel.write_text("no archive")
    with pytest.raises(UserError, match="no wheel"):
        jobs._copy_code(wheel, tmp_path / "out")


def test_a_config_that_the_wheel_cannot_read_is_refused(tmp_path: Path, tiny_experiment: Experiment) -> None:
    """A wheel of an older version, without a field of today's."""
    wheel = tmp_path / "ilrec-0.0.9-py3-none-any.whl"
    (tmp_path / "code").mkdir()
    jobs._copy_code(None, tmp_path / "code")
    config = tmp_path / "code" / "trainer" / "config.py"
    assert "checkpoint_every" in config.read_text()
    config.write_text(config.read_text().replace("checkpoint_every", "save_every"))
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in (tmp_path / "code").rglob("*.py"):
            archive.write(path, path.relative_to(tmp_path / "code"))
    values = {"name": "my", "world": {}, "cluster": {"storage": "/mnt/runs"}}
    with jobs.packed(load(values, tmp_path), values, wheel, print):
        pass
    values["training"] = {"checkpoint_every": 2}
    with (
        pytest.raises(UserError, match=r"0\.0\.9.*cannot read this config(.|\n)*training\.checkpoint_every"),
        jobs.packed(load(values, tmp_path), values, wheel, print),
    ):
        pass


def load(values: dict[str, Any], directory: Path) -> Experiment:
    path = directory / "my.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_experiment(path)

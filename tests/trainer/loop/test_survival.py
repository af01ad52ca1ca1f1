"""A run on a cluster of several nodes, to which all that can happens: it ends where an undisturbed one does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.chaos import Job, Kill, experiment, kill
from benchmarks.local_cluster import LocalCluster
from trainer.loop.storage import drop_damaged

STEPS = 24  # four epochs of six


def small(name: str, storage: Path) -> dict[str, Any]:
    values = experiment(name, storage)
    values["training"]["epochs"] = 4
    return values


def weights(job: Job) -> dict[str, Tensor]:
    """Weights and moments after the last step."""
    found: dict[str, Tensor] = {}
    for shard in (job.run / "ray" / f"step-{STEPS:08d}").glob("*.safetensors"):
        found.update(load_file(shard))
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Three nodes of one worker each, of which a run of two workers leaves one to spare."""
    with LocalCluster(3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def alone(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Job:
    directory = tmp_path_factory.mktemp("alone")
    job = Job(cluster, small("alone", directory / "runs"), directory)
    job.finish()
    return job


@pytest.fixture(scope="module")
def disk() -> Iterator[Path]:
    """A small one of its own, where this user may mount one; otherwise a directory."""
    with tempfile.TemporaryDirectory() as directory:
        command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", directory]
        mounted = not subprocess.run(command, stderr=subprocess.DEVNULL).returncode
        yield Path(directory)
        if mounted:
            subprocess.run(["umount", "--lazy", directory], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all the room there is."""
    path = disk / "full"
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))
    return path


def damage_newest(job: Job) -> str:
    """Turn bytes in the midst of a file of the latest checkpoint over; returns what is said of it."""
    listing = job.run / "ray" / "checkpoint_manager_snapshot.json"
    newest = json.loads(listing.read_text())["latest_checkpoint_result"]["checkpoint_dir_name"]
    shard = job.run / "ray" / newest / "shard-00001-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    for at in range(len(content) // 2, len(content) // 2 + 200):
        content[at] ^= 0x40
    shard.write_bytes(content)
    return f"{shard.parent} is damaged and not used: {shard.name}: its contents differ from its checksum"


@pytest.fixture(scope="module")
def disturbed(cluster: LocalCluster, alone: Job, disk: Path) -> tuple[Job, list[Kill], str]:
    """A worker is killed, a node is taken after a notice, another without, then the driver is killed, whose newest
    checkpoint is damaged, then the disk is full."""
    job = Job(cluster, small("disturbed", disk / "runs"), disk)
    kills = []
    for what, step in (("worker", 5), ("notice", 9), ("node", 13)):
        job.until_step(step)
        kills.append(kill(cluster, job, what, victim=1))
    job.until_step(17)
    job.driver.kill()
    job.driver.wait()
    cluster.wait_for_no_worker()
    warning, resumed = damage_newest(job), job.log.count("resumed at step")
    job.start()
    job.until(lambda: job.log.count("resumed at step") > resumed)
    if disk.is_mount():
        full = fill(disk)
        job.until(lambda: "cannot be saved, trying again" in job.log)
        full.unlink()
    job.finish()
    return job, kills, warning


def assert_same_outcome(job: Job, alone: Job) -> None:
    left, right = weights(job), weights(alone)
    assert left.keys() == right.keys()
    assert max((left[name] - right[name]).abs().max().item() for name in left) < 1e-5
    losses = [[epoch["loss"] for epoch in each.finish()] for each in (job, alone)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(losses[0]) == 4


def test_the_outcome_is_that_of_an_undisturbed_run(alone: Job, disturbed: tuple[Job, list[Kill], str]) -> None:
    assert_same_outcome(disturbed[0], alone)


def test_it_went_on_from_checkpoints(disturbed: tuple[Job, list[Kill], str]) -> None:
    job, kills, _ = disturbed
    assert job.log.count("resumed at step ") == 4
    assert all(each.lost < each.step for each in kills)


def test_after_a_notice_nothing_is_done_again(disturbed: tuple[Job, list[Kill], str]) -> None:
    job, kills, _ = disturbed
    assert [each.lost for each in kills if each.what == "notice"] == [0]
    assert "a node goes away; all is saved, going on without it" in job.output


def test_the_checkpoint_before_a_damaged_one_is_used(disturbed: tuple[Job, list[Kill], str]) -> None:
    job, _, warning = disturbed
    assert warning in job.output
    assert not drop_damaged(job.run / "ray", print)


def test_a_full_disk_is_waited_for(disk: Path, disturbed: tuple[Job, list[Kill], str]) -> None:
    if not disk.is_mount():
        pytest.skip("no file system of its own to fill up: mounting one is not allowed here")
    job, _, _ = disturbed
    assert "No space left on device" in job.log


@pytest.mark.skipif(
    "ILREC_FULL_PRODUCT" not in os.environ,
    reason="takes two minutes: Ray looks for room once a minute; ILREC_FULL_PRODUCT=1 runs it",
)
def test_an_elastic_run_goes_on_with_fewer_workers(cluster: LocalCluster, alone: Job, tmp_path: Path) -> None:
    values = small("elastic", tmp_path / "runs")
    values["cluster"] |= {"workers": 3, "min_workers": 2}
    job = Job(cluster, values, tmp_path)
    job.until_step(5)
    cluster.kill_node(2)  # there is no other
    job.finish()
    assert_same_outcome(job, alone)
    assert re.findall(r"steps an epoch on (\d) workers", job.log) == ["3", "2"]

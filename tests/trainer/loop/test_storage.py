"""Checkpoints that storage damaged, and the list that Ray Train keeps of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.train import CheckpointConfig
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext
from safetensors.torch import save_file

from recommender.errors import UserError
from trainer.loop.storage import SELECTION, drop_damaged

LISTING = "checkpoint_manager_snapshot.json"


def epochs(*scores: float) -> list[dict[str, float]]:
    """Epochs of four steps."""
    return [{"epoch": at + 1, "step": 4 * (at + 1), SELECTION: score} for at, score in enumerate(scores)]


def manager(checkpoints: Path) -> CheckpointManager:
    """What a job's controller makes of the directory."""
    return CheckpointManager(
        CheckpointConfig(num_to_keep=2, checkpoint_score_attribute=SELECTION),
        StorageContext(str(checkpoints.parent), checkpoints.name),
    )


def kept(checkpoints: Path) -> tuple[dict[str, float], str]:
    """The names and scores of the listed checkpoints, and the latest."""
    found = manager(checkpoints)
    scores = {Path(each.checkpoint.path).name: each.metrics[SELECTION] for each in found.best_checkpoint_results}
    latest: Any = found.latest_checkpoint_result
    return scores, latest and Path(latest.checkpoint.path).name


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Two epochs, of which the first is better, and two steps of the third."""
    directory = tmp_path / "ray"
    entries = []
    for step, history in ((4, epochs(0.3)), (8, epochs(0.3, 0.2)), (10, epochs(0.3, 0.2))):
        at = directory / f"step-{step:08d}"
        at.mkdir(parents=True)
        for rank in range(2):
            save_file({"weight/w": torch.zeros(100)}, at / f"shard-{rank:05d}-of-00002.safetensors")
        document = {"schema_version": 1, "workers": 2, "state": {"step": step, "epochs": history}}
        (at / "state.json").write_text(json.dumps(document))
        score = -1.0 if step == 10 else history[-1][SELECTION]
        entries.append({"checkpoint_dir_name": at.name, "metrics": {"step": step, SELECTION: score}})
    listing = {
        "checkpoint_results": [entries[2], entries[1], entries[0]],
        "checkpoint_report_indices": [2, 1, 0],
        "latest_checkpoint_result": entries[2],
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": 3,
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
    (directory / LISTING).write_text(json.dumps(listing))
    return directory


def test_good_checkpoints_are_left_alone(checkpoints: Path) -> None:
    before, said = (checkpoints / LISTING).read_bytes(), list[str]()
    assert not drop_damaged(checkpoints, said.append)
    assert (checkpoints / LISTING).read_bytes() == before
    assert kept(checkpoints)[1] == "step-00000010"
    assert not drop_damaged(checkpoints.parent / "new", said.append)
    assert not said


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("shard-00001-of-00002.safetensors", None),
        ("shard-00000-of-00002.safetensors", b""),
        ("shard-00001-of-00002.safetensors", bytes(472)),
        ("state.json", None),
        ("state.json", b""),
        ("state.json", b"[]"),
    ],
)
def test_the_one_before_a_damaged_one_becomes_the_latest(checkpoints: Path, file: str, content: bytes | None) -> None:
    path = checkpoints / "step-00000010" / file
    path.unlink() if content is None else path.write_bytes(content)
    said: list[str] = []
    assert drop_damaged(checkpoints, said.append)
    assert kept(checkpoints) == ({"step-00000008": 0.2, "step-00000004": 0.3}, "step-00000008")
    assert "step-00000010" in said[0]
    assert file in said[0]
    assert said[1:] == ["going on from step-00000008"]
    assert not drop_damaged(checkpoints, said.append)


def test_a_damaged_list_is_made_again(checkpoints: Path) -> None:
    before = kept(checkpoints)
    for content in (b"", b'{"checkpoint_results": [', b"{}"):
        (checkpoints / LISTING).write_bytes(content)
        said: list[str] = []
        assert drop_damaged(checkpoints, said.append)
        assert LISTING in said[0]
        assert kept(checkpoints) == before


def test_without_a_good_one_training_starts_over(checkpoints: Path) -> None:
    for state in checkpoints.glob("step-*/state.json"):
        state.unlink()
    said: list[str] = []
    assert drop_damaged(checkpoints, said.append)
    assert kept(checkpoints) == ({}, None)
    assert said[-1] == "no checkpoint is left: training starts over"


def test_storage_that_does_not_answer_is_no_damage(checkpoints: Path) -> None:
    before = (checkpoints / LISTING).read_bytes()
    shard = checkpoints / "step-00000010" / "shard-00000-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to(shard.name)  # opening it fails, and it is not missing
    with pytest.raises(UserError, match="Once the storage answers, the same command goes on"):
        drop_damaged(checkpoints, print)
    assert (checkpoints / LISTING).read_bytes() == before

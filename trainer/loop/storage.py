"""A run's checkpoints on storage that may fail: saved with patience, and listed without the damaged ones."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

from recommender.errors import UserError
from trainer.loop.checkpoint import STATE_FILE, shards
from trainer.loop.patience import patiently
from trainer.loop.tensors import check_tensors

SELECTION = "validation_NDCG@10"
COLLABORATIVE = "training.safetensors"  # a collaborative model's checkpoint: this and STATE_FILE


def report(directory: Path | None, name: str, state: dict[str, Any], say: Callable[[str], None]) -> None:
    """Report this rank's share of a checkpoint to Ray Train, with the metrics of `state`. Collective.

    Args:
        directory: whose files are copied to the storage; None where a rank has none.
        say: told when the storage fails, which is tried again for ten minutes: a full disk may be cleared. After that
            the error is Ray's, which restarts the workers.
    """
    checkpoint = None if directory is None else ray.train.Checkpoint.from_directory(str(directory))
    ray.train.report(
        reported(state),
        checkpoint=checkpoint,
        checkpoint_dir_name=name,
        checkpoint_upload_fn=partial(_upload, say=say),
    )


def _upload(checkpoint: Any, name: str, say: Callable[[str], None]) -> Any:
    storage = ray.train.get_context().get_storage()
    mine = [path.name for path in Path(checkpoint.path).iterdir()]
    there = storage.build_checkpoint_path_from_name(name)

    def undo() -> None:
        for file in mine:  # other ranks' files lie there as well
            with suppress(OSError):
                storage.storage_filesystem.delete_file(f"{there}/{file}")

    return patiently(lambda: storage.persist_current_checkpoint(checkpoint, name), undo, name, say)


def reported(state: dict[str, Any]) -> dict[str, Any]:
    """The metrics that a checkpoint is reported with: of the epoch that it ends and of those before, or, inside an
    epoch, such that it is only kept while it is the latest."""
    epochs = state["epochs"]
    if epochs and epochs[-1]["step"] == state["step"]:
        return {**epochs[-1], "history": json.dumps(epochs)}
    return {"epoch": len(epochs), "step": state["step"], SELECTION: -1.0}


def drop_damaged(checkpoints: Path, say: Callable[[str], None]) -> bool:
    """Take checkpoints that cannot be resumed out of Ray Train's list, so that the newest good one is the latest.

    The list itself is written again where it is damaged. No job of the run may be running. A damaged checkpoint stays
    where it is until training comes to the same step again.

    Args:
        checkpoints: Ray Train's directory of the run.
        say: warned of each, by the name of the file.

    Returns:
        Whether there was any.

    Raises:
        UserError: the storage cannot be read or written.
    """
    listing = checkpoints / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
    if not listing.exists():
        return False
    try:
        try:
            listed = json.loads(listing.read_bytes())
            found = [checkpoints / each["checkpoint_dir_name"] for each in listed["checkpoint_results"]]
            whole = True
        except (ValueError, KeyError, TypeError) as error:
            say(f"warning: {listing} is damaged ({error}) and made again from the checkpoints beside it")
            found = [path for path in checkpoints.iterdir() if path.is_dir()]
            whole = False
        states = []
        for directory in found:
            try:
                states.append((directory.name, _read(directory)))
            except (FileNotFoundError, ValueError) as error:
                say(f"warning: {directory} is damaged and not used: {error}")
        if whole and len(states) == len(found):
            return False
        say(f"going on from {max(states, key=_step)[0]}" if states else "no checkpoint is left: training starts over")
        aside = listing.with_name(f"{listing.name}.partial")
        aside.write_text(json.dumps(_listing(sorted(states, key=_step))))
        os.replace(aside, listing)
    except OSError as error:
        raise UserError(f"{checkpoints}: {error}. Once the storage answers, the same command goes on.") from error
    return True


def _read(directory: Path) -> dict[str, Any]:
    """The state of a checkpoint whose files are all there and whole.

    Raises:
        FileNotFoundError, ValueError: a file is missing, or damaged.
    """
    path = directory / STATE_FILE
    try:
        document = json.loads(path.read_bytes())
        if "epochs" in document:
            names, state = [COLLABORATIVE], document
        else:
            names, state = shards(document["workers"]), document["state"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name}: {error}") from None
    for name in names:
        check_tensors(directory / name)
    return state


def _step(entry: tuple[str, dict[str, Any]]) -> int:
    return int(entry[1]["step"])


def _listing(states: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """What Ray Train's checkpoint manager reads: checkpoints by rising score, and which one is the latest."""
    metrics = [reported(state) for _, state in states]
    entries = [{"checkpoint_dir_name": name, "metrics": of} for (name, _), of in zip(states, metrics, strict=True)]
    order = sorted(range(len(entries)), key=lambda at: (metrics[at][SELECTION], at))
    return {
        "ray_version": ray.__version__,
        "checkpoint_results": [entries[at] for at in order],
        "checkpoint_report_indices": order,
        "latest_checkpoint_result": entries[-1] if entries else None,
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(entries),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }

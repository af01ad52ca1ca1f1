"""A run's directory belongs to one experiment: what was trained there is never mixed with what another config means."""

from __future__ import annotations

import json
import shutil
from typing import Any

from recommender.errors import UserError
from trainer.experiment import Experiment

_FILE = "experiment.json"
_SECTIONS = ("identifier", "prompt", "backbone", "init_from", "objective", "training")
# How a run is carried out, not what comes out of it: these may change between an interruption and the resumption.
_FREE = ("zero_stage", "accumulation", "logits_memory_mb", "gradient_checkpointing", "checkpoint_every", "patience")


def claim(experiment: Experiment, data_fingerprint: str, fresh: bool) -> None:
    """Mark the run's directory as this experiment's, or find it marked so.

    Args:
        fresh: remove what an earlier run left (checkpoints, bundle, evaluation); prepared data are kept.

    Raises:
        UserError: another experiment was trained there; names the fields that differ.
    """
    directory = experiment.run_dir
    if fresh:
        for left in ("ray", "bundle", "evaluation"):
            shutil.rmtree(directory / left, ignore_errors=True)
        for left in (_FILE, "train.log", "training.json", "summary.json"):
            (directory / left).unlink(missing_ok=True)
    mine = _identity(experiment, data_fingerprint)
    path = directory / _FILE
    if path.exists() and (directory / "ray").exists():
        theirs = json.loads(path.read_text())
        changed = [
            f"{field}: {theirs.get(field)!r} → {mine.get(field)!r}"
            for field in sorted(mine.keys() | theirs.keys())
            if mine.get(field) != theirs.get(field)
        ]
        if changed:
            raise UserError(
                f"{directory} holds a run of another config:\n  "
                + "\n  ".join(changed)
                + "\nGive this one another name (--set name=…), or start over with --fresh."
            )
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(mine, indent=2))


def _identity(experiment: Experiment, data_fingerprint: str) -> dict[str, Any]:
    """What decides a run's outcome, flat: field → value."""
    sections = experiment.model_dump(mode="json", include=set(_SECTIONS))
    flat = {"data": data_fingerprint[:16]}
    for section, values in sections.items():
        if not isinstance(values, dict):
            flat[section] = values
            continue
        flat |= {f"{section}.{name}": value for name, value in values.items() if name not in _FREE}
    return flat

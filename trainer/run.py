"""A run's directory belongs to one experiment: what was trained there is never mixed with what another config means."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from objectives.config import needs_rewards
from recommender.bundle import read_manifest
from recommender.errors import UserError
from trainer.config import CollaborativeBundle, LanguageModelConfig, RewardConfig
from trainer.experiment import Experiment
from trainer.lock import LOCK, locked
from trainer.sweep_config import SweepConfig

SWEEP = "tune"  # the directory of a run that is a sweep
FAILURE = "failure.txt"  # beside the run's log: why training failed
CHECKPOINTS = "ray"  # of Ray Train, or of Ray Tune in a sweep's
IDENTITY = "experiment.json"
TRACKING = "tracking.json"  # the ids of the run at MLflow and Weights & Biases
_FINGERPRINT = "data fingerprint"
_SHARED = ("world", "data", "recommender", "evaluation")  # evaluation, as validation chooses the epoch
_LANGUAGE_MODEL = (*_SHARED, "identifier", "prompt", "backbone", "init_from", "objective", "training")
_COLLABORATIVE = _SHARED
# How a run is carried out, how long, and where its files lie: these may change before a resumption.
_FREE = {
    "training": (
        "zero_stage",
        "accumulation",
        "logits_memory_mb",
        "attention",
        "gradient_checkpointing",
        "checkpoint_every",
        "patience",
    ),
    "recommender": ("epochs", "patience"),
    "evaluation": ("cutoffs", "test_targets", "batch", "precision", "bootstrap"),
    "data": ("interactions", "items", "train", "validation", "test"),
}


@contextmanager
def alone(experiment: Experiment) -> Iterator[None]:
    """Keep other commands from writing into the run's directory meanwhile, on this machine or on one that shares it.

    Raises:
        UserError: another one is at it.
    """
    directory = experiment.run_dir
    directory.mkdir(parents=True, exist_ok=True)

    def refuse() -> None:
        raise UserError(
            f"{directory}: another command is training there; wait for its end, stop it, or give this run another "
            "name (--set name=…)"
        )

    with locked(directory / LOCK, refuse):
        yield


def check_claim(experiment: Experiment, data_fingerprint: str | None = None, sweep: SweepConfig | None = None) -> None:
    """Refuse a directory in which another experiment was trained.

    Args:
        data_fingerprint: of the prepared dataset; None where it is not known yet.
        sweep: of the directory, if it is a sweep's.

    Raises:
        UserError: names the fields that differ; or a sweep was run there.
    """
    directory = experiment.run_dir
    if (directory / SWEEP).exists():
        raise UserError(
            f"{directory} holds a sweep (`ilrec tune`), whose best trial is its bundle; give this run another name "
            "(--set name=…)"
        )
    if not (directory / IDENTITY).exists() or not (directory / CHECKPOINTS).exists():
        return
    mine, theirs = _identity(experiment, data_fingerprint, sweep), json.loads((directory / IDENTITY).read_text())
    if data_fingerprint is None:
        mine[_FINGERPRINT] = theirs.get(_FINGERPRINT)
    changed = [
        f"{field}: {theirs.get(field)!r} → {mine.get(field)!r}"
        for field in sorted(theirs)  # a field that is missing there came with a later release
        if mine.get(field) != theirs.get(field)
    ]
    if changed:
        raise UserError(
            f"{directory} holds a run of another config:\n  "
            + "\n  ".join(changed)
            + "\nGive this one another name (--set name=…), or start over with --fresh."
        )


def pruned(experiment: Experiment) -> Path | None:
    """The bundle of a finished run whose checkpoints were removed, so that there is nothing to go on from."""
    checkpoints, bundle = experiment.run_dir / CHECKPOINTS, experiment.run_dir / "bundle"
    return bundle if bundle.exists() and checkpoints.is_dir() and not any(checkpoints.iterdir()) else None


def claim(experiment: Experiment, data_fingerprint: str, fresh: bool, sweep: SweepConfig | None = None) -> None:
    """Mark the run's directory as this experiment's, or find it marked so.

    Args:
        fresh: remove what an earlier run left (checkpoints, bundle, evaluation); prepared data are kept.
        sweep: of the directory, if it is a sweep's.

    Raises:
        UserError: another experiment was trained there, or a sweep was run, whose best trial is the bundle.
    """
    directory = experiment.run_dir
    if fresh and not (directory / SWEEP).exists():
        for left in (CHECKPOINTS, "bundle", "evaluation", "tensorboard"):
            shutil.rmtree(directory / left, ignore_errors=True)
        for left in (IDENTITY, TRACKING, "train.log", FAILURE, "training.json", "summary.json", "report.html"):
            (directory / left).unlink(missing_ok=True)
    check_claim(experiment, data_fingerprint, sweep)
    directory.mkdir(parents=True, exist_ok=True)
    aside = directory / f"{IDENTITY}.partial"  # a full disk leaves the old one as it was
    aside.write_text(json.dumps(_identity(experiment, data_fingerprint, sweep), indent=2))
    os.replace(aside, directory / IDENTITY)


def _identity(experiment: Experiment, data_fingerprint: str | None, sweep: SweepConfig | None) -> dict[str, Any]:
    """What decides a run's outcome, flat: field → value. Where the data lie does not; what is in them does."""
    flat: dict[str, Any] = {_FINGERPRINT: data_fingerprint}
    language_model = isinstance(experiment.recommender, LanguageModelConfig)
    sections = set(_LANGUAGE_MODEL if language_model else _COLLABORATIVE)
    if language_model and needs_rewards(experiment.objective):
        flat["rewards"] = _rewards(experiment.collaborative)
    dumped = experiment.model_dump(mode="json", include=sections)
    if sweep is not None:
        dumped["sweep"] = sweep.model_dump(mode="json")
    for section, values in dumped.items():
        if isinstance(values, dict):
            free = _FREE.get(section, ())
            flat |= {f"{section}.{name}": value for name, value in values.items() if name not in free}
        else:
            flat[section] = values
    return flat


def _rewards(collaborative: RewardConfig | None) -> Any:
    """The model that rewards come from: its config, or the checksum of a bundle's weights, wherever that lies."""
    if isinstance(collaborative, CollaborativeBundle):
        return read_manifest(Path(collaborative.path)).checksums
    return None if collaborative is None else collaborative.model_dump(mode="json")

"""The runs of a storage directory: what each is, how far it got, what of it nobody needs. Nothing heavy is imported."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recommender.bundle import MANIFEST, read_manifest
from recommender.errors import UserError
from trainer.lock import LOCK, is_locked
from trainer.run import CHECKPOINTS, IDENTITY, SWEEP

_SELECTION = "validation_NDCG@10"
_COLLABORATIVE = "collaborative"  # under it lie the models that objectives take rewards from
_WRITTEN_ASIDE = ("bundle", "dataset", "items", "world")  # as .NAME-…, and then renamed
_AN_HOUR = 3600


@dataclass(frozen=True)
class Run:
    """A run's directory.

    Attributes:
        name: below the storage.
        kind: "language model", "collaborative" or "sweep"; None where nothing was trained yet.
        objective: of a language model; otherwise the kind of collaborative model.
        state: "prepared", "finished"; "training at step N" or "tuning" while a command is at it, otherwise "stopped at
            step N" or "stopped", and always so where the file system knows no locks.
        fields: what decides its outcome (`experiment.json`).
        validation: the best NDCG@10 so far.
        test: metrics on the test targets, by name; empty where it was not evaluated.
        changed: when something in the directory last was (seconds since the epoch).
    """

    directory: Path
    name: str
    kind: str | None
    objective: str | None
    state: str
    fields: dict[str, Any]
    validation: float | None
    test: dict[str, float]
    changed: float

    @property
    def checkpoints(self) -> Path:
        """Ray's directory."""
        return self.directory / (SWEEP if self.kind == "sweep" else "") / CHECKPOINTS

    @property
    def log(self) -> Path:
        """What its workers say."""
        return self.directory / ("tune/tune.log" if self.kind == "sweep" else "train.log")

    @property
    def per_target(self) -> Path:
        """A row a test target, if it was evaluated."""
        return self.directory / "evaluation" / "test.parquet"


def find_runs(storage: Path) -> tuple[list[Run], list[str]]:
    """The runs of a storage, by name, and why other directories are none.

    Raises:
        UserError: there is no such directory.
    """
    if not storage.is_dir():
        raise UserError(f"{storage}: no such directory; --storage is where runs live (cluster.storage, default: runs)")
    runs, notes = [], []
    shared = storage / _COLLABORATIVE
    places = [*storage.iterdir(), *(shared.iterdir() if shared.is_dir() else ())]
    for directory in sorted(path for path in places if path.is_dir() and not path.name.startswith(".")):
        if directory == shared:
            continue
        try:
            runs.append(read_run(directory, str(directory.relative_to(storage))))
        except UserError as error:
            notes.append(str(error))
    return runs, notes


def named_run(storage: Path, name: str) -> Run:
    """A run by its name in the storage, or by its path.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    directory = next((path for path in (storage / name, Path(name)) if path.is_dir()), None)
    if directory is None:
        known = ", ".join(run.name for run in find_runs(storage)[0]) or "none"
        raise UserError(f"{name}: no run of this name in {storage}; there are: {known}")
    return read_run(directory, name)


def read_run(directory: Path, name: str) -> Run:
    """What a directory says of its run.

    Raises:
        UserError: it holds no run, or a file of it cannot be read.
    """
    try:
        return _read_run(directory, name)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{directory}: left aside, a file of its run cannot be read ({error!r})") from None


def _read_run(directory: Path, name: str) -> Run:
    is_sweep = (directory / SWEEP).is_dir()
    fields: dict[str, Any] = _json((directory / SWEEP if is_sweep else directory) / IDENTITY) or {}
    manifest: dict[str, Any] | None = _json(directory / "bundle" / MANIFEST)
    if not fields and manifest is None and not (directory / "prepared").is_dir():
        raise UserError(f"{directory}: left aside, it holds no run")
    trained = fields.get("recommender.kind") or ((manifest or {}).get("recommender") or {}).get("kind")
    kind = None if trained is None else "language model" if trained == "language_model" else "collaborative"
    objective = fields.get("objective.kind") if kind == "language model" else trained
    history: list[dict[str, Any]] = _json(directory / "training.json") or []
    step, seen = (0, []) if is_sweep else _latest(directory / CHECKPOINTS)
    is_running = is_locked(directory / LOCK)
    if manifest is not None and history and step <= history[-1]["step"]:
        state = "finished"
    elif is_sweep:
        state = "tuning" if is_running else "stopped"
    else:
        state, history = f"{'training' if is_running else 'stopped'} at step {step}" if fields else "prepared", seen
    test = _json(directory / "evaluation" / "test.json")
    return Run(
        directory=directory,
        name=name,
        kind="sweep" if is_sweep else kind,
        objective=objective,
        state=state,
        fields=fields,
        validation=max((float(epoch[_SELECTION]) for epoch in history), default=None),
        test={metric: float(value) for metric, value in test["metrics"]["model"].items()} if test else {},
        changed=max(path.lstat().st_mtime for path in (directory, *directory.iterdir())),
    )


def _latest(checkpoints: Path) -> tuple[int, list[dict[str, Any]]]:
    """The optimiser step of the latest checkpoint, and the epochs until then."""
    found = sorted(path for path in checkpoints.glob("*-*/state.json"))
    if not found:
        return 0, []
    document = _json(found[-1])
    state = document.get("state", document)  # a language model's has more beside it
    return int(state["step"]), state["epochs"]


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The fields in which runs differ, each with its values; None where a run has no such field."""
    names = dict.fromkeys(field for run in runs for field in run.fields)
    values = {name: [run.fields.get(name) for run in runs] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def prunable(run: Run) -> Iterator[tuple[Path, str]]:
    """What can go: the checkpoints of a finished run, and what a write that was interrupted more than an hour ago left.
    Never a bundle, prepared data or an evaluation.

    Yields:
        A directory, and what it holds.

    Raises:
        UserError: checkpoints are still needed: the bundle is damaged, or the run was started again.
    """
    yield from _interrupted_writes(run)
    if run.state == "finished" and run.checkpoints.is_dir() and any(run.checkpoints.iterdir()):
        read_manifest(run.directory / "bundle")
        if is_locked(run.directory / LOCK):
            raise UserError(f"{run.directory}: a command is training there")
        if run.log.exists() and run.log.stat().st_mtime > (run.directory / "training.json").stat().st_mtime:
            raise UserError(f"{run.log} is newer than training.json, so it may be training")
        yield run.checkpoints, "checkpoints"


def _interrupted_writes(run: Run) -> Iterator[tuple[Path, str]]:
    for name in _WRITTEN_ASIDE:
        for place in (run.directory, run.directory / "prepared"):
            for path in sorted(place.glob(f".{name}-*")) if (place / name).exists() else ():
                if path.is_dir() and time.time() - path.stat().st_mtime > _AN_HOUR:
                    yield path, "left by an interrupted write"


def remove(directory: Path) -> None:
    """Remove a directory that `prunable` named. Of the checkpoints' an empty one stays, which marks the run's directory
    as taken."""
    if directory.name != CHECKPOINTS:
        shutil.rmtree(directory)
        return
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def size(directory: Path) -> int:
    """Bytes of all files in a directory."""
    total = 0
    for place, _, files in os.walk(directory):
        for file in files:
            with suppress(FileNotFoundError):  # a run that trains removes its old checkpoints
                total += os.lstat(os.path.join(place, file)).st_size
    return total


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

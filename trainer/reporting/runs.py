"""The runs of a storage: what each version is, how far it got, what of it can go. Nothing heavy is imported."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recommender.bundle import Manifest, peek_manifest, read_manifest
from recommender.errors import UserError
from recommender.files import read_json
from recommender.lock import LOCK, is_locked
from recommender.models import Model, Version, find_bundles
from trainer.evaluation.saved import latest
from trainer.parts import PARTS
from trainer.run import CHECKPOINTS, CONFIG, HISTORY, RECORD, SWEEP, is_earlier_release

_SELECTION = "validation_NDCG@10"
_SHARED = "collaborative"  # below it lie the models that objectives take rewards from
_AN_HOUR = 3600
_GOING = "-pruned"  # what is about to be removed is first given a name that ends so
_ASIDE = re.compile(r"\..+-[a-z0-9_]{8}")  # a directory as `recommender.files` writes one aside
_PARTIAL = re.compile(r"\..+\.partial-\d+")  # a file


@dataclass(frozen=True)
class Run:
    """A version of a model.

    Attributes:
        kind: "language model", "collaborative" or "sweep"; or the verb that made it from another one.
        objective: of a language model; otherwise the kind of collaborative model.
        state: "finished"; "never finished", of one that was made from another; "training at step N" or "tuning" while a
            command is at it, otherwise "stopped at step N" or "stopped", and always so where the file system knows no
            locks.
        fields: what decided its outcome.
        made_from: the version or bundle that it was made from without training, if it was.
        parts: of the storage that it was trained on.
        validation: the best NDCG@10 so far.
        test: metrics on the test targets, by name; empty where it was not evaluated.
        changed: when something in the directory last was (seconds since the epoch).
    """

    version: Version
    kind: str
    objective: str | None
    state: str
    fields: dict[str, Any]
    made_from: str
    parts: list[str]
    validation: float | None
    test: dict[str, float]
    changed: float

    @property
    def name(self) -> str:
        return str(self.version)

    @property
    def directory(self) -> Path:
        return self.version.directory

    @property
    def checkpoints(self) -> Path:
        """Ray's directory."""
        return self.directory / (SWEEP if self.kind == "sweep" else "") / CHECKPOINTS

    @property
    def per_target(self) -> Path | None:
        """A row a test target, if it was evaluated."""
        saved = latest(self.directory)
        return None if saved is None else saved.per_target


def find_runs(storage: Path) -> tuple[list[Run], list[str]]:
    """The runs of a storage, by name and number, and why other directories are none.

    Raises:
        UserError: there is no such directory.
    """
    runs, notes = [], []
    for model in find_homes(storage):
        if is_earlier_release(model.home):
            notes.append(f"{model.home}: a run of an earlier release; `ilrec runs convert` makes it version 1")
        elif not model.versions:
            notes.append(f"{model.home}: left aside, it holds no run")
        for version in model.versions:
            try:
                runs.append(read_run(version))
            except UserError as error:
                notes.append(str(error))
    return runs, notes


def find_homes(storage: Path) -> list[Model]:
    """What a storage holds besides parts, by name, whether or not it is a model.

    Raises:
        UserError: there is no such directory.
    """
    if not storage.is_dir():
        raise UserError(f"{storage}: no such directory; --storage is where runs live (cluster.storage, default: runs)")
    shared = storage / _SHARED
    places = [*storage.iterdir(), *(shared.iterdir() if shared.is_dir() else ())]
    return [
        Model(storage, str(path.relative_to(storage)))
        for path in sorted(places)
        if path.is_dir() and not path.name.startswith(".") and path not in (shared, storage / PARTS)
    ]


def named_run(storage: Path, name: str) -> Run:
    """A run by its name: "shop" is its latest version, "shop@2" that one.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    model, _, which = name.partition("@")
    versions = Model(storage, model).versions
    found = [version for version in versions if which in ("", "latest", str(version.number))]
    if not found:
        known = ", ".join(run.name for run in find_runs(storage)[0]) or "none"
        raise UserError(f"{name}: no run of this name in {storage}; there are: {known}")
    return read_run(found[-1])


def read_run(version: Version) -> Run:
    """What a directory says of its run.

    Raises:
        UserError: it holds no run, or a file of it cannot be read.
    """
    try:
        return _read_run(version)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{version.directory}: left aside, a file of its run cannot be read ({error!r})") from None


def _read_run(version: Version) -> Run:
    directory = version.directory
    recorded: dict[str, Any] | None = read_json(directory / RECORD)
    if recorded is None:
        raise UserError(f"{directory}: left aside, it holds no run")
    fields: dict[str, Any] = recorded["fields"]
    made_by = recorded["made_by"]
    if made_by in ("train", "tune"):
        of = fields.get("recommender.kind", "language_model")
        kind = "sweep" if made_by == "tune" else "language model" if of == "language_model" else "collaborative"
        objective = fields.get("objective.kind") if of == "language_model" else of
    else:
        kind, objective = f"{made_by} of {recorded['made_from']}", None
    history: list[dict[str, Any]] = read_json(directory / HISTORY) or []
    is_running = is_locked(version.directory.parent / LOCK)
    if version.is_complete:
        state = "finished"
    elif recorded.get("made_from"):
        state = "never finished"
    elif kind == "sweep":
        state = "tuning" if is_running else "stopped"
    else:
        step, history = _latest(directory / CHECKPOINTS)
        state = f"{'training' if is_running else 'stopped'} at step {step}"
    saved = latest(directory)
    return Run(
        version=version,
        kind=kind,
        objective=objective,
        state=state,
        fields=fields,
        made_from=str(recorded.get("made_from", "")),
        parts=recorded.get("parts", []),
        validation=max((float(epoch[_SELECTION]) for epoch in history), default=None),
        test={} if saved is None else saved.metrics,
        changed=max(path.lstat().st_mtime for path in (directory, *directory.iterdir())),
    )


def _latest(checkpoints: Path) -> tuple[int, list[dict[str, Any]]]:
    """The optimiser step of the latest checkpoint, and the epochs until then."""
    found = sorted(path for path in checkpoints.glob("*-*/state.json"))
    if not found:
        return 0, []
    document = read_json(found[-1])
    state = document.get("state", document)  # a language model's has more beside it
    return int(state["step"]), state["epochs"]


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The fields in which runs differ, each with its values; None where a run has no such field."""
    names = dict.fromkeys(field for run in runs for field in run.fields)
    values = {name: [run.fields.get(name) for run in runs] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


# -- What can go ------------------------------------------------------------------------------------------------------


def prunable(
    storage: Path, keep: int | None = None, parts: bool = False, idle: bool = True
) -> tuple[list[tuple[Path, str]], list[str]]:
    """What can go: checkpoints of finished versions, and what a write left that was interrupted an hour ago or more.

    Args:
        keep: also finished versions of a model but for so many of the latest, the promoted one, the one that a
            rollback would go to, and those that an adapter needs as its base or a run that is not finished starts from.
        parts: also worlds, datasets and spelled catalogues that no version that stays was trained on.
        idle: whether nobody is at work in the storage (`recommender.lock.unused`). Who is may need any version or part
            without having said so yet, so all of these stay.

    Returns:
        Directories and files, and what they hold; and notes on what stays although it might have gone.
    """
    runs, notes = find_runs(storage)
    homes = find_homes(storage)
    busy = {model.name for model in homes if is_locked(model.home / LOCK)}
    notes += [f"{name}: a command is training it, so all of it stays" for name in sorted(busy)]
    if not idle:
        notes.append(
            "a command is at work in this storage, so all versions and parts stay; prune again when it is done"
        )
    settled = [run for run in runs if run.version.name not in busy]
    old = set(_old_versions(settled, runs, storage, keep)) if keep is not None and idle else set()
    found: list[tuple[Path, str]] = []
    for model in homes:
        if model.name not in busy:
            found += _interrupted(model.home)
            for version in model.versions:
                found += _interrupted(version.directory)
                if idle and _was_never_begun(version):
                    found.append((version.directory, "a version that was never begun"))
    for run in settled:
        if run.version in old:
            found.append((run.directory, "an old version"))
        elif idle and run.made_from and not run.version.is_complete and _age(run.directory) > _AN_HOUR:
            found.append((run.directory, "left by an interrupted command"))
        elif run.state == "finished" and run.checkpoints.is_dir() and any(run.checkpoints.iterdir()):
            try:
                read_manifest(run.version.bundle)  # nothing but a good bundle makes up for checkpoints
            except UserError as error:
                notes.append(f"{run.name} keeps its checkpoints: {error}")
            else:
                found.append((run.checkpoints, "checkpoints of a finished run"))
    for kind in sorted((storage / PARTS).glob("*")):
        found += _interrupted(kind)
    if parts and idle:
        found += _unused_parts(storage, old, notes)
    mine = [(path, what) for path, what in found if _can_go(path)]
    notes += [f"{path}: is not yours to remove, or a link, so it stays" for path, _ in found if not _can_go(path)]
    return mine, notes


def _unused_parts(storage: Path, old: set[Version], notes: list[str]) -> Iterator[tuple[Path, str]]:
    used: set[str] = set()
    for version in [version for model in find_homes(storage) for version in model.versions if version not in old]:
        try:
            used.update((read_json(version.directory / RECORD) or {}).get("parts", []))
        except (OSError, ValueError, AttributeError) as error:
            notes.append(f"all parts stay: which of them {version} needs cannot be read ({error!r})")
            return
    for part in sorted((storage / PARTS).glob("*/[!.]*")):
        if str(part.relative_to(storage)) not in used and _age(part) > _AN_HOUR:
            yield part, "no version was trained on it"


def _old_versions(settled: Sequence[Run], runs: Sequence[Run], storage: Path, keep: int) -> Iterator[Version]:
    """Versions of settled models that nothing in the storage needs."""
    bases = [base for bundle in find_bundles(storage) if (base := _manifest(bundle).base)]
    unfinished = [run.fields for run in runs if not run.version.is_complete]
    starts = {fields.get("init_from") for fields in unfinished}
    rewards = [fields.get("rewards") for fields in unfinished]
    names = dict.fromkeys(run.version.name for run in settled if run.version.is_complete)
    complete = {run.version for run in settled if run.version.is_complete}
    for name in names:
        model = Model(storage, name)
        spared = {*model.complete[-keep:], model.promoted, model.before}
        for version in model.complete:
            manifest = _manifest(version.bundle)
            needed = manifest.weights in bases or manifest.checksum in starts or manifest.checksums in rewards
            if version in complete and version not in spared and manifest.checksums and not needed:
                yield version


def _manifest(bundle: Path) -> Manifest:
    """Without checksums where it cannot be read."""
    try:
        return peek_manifest(bundle)
    except UserError:
        return Manifest(name="")


def _was_never_begun(version: Version) -> bool:
    """Whether a command ended between the first file and the record of a version."""
    files = {path.name for path in version.directory.iterdir()}
    return all(name == CONFIG or _is_partial(name) for name in files)


def _interrupted(place: Path) -> Iterator[tuple[Path, str]]:
    """What was written aside, and never put into place; or put aside, and not removed to the end."""
    for path in sorted(place.glob(".*")) if place.is_dir() else ():
        if path.is_symlink():
            continue
        is_aside = _is_partial(path.name) if path.is_file() else _ASIDE.fullmatch(path.name) and not is_locked(path)
        if path.name.endswith(_GOING) or (is_aside and _age(path) > _AN_HOUR):
            yield path, "left by an interrupted command"


def _is_partial(name: str) -> bool:
    return _PARTIAL.fullmatch(name) is not None


def _can_go(path: Path) -> bool:
    """Whether this user may empty a directory and take it away, and it is one rather than a link to one elsewhere."""
    places = [path.parent, path] if path.is_dir() else [path.parent]
    return not path.is_symlink() and all(os.access(place, os.W_OK | os.X_OK) for place in places)


def _age(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def remove(path: Path) -> None:
    """Remove what `prunable` named. It is gone at once; an interrupted removal is ended by the next one."""
    if path.is_file():
        path.unlink()
        return
    aside = path if path.name.endswith(_GOING) else path.with_name(f".{path.name}{_GOING}")
    if aside != path:
        if aside.exists():
            shutil.rmtree(aside)
        os.rename(path, aside)
    shutil.rmtree(aside)


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    total = path.lstat().st_size if path.is_file() else 0
    for place, _, files in os.walk(path):
        for file in files:
            with suppress(FileNotFoundError):  # a run that trains removes its old checkpoints
                total += os.lstat(os.path.join(place, file)).st_size
    return total

"""The versions of a run: each belongs to one experiment on one state of the data, and is never trained as another.

<storage>/<name>/<number>/
    config.yaml                the experiment, written first
    version.json               what decides its outcome: with it the version is begun
    train.log, tensorboard/    of its training
    ray/                       checkpoints; `prune` removes them from finished versions
    training.json              the history of all epochs
    bundle/                    with it the version is finished: from here on it is the model's
    tune/, best.yaml           of a sweep
    evaluation/                one directory for each evaluation
    report.html                drawn from all of these
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from objectives.config import needs_rewards
from recommender.bundle import peek_manifest
from recommender.custom import source_of
from recommender.errors import UserError
from recommender.files import read_json, sha256, write_json, write_text
from recommender.lock import LOCK, in_use, locked
from recommender.models import Model, Version, find_bundle
from trainer.config import CollaborativeBundle, LanguageModelConfig, RewardConfig
from trainer.experiment import Experiment, Overrides, custom_classes, load_experiment
from trainer.parts import Prepared, Say
from trainer.sweep_config import SweepConfig

RECORD = "version.json"
CONFIG = "config.yaml"
LOG = "train.log"
HISTORY = "training.json"
FAILURE = "failure.txt"  # beside the log: why training failed
CHECKPOINTS = "ray"  # of Ray Train, or of Ray Tune in a sweep's
SWEEP = "tune"  # the directory of a version that is a sweep
TRACKING = "tracking.json"  # the ids of the run at MLflow and Weights & Biases
BEST = "best.yaml"

EARLIER = ("experiment.json", "prepared", CHECKPOINTS, SWEEP, "bundle")  # what releases before versions kept at home
_FINGERPRINT = "data fingerprint"
_SHARED = ("world", "data", "recommender", "evaluation")  # evaluation, as validation chooses the epoch
_LANGUAGE_MODEL = (*_SHARED, "identifier", "prompt", "backbone", "init_from", "objective", "training")
# How a run is carried out, and where its files lie: these may change before a resumption.
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
    "recommender": ("patience",),
    "evaluation": (
        "cutoffs",
        "test_targets",
        "batch",
        "precision",
        "bootstrap",
        "floors",
        "both_policies",
        "category",
    ),
    "data": ("interactions", "items", "train", "validation", "test"),
}
_SHOWN = 8  # fields that differ from the version before


@contextmanager
def alone(experiment: Experiment) -> Iterator[None]:
    """Keep other commands from training this model meanwhile, on this machine or on one that shares its directory.

    Raises:
        UserError: another one is at it, or a run of an earlier release lies there.
    """
    home = experiment.model.home
    refuse_earlier_release(home)
    home.mkdir(parents=True, exist_ok=True)

    def refuse() -> None:
        raise UserError(
            f"{home}: another command is training this model; wait for its end, stop it, or give this run another "
            "name (--set name=…)"
        )

    with in_use(experiment.storage), locked(home / LOCK, refuse):
        yield


def refuse_earlier_release(home: Path) -> None:
    """Releases before versions kept one run in `<storage>/<name>` itself.

    Raises:
        UserError: there is one; says how to convert it.
    """
    if is_earlier_release(home):
        raise UserError(
            f"{home} holds a run of an earlier release. `ilrec runs convert --storage {home.parent}` makes it version "
            "1 of the model and loses nothing; its bundle can also be opened by its path as it is"
        )


def is_earlier_release(home: Path) -> bool:
    """Whether a directory is the run of a release before versions."""
    return any((home / left).exists() for left in EARLIER)


def version_of(experiment: Experiment, data_fingerprint: str, sweep: SweepConfig | None = None) -> Version | None:
    """The latest version that was begun with the same config on the same data; None if there is none."""
    mine = identity(experiment, data_fingerprint, sweep)
    for version in reversed(experiment.model.versions):
        if (theirs := fields_of(version)) is not None and not _changed(theirs, mine):
            return version
    return None


def begin(
    experiment: Experiment,
    prepared: Prepared,
    sweep: SweepConfig | None = None,
    say: Say = print,
    model: Model | None = None,
) -> Version:
    """A new version for an experiment; what there was before stays as it is.

    Args:
        model: whose version it is, if not the experiment's.
    """
    model = model or experiment.model
    mine, before = identity(experiment, prepared.fingerprint, sweep), model.versions
    version = model.begin()
    parts = [_shown_part(part, experiment.storage) for part in prepared.parts]
    values = experiment.model_dump(mode="json")
    write_text(version.directory / CONFIG, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    record(version, "tune" if sweep else "train", mine, parts=parts)
    say(f"{version}: a new version, in {version.directory}")
    if before and (theirs := fields_of(before[-1])) is not None:
        changed = _changed(theirs, mine)
        for line in changed[:_SHOWN]:
            say(f"  since {before[-1]}: {line}")
        if len(changed) > _SHOWN:
            say(f"  and {len(changed) - _SHOWN} more; `ilrec runs compare {before[-1]} {version}` shows all")
    return version


def _shown_part(part: Path, storage: Path) -> str:
    """Relative to the storage, which may be moved, if it lies there."""
    return str(part.relative_to(storage) if part.is_relative_to(storage) else part)


def record(
    version: Version, made_by: str, fields: dict[str, Any], made_from: str = "", parts: Sequence[str] = ()
) -> None:
    """Write down what a version is. One without this record was never begun.

    Args:
        made_by: the verb.
        fields: what decides its outcome, where it is trained.
        made_from: the version or bundle that it is made from, where it is not.
        parts: of the storage that it is trained on.
    """
    described = {
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "made_by": made_by,
        "made_from": made_from,
        "fields": fields,
        "parts": list(parts),
    }
    write_json(version.directory / RECORD, described)


def fields_of(version: Version) -> dict[str, Any] | None:
    """What decided a version's outcome; None where that is not known, as of one that was not trained."""
    try:
        fields = (read_json(version.directory / RECORD) or {}).get("fields")
    except (ValueError, AttributeError):
        return None
    return fields if isinstance(fields, dict) and fields else None


def experiment_of(bundle: Path, overrides: Overrides = ()) -> Experiment:
    """The experiment that a version was trained as, or the one that it was made from was.

    Args:
        bundle: of a version.
        overrides: as `load_experiment` takes them.

    Raises:
        UserError: it is not known, as of a bundle that was copied out of its storage.
    """
    directory = _trained(bundle)
    if directory is None:
        raise UserError(
            f"{bundle}: nothing beside it tells which data it is of; give the experiment as well: "
            "ilrec evaluate my.yaml --model …"
        )
    experiment = load_experiment(directory / CONFIG, overrides)
    here = experiment.cluster.model_copy(update={"storage": str(directory.absolute().parents[1])})  # it may have moved
    return experiment.model_copy(update={"cluster": here})


def prepared_of(bundle: Path) -> Prepared:
    """The parts that a version was trained on, or the one that it was made from was.

    Args:
        bundle: of the version.

    Raises:
        UserError: they are not known, or not there any more.
    """
    directory = _trained(bundle) or bundle.parent
    recorded = read_json(directory / RECORD) or {}
    for place in directory.absolute().parents:
        found = {Path(part).parts[-2]: place / part for part in recorded.get("parts", [])}
        if "datasets" in found and found["datasets"].is_dir():
            return Prepared(found["datasets"], found.get("items"), found.get("worlds"))
    raise UserError(f"{bundle}: the data that it was trained on are not known here; prepare and train it again")


def _trained(bundle: Path) -> Path | None:
    """The directory of the version that was trained, of which others may have been made; None where it is not known."""
    directory = bundle.parent
    while not (directory / CONFIG).exists():
        made_from = str((read_json(directory / RECORD) or {}).get("made_from", ""))
        if not made_from:
            return None
        directory = find_bundle(made_from, directory.parents[1]).parent
    return directory


def identity(experiment: Experiment, data_fingerprint: str, sweep: SweepConfig | None = None) -> dict[str, Any]:
    """What decides a run's outcome, flat: field → value. Where files lie does not; what is in them does.

    Args:
        sweep: of the run, if it is a sweep.
    """
    flat: dict[str, Any] = {_FINGERPRINT: data_fingerprint}
    language_model = isinstance(experiment.recommender, LanguageModelConfig)
    sections = set(_LANGUAGE_MODEL if language_model else _SHARED)
    if language_model and needs_rewards(experiment.objective):
        flat["rewards"] = _rewards(experiment.collaborative)
    if language_model:
        flat |= {f"{field}.code": sha256(source_of(each, field)) for field, each in custom_classes(experiment)}
    dumped = experiment.model_dump(mode="json", include=sections)
    if experiment.init_from is not None and language_model:
        dumped["init_from"] = peek_manifest(Path(experiment.init_from)).checksum
    if sweep is not None:
        dumped["sweep"] = sweep.model_dump(mode="json")
    for section, values in dumped.items():
        if isinstance(values, dict):
            free = _FREE.get(section, ())
            flat |= {f"{section}.{name}": value for name, value in values.items() if name not in free}
        else:
            flat[section] = values
    return flat


def _changed(theirs: dict[str, Any], mine: dict[str, Any]) -> list[str]:
    """The fields that differ, with both values. One that is missing in theirs came with a later release."""
    same_kind = ("sweep.trials" in theirs) == ("sweep.trials" in mine)
    fields = sorted(theirs) if same_kind else sorted(theirs.keys() | mine.keys())
    return [
        f"{field}: {_short(theirs.get(field))} → {_short(mine.get(field))}"
        for field in fields
        if mine.get(field) != theirs.get(field)
    ]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


def _rewards(collaborative: RewardConfig | None) -> Any:
    """The model that rewards come from: its config, or the checksum of a bundle, wherever that lies."""
    if isinstance(collaborative, CollaborativeBundle):
        return peek_manifest(Path(collaborative.path)).checksums
    return None if collaborative is None else collaborative.model_dump(mode="json")

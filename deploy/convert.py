"""`ilrec runs convert`: runs of releases before versions become version 1 of their model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from recommender.errors import UserError
from recommender.files import read_json, write_text
from recommender.lock import LOCK, is_locked
from recommender.models import Model, Version
from trainer.evaluation.saved import EVALUATION, REPORT, TARGETS
from trainer.experiment import Experiment
from trainer.reporting.runs import find_homes
from trainer.run import CONFIG, EARLIER, RECORD, SWEEP, is_earlier_release, record

_IDENTITY = "experiment.json"  # what RECORD was
_DATASET = "prepared/dataset/dataset.json"


def convert(storage: Path, agreed: bool, confirm: Callable[[str], bool], say: Callable[[str], None]) -> None:
    """Move each run of an earlier release into version 1 of its name, once the user has seen which and agrees.

    Files are only renamed, one after the other: a conversion that is interrupted goes on when it is called again.
    """
    earlier = [model for model in find_homes(storage) if is_earlier_release(model.home)]
    for model in [model for model in earlier if is_locked(model.home / LOCK)]:
        say(f"note: {model.name}: a command is training it, so it stays as it is")
        earlier.remove(model)
    if not earlier:
        say(f"{storage}: nothing to convert")
        return
    for model in earlier:
        say(f"  {model.home} -> {model.home / '1'}")
    say(
        f"{len(earlier)} runs become version 1 of their model. All files are kept; prepared data go along but are not "
        "read any more: the next command prepares them again, for all runs together"
    )
    if not (agreed or confirm("Convert them?")):
        say("nothing was changed")
        return
    for model in earlier:
        _convert(model)
        say(f"{model.name}@1: {model.home / '1'}")


def _convert(model: Model) -> None:
    version = Version(model.storage, model.name, 1)
    version.directory.mkdir(exist_ok=True)
    if not (version.directory / RECORD).exists():
        sweep = (model.home / SWEEP).is_dir() or (version.directory / SWEEP).is_dir()
        places = [place / sub for place in (model.home, version.directory) for sub in ("", SWEEP)]
        fields: dict[str, Any] = next((found for place in places if (found := read_json(place / _IDENTITY))), {})
        _write_config(version, fields, next((found for place in places if (found := read_json(place / _DATASET))), {}))
        record(version, "tune" if sweep else "train", fields)
    for path in sorted(model.home.iterdir()):
        if not path.name.startswith(".") and not path.name.isdigit() and path.name not in ("model.json", *EARLIER):
            os.rename(path, version.directory / path.name)
    evaluation = version.directory / EVALUATION
    for report in sorted(evaluation.glob("*.json")):
        directory = evaluation / f"{report.stem}-converted"
        directory.mkdir(exist_ok=True)
        if (rows := report.with_suffix(".parquet")).exists():
            os.rename(rows, directory / TARGETS)
        os.rename(report, directory / REPORT)
    for name in EARLIER:  # last, as they tell that there is something to convert; and of them the bundle
        if (model.home / name).exists():
            os.rename(model.home / name, version.directory / name)


def _write_config(version: Version, fields: dict[str, Any], dataset: dict[str, Any]) -> None:
    """The experiment as far as it was kept, so that the version can be evaluated by its name; without one it is
    evaluated with `--model`.

    Args:
        fields: what decided the outcome, flat.
        dataset: what the prepared data say of themselves, the paths of their sources among it.
    """
    values: dict[str, Any] = {"name": version.name}
    for field, value in fields.items():
        section, _, name = field.partition(".")
        if name:
            values.setdefault(section, {})[name] = value
        elif field in Experiment.model_fields:
            values[field] = value
    if isinstance(fields.get("rewards"), dict) and "kind" in fields["rewards"]:
        values["collaborative"] = fields["rewards"]
    if values.get("world") is None and (data := dataset.get("config")):
        values["data"] = data
    if values.get("init_from"):  # which is converted as well
        start = Path(values["init_from"])
        if start.name == "bundle" and (version.storage / start.parent.name).is_dir():
            values["init_from"] = f"{start.parent.name}@1"
    try:
        experiment = Experiment.model_validate(values).model_dump(mode="json")
    except (ValidationError, UserError):
        return
    write_text(version.directory / CONFIG, yaml.safe_dump(experiment, sort_keys=False, allow_unicode=True))

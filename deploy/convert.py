"""`ilrec runs convert`: runs of releases before versions become version 1 of their model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recommender.files import read_json
from recommender.models import Model, Version
from trainer.evaluation.saved import EVALUATION, REPORT, TARGETS
from trainer.reporting.runs import find_homes
from trainer.run import RECORD, SWEEP, is_earlier_release, record

_IDENTITY = "experiment.json"  # what RECORD was


def convert(storage: Path, agreed: bool, confirm: Callable[[str], bool], say: Callable[[str], None]) -> None:
    """Move each run of an earlier release into version 1 of its name, once the user has seen which and agrees.

    Files are only renamed, one after the other: a conversion that is interrupted goes on when it is called again.
    """
    earlier = [model for model in find_homes(storage) if is_earlier_release(model.home)]
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
        record(version, "tune" if sweep else "train", fields)
    for path in sorted(model.home.iterdir()):
        if not path.name.startswith(".") and not path.name.isdigit() and path.name not in ("model.json", "bundle"):
            os.rename(path, version.directory / path.name)
    evaluation = version.directory / EVALUATION
    for report in sorted(evaluation.glob("*.json")):
        directory = evaluation / f"{report.stem}-converted"
        directory.mkdir(exist_ok=True)
        if (rows := report.with_suffix(".parquet")).exists():
            os.rename(rows, directory / TARGETS)
        os.rename(report, directory / REPORT)
    if (model.home / "bundle").exists():
        os.rename(model.home / "bundle", version.bundle)  # last: with it the version is finished

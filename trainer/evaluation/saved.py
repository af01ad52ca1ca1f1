"""Evaluations on disk: one directory for each, by its settings, in `evaluation/` beside the bundle.

<split>-<settings>/
    targets.parquet    a row a target: rank, list, history length, popularity
    report.json        metrics with intervals; written last, with it the evaluation is complete
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from recommender.errors import UserError
from recommender.files import read_json
from recommender.models import Version, find_version

EVALUATION = "evaluation"
REPORT = "report.json"
TARGETS = "targets.parquet"


@dataclass(frozen=True)
class Saved:
    """An evaluation's directory."""

    directory: Path

    @property
    def per_target(self) -> Path:
        """A row a target."""
        return self.directory / TARGETS

    @cached_property
    def report(self) -> dict[str, Any]:
        """What `Report` holds, as JSON has it."""
        found: dict[str, Any] = read_json(self.directory / REPORT)
        return found

    @property
    def metrics(self) -> dict[str, float]:
        """Of the model, by name."""
        return {name: float(value) for name, value in self.report["metrics"]["model"].items()}


def latest(run: Path, split: str = "test") -> Saved | None:
    """The evaluation on a split that was made last, of the bundle in a directory; None if there is none."""
    found = [Saved(path.parent) for path in (run / EVALUATION).glob(f"{split}-*/{REPORT}")]
    return max(found, key=lambda saved: str(saved.report.get("evaluated_at", "")), default=None)


def per_target_of(reference: str, split: str, storage: Path) -> Path:
    """The per-target file of another evaluation.

    Args:
        reference: the file itself; or the model whose latest evaluation on the split is meant.

    Raises:
        UserError: there is none.
    """
    if Path(reference).suffix == ".parquet":
        return Path(reference).expanduser()
    version = find_version(reference, storage)
    run = version.directory if isinstance(version, Version) else version.parent
    saved = latest(run, split)
    if saved is None:
        raise UserError(f"{reference}: was not evaluated on the {split} split yet: ilrec evaluate {reference}")
    return saved.per_target

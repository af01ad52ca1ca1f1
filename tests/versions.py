"""Where the versions of a test's models lie."""

from __future__ import annotations

from pathlib import Path

from trainer.experiment import Experiment


def directory_of(experiment: Experiment) -> Path:
    """The directory of the latest version that was begun."""
    return experiment.model.versions[-1].directory

"""The runs of a study: their experiments, their commands, and what they left on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.config import StudyConfig, as_override
from objectives.config import needs_rewards
from recommender.bundle import peek_manifest
from recommender.collaborative.config import CollaborativeModelConfig
from recommender.errors import UserError
from recommender.files import write_json
from trainer.config import ClusterConfig, LanguageModelConfig
from trainer.evaluation.saved import Saved, latest
from trainer.experiment import Experiment, load_experiment

_RECORD = "study.json"

# What may change while a study is under way: how a run is carried out and where its files lie.
_FREE: dict[str, Any] = {
    "name": True,
    "cluster": True,
    "serving": True,
    "training": {"zero_stage", "accumulation", "logits_memory_mb", "gradient_checkpointing", "checkpoint_every"},
    "evaluation": {"batch", "bootstrap"},
    "data": {"interactions", "items", "train", "validation", "test"},
}

_OF_LANGUAGE_MODELS = ("identifier", "prompt", "backbone", "init_from", "objective", "training", "search")


@dataclass(frozen=True)
class Run:
    """A method with one of its trials and a seed.

    Attributes:
        name: <study>-<method>-<trial>-s<seed>.
        trial: 1-based.
        base: the experiment that the overrides change.
        overrides: as `ilrec --set` takes them.
        experiment: what comes out of it.
    """

    name: str
    method: str
    trial: int
    seed: int
    base: str
    overrides: tuple[str, ...]
    experiment: Experiment

    def command(self, verb: str) -> list[str]:
        """Arguments for ilrec.py."""
        return [verb, self.base, *(word for override in self.overrides for word in ("--set", override))]

    @property
    def home(self) -> Path:
        """Of its model."""
        return self.experiment.model.home

    @property
    def directory(self) -> Path:
        """Of the version that is trained; only of a run that is."""
        return self.experiment.model.version("latest").directory

    @property
    def log(self) -> Path:
        """What the commands said, all of them one after the other."""
        return self.home.with_name(f"{self.name}.log")

    def check(self) -> None:
        """Refuse a directory in which other settings were run: a finished run is never passed off as another.

        Raises:
            UserError: names the fields that differ.
        """
        path = self.home / _RECORD
        if not path.exists():
            return
        mine, theirs = self._settings(), json.loads(path.read_text())
        changed = [
            f"  {field}: {theirs.get(field)!r} → {mine.get(field)!r}"
            for field in sorted(mine.keys() | theirs.keys())
            if mine.get(field) != theirs.get(field)
        ]
        if changed:
            raise UserError(
                f"{self.home} holds a run with other settings:\n"
                + "\n".join(changed)
                + "\nTake the change back, give the study another name, or remove that directory."
            )

    def claim(self) -> None:
        """Write down what is run here, for `check`."""
        write_json(self.home / _RECORD, self._settings())

    def _settings(self) -> dict[str, Any]:
        """What decides the outcome, by path; sections that do not apply to this kind of recommender are left out."""
        experiment, ignored = self.experiment, dict(_FREE)
        if not isinstance(experiment.recommender, LanguageModelConfig):
            ignored |= dict.fromkeys((*_OF_LANGUAGE_MODELS, "collaborative"), True)
        elif not needs_rewards(experiment.objective):
            ignored["collaborative"] = True
        return _flat(experiment.model_dump(mode="json", exclude=ignored))

    @property
    def is_trained(self) -> bool:
        """Whether it has a bundle."""
        return (self.home / _RECORD).exists() and bool(self.experiment.model.complete)

    @property
    def is_tested(self) -> bool:
        return self.is_trained and latest(self.directory) is not None

    def validation(self, metric: str) -> float:
        """Of the epoch that became the bundle."""
        return peek_manifest(self.directory / "bundle").metrics[f"validation_{metric}"]

    @property
    def seconds(self) -> float:
        """Training and validation of all epochs, interruptions and start-up aside."""
        epochs = json.loads((self.directory / "training.json").read_text())
        return float(sum(epoch["train_seconds"] + epoch["validation_seconds"] for epoch in epochs))

    @property
    def test(self) -> dict[str, Any]:
        """What `ilrec evaluate` reported."""
        return self.evaluation.report

    @property
    def evaluation(self) -> Saved:
        """On the test targets."""
        found = latest(self.directory)
        assert found is not None
        return found


class Study:
    """A study and its runs.

    Args:
        name: its directory is <storage>/<name>.

    Raises:
        UserError: a method's experiment is not valid, or a run's directory holds other settings.
    """

    def __init__(self, config: StudyConfig, name: str, storage: Path):
        self.config, self.name, self.directory = config, name, storage / name
        self._runs = {
            (method, trial, seed): plan_run(config, name, storage, method, trial, seed)
            for method in config.methods
            for trial in range(1, config.budget + 1)
            for seed in config.seeds
        }
        for run in self._runs.values():
            run.check()

    @property
    def cluster(self) -> ClusterConfig:
        """What the run that needs most needs."""
        return max((run.experiment.cluster for run in self._runs.values()), key=lambda c: c.workers)

    def trials(self, method: str) -> list[Run]:
        """What the settings of a method are chosen from."""
        tuned = self.config.tuned(method)
        return [self._runs[tuned, trial, self.config.seeds[0]] for trial in range(1, self.config.budget + 1)]

    def choice(self, method: str) -> int | None:
        """The trial with the best validation, of equals the first; None until all are trained."""
        trials = self.trials(method)
        if not all(run.is_trained for run in trials):
            return None
        return max(trials, key=lambda run: run.validation(self.config.metric)).trial

    def finals(self, method: str) -> list[Run]:
        """The chosen trial with every seed; a tuned method's first is a tuning run. Empty while there is no choice."""
        trial = self.choice(method)
        return [] if trial is None else [self._runs[method, trial, seed] for seed in self.config.seeds]


def plan_run(study: StudyConfig, name: str, storage: Path, method: str, trial: int, seed: int) -> Run:
    """The run of a method with a trial (1-based) and a seed, its experiment validated.

    Args:
        name: of the study.

    Raises:
        UserError: the experiment is not valid; names the method, the trial, the field.
    """
    run = f"{name}-{method}-{trial}-s{seed}"
    changes = [as_override(path, value) for path, value in study.settings(method, trial).items()]
    placed = [as_override("name", run), as_override("cluster.storage", str(storage / name))]
    try:
        experiment = load_experiment(study.base, [*changes, *placed])
        seeded = []  # a floor draws nothing
        if isinstance(experiment.recommender, LanguageModelConfig):
            seeded = [as_override("training.seed", seed)]
        elif isinstance(experiment.recommender, CollaborativeModelConfig):
            seeded = [as_override("recommender.seed", seed)]
        overrides = (*changes, *seeded, *placed)
        experiment = load_experiment(study.base, overrides)
    except UserError as error:
        raise UserError(f"method {method}, trial {trial}: {error}") from None
    return Run(run, method, trial, seed, study.base, overrides, experiment)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by their path: {a: {b: 1}} → {a.b: 1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat

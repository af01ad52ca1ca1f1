"""The floors: recommenders without training that every other one has to beat, fitted in seconds and kept."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from recommender.bundle import MANIFEST, Manifest
from recommender.catalogue.catalogue import Catalogue
from recommender.errors import UserError
from recommender.files import digest, write_json
from recommender.floors.config import FloorConfig, ItemKNNConfig, TfidfConfig
from recommender.floors.itemknn import ItemKNN
from recommender.floors.model import Floor
from recommender.floors.recommender import FloorRecommender
from recommender.floors.tfidf import Tfidf, texts_of
from recommender.metrics import metric_values, score_ranks
from recommender.models import Version
from trainer.config import EvaluationConfig
from trainer.data.dataset import Dataset
from trainer.evaluation.ranking import HeldOut, held_out
from trainer.experiment import Experiment
from trainer.parts import Say, make_part
from trainer.run import HISTORY

_SELECTION = "validation_NDCG@10"
_SCORES_AT_ONCE = 1 << 24


def fit_floor(run: Experiment, config: FloorConfig, version: Version, dataset: Dataset, say: Say) -> None:
    """Fit a run's floor, choose its settings, and write `training.json`, a row a setting, and the version's bundle."""
    recommender, tried = choose(config, dataset, run.evaluation, run.name, say)
    of_version = {"version": version.number, "trained_until": dataset.trained_until()}
    recommender.manifest = recommender.manifest.model_copy(update=of_version)
    write_json(version.directory / HISTORY, tried)
    recommender.save(version.bundle)


def floors_of(experiment: Experiment) -> Path:
    """Where the runs of a storage keep their floors."""
    return experiment.parts / "floors"


def kept_floors(
    dataset: Dataset, evaluation: EvaluationConfig, directory: Path, say: Say
) -> dict[str, FloorRecommender]:
    """The floors that `evaluation` names, by kind; one that the data cannot have is left out.

    Each is fitted on the first use and kept in `directory`, by the hash of the data, its config and the validation that
    chooses its settings.
    """
    bundles = floor_bundles(dataset, evaluation, directory, say)
    return {kind: FloorRecommender.load(bundle) for kind, bundle in bundles.items()}


def floor_bundles(dataset: Dataset, evaluation: EvaluationConfig, directory: Path, say: Say) -> dict[str, Path]:
    """The bundles of `kept_floors`, by kind."""
    found: dict[str, Path] = {}
    for kind in evaluation.floors:
        config = ItemKNNConfig() if kind == "itemknn" else TfidfConfig()
        decisive = [
            dataset.fingerprint,
            config.model_dump(mode="json"),
            evaluation.validation_targets,
            evaluation.exclude_seen,
        ]
        bundle = directory / f"{kind}-{digest(*decisive)}"

        def write(aside: Path, config: FloorConfig = config, kind: str = kind) -> None:
            started = time.monotonic()
            floor, tried = choose(config, dataset, evaluation, kind, lambda text: None)
            floor.save(aside)
            best, seconds = floor.manifest.metrics[_SELECTION], time.monotonic() - started
            say(f"{kind}: the best of {len(tried)} settings has validation NDCG@10 {best:.4f}, {seconds:.1f} s")

        try:
            make_part(bundle, MANIFEST, write, say)
        except UserError as error:
            say(f"note: no {kind} beside the model: {error}")
        else:
            found[kind] = bundle
    return found


def choose(
    config: FloorConfig, dataset: Dataset, evaluation: EvaluationConfig, name: str, say: Say
) -> tuple[FloorRecommender, list[dict[str, float]]]:
    """Fit with everything that is tried, and keep what has the best validation NDCG@10; of equals the first.

    Returns:
        The recommender, and the validation metrics of each setting, numbered from 1 as an epoch would be.

    Raises:
        UserError: the data have nothing that it could be fitted on.
    """
    split = held_out(dataset, "validation", evaluation.validation_targets)
    if not len(split):
        raise UserError("data: there is no validation target, and settings are chosen on them; add data")
    catalogue = Catalogue(dataset.item_ids, dataset.titles, dataset.items_table, dataset.popularity())
    best: FloorRecommender | None = None
    tried: list[dict[str, float]] = []
    started = time.monotonic()
    for model in _fitted(config, dataset):
        fitted = time.monotonic() - started
        for decay in config.decay:
            started = time.monotonic()
            recommender = FloorRecommender(catalogue, model, decay, Manifest(name=name))
            values = metric_values(_ranks(recommender, split, evaluation.exclude_seen), [10])
            found = {f"validation_{metric}": float(each.mean()) for metric, each in values.items()}
            seconds = {"train_seconds": fitted, "validation_seconds": time.monotonic() - started}
            better = best is None or found[_SELECTION] > best.manifest.metrics[_SELECTION]
            tried.append({"epoch": len(tried) + 1, "step": len(tried) + 1, **found, **seconds})
            shown = model.settings.model_dump(exclude={"kind"}) | {"decay": decay}
            said = ", ".join(f"{field} {_shown(value)}" for field, value in shown.items())
            mark = " (best so far)" if better else ""
            say(f"{config.kind}: {said}: validation NDCG@10 {found[_SELECTION]:.4f}{mark}")
            if better:
                settings = {"kind": config.kind, **shown}
                recommender.manifest = Manifest(
                    name=name, recommender=settings, data_fingerprint=dataset.fingerprint, metrics=found
                )
                best = recommender
        started = time.monotonic()
    assert best is not None
    return best, tried


def _fitted(config: FloorConfig, dataset: Dataset) -> Iterator[Floor]:
    """The models of all settings that are tried."""
    if isinstance(config, ItemKNNConfig):
        sequence, items = dataset.training_interactions()
        for settings in config.settings():
            yield ItemKNN.fit(settings, sequence, items, len(dataset.item_ids))
    else:
        texts = texts_of(dataset.items_table, config.columns)
        for words in config.settings():
            yield Tfidf.fit(words, texts)


def _shown(value: object) -> str:
    return " + ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _ranks(recommender: FloorRecommender, split: HeldOut, exclude_seen: bool) -> np.ndarray:
    """What `ranks_of` finds, without the lists: every setting is ranked."""
    rows = max(1, _SCORES_AT_ONCE // len(recommender.catalogue))
    found = []
    for begin in range(0, len(split), rows):
        part = split.take(np.arange(begin, min(begin + rows, len(split))))
        scores = recommender.scores(part.histories).numpy()
        found.append(score_ranks(scores, part.targets, part.histories if exclude_seen else None))
    return np.concatenate(found)

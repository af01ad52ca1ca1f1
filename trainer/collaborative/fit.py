"""The driver of collaborative models on Ray Train, as recommenders by themselves or for an objective that needs one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from recommender.bundle import LANGUAGE_MODEL, Manifest, read_manifest
from recommender.catalogue.catalogue import Catalogue
from recommender.collaborative.config import CollaborativeConfig
from recommender.collaborative.recommender import CollaborativeRecommender, build_model
from recommender.errors import UserError
from trainer.cluster import check_resources, connect
from trainer.collaborative.worker import TOO_LARGE, load, train_worker
from trainer.config import CollaborativeBundle, LanguageModelConfig
from trainer.data.dataset import Dataset
from trainer.experiment import Experiment
from trainer.lock import LOCK, locked
from trainer.loop.launch import Trained, run_to_best, torch_trainer
from trainer.prepare import Say
from trainer.reporting.tracking import tracked


def ensure_collaborative(experiment: Experiment, prepared: Path, say: Say = print) -> Path:
    """The collaborative model that a language model's objective takes rewards from, as `collaborative` says.

    One that is given by its config is trained once under `<storage>/collaborative/<kind>-<hash>`, whatever experiment
    asks for it: the hash is of the data, the config and the validation that chooses the epoch.

    Returns:
        Its bundle, whose items are the dataset's, in the same order.

    Raises:
        UserError: there is none, it is no collaborative model, it is of another catalogue, or it cannot be trained.
    """
    config = experiment.collaborative
    if config is None:
        raise UserError("collaborative: null, but the objective needs a collaborative model; leave it out for SASRec")
    dataset = Dataset.load(prepared / "dataset")
    bundle = (
        Path(config.path)
        if isinstance(config, CollaborativeBundle)
        else _shared(experiment, config, dataset, prepared, say)
    )
    manifest = read_manifest(bundle)
    if manifest.kind == LANGUAGE_MODEL:
        raise UserError(
            f"collaborative: {bundle} holds a language model; give the bundle of a collaborative one "
            "(--set recommender.kind=sasrec trains it), or its config"
        )
    same_items = Catalogue.load(bundle).item_ids == dataset.item_ids
    if manifest.data_fingerprint != dataset.fingerprint and same_items:
        raise UserError(
            f"collaborative: {bundle} was fitted on other data or another split than {dataset.path}, so its rewards "
            "may know what is held out here; train one on these data, or give a config ({kind: sasrec})"
        )
    if not same_items:
        raise UserError(
            f"collaborative: {bundle} was trained on another catalogue than {dataset.path}; give one of these data, or "
            "a config ({kind: sasrec}), which is trained on them"
        )
    return bundle


def _shared(experiment: Experiment, config: CollaborativeConfig, dataset: Dataset, prepared: Path, say: Say) -> Path:
    evaluation = experiment.evaluation
    decisive = [
        dataset.fingerprint,
        config.model_dump(mode="json"),
        evaluation.validation_targets,
        evaluation.exclude_seen,
    ]
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]
    storage = experiment.run_dir.parent / "collaborative"
    run = experiment.model_copy(
        update={
            "name": f"{config.kind}-{digest}",
            "recommender": config,
            "cluster": experiment.cluster.model_copy(update={"storage": str(storage)}),
        }
    )
    run.run_dir.mkdir(parents=True, exist_ok=True)
    waiting = f"another experiment is training the collaborative model in {run.run_dir}; waiting for it"
    with locked(run.run_dir / LOCK, lambda: say(waiting)):  # of experiments that start together one trains
        bundle = run.run_dir / "bundle"
        if bundle.exists():
            say(f"collaborative model: {bundle}")
            return bundle
        say(f"training the collaborative model ({config.kind}) once, in {run.run_dir}")
        connect()
        check_resources(run.cluster, run.cluster.fewest_workers)
        return fit_collaborative(run, dataset, prepared, say)


def fit_collaborative(run: Experiment, dataset: Dataset, prepared: Path, say: Say) -> Path:
    """Train a run's collaborative recommender on the connected Ray and write the best epoch as a bundle."""
    run.run_dir.mkdir(parents=True, exist_ok=True)
    log = run.run_dir / "train.log"
    with tracked(run):
        trained = run_to_best(torch_trainer(run, prepared, log, train_worker), log, say, TOO_LARGE)
    return export_collaborative(run, dataset, trained)


def export_collaborative(run: Experiment, dataset: Dataset, trained: Trained) -> Path:
    """Write the bundle of a checkpoint."""
    config = run.recommender
    assert not isinstance(config, LanguageModelConfig)
    model = build_model(config, len(dataset.item_ids))
    with trained.checkpoint.as_directory() as directory:
        load(Path(directory), model)
    manifest = Manifest(
        name=run.name,
        recommender=config.model_dump(mode="json"),
        data_fingerprint=dataset.fingerprint,
        metrics={name: float(trained.metrics[name]) for name in ("validation_HR@10", "validation_NDCG@10")},
    )
    catalogue = Catalogue(dataset.item_ids, dataset.titles, dataset.items_table, dataset.popularity())
    bundle = run.run_dir / "bundle"
    CollaborativeRecommender(catalogue, model, manifest).save(bundle)
    (run.run_dir / "training.json").write_text(json.dumps(trained.history, indent=2))
    return bundle

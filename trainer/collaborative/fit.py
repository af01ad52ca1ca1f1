"""The driver of collaborative models on Ray Train, as recommenders by themselves or for an objective that needs one."""

from __future__ import annotations

from pathlib import Path

from recommender.bundle import FLOORS, LANGUAGE_MODEL, Manifest, read_manifest
from recommender.catalogue.catalogue import Catalogue
from recommender.collaborative.config import CollaborativeConfig, CollaborativeModelConfig
from recommender.collaborative.recommender import CollaborativeRecommender
from recommender.errors import UserError
from recommender.files import digest, write_json
from recommender.lock import LOCK, locked
from recommender.models import Model, Version
from trainer.cluster import check_resources, connect
from trainer.collaborative.worker import TOO_LARGE, fresh_model, load, train_worker
from trainer.config import CollaborativeBundle
from trainer.data.dataset import Dataset
from trainer.experiment import Experiment
from trainer.loop.launch import Trained, run_to_best, torch_trainer
from trainer.parts import Prepared, Say
from trainer.reporting.tracking import tracked
from trainer.run import HISTORY, LOG, begin, fields_of

COLLABORATIVE = "collaborative"  # below it lie the models that objectives take rewards from


def ensure_collaborative(experiment: Experiment, prepared: Prepared, say: Say = print) -> Path:
    """The collaborative model that a language model's objective takes rewards from, as `collaborative` says.

    One that is given by its config is trained once, as the model `collaborative/<kind>-<hash>` of the storage, whatever
    experiment asks for it: the hash is of the data, the config and the validation that chooses the epoch.

    Returns:
        Its bundle, whose items are the dataset's, in the same order.

    Raises:
        UserError: there is none, it is no collaborative model, it is of another catalogue, or it cannot be trained.
    """
    config = experiment.collaborative
    if config is None:
        raise UserError("collaborative: null, but the objective needs a collaborative model; leave it out for SASRec")
    dataset = Dataset.load(prepared.dataset)
    bundle = (
        Path(config.path)
        if isinstance(config, CollaborativeBundle)
        else _shared(experiment, config, dataset, prepared, say)
    )
    manifest = read_manifest(bundle)
    if manifest.kind in (LANGUAGE_MODEL, *FLOORS):
        held = "a language model" if manifest.kind == LANGUAGE_MODEL else manifest.kind
        raise UserError(
            f"collaborative: {bundle} holds {held}; give the bundle of a collaborative one "
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


def _shared(
    experiment: Experiment, config: CollaborativeConfig, dataset: Dataset, prepared: Prepared, say: Say
) -> Path:
    evaluation = experiment.evaluation
    decisive = [config.model_dump(mode="json"), evaluation.validation_targets, evaluation.exclude_seen]
    model = Model(experiment.storage, f"{COLLABORATIVE}/{config.kind}-{digest(dataset.fingerprint, *decisive)}")
    run = experiment.model_copy(update={"recommender": config})
    model.home.mkdir(parents=True, exist_ok=True)
    waiting = f"another experiment is training the collaborative model in {model.home}; waiting for it"
    with locked(model.home / LOCK, lambda: say(waiting)):  # of experiments that start together one trains
        if model.complete:
            say(f"collaborative model: {model.version()}")
            return model.version().bundle
        say(f"training the collaborative model ({config.kind}) once, in {model.home}")
        connect()
        check_resources(run.cluster, run.cluster.fewest_workers)
        begun = [version for version in model.versions if fields_of(version) is not None]
        version = begun[-1] if begun else begin(run, prepared, say=say, model=model)
        return fit_collaborative(run, version, prepared, say)


def fit_collaborative(run: Experiment, version: Version, prepared: Prepared, say: Say) -> Path:
    """Train a collaborative recommender on the connected Ray and write the best epoch as the version's bundle."""
    log = version.directory / LOG
    with tracked(run, version.directory):
        trained = run_to_best(torch_trainer(run, prepared, log, train_worker), log, say, TOO_LARGE)
    return export_collaborative(run, version, prepared, trained)


def export_collaborative(run: Experiment, version: Version, prepared: Prepared, trained: Trained) -> Path:
    """Write the history and, last, the bundle of what was trained: with it the version is finished."""
    config, dataset = run.recommender, Dataset.load(prepared.dataset)
    assert isinstance(config, CollaborativeModelConfig)
    model = fresh_model(config, dataset)
    with trained.checkpoint.as_directory() as directory:
        load(Path(directory), model)
    if config.content is not None:
        model.fold_texts()
    manifest = Manifest(
        name=version.name,
        version=version.number,
        trained_until=dataset.trained_until(),
        recommender=config.model_dump(mode="json"),
        data_fingerprint=dataset.fingerprint,
        metrics=trained.selection,
    )
    catalogue = Catalogue(dataset.item_ids, dataset.titles, dataset.items_table, dataset.popularity())
    write_json(version.directory / HISTORY, trained.history)
    CollaborativeRecommender(catalogue, model, manifest).save(version.bundle)
    return version.bundle

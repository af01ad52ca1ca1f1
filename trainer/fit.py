"""`ilrec train`: the driver of a Ray Train run, from a prepared experiment to a bundle."""

from __future__ import annotations

import os
from pathlib import Path

from objectives.config import CustomConfig, ILRecConfig, needs_rewards
from objectives.objective import build_objective, check_custom
from recommender.backbone.backbone import count_layers
from recommender.bundle import Manifest, read_manifest
from recommender.config import PRESETS, CustomClass, PresetBackbone
from recommender.custom import made
from recommender.errors import UserError
from recommender.files import write_json
from recommender.floors.config import ItemKNNConfig, TfidfConfig
from recommender.items.item_space import ItemSpace
from recommender.items.prompt import Wording
from recommender.models import Version
from recommender.recommender import Recommender, language_model_manifest
from trainer.cluster import check_address, check_resources, connect
from trainer.collaborative.fit import ensure_collaborative, fit_collaborative
from trainer.config import CollaborativeBundle, LanguageModelConfig
from trainer.data.dataset import Dataset
from trainer.evaluation.floors import fit_floor
from trainer.experiment import Experiment
from trainer.loop import checkpoint
from trainer.loop.launch import Trained, run_to_best, torch_trainer
from trainer.loop.worker import TOO_LARGE, starting_backbone
from trainer.parts import Prepared, Say
from trainer.reporting.report import REPORT, write_report
from trainer.reporting.tracking import check_tracking, tracked
from trainer.run import HISTORY, LOG, begin, version_of


def train(experiment: Experiment, prepared: Prepared, say: Say = print, fresh: bool = False) -> Version:
    """Train a version of the experiment's model on Ray, export its best checkpoint as a bundle, and draw its report.
    A floor is fitted right here.

    What was begun with the same config on the same data goes on from its latest checkpoint; what is finished is not
    repeated; anything else becomes a new version beside those that there are.

    Args:
        fresh: train a new version, whatever there is.

    Raises:
        UserError: the cluster is too small, or training stopped for a reason that the user can mend.
    """
    dataset = Dataset.load(prepared.dataset)
    if not len(dataset.targets["validation"].position):
        raise UserError("data: there is no validation target, and the best epoch is chosen on them; add data")
    check_model(experiment)
    version = None if fresh else version_of(experiment, dataset.fingerprint)
    if version is not None and version.is_complete:
        say(f"{version} is trained already, with this config on these data; --fresh trains another version")
        if not (version.directory / REPORT).exists():  # interrupted, after the bundle
            write_report(experiment, version.directory, prepared)
        return version
    if isinstance(experiment.recommender, ItemKNNConfig | TfidfConfig):
        version = version or begin(experiment, prepared, say=say)
        fit_floor(experiment, experiment.recommender, version, dataset, say)
        write_report(experiment, version.directory, prepared)
        return version
    connect()
    check_resources(experiment.cluster, experiment.cluster.fewest_workers)
    collaborative = None
    if isinstance(experiment.recommender, LanguageModelConfig) and needs_rewards(experiment.objective):
        collaborative = ensure_collaborative(experiment, prepared, say)
    if version is None:
        version = begin(experiment, prepared, say=say)
    else:
        say(f"{version} was begun before and goes on")
    if isinstance(experiment.recommender, LanguageModelConfig):
        _fit_language_model(experiment, version, prepared, collaborative, say)
    else:
        fit_collaborative(experiment, version, prepared, say)
    write_report(experiment, version.directory, prepared)
    return version


def _fit_language_model(
    experiment: Experiment, version: Version, prepared: Prepared, collaborative: Path | None, say: Say
) -> None:
    log = version.directory / LOG
    trainer = torch_trainer(experiment, prepared, log, collaborative=collaborative)
    with tracked(experiment, version.directory):
        trained = run_to_best(trainer, log, say, TOO_LARGE)
    export(experiment, version, prepared, trained)


def check_model(experiment: Experiment) -> None:
    """Refuse what can be seen without data: a Ray that cannot be used, layers that the backbone does not have, bundles
    that are none, packages that are missing, classes of the user's that cannot be imported or do not work.

    Raises:
        UserError: says which.
    """
    check_address()
    check_tracking(experiment.tracking)
    if not isinstance(experiment.recommender, LanguageModelConfig):
        return
    objective, collaborative = experiment.objective, experiment.collaborative
    if experiment.init_from is not None:
        language_model_manifest(Path(experiment.init_from))
    if isinstance(experiment.prompt.template, CustomClass):
        made(experiment.prompt.template, Wording, "prompt.template")
    if isinstance(objective, CustomConfig):
        check_custom(objective, backbone_layers(experiment))
    if isinstance(objective, ILRecConfig):
        objective.intermediate_layers(backbone_layers(experiment))
    if needs_rewards(objective) and isinstance(collaborative, CollaborativeBundle):
        read_manifest(Path(collaborative.path))


def backbone_layers(experiment: Experiment) -> int:
    """Decoder layers of the backbone that is trained, read without loading it."""
    if experiment.init_from is not None:
        return count_layers(experiment.init_from, None)
    if isinstance(experiment.backbone, PresetBackbone):
        return PRESETS[experiment.backbone.size].layers
    return count_layers(experiment.backbone.path, experiment.backbone.revision)


def export(experiment: Experiment, version: Version, prepared: Prepared, trained: Trained) -> None:
    """Write the history and, last, the bundle of what was trained: with it the version is finished."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saving imports DeepSpeed, which looks for a device and warns
    space = ItemSpace.load(prepared.items)
    backbone = starting_backbone(experiment, space)
    objective = build_objective(experiment.objective, backbone.num_layers, space.trie)
    with trained.checkpoint.as_directory() as directory:
        checkpoint.read_weights(Path(directory), backbone.model, prefix="model.")
        objective.state = checkpoint.read_state(Path(directory))["state"].get("objective", {})
    dataset = Dataset.load(prepared.dataset)
    space.catalogue.popularity = dataset.popularity()
    manifest = Manifest(
        name=version.name,
        version=version.number,
        trained_until=dataset.trained_until(),
        search=experiment.search.unblended(),
        temperature=objective.temperature,
        score="valid" if objective.valid_only else "full",
        backbone=experiment.backbone.model_dump(mode="json"),
        objective=experiment.objective.model_dump(mode="json"),
        prompt=experiment.prompt.model_dump(mode="json"),
        data_fingerprint=dataset.fingerprint,
        metrics=trained.selection,
    )
    write_json(version.directory / HISTORY, trained.history)
    Recommender(space, backbone, manifest).save(version.bundle)

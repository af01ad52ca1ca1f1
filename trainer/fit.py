"""`ilrec train`: the driver of a Ray Train run, from a prepared experiment to a bundle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ray.train

from objectives.config import ILRecConfig, needs_rewards
from objectives.objective import build_objective
from recommender.backbone.backbone import count_layers
from recommender.bundle import Manifest, read_manifest
from recommender.config import PRESETS, PresetBackbone
from recommender.errors import UserError
from recommender.items.item_space import ItemSpace
from recommender.recommender import Recommender, language_model_manifest
from trainer.cluster import check_address, check_resources, connect
from trainer.collaborative.fit import ensure_collaborative, fit_collaborative
from trainer.config import CollaborativeBundle, LanguageModelConfig
from trainer.data.dataset import Dataset
from trainer.experiment import Experiment
from trainer.loop import checkpoint
from trainer.loop.launch import run_to_best, torch_trainer
from trainer.loop.worker import TOO_LARGE, starting_backbone
from trainer.prepare import Say
from trainer.reporting.report import write_report
from trainer.reporting.tracking import check_tracking, tracked
from trainer.run import check_claim, claim, pruned


def train(experiment: Experiment, prepared: Path, say: Say = print, fresh: bool = False) -> Path:
    """Train on Ray, export the best checkpoint as a bundle, and draw the run's report.

    A run that was interrupted goes on from its latest checkpoint when called again; a finished one is not repeated.

    Args:
        fresh: start over, whatever an earlier run left.

    Returns:
        `<run>/bundle`.

    Raises:
        UserError: the directory holds another config's run, the cluster is too small, or training stopped for a reason
            that the user can mend.
    """
    dataset = Dataset.load(prepared / "dataset")
    if not len(dataset.targets["validation"].position):
        raise UserError("data: there is no validation target, and the best epoch is chosen on them; add data")
    check_model(experiment)
    if not fresh:
        check_claim(experiment, dataset.fingerprint)  # before a collaborative model is trained for it
        if (bundle := pruned(experiment)) is not None:
            return bundle
    connect()
    check_resources(experiment.cluster, experiment.cluster.fewest_workers)
    if isinstance(experiment.recommender, LanguageModelConfig):
        collaborative = None
        if needs_rewards(experiment.objective):
            collaborative = ensure_collaborative(experiment, prepared, say)
        claim(experiment, dataset.fingerprint, fresh)
        bundle = _fit_language_model(experiment, prepared, collaborative, say)
    else:
        claim(experiment, dataset.fingerprint, fresh)
        bundle = fit_collaborative(experiment, dataset, prepared, say)
    write_report(experiment)
    return bundle


def _fit_language_model(experiment: Experiment, prepared: Path, collaborative: Path | None, say: Say) -> Path:
    log = experiment.run_dir / "train.log"
    trainer = torch_trainer(experiment, prepared, log, collaborative=collaborative)
    with tracked(experiment):
        trained = run_to_best(trainer, log, say, TOO_LARGE)
    return export(experiment, prepared, trained.checkpoint, trained.metrics, trained.history)


def check_model(experiment: Experiment) -> None:
    """Refuse what can be seen without data: a Ray that cannot be used, layers that the backbone does not have, bundles
    that are none, packages that are missing.

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


def export(
    experiment: Experiment, prepared: Path, best: ray.train.Checkpoint, metrics: dict[str, Any], history: list[Any]
) -> Path:
    """Write the bundle of a checkpoint."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saving imports DeepSpeed, which looks for a device and warns
    space = ItemSpace.load(prepared / "items")
    backbone = starting_backbone(experiment, space)
    objective = build_objective(experiment.objective, backbone.num_layers, space.trie)
    with best.as_directory() as directory:
        checkpoint.read_weights(Path(directory), backbone.model, prefix="model.")
        objective.state = checkpoint.read_state(Path(directory))["state"].get("objective", {})
    dataset = Dataset.load(prepared / "dataset")
    space.catalogue.popularity = dataset.popularity()
    manifest = Manifest(
        name=experiment.name,
        search=experiment.search,
        temperature=objective.temperature,
        backbone=experiment.backbone.model_dump(mode="json"),
        objective=experiment.objective.model_dump(mode="json"),
        data_fingerprint=dataset.fingerprint,
        metrics={name: float(metrics[name]) for name in ("validation_HR@10", "validation_NDCG@10")},
    )
    bundle = experiment.run_dir / "bundle"
    Recommender(space, backbone, manifest).save(bundle)
    (experiment.run_dir / "training.json").write_text(json.dumps(history, indent=2))
    return bundle

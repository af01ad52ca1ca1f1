"""`ilrec blend`: a model's next version, whose score has priors added to it, with weights found on validation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recommender.bundle import FLOORS, LANGUAGE_MODEL, Manifest, kind_of, peek_manifest
from recommender.collaborative.recommender import CollaborativeRecommender
from recommender.config import (
    ModelPrior,
    NewPrior,
    PopularityPrior,
    PriorConfig,
    UnconditionalPrior,
)
from recommender.errors import UserError
from recommender.files import write_json, write_text
from recommender.loading import load_recommender
from recommender.metrics import metric_values
from recommender.models import Version, find_bundle, find_version
from recommender.priors import Priors, unconditional
from recommender.recommender import Recommender
from recommender.scored import ScoredRecommender
from trainer.data.dataset import Dataset
from trainer.evaluation.blend import LEAST, Blend, Weighing, with_scales
from trainer.evaluation.floors import floor_bundles, floors_of
from trainer.evaluation.pools import BASE, Pools, pools_of
from trainer.evaluation.ranking import Progress, held_out
from trainer.experiment import Experiment
from trainer.parts import Prepared, Say
from trainer.reporting import figures

BLEND, PAGE = "blend.json", "blend.html"
_TARGETS = 4000  # of validation at most, a seeded sample
_LISTED = 100  # items of each list in a pool
_HALVINGS = 8  # of the weight of targets, from the earliest to the latest


@dataclass(frozen=True)
class Blending:
    """What was found.

    Attributes:
        configs: the priors that are left, with their weights.
        singles: system → NDCG@10, HR@10 on the targets that weights were chosen on; "blend", "model" and the priors.
        segments: label → system → NDCG@10.
        curves: see `Weighing.curves`.
        targets: how many weights were chosen on.
    """

    configs: dict[str, PriorConfig]
    singles: dict[str, dict[str, float]]
    segments: dict[str, dict[str, float]]
    curves: dict[str, Any]
    targets: int


def blend(
    experiment: Experiment, bundle: Path, prepared: Prepared, models: Sequence[str], target: Path, say: Say, **of: Any
) -> Blending:
    """Find weights, and write the bundle that has them.

    Args:
        bundle: of the model; priors that it has are left out.
        models: further ones to add, by name, name@version or path.
        target: of the new bundle.
        of: fields of its manifest.

    Raises:
        UserError: the model gives no log-probabilities, a prior cannot be had, or there are no validation targets.
    """
    kind = kind_of(bundle)
    if kind in FLOORS:
        raise UserError(f"{bundle}: holds {kind}, whose scores are no log-probabilities; blend a language model or a "
                        "collaborative one")  # fmt: skip
    dataset = Dataset.load(prepared.dataset)
    device = "cuda" if experiment.cluster.gpus_per_worker and torch.cuda.is_available() else "cpu"
    recommender = load_recommender(bundle, device)
    assert isinstance(recommender, Recommender | CollaborativeRecommender)
    if recommender.catalogue.item_ids != dataset.item_ids:
        raise UserError(f"{bundle}: its catalogue is not the one of {prepared.dataset}; blend it on its own data")
    if recommender.manifest.data_fingerprint not in ("", dataset.fingerprint):
        say(f"note: {bundle} was trained on other data than {prepared.dataset}; it may have seen the targets")
    popularity = dataset.popularity()
    recommender.catalogue.popularity = popularity  # bundles of earlier releases do not have it
    configs = asked_for(experiment, dataset, models, kind == LANGUAGE_MODEL, say)
    say(f"priors: {', '.join(configs)}")
    vector = None
    if any(isinstance(config, UnconditionalPrior) for config in configs.values()):
        vector = unconditional(recommender)
    priors = Priors(recommender.catalogue, configs, opened(configs, dataset, device), vector)

    split = held_out(dataset, "validation", _TARGETS)
    if not len(split):
        raise UserError("data: there is no validation target, and weights are chosen on them; add data")
    progress = Progress("validation: lists read", len(split), say)
    pools = pools_of(
        recommender, priors, split, experiment.evaluation.exclude_seen, _LISTED, experiment.evaluation.batch, progress
    )
    configs = with_scales(pools, configs)
    weighing = Weighing(pools, configs)
    importance = importances(dataset, split.numbers)
    found = weighing.fitted(importance)
    new = popularity[split.targets] == 0
    segments = {"all": np.ones(len(new), bool), "seen in training": ~new, "unseen in training": new}
    if importance.min() < importance.max():
        segments["latest quarter"] = importance >= np.quantile(importance, 0.75)
    if found.base <= LEAST:
        say("note: beside the priors the model's own score says next to nothing of the validation targets")
    blending = _described(pools, weighing, found, segments)

    kept = found.configs
    recommender.priors = Priors(
        recommender.catalogue,
        kept,
        {name: model for name, model in priors.models.items() if name in kept},
        vector if any(isinstance(config, UnconditionalPrior) for config in kept.values()) else None,
    )
    metrics = {f"validation_{metric}": value for metric, value in blending.singles["blend"].items()}
    recommender.manifest = _with_priors(recommender.manifest, kept, metrics, of)
    recommender.save(target)
    return blending


def asked_for(
    experiment: Experiment, dataset: Dataset, models: Sequence[str], language_model: bool, say: Say
) -> dict[str, PriorConfig]:
    """The priors to weigh, with the paths of bundles: those of the experiment, or all that can be had; and `models`.

    Raises:
        UserError: there is no such model; names the field.
    """
    found: dict[str, PriorConfig] = {}
    if experiment.search.priors is not None:
        found = dict(experiment.search.priors)
    else:
        for kind, path in floor_bundles(dataset, experiment.evaluation, floors_of(experiment), say).items():
            transform = "log" if kind == "itemknn" else "none"
            found[kind] = ModelPrior(kind="model", path=str(path), transform=transform)
        found |= {
            "popularity": PopularityPrior(kind="popularity"),
            "new": NewPrior(kind="new"),
        }
        if language_model:  # a collaborative model's is its item bias
            found["unconditional"] = UnconditionalPrior(kind="unconditional")
    for reference in models:
        name = prior_name(reference, experiment.storage)
        if name in found:
            raise UserError(f"--add {reference}: there is a prior {name} already; name both in search.priors")
        found[name] = ModelPrior(kind="model", path=reference)
    if taken := {BASE, "blend"} & set(found):
        raise UserError(
            f"search.priors.{taken.pop()}: stands for something else in a blend's table; choose another name"
        )
    for name, config in found.items():
        if isinstance(config, ModelPrior):
            try:
                path = find_bundle(config.path, experiment.storage)
                update: dict[str, Any] = {"path": str(path)}
                if peek_manifest(path).kind == "itemknn" and "transform" not in config.model_fields_set:
                    update["transform"] = "log"
                found[name] = config.model_copy(update=update)
            except UserError as error:
                raise UserError(f"search.priors.{name}.path: {error}") from None
    return found


def prior_name(reference: str, storage: Path) -> str:
    """What the prior of a further model is called: its name and version, as far as such a name goes.

    Raises:
        UserError: there is no such model.
    """
    try:
        found = find_version(reference, storage)
    except UserError as error:
        raise UserError(f"--add {error}") from None
    text = _reference(found.bundle if isinstance(found, Version) else found)
    return re.sub(r"[^A-Za-z0-9_-]", "-", text).lstrip("-_")[:40]


def _reference(bundle: Path) -> str:
    """What a bundle is called wherever it lies: name@2 of a version's, else the last part of its path that says more
    than "bundle"."""
    if bundle.name != "bundle":
        return bundle.name
    home = bundle.parent
    return f"{home.parent.name}@{home.name}" if home.name.isdigit() else home.name


def opened(configs: Mapping[str, PriorConfig], dataset: Dataset, device: str) -> dict[str, ScoredRecommender]:
    """The models of `model` priors, whose paths are those of bundles.

    Raises:
        UserError: one is missing or damaged, holds a language model, is a blend, or has another catalogue or other
            data, so that it may have seen the validation targets; names the field.
    """
    models: dict[str, ScoredRecommender] = {}
    for name, config in configs.items():
        if not isinstance(config, ModelPrior):
            continue
        bundle, field = Path(config.path), f"search.priors.{name}.path"
        if kind_of(bundle) == LANGUAGE_MODEL:
            raise UserError(
                f"{field}: {bundle} holds a language model; give a collaborative one, an itemknn or a tfidf"
            )
        model = load_recommender(bundle, device)
        assert isinstance(model, ScoredRecommender)
        if model.catalogue.item_ids != dataset.item_ids:
            raise UserError(f"{field}: {bundle} has another catalogue; train it on the same data")
        if model.manifest.data_fingerprint != dataset.fingerprint:
            raise UserError(
                f"{field}: {bundle} was trained on other data, and may have seen the validation targets that weights "
                "are found on; train it on the same data, split alike"
            )
        if model.manifest.search.priors:
            raise UserError(
                f"{field}: {bundle} is a blend itself; give the version that it was made from, and its priors"
            )
        models[name] = model
    return models


def importances(dataset: Dataset, numbers: np.ndarray) -> np.ndarray:
    """How much each of some validation targets counts, float [M]: where splits follow time, later ones more.

    What comes next is more like what came last: items that nobody knew yet make up more and more of it. The weight
    halves with every eighth of the targets, back from the latest.
    """
    if dataset.protocol == "leave_one_out" or not len(numbers):
        return np.ones(len(numbers))
    order = np.arange(len(numbers))  # published windows stand in the order of their targets' times
    if dataset.trained_until():
        targets = dataset.targets["validation"]
        at = dataset.offsets[targets.sequence[numbers]] + targets.position[numbers]
        order = np.argsort(dataset.times[at], kind="stable")
    age = np.empty(len(numbers))
    age[order] = np.arange(len(numbers))[::-1]
    return np.asarray(0.5 ** (age / (len(numbers) / _HALVINGS)))


def write_blending(found: Blending, directory: Path, title: str) -> Path:
    """Write `blend.json` and draw `blend.html`: the table, and NDCG@10 against each weight.

    Returns:
        The page.
    """
    values = asdict(found) | {
        "configs": {name: config.model_dump(mode="json") for name, config in found.configs.items()}
    }
    write_json(directory / BLEND, values)
    systems = [*found.singles]
    rows = [
        [
            name,
            *(f"{found.segments[label][name]:.4f}" for label in found.segments),
            f"{found.singles[name]['HR@10']:.4f}",
        ]
        for name in systems
    ]
    best = max(range(len(rows)), key=lambda row: float(rows[row][1]))
    weights = [[name, str(config.weight), _said(config)] for name, config in found.configs.items()]
    body = [
        f"<h1>{escape(title)}</h1><p>Weights chosen on {found.targets} validation targets.</p>",
        "<h2>NDCG@10 by kind of target</h2>",
        figures.table(["", *found.segments, "HR@10, all"], rows, best),
        "<h2>Priors</h2>",
        figures.table(["prior", "weight", ""], weights),
        "<h2>NDCG@10 as one weight changes</h2>",
    ]
    for name, curve in found.curves.items():
        drawn = {label: list(zip(curve["weights"], line, strict=True)) for label, line in curve["NDCG@10"].items()}
        ordered = {label: sorted(points) for label, points in drawn.items()}
        body.append(figures.lines(name, "", ordered, unit="weight", chosen=found.configs[name].weight))
    write_text(directory / PAGE, figures.page(title, body))
    return directory / PAGE


def lines_of(found: Blending) -> list[str]:
    """The same as lines for a terminal."""
    labels = list(found.segments)
    lines = [f"{'validation NDCG@10':22}" + "".join(f"{label:>20}" for label in labels)]
    for name in found.singles:
        lines.append(f"{name:22}" + "".join(f"{found.segments[label][name]:>20.4f}" for label in labels))
    lines += [f"weight of {name}: {config.weight:g}{_said(config)}" for name, config in found.configs.items()]
    return lines


def _said(config: PriorConfig) -> str:
    if isinstance(config, ModelPrior) and config.transform == "log":
        return f" × ln(score / {config.scale:g} + {config.offset:g})"
    return ""


def _described(pools: Pools, weighing: Weighing, found: Blend, segments: Mapping[str, np.ndarray]) -> Blending:
    systems = {"blend": weighing.total(found.configs), BASE: pools.scores[BASE]}
    systems |= {name: pools.scores[name] for name, config in weighing.configs.items() if config.kind == "model"}
    values = {name: metric_values(pools.ranks(total), [10]) for name, total in systems.items()}
    return Blending(
        configs=found.configs,
        singles={name: {metric: float(v.mean()) for metric, v in each.items()} for name, each in values.items()},
        segments={
            label: {name: float(each["NDCG@10"][mask].mean()) for name, each in values.items()}
            for label, mask in segments.items()
            if mask.any()
        },
        curves=weighing.curves(found, segments),
        targets=len(pools.place),
    )


def _with_priors(
    manifest: Manifest, priors: Mapping[str, PriorConfig], metrics: Mapping[str, float], of: Mapping[str, Any]
) -> Manifest:
    shown = dict(priors)
    for name, config in priors.items():
        if isinstance(config, ModelPrior):  # the bundle holds the model, and this machine's paths say nothing elsewhere
            shown[name] = config.model_copy(update={"path": _reference(Path(config.path))})
    search = manifest.search.model_copy(update={"priors": shown})
    return manifest.model_copy(update={"search": search, "metrics": dict(metrics), **of})

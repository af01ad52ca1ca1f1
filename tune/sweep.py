"""`ilrec tune`: the driver of a sweep, from an experiment to the best trial's bundle and a report."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from objectives.config import ILRecConfig, needs_rewards
from recommender.config import PresetBackbone
from recommender.errors import UserError
from recommender.models import Version
from trainer.cluster import check_resources, connect
from trainer.collaborative.fit import ensure_collaborative, export_collaborative
from trainer.config import ClusterConfig, LanguageModelConfig
from trainer.data.dataset import Dataset
from trainer.experiment import Experiment
from trainer.fit import backbone_layers, check_model, export
from trainer.loop.launch import Trained, best_checkpoint, following
from trainer.parts import Prepared, Say
from trainer.prepare import prepare
from trainer.run import BEST, CHECKPOINTS, SWEEP, begin, version_of
from trainer.sweep_config import Choice, Grid, LogUniform, Parameter, SweepConfig
from tune.files import LOG, TRIALS
from tune.progress import METRIC, Progress
from tune.report import write_report
from tune.results import Trial, best_of, read_trials, write_best, write_trials
from tune.scheduler import ResumableAsha
from tune.space import check_sweep, epochs_of, trial_experiment
from tune.trial import Farewell, trainable


def sweep(experiment: Experiment, say: Say = print, fresh: bool = False) -> Version:
    """Train the sweep's trials on Ray, export the best one's best checkpoint as a bundle, write a report.

    A sweep that was interrupted goes on when called again: finished trials are kept, others go on from their latest
    checkpoint, and those that failed until then are tried again. A finished one is not repeated.

    Args:
        fresh: begin a new version, whatever there is.

    Returns:
        The version of the model. Beside its bundle lie `best.yaml` and `tune/`.

    Raises:
        UserError: the sweep cannot be run as it is written, the cluster is too small, or no trial has finished an
            epoch.
    """
    config, corners = check_sweep(experiment)
    if config.search == "optuna" and importlib.util.find_spec("optuna") is None:
        raise UserError("sweep.search: optuna is not installed; pip install 'ilrec[optuna]', or choose search: random")
    rewarded = [corner for corner in corners if _takes_rewards(corner)]
    owner = (rewarded or [experiment])[0]
    check_model(owner)
    _check_layers(experiment, corners)

    prepared = prepare(experiment, say)
    dataset = Dataset.load(prepared.dataset)
    if not len(dataset.targets["validation"].position):
        raise UserError("data: there is no validation target, and the best trial is chosen on them; add data")
    version = None if fresh else version_of(owner, dataset.fingerprint, config)
    if version is not None and version.is_complete:
        say(f"{version} is a finished sweep, of this config on these data; --fresh begins another version")
        return version
    connect()
    concurrent = concurrency(experiment.cluster, config)
    collaborative = ensure_collaborative(rewarded[0], prepared, say) if rewarded else None
    version = version or begin(owner, prepared, config, say)

    directory = version.directory / SWEEP
    directory.mkdir(exist_ok=True)
    epochs = max(map(epochs_of, corners))
    say(f"{config.total} trials, {concurrent} at once, of at most {epochs} epochs each")
    trial = trainable(experiment, directory / TRIALS, prepared, collaborative)
    try:
        with following(directory / LOG, say):
            results = _tuner(trial, config, epochs, directory, concurrent).fit()
    except KeyboardInterrupt:
        say("interrupted; the same command goes on")
        raise
    _conclude(experiment, version, prepared, read_trials(experiment, results, directory), say)
    return version


def _check_layers(experiment: Experiment, corners: list[Experiment]) -> None:
    """Refuse layers that the backbone does not have. (An experiment with a preset has been checked already.)"""
    if isinstance(experiment.backbone, PresetBackbone) and experiment.init_from is None:
        return
    layers = backbone_layers(experiment)
    for corner in corners:
        if isinstance(corner.objective, ILRecConfig):
            corner.objective.intermediate_layers(layers)


def concurrency(cluster: ClusterConfig, config: SweepConfig) -> int:
    """How many trials run at once: as configured, or as many as the connected Ray has room for.

    Raises:
        UserError: it has no room for that many, or for a single one.
    """
    check_resources(cluster, cluster.workers)
    if config.concurrent is not None:
        try:
            check_resources(cluster, cluster.workers * config.concurrent)
        except UserError as error:
            raise UserError(f"sweep.concurrent {config.concurrent}: {error}; or lower sweep.concurrent") from None
        return config.concurrent
    has = ray.cluster_resources()
    needs = {"CPU": cluster.cpus_per_worker * cluster.workers, "GPU": cluster.gpus_per_worker * cluster.workers}
    return min(config.total, *(int(has[resource] // need) for resource, need in needs.items() if need))


def _tuner(trial: Any, config: SweepConfig, epochs: int, directory: Path, concurrent: int) -> tune.Tuner:
    """Tune's driver: a new one, or the one that was interrupted in `directory`."""
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # trials that fail are reported by us
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the other one draws a table even where `verbose` is 0
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # else Ctrl-C looks like the end of the sweep
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "2")
    path = directory / TRIALS
    if tune.Tuner.can_restore(path):
        return tune.Tuner.restore(str(path), trial, resume_errored=True)
    return tune.Tuner(
        trial,
        param_space={path: _domain(parameter) for path, parameter in config.parameters.items()},
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="max",
            num_samples=config.trials or 1,
            scheduler=_scheduler(config, epochs),
            search_alg=_search(config, concurrent),
            max_concurrent_trials=concurrent if config.search == "optuna" else None,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=path.name,
            storage_path=str(directory),
            verbose=0,
            callbacks=[Progress(directory, config.total, epochs), Farewell(path)],
        ),
    )


def _domain(parameter: Parameter) -> Any:
    if isinstance(parameter, Grid):
        return tune.grid_search(list(parameter.values))
    if isinstance(parameter, Choice):
        return tune.choice(list(parameter.values))
    draw = tune.loguniform if isinstance(parameter, LogUniform) else tune.uniform
    return draw(parameter.low, parameter.high)


def _scheduler(config: SweepConfig, epochs: int) -> Any:
    if config.scheduler is None:
        return FIFOScheduler()
    return ResumableAsha(
        time_attr="epoch",
        max_t=epochs,
        grace_period=config.scheduler.grace_period,
        reduction_factor=config.scheduler.reduction_factor,
    )


def _search(config: SweepConfig, concurrent: int) -> Any:
    if config.search == "random":
        return BasicVariantGenerator(max_concurrent=concurrent, random_state=config.seed)
    from ray.tune.search.optuna import OptunaSearch

    return OptunaSearch(seed=config.seed)


def _name(trial: Any) -> str:
    return str(trial.trial_id)


def _conclude(experiment: Experiment, version: Version, prepared: Prepared, trials: list[Trial], say: Say) -> None:
    """Write what the sweep found: the trials, the report, the best one's config and, last, its bundle."""
    directory = version.directory / SWEEP
    failed = [trial for trial in trials if trial.outcome == "failed"]
    if failed:
        say(f"{len(failed)} of {len(trials)} trials failed, see {directory / 'report.html'}; --fresh tries all again")
    write_trials(trials, directory / "trials.json")
    best = best_of(trials)
    write_report(experiment.name, trials, directory / "report.html")
    write_best(experiment, best, len(trials), version.directory / BEST)
    trained = trial_experiment(experiment, best.parameters)
    checkpoint, metrics = best_checkpoint(ray.train.Result.from_path(directory / TRIALS / best.name / CHECKPOINTS))
    found = Trained(checkpoint, metrics, best.history)
    if isinstance(trained.recommender, LanguageModelConfig):
        export(trained, version, prepared, found)
    else:
        export_collaborative(trained, version, prepared, found)


def _takes_rewards(experiment: Experiment) -> bool:
    return isinstance(experiment.recommender, LanguageModelConfig) and needs_rewards(experiment.objective)

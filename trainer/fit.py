"""`ilrec train`: the driver of a Ray Train run, from a prepared experiment to a bundle."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from objectives.objective import build_objective
from recommender.backbone import PRESETS, count_layers
from recommender.bundle import Manifest
from recommender.config import PresetBackbone
from recommender.errors import UserError
from recommender.items import ItemSpace
from recommender.recommender import Recommender
from trainer import checkpoint
from trainer.cluster import check_resources, connect
from trainer.data.dataset import Dataset
from trainer.experiment import Experiment
from trainer.prepare import Say
from trainer.run import claim
from trainer.worker import SELECTION, TOO_LARGE, starting_backbone, train_worker


def train(experiment: Experiment, prepared: Path, say: Say = print, fresh: bool = False) -> Path:
    """Train on Ray and export the best checkpoint as a bundle.

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
    connect()
    check_resources(experiment.cluster, experiment.cluster.workers)
    check_objective(experiment)
    claim(experiment, dataset.fingerprint, fresh)
    log = experiment.run_dir / "train.log"
    with following(log, say):
        try:
            result: Any = torch_trainer(experiment, prepared, log).fit()  # Ray's stubs show the old Result
        except TrainingFailedError as error:
            if TOO_LARGE in str(error):
                raise UserError(TOO_LARGE) from error
            say("training failed; once the cause is mended, the same command goes on from the latest checkpoint")
            raise
    if result.return_value["error"]:
        raise UserError(result.return_value["error"])
    best = max(
        (entry for entry in result.best_checkpoints or [] if SELECTION in entry[1]),
        key=lambda entry: entry[1][SELECTION],
        default=None,
    )
    if best is None:
        raise UserError(f"{experiment.run_dir}: the run has no validated checkpoint; see the messages above")
    history = json.loads(result.metrics["history"])  # of the last epoch, so of all of them
    return export(experiment, prepared, best[0], best[1], history)


@contextmanager
def following(log: Path, say: Say) -> Iterator[None]:
    """Say every line that the workers append to `log` from now on, while the block runs."""
    log.touch()
    done = threading.Event()

    def follow() -> None:
        with log.open() as file:
            file.seek(0, os.SEEK_END)
            while True:
                last = done.is_set()
                while line := file.readline():
                    say(line.rstrip())
                if last:
                    return
                done.wait(0.5)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def torch_trainer(
    experiment: Experiment, prepared: Path, log: Path, worker: Callable[[dict[str, Any]], Any] = train_worker
) -> TorchTrainer:
    """The Ray Train job of an experiment: `worker` on every rank."""
    cluster = experiment.cluster
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    environment = {"OMP_NUM_THREADS": str(max(1, int(cluster.cpus_per_worker)))}
    if not cluster.gpus_per_worker:
        environment["DS_ACCELERATOR"] = "cpu"
    configuration: dict[str, Any] = {"worker_runtime_env": {"env_vars": environment}}  # not in Ray's stubs
    return TorchTrainer(
        worker,
        train_loop_config={"experiment": experiment.model_dump_json(), "prepared": str(prepared), "log": str(log)},
        torch_config=TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=cluster.workers, use_gpu=bool(cluster.gpus_per_worker), resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=str(experiment.run_dir),
            checkpoint_config=CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute=SELECTION, checkpoint_score_order="max"
            ),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            **configuration,
        ),
    )


def check_objective(experiment: Experiment) -> None:
    """Refuse, before any worker starts, an objective that the backbone cannot serve."""
    if experiment.init_from is not None:
        layers = count_layers(experiment.init_from, None)
    elif isinstance(experiment.backbone, PresetBackbone):
        layers = PRESETS[experiment.backbone.size].layers
    else:
        layers = count_layers(experiment.backbone.path, experiment.backbone.revision)
    build_objective(experiment.objective, layers)


def export(
    experiment: Experiment, prepared: Path, best: ray.train.Checkpoint, metrics: dict[str, Any], history: list[Any]
) -> Path:
    """Write the bundle of a checkpoint."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saving imports DeepSpeed, which looks for a device and warns
    space = ItemSpace.load(prepared / "items")
    backbone = starting_backbone(experiment, space)
    with best.as_directory() as directory:
        checkpoint.read_weights(Path(directory), backbone.model, prefix="model.")
    manifest = Manifest(
        name=experiment.name,
        search=experiment.search,
        backbone=experiment.backbone.model_dump(mode="json"),
        objective=experiment.objective.model_dump(mode="json"),
        data_fingerprint=Dataset.load(prepared / "dataset").fingerprint,
        metrics={name: float(metrics[name]) for name in ("validation_HR@10", "validation_NDCG@10")},
    )
    bundle = experiment.run_dir / "bundle"
    Recommender(space, backbone, manifest).save(bundle)
    (experiment.run_dir / "training.json").write_text(json.dumps(history, indent=2))
    return bundle

"""Ray Train jobs as an experiment's `cluster` section says, and what their workers have to tell."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.train import (
    Checkpoint,
    CheckpointConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.callback import RayTrainCallback

from recommender.errors import UserError
from trainer.experiment import Experiment
from trainer.loop.outcome import forget
from trainer.loop.storage import SELECTION, drop_damaged
from trainer.loop.worker import train_worker
from trainer.parts import Prepared, Say
from trainer.run import CHECKPOINTS, FAILURE


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


def _failure(error: TrainingFailedError, report: Path) -> str:
    """What ended a run; the workers' tracebacks go to `report`."""
    with suppress(OSError):  # a full disk may be what ended it
        report.write_text(str(error))
    causes = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    rank, cause = next(iter(causes.items()), (None, error))
    last = (str(cause).strip() or type(cause).__name__).splitlines()[-1]
    where = "" if rank is None else f" on worker {rank}, and cluster.max_failures restarts are used up"
    return (
        f"training failed{where}: {last}\nThe whole traceback: {report}. Once the cause is mended, the same command "
        "goes on from the latest checkpoint."
    )


@dataclass(frozen=True)
class Trained:
    """What a finished run leaves.

    Attributes:
        checkpoint: of the epoch with the best validation.
        metrics: of that epoch.
        history: of all epochs.
    """

    checkpoint: Checkpoint
    metrics: dict[str, Any]
    history: list[Any]

    @property
    def selection(self) -> dict[str, float]:
        """What the epoch was chosen by."""
        return {name: float(self.metrics[name]) for name in ("validation_HR@10", "validation_NDCG@10")}


def _run(trainer: TorchTrainer, log: Path, too_large: str) -> Any:
    """What Ray returns, its errors in words."""
    try:
        result: Any = trainer.fit()  # Ray's stubs show the old Result
    except SystemExit:  # Ray's way to end on Ctrl-C, with a status of 0
        raise KeyboardInterrupt from None
    except TrainingFailedError as error:
        if too_large in str(error):
            raise UserError(too_large) from error
        raise UserError(_failure(error, log.parent / FAILURE)) from error
    if result.return_value["error"]:
        raise UserError(result.return_value["error"])
    return result


def run_to_best(trainer: TorchTrainer, log: Path, say: Say, too_large: str) -> Trained:
    """Run a job to its end, saying what its workers log.

    Damaged checkpoints are passed over for the ones before; workers whose node goes away are started again elsewhere.

    Args:
        too_large: what a worker raises where memory is short, the remedy in it.

    Raises:
        UserError: training stopped; says why, and what to do.
    """
    checkpoints = log.parent / CHECKPOINTS
    forget(log)
    with following(log, say):
        drop_damaged(checkpoints, say)
        while True:
            try:
                result = _run(trainer, log, too_large)
                if not result.return_value["preempted"]:
                    break
                say("a node goes away; all is saved, going on without it")
            except KeyboardInterrupt:
                say("interrupted; the same command goes on from the latest checkpoint")
                raise
            except UserError:
                if not drop_damaged(checkpoints, say):  # one of which the workers, restarted, should have gone on
                    raise
    checkpoint, metrics = best_checkpoint(result)
    history = json.loads(result.metrics["history"])  # of the last epoch, so of all of them
    return Trained(checkpoint, metrics, history)


def best_checkpoint(result: Any) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint of the epoch with the best validation, and that epoch's metrics.

    Args:
        result: what Ray Train returned, or read from a run's directory.

    Raises:
        UserError: there is none.
    """
    found = [entry for entry in result.best_checkpoints or [] if SELECTION in entry[1]]
    if not found:
        raise UserError(f"{result.path}: the run has no validated checkpoint; see its messages")
    checkpoint, metrics = max(found, key=lambda entry: entry[1][SELECTION])
    return checkpoint, metrics


def torch_trainer(
    experiment: Experiment,
    prepared: Prepared,
    log: Path,
    worker: Callable[[dict[str, Any]], Any] = train_worker,
    collaborative: Path | None = None,
    callbacks: Sequence[RayTrainCallback] = (),
) -> TorchTrainer:
    """The Ray Train job of an experiment: `worker` on every rank, `callbacks` in its controller.

    Args:
        log: in the version's directory, where the checkpoints go as well.
    """
    cluster = experiment.cluster
    workers: Any = cluster.workers if cluster.min_workers is None else (cluster.min_workers, cluster.workers)
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    environment = {"OMP_NUM_THREADS": str(max(1, int(cluster.cpus_per_worker)))}
    if not cluster.gpus_per_worker:
        environment["DS_ACCELERATOR"] = "cpu"
    configuration: dict[str, Any] = {  # not in Ray's stubs
        "worker_runtime_env": {"env_vars": environment},
        "callbacks": list(callbacks),
    }
    return TorchTrainer(
        worker,
        train_loop_config={
            "experiment": experiment.model_dump_json(),
            "prepared": prepared,
            "log": str(log),
            "collaborative": None if collaborative is None else str(collaborative),
        },
        torch_config=TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers,  # Ray's stubs know no range
            use_gpu=bool(cluster.gpus_per_worker),
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=CHECKPOINTS,
            storage_path=str(log.parent),
            checkpoint_config=CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute=SELECTION, checkpoint_score_order="max"
            ),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            **configuration,
        ),
    )

"""The training loop of a collaborative model that every Ray Train worker runs, top to bottom.

Each rank adds up the gradients of its share of a step's windows; one all-reduce of gradients, loss and number of
targets later all ranks take the same step. So the outcome does not depend on the number of workers, but for dropout,
which each rank draws for itself.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from recommender.bundle import Manifest
from recommender.catalogue.catalogue import Catalogue
from recommender.collaborative.config import CollaborativeConfig, CollaborativeModelConfig
from recommender.collaborative.model import CollaborativeModel
from recommender.collaborative.recommender import CollaborativeRecommender, build_model
from recommender.errors import UserError
from recommender.files import write_json
from recommender.metrics import metric_values
from trainer.collaborative.step import RowAdamW, optimiser_step
from trainer.collaborative.texts import text_vectors
from trainer.collaborative.windows import TrainingWindows
from trainer.config import EvaluationConfig
from trainer.data.dataset import Dataset
from trainer.evaluation.ranking import HeldOut, held_out, ranks_of
from trainer.experiment import Experiment
from trainer.loop import preemption, storage
from trainer.loop.agreement import agreed
from trainer.loop.checkpoint import STATE_FILE
from trainer.loop.outcome import outcome_of, refuse_to_repeat
from trainer.loop.patience import patiently
from trainer.loop.storage import COLLABORATIVE, SELECTION
from trainer.loop.tensors import check_tensors, write_tensors
from trainer.loop.worker import Meter, Progress
from trainer.parts import Prepared
from trainer.reporting.curves import Curves
from trainer.reporting.tracking import Tracking

TOO_LARGE = (
    "The collaborative model does not fit into memory. Lower its dim, max_length or batch, or set negatives (say "
    "4096), so that targets no longer compete with all items."
)

_MOMENTS = ("exp_avg", "exp_avg_sq")


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Train until the last epoch, or until validation NDCG@10 has not risen for `patience` epochs.

    Args:
        config: `experiment` (JSON), `prepared` (where the data lie), `log` (a file for progress).

    Returns:
        How it ended, see `trainer/loop/outcome.py`.
    """
    experiment, log = Experiment.model_validate_json(config["experiment"]), Path(config["log"])
    return outcome_of(partial(_train, experiment, config["prepared"], log), log, TOO_LARGE)


def _train(experiment: Experiment, prepared: Prepared, log: Path) -> None:
    config = experiment.recommender
    assert isinstance(config, CollaborativeModelConfig)
    rank, world = dist.get_rank(), dist.get_world_size()
    device = ray.train.torch.get_device()
    say = Progress(log, rank)
    with agreed(device):  # a node may lack what others have
        refuse_to_repeat(log)
        dataset = Dataset.load(prepared.dataset)
    windows = TrainingWindows(dataset, config.max_length, config.batch, config.seed)
    torch.manual_seed(config.seed)
    model = fresh_model(config, dataset).to(device)
    optimiser = RowAdamW(model.parameters(), config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    catalogue = Catalogue(dataset.item_ids, dataset.titles)
    recommender = CollaborativeRecommender(catalogue, model, Manifest(name=experiment.name))
    split = held_out(dataset, "validation", experiment.evaluation.validation_targets)
    mine = split.take(np.arange(rank, len(split), world))
    weights = sum(parameter.numel() for parameter in model.parameters())
    say(f"{config.kind}: {weights:,} weights, {windows.targets:,} targets an epoch on {world} workers")

    state: dict[str, Any] = {"step": 0, "best": -1.0, "stale": 0, "epochs": []}
    resumed = ray.train.get_checkpoint()
    if resumed is not None:
        with resumed.as_directory() as directory:
            state = load(Path(directory), model, optimiser)
        say(f"resumed after epoch {len(state['epochs'])} of {config.epochs}")

    # A model with texts learns nothing against items that it has never seen.
    candidates = np.arange(model.items) if model.content is None else model.content.known.nonzero()[:, 0].cpu().numpy()
    curves = Curves(log.parent, rank, state["step"], Tracking(experiment, log.parent, say) if rank == 0 else None)
    while len(state["epochs"]) < config.epochs and state["stale"] < config.patience:
        number = len(state["epochs"])
        epoch = windows.epoch(number)
        started = said = time.monotonic()
        loss, counted = 0.0, 0.0
        for done, step in enumerate(epoch.steps, 1):
            torch.manual_seed((config.seed * 1_000_003 + state["step"]) * 1024 + rank)  # dropout, also after a resume
            negatives = None
            if config.negatives is not None:
                rng = np.random.default_rng([config.seed, number, done])
                drawn = rng.integers(0, len(candidates), config.negatives)
                negatives = torch.from_numpy(candidates[drawn])
            step_loss, step_counted = optimiser_step(
                model, optimiser, windows, epoch, step[rank::world], negatives, device
            )
            if not math.isfinite(step_loss):
                raise FloatingPointError(
                    f"the loss of step {state['step']} is not finite. The weights were not updated and the latest "
                    "checkpoint is good. Lower the model's learning_rate, then start over with --fresh."
                )
            state["step"] += 1
            loss, counted = loss + step_loss, counted + step_counted
            if time.monotonic() - said > Meter.EVERY:
                said = time.monotonic()
                say(f"epoch {number + 1}/{config.epochs} step {done}/{len(epoch.steps)}: loss {loss / counted:.4f}")
                curves.add("training", {"loss": loss / counted}, state["step"])
        trained = time.monotonic()
        metrics = validate(recommender, mine, experiment.evaluation, device)
        improved = metrics[SELECTION] > state["best"]
        state["best"] = max(state["best"], metrics[SELECTION])
        state["stale"] = 0 if improved else state["stale"] + 1
        found = {"loss": loss / counted, **metrics}
        found |= {"train_seconds": trained - started, "validation_seconds": time.monotonic() - trained}
        curves.add("epoch", found, state["step"])
        summary = {"epoch": number + 1, "step": state["step"], **found}
        state["epochs"].append(summary)
        say(
            f"epoch {number + 1}/{config.epochs}: loss {summary['loss']:.4f} in {summary['train_seconds']:.1f} s, "
            f"validation NDCG@10 {metrics[SELECTION]:.4f} in {summary['validation_seconds']:.1f} s"
            + (" (best so far)" if improved else "")
        )
        report(model, optimiser, state, log)
        preemption.leave_if_noticed(device)
    curves.close()


def fresh_model(config: CollaborativeConfig, dataset: Dataset) -> CollaborativeModel:
    """A model before its first step, weights drawn from torch's global generator.

    Raises:
        UserError: it is to learn from texts, and the items have none.
    """
    model = build_model(config, len(dataset.item_ids))
    if config.content is not None:
        texts = text_vectors(config.content, dataset)
        model.learn_texts(torch.from_numpy(texts), torch.from_numpy(dataset.popularity() > 0))
    return model


def validate(
    recommender: CollaborativeRecommender, mine: HeldOut, evaluation: EvaluationConfig, device: torch.device
) -> dict[str, float]:
    """HR@10 and NDCG@10 of the validation targets among all items, of which this rank ranks `mine`. Collective."""
    recommender.model.eval()
    ranking = ranks_of(recommender, mine, 10, evaluation.exclude_seen, evaluation.batch)
    values = metric_values(ranking.ranks, [10])
    sums = torch.tensor([len(mine), *(v.sum() for v in values.values())], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    count, *totals = sums.tolist()
    return {f"validation_{name}": total / count for name, total in zip(values, totals, strict=True)}


def report(model: CollaborativeModel, optimiser: torch.optim.Optimizer, state: dict[str, Any], log: Path) -> None:
    """Report an epoch to Ray; rank 0 adds a checkpoint. Collective."""
    name = f"epoch-{len(state['epochs']):05d}"
    if dist.get_rank() != 0:
        storage.report(None, name, state, Progress(log))
        return
    with tempfile.TemporaryDirectory() as directory:
        save(Path(directory), model, optimiser, state, Progress(log))
        storage.report(Path(directory), name, state, Progress(log))


def save(
    directory: Path,
    model: CollaborativeModel,
    optimiser: torch.optim.Optimizer,
    state: dict[str, Any],
    say: Callable[[str], None] = print,
) -> None:
    """Write weight/NAME, exp_avg/NAME, exp_avg_sq/NAME of every parameter, and the state as JSON."""
    tensors = {f"weight/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{moment}/{name}": optimiser.state[parameter][moment] for moment in _MOMENTS}
    write_tensors({name: tensor.cpu() for name, tensor in tensors.items()}, directory / COLLABORATIVE, say)
    patiently(lambda: write_json(directory / STATE_FILE, state), lambda: None, STATE_FILE, say)


@torch.no_grad()
def load(directory: Path, model: CollaborativeModel, optimiser: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Restore weights and, with an optimiser, its moments; return the state that was saved."""
    state: dict[str, Any] = json.loads((directory / STATE_FILE).read_text())
    try:
        check_tensors(directory / COLLABORATIVE)
    except ValueError as error:
        raise UserError(f"{directory}: this checkpoint is damaged: {error}") from None
    tensors = load_file(directory / COLLABORATIVE)
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[f"weight/{name}"])
        if optimiser is not None:
            moments = {moment: tensors[f"{moment}/{name}"].to(parameter.device) for moment in _MOMENTS}
            optimiser.state[parameter] = {"step": torch.tensor(float(state["step"])), **moments}
    return state

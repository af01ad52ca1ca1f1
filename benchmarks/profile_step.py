"""Where the time of a training step goes, by part.

    python -m benchmarks.profile_step --config configs/office.yaml
    python -m benchmarks.profile_step --config configs/games.yaml --set backbone.size=small --set objective.kind=lml

Optimiser steps of the training loop, with DeepSpeed, on one worker in this process, spread over the first epoch, under
torch.profiler, which stretches short operations. A part has the time of all operations and all Python inside it that no
other part claims.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.packing import start_alone
from objectives.config import needs_rewards
from objectives.objective import build_objective
from recommender.backbone.tree import Batch
from recommender.errors import UserError
from recommender.items.item_space import ItemSpace
from trainer.config import LanguageModelConfig
from trainer.data.dataset import Dataset
from trainer.experiment import Experiment, load_experiment
from trainer.loop.module import TrainedModel
from trainer.loop.plan import BatchPlan, Step
from trainer.loop.rows import TrainingRows
from trainer.prepare import prepare

ROWS, MASK, HEAD, OPTIMISER = "rows, batches, blocks", "masks", "objective and its gradient", "optimiser (DeepSpeed)"
PRODUCTS, HEAD_PRODUCTS = "matrix products of the backbone", "matrix products of the prediction layer"
ATTENTION, OTHER = "attention", "norms, activations, all else of the model"
OUTSIDE = "loop, DeepSpeed around the passes"
PARTS = (PRODUCTS, ATTENTION, OTHER, HEAD_PRODUCTS, HEAD, OPTIMISER, ROWS, MASK, OUTSIDE)
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul")


@contextmanager
def marked(engine: Any) -> Iterator[None]:
    """Name the parts of a step for the profiler."""
    from trainer.loop import module, worker

    places = [
        (worker, "micro_batch", ROWS),
        (module, "objective_sums", HEAD),
        (Batch, "attention_mask", MASK),
        (TrainedModel, "forward", OTHER),
        (torch.Tensor, "backward", OTHER),
        (engine, "step", OPTIMISER),
    ]
    with ExitStack() as stack:
        for owner, name, part in places:
            stack.enter_context(patch.object(owner, name, named(getattr(owner, name), part)))
        yield


def named(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(part):
            return function(*args, **kwargs)

    return run


def part_of(event: Any) -> str:
    """The part that an operation's own time belongs to."""
    inside = event
    while inside is not None and inside.name not in PARTS:
        inside = inside.cpu_parent
    scope = OUTSIDE if inside is None else inside.name
    if event.name in _PRODUCTS:
        return {HEAD: HEAD_PRODUCTS, OTHER: PRODUCTS}.get(scope, scope)
    return ATTENTION if scope == OTHER and "attention" in event.name.lower() else scope


def profiled(run: Callable[[], object], engine: Any) -> dict[str, Counter[str]]:
    """Milliseconds of a run by part and operation."""
    with marked(engine), profile(activities=[ProfilerActivity.CPU]) as profiler, record_function(OUTSIDE):
        run()
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for event in profiler.events() or ():
        found[part_of(event)][event.name] += event.self_cpu_time_total / 1e3
    return found


def table(found: dict[str, Counter[str]], steps: int, title: str) -> Table:
    made = Table("part", "ms a step", "share", "most of it", title=title)
    whole = sum(sum(times.values()) for times in found.values())
    for part in PARTS:
        times = found.get(part, Counter())
        own = sum(times.values())
        most = [(name.removeprefix("aten::"), ms / whole) for name, ms in times.most_common(3)]
        named_most = ", ".join(f"{'Python' if name == part else name} {share:.1%}" for name, share in most)
        made.add_row(part, f"{own / steps:.1f}", f"{own / whole:.1%}", named_most)
    made.add_row("all", f"{whole / steps:.1f}", "", "")
    return made


def load(config: str, overrides: list[str]) -> tuple[Experiment, Dataset, ItemSpace]:
    """An experiment and its data, prepared.

    Raises:
        UserError: it takes rewards, whose model would have to be trained first.
    """
    experiment = load_experiment(config, overrides)
    if needs_rewards(experiment.objective):
        raise UserError("objective: takes rewards, whose model is not trained here; set objective.crr_weight=0")
    own = {"name": f"profile-{experiment.name}", "recommender": LanguageModelConfig()}
    prepared = prepare(experiment.model_copy(update=own))
    return experiment, Dataset.load(prepared.dataset), ItemSpace.load(prepared.items)


def engine_alone(experiment: Experiment, space: ItemSpace) -> tuple[Any, TrainedModel]:
    """What the only rank of a training loop trains with, and the module in it."""
    start_alone("cpu")
    from trainer.loop.engine import build_engine, set_learning_rate
    from trainer.loop.worker import starting_backbone

    training = experiment.training
    backbone = starting_backbone(experiment, space)
    objective = build_objective(experiment.objective, backbone.num_layers, space.trie)
    memory_mb = training.logits_memory_mb or 256
    module = TrainedModel(backbone, objective, space.trie, training.dropout, None, memory_mb)
    engine = build_engine(module, training)
    set_learning_rate(engine, training.learning_rate)
    return engine, module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/office.yaml", help="an experiment")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of the experiment")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        experiment, dataset, space = load(args.config, args.set)
    except UserError as error:
        parser.error(str(error))
    training, (engine, module) = experiment.training, engine_alone(experiment, space)
    from trainer.loop.worker import optimiser_step

    rows = TrainingRows(dataset, space, training, module.objective.branching_only)
    planned = BatchPlan(rows.lengths, rows.counted, training.batch_tokens, training.seed).epoch(0)
    steps = [planned[at] for at in np.linspace(0, len(planned) - 1, args.steps).astype(int)]

    def run(some: list[Step]) -> None:
        for step in some:
            optimiser_step(engine, module, step, rows)

    run(steps[:2])
    tokens = sum(int(rows.lengths[step.rows].sum()) for step in steps) // len(steps)
    title = f"{experiment.name}, {experiment.objective.kind}, {training.precision}: {tokens:,} tokens a step"
    Console(width=160).print(table(profiled(lambda: run(steps), engine), len(steps), title))


if __name__ == "__main__":
    main()

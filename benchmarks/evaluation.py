"""What full ranking costs beside a training epoch of the same backbone.

    python -m benchmarks.evaluation --config configs/games.yaml --set backbone.size=small

Contenders take turns in one process; on a CPU, seconds are the process's own CPU seconds. Nothing is trained before: a
trained model may need fewer nodes to prove a list.

- Evaluation: the largest of `evaluation.cutoffs` items for a seeded sample of test targets, as `ilrec evaluate` ranks
  them, in each precision and batch.
- Training: a few optimiser steps of an epoch, from short rows to long ones, through the training loop, under both
  history rules, with the experiment's objective and `training.precision`.

Whole splits and epochs are extrapolated, by targets and by tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.packing import RULES, under
from benchmarks.profile_step import engine_alone, load
from benchmarks.timing import in_turns, ratio, spread
from recommender.backbone.backbone import load_backbone
from recommender.bundle import Manifest
from recommender.errors import UserError
from recommender.items.item_space import ItemSpace
from recommender.recommender import Recommender
from trainer.data.dataset import Dataset
from trainer.evaluation.ranking import HeldOut, Ranking, held_out, ranks_of
from trainer.experiment import Experiment
from trainer.loop.module import dtype_of
from trainer.loop.plan import BatchPlan, Step
from trainer.loop.rows import TrainingRows

PRECISIONS = ("float32", "bfloat16")


@dataclass
class Contender:
    """Work whose seconds tell those of a whole.

    Attributes:
        part, whole: targets that are ranked, or tokens that are trained on, and all there are.
        run: does the part.
        ranking: of the latest run, where it ranks.
    """

    name: str
    part: int
    whole: int
    run: Callable[[], Ranking | None]
    ranking: Ranking | None = None

    def __call__(self) -> None:
        self.ranking = self.run()


def evaluations(
    experiment: Experiment, space: ItemSpace, targets: HeldOut, whole: int, batches: Sequence[int]
) -> list[Contender]:
    """Ranking the targets in each precision and batch."""
    k, made = max(experiment.evaluation.cutoffs), []
    for precision in PRECISIONS:
        backbone = load_backbone(experiment.backbone, space.tokenizer, dtype_of(precision), experiment.training.seed)
        backbone.model.eval()
        recommender = Recommender(space, backbone, Manifest(name=experiment.name, search=experiment.search.unblended()))
        for batch in batches:
            run = partial(ranks_of, recommender, targets, k, experiment.evaluation.exclude_seen, batch)
            made.append(Contender(f"evaluation, {precision}, batches of {batch}", len(targets), whole, run))
    return made


def epochs(experiment: Experiment, dataset: Dataset, space: ItemSpace, steps: int) -> list[Contender]:
    """Optimiser steps on rows of each history rule, drawn from an epoch's plan. The rules share weights and engine."""
    training, (engine, module) = experiment.training, engine_alone(experiment, space)
    from trainer.loop.worker import optimiser_step

    made = []
    for rule in RULES:
        rows = TrainingRows(dataset, space, under(training, rule), module.objective.branching_only)
        plan = BatchPlan(rows.lengths, rows.counted, training.batch_tokens, training.seed).epoch(0)
        by_length = sorted(plan, key=lambda step: rows.lengths[step.rows].mean())
        chosen = [by_length[(2 * n + 1) * len(plan) // (2 * steps)] for n in range(steps)]  # short, middling, long rows

        def run(rows: TrainingRows = rows, chosen: Sequence[Step] = chosen) -> None:
            for step in chosen:
                optimiser_step(engine, module, step, rows)

        tokens = sum(int(rows.lengths[step.rows].sum()) for step in chosen)
        made.append(Contender(f"a training epoch, {rule}", tokens, int(rows.lengths.sum()), run))
    return made


def seconds_table(made: Sequence[Contender], seconds: Sequence[Sequence[float]]) -> Table:
    """The wholes in minutes, and beside the epochs, which come last."""
    table = Table(
        "", "part", "whole", "s of the part min/median/max", "minutes of the whole", "ms each",
        *(f"x {each.name}" for each in made[-len(RULES) :]), "nodes", "exact", title="extrapolated",
    )  # fmt: skip
    wholes = [[s * each.whole / each.part for s in own] for each, own in zip(made, seconds, strict=True)]
    for each, own, whole in zip(made, seconds, wholes, strict=True):
        cells = [each.name, f"{each.part:,}", f"{each.whole:,}", spread(own), spread([s / 60 for s in whole], ".1f")]
        cells.append(spread([1e3 * s / each.part for s in own], ".3g"))
        cells += [f"{ratio(whole, epoch):.2f}" for epoch in wholes[-len(RULES) :]]
        if each.ranking is not None:
            cells += [f"{each.ranking.expansions.mean():.1f}", f"{each.ranking.exact.mean():.1%}"]
        table.add_row(*cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/games.yaml", help="an experiment")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of the experiment")
    parser.add_argument("--targets", type=int, default=192, help="of the test split, a seeded sample")
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--steps", type=int, default=5, help="of each history rule")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        experiment, dataset, space = load(args.config, args.set)
    except UserError as error:
        parser.error(str(error))
    targets = held_out(dataset, "test", args.targets)
    whole = len(dataset.targets["test"].position)
    made = evaluations(experiment, space, targets, whole, args.batch)
    made += epochs(experiment, dataset, space, args.steps)
    console = Console(width=190)
    console.print(
        f"{len(targets)} of {whole:,} test targets, {len(space.catalogue):,} items; {experiment.objective.kind}, steps "
        f"of {experiment.training.batch_tokens:,} tokens; {args.threads} threads, {args.repeats} rounds in turns"
    )
    console.print(seconds_table(made, in_turns(made, args.repeats, "cpu")))


if __name__ == "__main__":
    main()

"""The training loop that every Ray Train worker runs, top to bottom.

All ranks make the same sequence of collective calls: the same number of micro-batches, of reports.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from objectives.config import ILRecConfig, ObjectiveConfig
from objectives.objective import build_objective
from objectives.rewards import RewardSource
from recommender.backbone.backbone import Backbone, load_backbone
from recommender.backbone.flex import choose_attention
from recommender.backbone.tree import Row, collate, padded_length
from recommender.bundle import Manifest
from recommender.collaborative.recommender import load_model
from recommender.errors import UserError
from recommender.items.item_space import ItemSpace
from recommender.metrics import metric_values
from recommender.probe import check_tree, flex_fault
from recommender.recommender import Recommender, starting_point
from trainer.config import TrainingConfig
from trainer.data.dataset import Dataset
from trainer.evaluation.ranking import held_out, ranks_of
from trainer.experiment import Experiment
from trainer.loop import checkpoint, preemption, storage
from trainer.loop.agreement import agreed
from trainer.loop.engine import build_engine, copy_weights, loss_scale, set_learning_rate
from trainer.loop.module import MicroBatch, TrainedModel, dtype_of
from trainer.loop.outcome import outcome_of, refuse_to_repeat
from trainer.loop.plan import BatchPlan, Step
from trainer.loop.rows import TrainingRows
from trainer.loop.storage import SELECTION
from trainer.parts import Prepared
from trainer.reporting.curves import Curves
from trainer.reporting.tracking import Tracking

NOT_FINITE = (
    "The weights were not updated and the latest checkpoint is good. Lower training.learning_rate or the objective's "
    "strengths, or use training.precision: float32; then start over with --fresh."
)

TOO_LARGE = (
    "The step with the longest row runs first, and it does not fit. Raise training.accumulation, lower "
    "training.batch_tokens, training.logits_memory_mb or prompt.history, set training.gradient_checkpointing: true, or "
    "use a higher training.zero_stage with more workers."
)


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Train until the last epoch, or until validation NDCG@10 has not risen for `patience` epochs.

    Args:
        config: `experiment` (JSON), `prepared` (where the data lie), `log` (a file for progress), `collaborative`
            (the bundle of the model that rewards come from, or None).

    Returns:
        How it ended, see `trainer/loop/outcome.py`.
    """
    experiment, log = Experiment.model_validate_json(config["experiment"]), Path(config["log"])
    train = partial(_train, experiment, config["prepared"], log, config["collaborative"])
    return outcome_of(train, log, TOO_LARGE)


def _train(experiment: Experiment, prepared: Prepared, log: Path, collaborative: str | None) -> None:
    training = experiment.training
    rank, world = dist.get_rank(), dist.get_world_size()
    device = ray.train.torch.get_device()
    say = Progress(log, rank)
    with agreed(device):  # a node may lack what others have
        refuse_to_repeat(log)
        dataset, space = Dataset.load(prepared.dataset), ItemSpace.load(prepared.items)
        backbone = starting_backbone(experiment, space)
        backbone.to(device)
        choose_attention(backbone, training.attention)
        objective = build_objective(experiment.objective, backbone.num_layers, space.trie)
        rows = TrainingRows(dataset, space, training, objective.branching_only)
        longest = longest_path(backbone, rows)
        check_tree(backbone, longest)
        if (fault := flex_fault(backbone, longest)) is not None:
            if training.attention == "flex":
                raise UserError(f"training.attention: flex: {fault}; use auto")
            backbone.blocks_from = None
            say(f"training.attention: {fault}; SDPA computes all rows")
        rewards = reward_source(experiment.objective, space, collaborative, device)
    if training.gradient_checkpointing:
        backbone.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    memory_mb = training.logits_memory_mb or (2048 if device.type == "cuda" else 256)
    module = TrainedModel(backbone, objective, space.trie, training.dropout, rewards, memory_mb)
    engine = build_engine(module, training)
    plan = BatchPlan(rows.lengths, rows.counted, training.batch_tokens, training.seed)
    total_steps = plan.steps_per_epoch * training.epochs
    say(
        f"{len(rows.targets)} targets in {len(rows)} rows, {rows.lengths.sum()} tokens an epoch; "
        f"{plan.steps_per_epoch} steps an epoch on {world} workers, longest row {rows.lengths.max()} tokens"
    )

    state: dict[str, Any] = {"step": 0, "best": -1.0, "stale": 0, "sums": {}, "epochs": [], "objective": {}}
    resumed = ray.train.get_checkpoint()
    if resumed is not None:
        with resumed.as_directory() as directory:
            state = checkpoint.load(engine, Path(directory))
        objective.state = state.get("objective", objective.state)
        say(f"resumed at step {state['step']} of {total_steps}")

    curves = Curves(log.parent, rank, state["step"], Tracking(experiment, log.parent, say) if rank == 0 else None)
    started, first_step = time.monotonic(), state["step"]
    while state["step"] < total_steps and state["stale"] < training.patience:
        epoch = state["step"] // plan.steps_per_epoch
        steps = heaviest_first(plan.epoch(epoch), rows.lengths) if epoch == 0 else plan.epoch(epoch)
        meter = Meter(
            say, curves, state["sums"], training.epochs, plan.steps_per_epoch, total_steps, first_step, started
        )
        for step in steps[state["step"] % plan.steps_per_epoch :]:
            torch.manual_seed((training.seed * 1_000_003 + state["step"]) * 1024 + rank)  # dropout, also after a resume
            rate = learning_rate(training, state["step"], total_steps)
            set_learning_rate(engine, rate)
            means = objective.advance(optimiser_step(engine, module, step, rows), step.counted)
            if not math.isfinite(means["loss"]):
                raise_non_finite(state["step"], step, means)
            state["step"] += 1
            state["objective"] = objective.state
            meter.update(state["step"], step, int(rows.lengths[step.rows].sum()), means, rate)
            inside = state["step"] % plan.steps_per_epoch
            due = preemption.noticed(engine.device) or (
                training.checkpoint_every is not None and inside % training.checkpoint_every == 0
            )
            if due and inside:
                report(engine, state, log)
        metrics = validate(engine, experiment, space, dataset)
        improved = metrics[SELECTION] > state["best"]
        state["best"] = max(state["best"], metrics[SELECTION])
        state["stale"] = 0 if improved else state["stale"] + 1
        found = meter.epoch_means() | metrics
        curves.add("epoch", found, state["step"])
        summary = {"epoch": epoch + 1, "step": state["step"], **found}
        state["epochs"], state["sums"] = [*state["epochs"], summary], {}
        say(
            f"epoch {epoch + 1}/{training.epochs}: loss {summary['loss']:.4f} in {summary['train_seconds']:.0f} s, "
            f"validation NDCG@10 {metrics[SELECTION]:.4f} in {metrics['validation_seconds']:.0f} s"
            + (" (best so far)" if improved else "")
        )
        report(engine, state, log)
    curves.close()


def starting_backbone(experiment: Experiment, space: ItemSpace) -> Backbone:
    """The backbone before its first step: of `init_from`'s bundle, or as `backbone` says. Equal on all ranks."""
    dtype, seed = dtype_of(experiment.training.precision), experiment.training.seed
    if experiment.init_from is None:
        return load_backbone(experiment.backbone, space.tokenizer, dtype, seed)
    return starting_point(experiment.init_from, experiment.backbone.lora, dtype, seed, space.tokenizer)


def reward_source(
    objective: ObjectiveConfig, space: ItemSpace, collaborative: str | None, device: torch.device
) -> RewardSource | None:
    """Where the objective's token rewards come from, if it takes any: the collaborative model's bundle."""
    if collaborative is None or not isinstance(objective, ILRecConfig):
        return None
    return RewardSource(load_model(collaborative, str(device)), space.trie, objective.crr_items)


def longest_path(backbone: Backbone, rows: TrainingRows) -> int:
    """Tokens of the longest prompt and response, padded as rows are.

    Raises:
        UserError: the backbone cannot read that many.
    """
    longest = padded_length(int(rows.sample_lengths.max()))
    if longest > backbone.context:
        raise UserError(
            f"the longest prompt has {longest} tokens, the backbone reads {backbone.context}; lower prompt.history or "
            "identifier.max_tokens"
        )
    return longest


def heaviest_first(steps: list[Step], lengths: np.ndarray) -> list[Step]:
    """The preflight: the step with the longest row opens the run, so that what does not fit fails at once."""
    heaviest = max(range(len(steps)), key=lambda i: int(lengths[steps[i].rows].max()))
    return [steps[heaviest], *steps[:heaviest], *steps[heaviest + 1 :]]


def learning_rate(training: TrainingConfig, step: int, total: int) -> float:
    """The rate of optimiser step `step` (0-based): linear warm-up, then the schedule down to 0."""
    warmup = round(training.warmup * total)
    if step < warmup:
        return training.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return training.learning_rate * factor[training.schedule]


def optimiser_step(engine: Any, module: TrainedModel, step: Step, rows: TrainingRows) -> dict[str, float]:
    """Run one step of the plan: every micro-batch forward and backward, then the update.

    The loss is Σ over counted positions of the global batch / their number; each micro-batch contributes its own share
    of that, scaled by what DeepSpeed divides by.

    Returns:
        Sums over the global batch of everything that the objective computes. Where the loss is not finite, the weights
        have not been touched.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    engine.train()
    totals: torch.Tensor | None = None
    names: list[str] = []
    micro_batches = step.micro_batches(world, engine.gradient_accumulation_steps())
    for number, ranks in enumerate(micro_batches):
        loss = engine(micro_batch(module, rows, ranks[rank]))
        engine.backward(loss * (loss_scale(engine) / max(step.counted, 1)))
        names = sorted(module.sums)
        values = torch.stack([module.sums[name].double() for name in names])
        totals = values if totals is None else totals + values
        if number == len(micro_batches) - 1:
            dist.all_reduce(totals)
            if not totals[names.index("loss")].isfinite():
                break
        engine.step()
    assert totals is not None
    sums = dict(zip(names, totals.tolist(), strict=True))
    if math.isfinite(sums["loss"]) and not engine.was_step_applied():
        raise FloatingPointError(f"the loss is finite, its gradients are not. {NOT_FINITE}")
    return sums


def micro_batch(module: TrainedModel, rows: TrainingRows, numbers: np.ndarray) -> MicroBatch:
    """Rows as a forward takes them; a rank without any runs the shortest with nothing to predict, to stay in step."""
    if len(numbers):
        chosen = [rows[number] for number in numbers]
    else:
        row, nothing = rows[int(rows.lengths.argmin())], np.empty(0, np.int32)
        chosen = [Row(row.tokens, row.end, row.depth, nothing, nothing, nothing, nothing)]
    backbone = module.backbone
    batch = collate(chosen, backbone.padding, module.objective.branching_only, blocks_from=backbone.blocks_from)
    return module.micro_batch(batch, rows.histories(numbers) if module.reward_source is not None else None)


def validate(engine: Any, experiment: Experiment, space: ItemSpace, dataset: Dataset) -> dict[str, float]:
    """HR@10 and NDCG@10 on the validation targets, each rank searching its share on unsharded weights."""
    rank, world = dist.get_rank(), dist.get_world_size()
    started = time.monotonic()
    backbone = unsharded(engine, experiment, space)
    objective = engine.module.objective
    manifest = Manifest(
        name=experiment.name,
        search=experiment.search.unblended(),
        temperature=objective.temperature,
        score="valid" if objective.valid_only else "full",
    )
    recommender = Recommender(space, backbone, manifest)
    evaluation = experiment.evaluation
    split = held_out(dataset, "validation", evaluation.validation_targets)
    mine = np.arange(rank, len(split), world)
    ranking = ranks_of(recommender, split.take(mine), 10, evaluation.exclude_seen, evaluation.batch)
    values = metric_values(ranking.ranks, [10])
    totals = torch.tensor(
        [len(mine), ranking.exact.sum(), *(v.sum() for v in values.values())], dtype=torch.float64
    ).to(engine.device)
    dist.all_reduce(totals)
    count, exact, *sums = totals.tolist()
    metrics = {f"validation_{name}": total / count for name, total in zip(values, sums, strict=True)}
    return metrics | {"validation_exact": exact / count, "validation_seconds": time.monotonic() - started}


def unsharded(engine: Any, experiment: Experiment, space: ItemSpace) -> Backbone:
    """A backbone with whole weights for search: the trained module itself, or under ZeRO-3 a copy gathered by name."""
    module: TrainedModel = engine.module
    if engine.zero_optimization_stage() < 3:
        return module.backbone
    replica = TrainedModel(starting_backbone(experiment, space), module.objective, module.trie)
    copy_weights(engine, replica)
    replica.to(engine.device)
    return replica.backbone


def report(engine: Any, state: dict[str, Any], log: Path) -> None:
    """Save a checkpoint, each rank its share, and report it with the state's metrics. Collective.

    Raises:
        Preempted: a node of the run goes away.
    """
    with tempfile.TemporaryDirectory() as directory:
        checkpoint.save(engine, Path(directory), state, Progress(log))
        storage.report(Path(directory), f"step-{state['step']:08d}", state, Progress(log))
    preemption.leave_if_noticed(engine.device)


def raise_non_finite(number: int, step: Step, sums: dict[str, float]) -> None:
    """The policy for a loss that is not finite: stop before the weights are touched."""
    raise FloatingPointError(
        f"the loss of step {number} is not finite: {sums} (rows {step.rows[:5].tolist()}…). {NOT_FINITE}"
    )


class Progress:
    """Lines of progress from rank 0: into the run's log, which the driver shows, and to the worker's own output.

    A log that cannot be written stops nothing: a full disk is dealt with where a checkpoint is saved.
    """

    def __init__(self, log: Path, rank: int = 0):
        self._log = log if rank == 0 else None

    def __call__(self, text: str) -> None:
        if self._log is not None:
            print(text, flush=True)
            with suppress(OSError), self._log.open("a") as file:
                file.write(text + "\n")


class Meter:
    """Throughput, loss and time left, said and drawn every few seconds, and an epoch's means.

    Args:
        sums: of the epoch so far, by name, and "counted", what they are divided by; added to in place. Checkpoints hold
            them, so that the means of an interrupted epoch are those of the whole.
    """

    EVERY = float(os.environ.get("ILREC_PROGRESS_SECONDS", "10"))

    def __init__(
        self,
        say: Progress,
        curves: Curves,
        sums: dict[str, float],
        epochs: int,
        per_epoch: int,
        total: int,
        first: int,
        started: float,
    ):
        self._say, self._curves, self._sums, self._epochs = say, curves, sums, epochs
        self._per_epoch, self._total, self._first, self._started = per_epoch, total, first, started
        self._begin = self._said = time.monotonic()
        self._tokens = 0

    def update(self, done: int, step: Step, tokens: int, means: dict[str, float], rate: float) -> None:
        self._tokens += tokens
        for name, mean in {"counted": 1.0, **means}.items():
            self._sums[name] = self._sums.get(name, 0.0) + mean * step.counted
        now = time.monotonic()
        if now - self._said >= self.EVERY:
            self._said = now
            throughput = self._tokens / (now - self._begin)
            left = (now - self._started) / max(done - self._first, 1) * (self._total - done) / 60
            self._say(
                f"epoch {(done - 1) // self._per_epoch + 1}/{self._epochs} step {done}/{self._total}: loss "
                f"{means['loss']:.4f}, {throughput:,.0f} tokens/s, at most {left:.1f} min left"
            )
            drawn = {"learning_rate": rate, "tokens_per_second": throughput}
            self._curves.add("training", means | drawn, done)

    def epoch_means(self) -> dict[str, float]:
        seconds = time.monotonic() - self._begin
        counted = max(self._sums["counted"], 1.0)
        means = {name: total / counted for name, total in self._sums.items() if name != "counted"}
        return means | {"train_seconds": seconds, "tokens_per_second": self._tokens / seconds}

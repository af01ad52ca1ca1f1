"""What tree rows save over one row a target: tokens, padding and seconds an epoch; and what their masks cost.

    python -m benchmarks.packing --config configs/games.yaml                     # the compact prompt: no masks at all
    python -m benchmarks.packing --config configs/games.yaml --set prompt.template=games     # each target is a branch
    python -m benchmarks.packing --config configs/ml1m.yaml --users 6            # long sequences: few users will do
    python -m benchmarks.packing --config configs/office.yaml --only-counts

1. Counts, over the whole dataset: rows and tokens under both history rules; padding in the batches of the plan, where
   similar lengths meet, and in batches of as many rows drawn at random.
2. Seconds of an epoch over the training targets of a few users, in turns in one process: tree rows and plain rows (one
   target each) through the training loop, and the plain rows through Hugging Face's Trainer, which pads them by
   length groups. The weights, the optimiser, the targets and the number of optimiser steps are the same, so every step
   has as many targets; the objective is LML, the one that the Trainer has. The first step's loss is printed for all
   three, on the same targets and weights. On a CPU, seconds are the process's own CPU seconds. Few users make few
   batches, and then the Trainer's length groups are no more than a batch: look at its padding.
3. The mask: seconds to build it and forward and backward with it and without it (which computes something else).

"follows" is the time ratio over the token ratio: 1.00 where seconds fall as tokens do.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import in_turns, milliseconds, ratio, spread
from objectives.config import LMLConfig
from objectives.objective import build_objective
from recommender.backbone.backbone import Backbone, load_backbone
from recommender.backbone.flex import choose_attention
from recommender.backbone.tree import PADDING_MULTIPLE, Row, padded_length
from recommender.errors import UserError
from recommender.items.item_space import ItemSpace
from trainer.config import LanguageModelConfig, TrainingConfig
from trainer.data.dataset import Dataset
from trainer.data.splits import Targets
from trainer.experiment import Experiment, load_experiment
from trainer.loop.module import MicroBatch, TrainedModel, dtype_of
from trainer.loop.plan import BatchPlan, Step
from trainer.loop.rows import TrainingRows
from trainer.prepare import prepare

RULES = ("sliding", "anchored")

# ---- Counts ----------------------------------------------------------------------------------------------------------


def padded(batches: Iterable[np.ndarray], lengths: np.ndarray) -> int:
    """Tokens of batches of rows, padding included."""
    return sum(len(rows) * padded_length(int(lengths[rows].max())) for rows in batches)


def padding(lengths: np.ndarray, batch_tokens: int) -> tuple[float, float]:
    """Share of padding among all tokens: in the plan's batches, and in as many drawn at random."""
    steps = BatchPlan(lengths, lengths, batch_tokens, seed=0).epoch(0)
    drawn = np.array_split(np.random.default_rng(0).permutation(len(lengths)), len(steps))
    planned, random = padded((step.rows for step in steps), lengths), padded(drawn, lengths)
    return 1 - lengths.sum() / planned, 1 - lengths.sum() / random


def counts_table(dataset: Dataset, space: ItemSpace, training: TrainingConfig) -> Table:
    """Rows and tokens of an epoch."""
    table = Table(
        "histories", "rows", "targets", "number", "tokens", "tokens a target", "x fewer than plain",
        "x fewer than plain sliding", "padding, planned", "padding, at random", title="an epoch of the whole dataset",
    )  # fmt: skip
    first: int | None = None
    for rule in RULES:
        rows = TrainingRows(dataset, space, under(training, rule), branching_only=False)
        tree, plain = rows.lengths, rows.sample_lengths
        first = first or int(plain.sum())
        for kind, lengths in (("plain", plain), ("tree", tree)):
            tokens = int(lengths.sum())
            planned, random = padding(lengths, training.batch_tokens)
            table.add_row(
                rule, kind, f"{len(plain):,}", f"{len(lengths):,}", f"{tokens:,}", f"{tokens / len(plain):.1f}",
                f"{plain.sum() / tokens:.2f}", f"{first / tokens:.2f}", f"{planned:.1%}", f"{random:.1%}",
            )  # fmt: skip
    return table


def under(training: TrainingConfig, rule: str) -> TrainingConfig:
    """These settings under one of the history rules; a stride is of anchored windows only."""
    return training.model_copy(update={"windows": rule, "stride": training.stride if rule == "anchored" else None})


# ---- Rows ------------------------------------------------------------------------------------------------------------


def sample_of_users(dataset: Dataset, users: int, seed: int = 0) -> Dataset:
    """The dataset with the training targets of a few sequences only, drawn among those that have any."""
    train = dataset.targets["train"]
    owners = np.unique(train.sequence)
    chosen = np.random.default_rng(seed).choice(owners, min(users, len(owners)), replace=False)
    kept = np.isin(train.sequence, chosen)
    return replace(dataset, targets={**dataset.targets, "train": Targets(train.sequence[kept], train.position[kept])})


class PlainRows(TrainingRows):
    """The same targets, each in a row of its own: the paths of the samples, cut out of their trees.

    Attributes:
        tree: int64 [M]; the tree row that each one comes from.
    """

    def __init__(self, packed: TrainingRows) -> None:
        cut = [(number, path) for number, row in enumerate(packed) for path in paths(row)]
        self.tree = np.array([number for number, _ in cut])
        self._rows = [path for _, path in cut]
        self.lengths = np.array([len(row) for row in self._rows], np.int64)
        self.counted = np.array([len(row.target) for row in self._rows], np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Row:
        return self._rows[number]


def paths(row: Row) -> list[Row]:
    """Each sample of a tree as a row of its own."""
    found = []
    places = np.arange(len(row))
    for sample in range(int(row.sample.max()) + 1):
        mine = row.sample == sample
        last = row.source[mine].max()
        path = np.flatnonzero((places <= last) & (row.end > last))
        found.append(
            Row(
                tokens=row.tokens[path],
                end=np.full(len(path), len(path), np.int32),
                depth=np.arange(len(path), dtype=np.int32),
                source=np.searchsorted(path, row.source[mine]).astype(np.int32),
                target=row.target[mine],
                nodes=row.nodes[mine],
                sample=np.zeros(int(mine.sum()), np.int32),
            )
        )
    return found


def features(row: Row) -> dict[str, list[int]]:
    """A plain row as the Trainer takes it: prompt and response, labels on the response only."""
    input_ids = np.append(row.tokens, row.target[-1])
    labels = np.full(len(input_ids), -100)
    labels[row.source + 1] = row.target
    return {"input_ids": input_ids.tolist(), "labels": labels.tolist()}


# ---- Contenders ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """The sampled targets under one history rule, in both kinds of rows, and the steps of an epoch of each."""

    rule: str
    tree: TrainingRows
    plain: PlainRows
    tree_steps: list[Step]
    plain_steps: list[Step]

    @property
    def batch(self) -> int:
        """Plain rows of a step, on average."""
        return -(-len(self.plain) // len(self.tree_steps))

    def first_plain(self) -> np.ndarray:
        """The plain rows of the first step's tree rows."""
        return np.flatnonzero(np.isin(self.plain.tree, self.tree_steps[0].rows))


def make_work(dataset: Dataset, space: ItemSpace, training: TrainingConfig, rule: str) -> Work:
    """Both kinds of rows; the plan of the plain ones has as many steps."""
    tree = TrainingRows(dataset, space, under(training, rule), branching_only=False)
    plain = PlainRows(tree)
    tree_steps = BatchPlan(tree.lengths, tree.counted, training.batch_tokens, training.seed).epoch(0)
    tokens = round(plain.lengths.sum() / len(tree_steps))
    return Work(rule, tree, plain, tree_steps, BatchPlan(plain.lengths, plain.counted, tokens, training.seed).epoch(0))


def build_module(backbone: Backbone, space: ItemSpace, training: TrainingConfig) -> TrainedModel:
    """What the training loop trains, with LML."""
    objective = build_objective(LMLConfig(), backbone.num_layers, space.trie)
    return TrainedModel(backbone, objective, space.trie, logits_memory_mb=training.logits_memory_mb or 256)


def build_trainer(model: Any, space: ItemSpace, work: Work, training: TrainingConfig) -> Any:
    """Hugging Face's Trainer on the plain rows, padded by length groups."""
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is written
        per_device_train_batch_size=work.batch,
        num_train_epochs=1,
        train_sampling_strategy="group_by_length",
        learning_rate=training.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=training.weight_decay,
        adam_beta1=training.betas[0],
        adam_beta2=training.betas[1],
        max_grad_norm=training.gradient_clipping,
        bf16=training.precision == "bfloat16",
        use_cpu=model.device.type == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    collator = DataCollatorForSeq2Seq(space.tokenizer, pad_to_multiple_of=PADDING_MULTIPLE)
    rows: Any = [features(row) for row in work.plain]
    trainer = Trainer(model, arguments, collator, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    return trainer


def first_losses(work: Work, module: TrainedModel, trainer: Any) -> dict[str, float]:
    """The mean loss of the first step's targets as each contender computes it."""
    from trainer.loop.worker import micro_batch

    counted, same = work.tree_steps[0].counted, work.first_plain()
    inputs = trainer.data_collator([features(work.plain[number]) for number in same])
    inputs = {name: tensor.to(trainer.model.device) for name, tensor in inputs.items()}
    with torch.no_grad():
        return {
            "tree": float(module(micro_batch(module, work.tree, work.tree_steps[0].rows))) / counted,
            "plain": float(module(micro_batch(module, work.plain, same))) / counted,
            "plain, Trainer": float(trainer.compute_loss(trainer.model, inputs, num_items_in_batch=counted)),
        }


def start_alone(device: str) -> None:
    """Make this process the only rank of a process group, which is what the training loop runs in.

    After the Trainer is made, which would take part in it.
    """
    import torch.distributed as dist

    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@dataclass(frozen=True)
class Contender:
    """One way to train an epoch.

    Attributes:
        tokens: of the rows.
        padded: with padding, as batched.
        epoch: trains one.
        first_loss: mean loss of the first step's targets before any step.
    """

    rule: str
    name: str
    tokens: int
    padded: int
    epoch: Callable[[], object]
    first_loss: float


def contenders(works: list[Work], space: ItemSpace, backbone: Backbone, training: TrainingConfig) -> list[Contender]:
    """Plain and tree rows through the training loop, plain rows through the Trainer on a copy of the model."""
    from trainer.loop.engine import build_engine, set_learning_rate
    from trainer.loop.worker import optimiser_step

    copied: Any = copy.deepcopy(backbone.model)
    module = build_module(backbone, space, training)
    trainers = [build_trainer(copied, space, work, training) for work in works]
    losses = [first_losses(work, module, trainer) for work, trainer in zip(works, trainers, strict=True)]
    start_alone(backbone.device.type)
    engine = build_engine(module, training)
    set_learning_rate(engine, training.learning_rate)

    def epoch(rows: TrainingRows, steps: list[Step]) -> None:
        for step in steps:
            optimiser_step(engine, module, step, rows)

    made = []
    for work, trainer, loss in zip(works, trainers, losses, strict=True):
        for name, rows, steps in (("plain", work.plain, work.plain_steps), ("tree", work.tree, work.tree_steps)):
            size = padded((step.rows for step in steps), rows.lengths)
            run = partial(epoch, rows, steps)
            made.append(Contender(work.rule, name, int(rows.lengths.sum()), size, run, loss[name]))
        lengths = work.plain.lengths + 1  # the response's last token is laid out there
        size = padded(trainer_batches(trainer, work.batch), lengths)
        name = "plain, Trainer"
        made.append(Contender(work.rule, name, int(lengths.sum()), size, trainer.train, loss[name]))
    return made


def trainer_batches(trainer: Any, batch: int) -> list[np.ndarray]:
    """The rows of each of the Trainer's batches in an epoch."""
    order = np.array(list(trainer._get_train_sampler()))
    return [order[begin : begin + batch] for begin in range(0, len(order), batch)]


# ---- Tables ----------------------------------------------------------------------------------------------------------


def seconds_table(made: list[Contender], repeats: int, device: str) -> Table:
    """Seconds an epoch; ratios to plain rows under the same rule and in the same loop."""
    table = Table(
        "histories", "rows", "tokens", "padding", "first loss", "s an epoch min/median/max", "x fewer tokens",
        "x less time", "follows", "tokens/s", title="an epoch of the sample",
    )  # fmt: skip
    seconds = in_turns([each.epoch for each in made], repeats, device)
    for each, own in zip(made, seconds, strict=True):
        base, plain = next(
            pair for pair in zip(made, seconds, strict=True) if (pair[0].rule, pair[0].name) == (each.rule, "plain")
        )
        tokens, time = base.tokens / each.tokens, ratio(plain, own)
        table.add_row(
            each.rule, each.name, f"{each.tokens:,}", f"{1 - each.tokens / each.padded:.1%}", f"{each.first_loss:.6f}",
            spread(own), f"{tokens:.2f}", f"{time:.2f}", f"{time / tokens:.2f}",
            f"{each.tokens / np.median(own):,.0f}",
        )  # fmt: skip
    return table


def mask_table(works: list[Work], module: TrainedModel, repeats: int, device: str) -> Table:
    """Forward and backward of the first step's tree rows with their mask and without."""
    from trainer.loop.worker import micro_batch

    table = Table(
        "histories", "rows x tokens", "mask built, ms", "share of a step", "step ms, masked", "step ms, causal",
        "x causal", title="the mask",
    )  # fmt: skip
    for work in works:
        masked = micro_batch(module, work.tree, work.tree_steps[0].rows)
        shape = " x ".join(map(str, masked.batch.input_ids.shape))
        if masked.batch.end is None:
            table.add_row(work.rule, shape, "none: no row branches", *["–"] * 4)
            continue
        causal = without_mask(masked)
        runs = [partial(forward_and_backward, module, batch) for batch in (masked, causal)]
        built, with_mask, without = in_turns([masked.batch.attention_mask, *runs], repeats, device)
        table.add_row(
            work.rule, shape, milliseconds(built, ".2f"), f"{ratio(built, with_mask):.2%}",
            milliseconds(with_mask, ".0f"), milliseconds(without, ".0f"), f"{ratio(with_mask, without):.3f}",
        )  # fmt: skip
    return table


def without_mask(micro_batch: MicroBatch) -> MicroBatch:
    """The same tokens in plain causal rows: as much work but for the mask, though another result."""
    batch = micro_batch.batch
    places = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device).expand_as(batch.input_ids)
    return replace(micro_batch, batch=replace(batch, end=None, position_ids=places))


def forward_and_backward(module: TrainedModel, micro_batch: MicroBatch) -> None:
    module(micro_batch).backward()
    module.zero_grad()


def load(config: str, overrides: list[str]) -> tuple[Experiment, Dataset, ItemSpace]:
    """An experiment's data, prepared; whatever it trains, a language model here."""
    experiment = load_experiment(config, overrides)
    own = {"name": f"packing-{experiment.name}", "recommender": LanguageModelConfig(), "objective": LMLConfig()}
    experiment = experiment.model_copy(update=own)
    prepared = prepare(experiment)
    return experiment, Dataset.load(prepared.dataset), ItemSpace.load(prepared.items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/games.yaml", help="an experiment; its objective is not read")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of the experiment")
    parser.add_argument("--users", type=int, default=200, help="whose training targets are timed, a seeded sample")
    parser.add_argument("--batch-tokens", type=int, default=1024, help="of a timed step of tree rows")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only-counts", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        experiment, dataset, space = load(args.config, args.set)
        console, training = Console(width=160), experiment.training.model_copy(update={"accumulation": 1})
        console.print(counts_table(dataset, space, training))
    except UserError as error:
        parser.error(str(error))
    if args.only_counts:
        return
    training = training.model_copy(update={"batch_tokens": args.batch_tokens})  # of so few targets, many steps
    backbone = load_backbone(experiment.backbone, space.tokenizer, dtype_of(training.precision), training.seed)
    backbone.to(args.device)
    choose_attention(backbone, training.attention)
    few = sample_of_users(dataset, args.users)
    works = [make_work(few, space, training, rule) for rule in RULES]
    console.print(
        f"{args.users} users, {len(few.targets['train'])} targets, {[len(work.tree_steps) for work in works]} steps; "
        f"{args.threads} threads, {training.precision}; {args.repeats} rounds in turns"
    )
    console.print(mask_table(works, build_module(backbone, space, training), args.repeats, args.device))
    console.print(seconds_table(contenders(works, space, backbone, training), args.repeats, args.device))


if __name__ == "__main__":
    main()

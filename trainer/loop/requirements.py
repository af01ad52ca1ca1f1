"""What a run needs, before it runs: memory of a worker, matrix products of an epoch.

Weights, gradients and optimizer: Rajbhandari et al. 2020, "ZeRO", section 3 and figure 1, with the copies that
DeepSpeed 0.19 makes. Activations: Korthikanti et al. 2022, "Reducing Activation Recomputation", section 4.1, counted
anew for gated MLPs, RMS norms in float32 and attention that keeps no score matrix. Matrix products: the same paper's
appendix A.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np

from objectives.objective import Objective, build_objective
from recommender.backbone.backbone import Backbone, empty_backbone
from recommender.backbone.tree import padded_length
from recommender.errors import UserError
from recommender.items.item_space import ItemSpace
from trainer.config import LanguageModelConfig, TrainingConfig
from trainer.data.dataset import Dataset
from trainer.experiment import Experiment
from trainer.loop.plan import BatchPlan
from trainer.loop.rows import TrainingRows
from trainer.parts import Prepared

_BUCKET = 500_000_000  # elements of DeepSpeed's reduce_bucket_size
_KEPT_WHOLE = 1_000_000_000  # its stage3_max_reuse_distance: smaller models stay gathered through a step


@dataclass(frozen=True)
class Shape:
    """A backbone in numbers.

    Attributes:
        trained, frozen: weights.
        matrices: weights of all decoder layers that multiply each token.
        trained_matrices: those of them that are trained.
        hidden, layers, queries, mlp, vocabulary: sizes; queries = heads × head dimension.
    """

    trained: int
    frozen: int
    matrices: int
    trained_matrices: int
    hidden: int
    layers: int
    queries: int
    mlp: int
    vocabulary: int

    @classmethod
    def of(cls, backbone: Backbone) -> Shape:
        """Read from a model, whose weights may be missing."""
        config: Any = backbone.model.config
        heads = config.num_attention_heads
        matrices = [p for layer in backbone.layers for p in layer.parameters() if p.dim() == 2]
        return cls(
            trained=sum(p.numel() for p in backbone.model.parameters() if p.requires_grad),
            frozen=sum(p.numel() for p in backbone.model.parameters() if not p.requires_grad),
            matrices=sum(p.numel() for p in matrices),
            trained_matrices=sum(p.numel() for p in matrices if p.requires_grad),
            hidden=config.hidden_size,
            layers=backbone.num_layers,
            queries=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
            mlp=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            vocabulary=backbone.vocabulary,
        )


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker at its peak. The process itself comes on top: CUDA's context, or Python and its libraries."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    logits: float
    validation: float

    @property
    def total(self) -> float:
        """A step's, or that of the validation between them, which at stage 3 searches a whole copy of the weights."""
        kept = self.weights + self.gradients + self.optimizer + self.buffers
        return kept + max(self.activations + self.logits, self.validation)


def memory(shape: Shape, training: TrainingConfig, workers: int, gpu: bool, tokens: int) -> Memory:
    """The memory of one of `workers`, whose largest micro-batch has `tokens`, padding included."""
    stage, half = training.zero_stage, training.precision == "bfloat16"
    width = 2 if half else 4
    whole, share = shape.trained, shape.trained / workers
    weights = float(width * (shape.trained + shape.frozen))
    if stage == 0:
        gradients, optimizer, buffers = float(width * whole), float((12 if half else 8) * whole), 0.0
    else:
        # bfloat16 at stage 1 keeps the whole gradient, in float32 too; else a bucket passes pieces on to their owners.
        gradients = 6 * whole if half and stage == 1 else 4 * share
        optimizer = 12 * share
        element = 4 if stage == 3 else 0 if half and stage == 1 else width
        buffers = element * (_BUCKET if gpu else min(whole, _BUCKET))  # untouched pages cost a CPU nothing
    if stage == 3:
        buffers += min(weights, width * _KEPT_WHOLE)
        weights /= workers
    copy = width * (shape.trained + shape.frozen) if stage == 3 else 0
    layer = _layer_bytes(shape, width)
    kept = shape.layers * (width * shape.hidden if training.gradient_checkpointing else layer)
    logits = training.logits_memory_mb or (2048 if gpu else 256)
    return Memory(weights, gradients, optimizer, buffers, (kept + layer) * tokens, logits * 2**20, copy)


def _layer_bytes(shape: Shape, width: int) -> int:
    """What a decoder layer keeps of a token for its backward pass.

    Two norms (their input in float32, what they scale, what they return), queries, keys, values and the attention's
    result, and four times the MLP's width: gate, its activation, up, their product.
    """
    return 2 * (4 + 2 * width) * shape.hidden + width * (4 * shape.queries + 4 * shape.mlp)


@dataclass(frozen=True)
class Requirements:
    """What an experiment's training needs.

    Attributes:
        tokens: of an epoch, without padding.
        steps: of an epoch.
        flops: of an epoch's matrix products, those of recomputation included.
        largest: accumulation → tokens of the largest micro-batch of a worker, padding included.
    """

    experiment: Experiment
    shape: Shape
    tokens: int
    steps: int
    flops: float
    largest: Callable[[int], int]

    def memory(self, **changes: Any) -> Memory:
        """Of one worker, with some fields of the training section changed."""
        cluster, training = self.experiment.cluster, self.experiment.training.model_copy(update=changes)
        tokens = self.largest(training.accumulation)
        return memory(self.shape, training, cluster.workers, bool(cluster.gpus_per_worker), tokens)

    def that_fit(self, limit: float) -> dict[str, Any] | None:
        """The smallest change of the training section whose memory is at most `limit` bytes; None where there is none.

        Higher stages come before smaller micro-batches, which cost speed, and these before recomputation.
        """
        training = self.experiment.training
        stages = sorted(range(4), key=lambda stage: (stage < training.zero_stage, stage))
        accumulations = [training.accumulation * 2**power for power in range(7)]
        recomputation = [True] if training.gradient_checkpointing else [False, True]
        for again, accumulation, stage in product(recomputation, accumulations, stages):
            changes = {"zero_stage": stage, "accumulation": accumulation, "gradient_checkpointing": again}
            if self.memory(**changes).total <= limit:
                return {name: value for name, value in changes.items() if value != getattr(training, name)}
        return None


def requirements(experiment: Experiment, prepared: Prepared) -> Requirements:
    """Count what training on prepared data needs. Loads no weights.

    Raises:
        UserError: not a language model.
    """
    if not isinstance(experiment.recommender, LanguageModelConfig):
        raise UserError("recommender.kind: plan is of use for language models; collaborative ones are small")
    dataset, space = Dataset.load(prepared.dataset), ItemSpace.load(prepared.items)
    backbone = empty_backbone(experiment.backbone, space.tokenizer, experiment.init_from)
    objective = build_objective(experiment.objective, backbone.num_layers, space.trie)
    training = experiment.training
    rows = TrainingRows(dataset, space, training, objective.branching_only)
    plan = BatchPlan(rows.lengths, rows.counted, training.batch_tokens, training.seed)
    shape = Shape.of(backbone)
    passes = 4 if training.gradient_checkpointing else 3  # forward; backward is two; once more to recompute
    flops = 2.0 * rows.lengths.sum() * ((passes - 1) * shape.matrices + shape.trained_matrices)
    flops += passes * 4.0 * shape.queries * shape.layers * np.square(rows.lengths.astype(float)).sum()
    flops += 6.0 * shape.hidden * (1 + len(objective.layers)) * _columns(rows, space, objective, shape.vocabulary)
    largest = cache(partial(largest_micro_batch, plan, rows.lengths, experiment.cluster.workers))
    return Requirements(experiment, shape, int(rows.lengths.sum()), plan.steps_per_epoch, flops, largest)


def _columns(rows: TrainingRows, space: ItemSpace, objective: Objective, vocabulary: int) -> int:
    """Logits of an epoch and a layer."""
    if not objective.valid_only:
        return int(rows.counted.sum()) * vocabulary
    nodes = space.trie.prediction_nodes()
    children = np.where(nodes >= 0, space.trie.child_count[nodes], 0)
    of_item = np.add.reduceat(children, space.identifiers.offsets[:-1], dtype=np.int64)
    return int(of_item[rows.targets].sum())


def largest_micro_batch(plan: BatchPlan, lengths: np.ndarray, workers: int, accumulation: int) -> int:
    """Tokens of the largest micro-batch of a worker in the first epoch, padding included."""
    return max(
        len(rows) * padded_length(int(lengths[rows].max()))
        for step in plan.epoch(0)
        for ranks in step.micro_batches(workers, accumulation)
        for rows in ranks
        if len(rows)
    )

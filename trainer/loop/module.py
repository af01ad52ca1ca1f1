"""The module that DeepSpeed trains: backbone, prediction layer and objective in one forward that returns a loss."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from objectives.blocks import Block, child_blocks, vocabulary_blocks
from objectives.head import objective_sums
from objectives.objective import Objective
from objectives.rewards import Histories, Rewards, RewardSource
from recommender.backbone.backbone import Backbone
from recommender.backbone.tree import Batch
from recommender.items.trie import RadixTrie

_SUBLAYERS = ("self_attn", "attn", "attention", "mlp")


@dataclass(frozen=True)
class MicroBatch:
    """What a forward takes: rows, their predictions in blocks and, where the objective takes them, rewards."""

    batch: Batch
    blocks: list[Block]
    rewards: Rewards | None


class TrainedModel(nn.Module):
    """Sum of an objective's losses over the predictions of a batch.

    Everything that touches weights happens inside `forward`, through modules, because ZeRO-3 gathers a module's weights
    when it is called.

    Args:
        trie: of the catalogue.
        reward_source: where the objective takes rewards.
        logits_memory_mb: see `objectives.head.objective_sums`.

    Attributes:
        sums: after a forward, the detached sums over positions of everything that the objective computes.
    """

    def __init__(
        self,
        backbone: Backbone,
        objective: Objective,
        trie: RadixTrie,
        dropout: float = 0.0,
        reward_source: RewardSource | None = None,
        logits_memory_mb: int = 256,
    ):
        super().__init__()
        self.model = backbone.model
        self.backbone = backbone
        self.objective = objective
        self.trie = trie
        self.reward_source = reward_source
        self.logits_memory_mb = logits_memory_mb
        self.sums: dict[str, Tensor] = {}
        if dropout:
            add_dropout(backbone, dropout)

    def micro_batch(self, batch: Batch, histories: Histories | None = None) -> MicroBatch:
        """A batch of rows, from `collate` and on the CPU, with all that `forward` needs, on the model's device.

        Args:
            histories: of the batch's samples, where the objective takes rewards.
        """
        blocks_of = partial(child_blocks, self.trie) if self.objective.valid_only else vocabulary_blocks
        blocks = [block.to(self.backbone.device) for block in blocks_of(batch.nodes, batch.target)]
        rewards = None
        if self.reward_source is not None and histories is not None:
            rewards = self.reward_source.rewards(histories, batch.sample.numpy(), batch.nodes.numpy())
        return MicroBatch(batch.to(self.backbone.device), blocks, rewards)

    def forward(self, micro_batch: MicroBatch) -> Tensor:
        """The sum of losses over the batch's predictions."""
        backbone, objective, batch = self.backbone, self.objective, micro_batch.batch
        with backbone.tapped(objective.layers) as taps:
            hidden = backbone.hidden(batch.input_ids, batch.attention_mask(), batch.position_ids)
        states = hidden.flatten(0, 1)[batch.source]
        layers = [taps[layer].flatten(0, 1)[batch.source] for layer in objective.layers]
        if not objective.layers_learn:
            layers = [layer.detach() for layer in layers]
        sums = objective_sums(
            objective, backbone, states, layers, micro_batch.blocks, micro_batch.rewards, self.logits_memory_mb
        )
        self.sums = {name: value.detach() for name, value in sums.items()}
        return sums["loss"]


def add_dropout(backbone: Backbone, probability: float) -> None:
    """Dropout on the embeddings and on what each attention and MLP block adds, in training mode only.

    Llama-like architectures have none of their own; small models trained from scratch need it.
    """

    def hook(module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        if isinstance(output, Tensor):
            return F.dropout(output, probability, module.training)
        return (F.dropout(output[0], probability, module.training), *output[1:])

    backbone.decoder.get_input_embeddings().register_forward_hook(hook)
    for layer in backbone.layers:
        for name, child in layer.named_children():
            if name in _SUBLAYERS:
                child.register_forward_hook(hook)


def dtype_of(precision: str) -> torch.dtype:
    """ "float32" or "bfloat16" as a torch dtype."""
    return getattr(torch, precision)

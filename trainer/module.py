"""The module that DeepSpeed trains: backbone, prediction layer and objective in one forward that returns a loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from objectives.chunks import objective_sums
from objectives.objective import Objective
from recommender.backbone import Backbone
from recommender.tree import Batch
from recommender.trie import TrieTensors

_SUBLAYERS = ("self_attn", "attn", "attention", "mlp")


class TrainedModel(nn.Module):
    """Sum of an objective's losses over the predictions of a batch.

    Everything that touches weights happens inside `forward`, through modules, because ZeRO-3 gathers a module's weights
    when it is called.

    Attributes:
        sums: after a forward, the detached sums over positions of everything that the objective reports.
    """

    def __init__(self, backbone: Backbone, objective: Objective, trie: TrieTensors, dropout: float = 0.0):
        super().__init__()
        self.model = backbone.model
        self.backbone = backbone
        self.objective = objective
        self.trie = trie
        self.sums: dict[str, Tensor] = {}
        if dropout:
            add_dropout(backbone, dropout)

    def forward(self, batch: Batch, chunks: int = 1) -> Tensor:
        """The sum of losses over the batch's predictions.

        Args:
            batch: rows on the model's device, from `collate`.
            chunks: see `objectives.chunks.objective_sums`.
        """
        backbone, objective = self.backbone, self.objective
        with backbone.tapped(objective.layers) as taps:
            hidden = backbone.hidden(batch.input_ids, batch.attention_mask(), batch.position_ids)
        states = hidden.flatten(0, 1)[batch.source]
        layers = [taps[layer].flatten(0, 1)[batch.source] for layer in objective.layers]
        sums = objective_sums(objective, backbone, self.trie, states, layers, batch.target, batch.nodes, chunks)
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


def chunk_count(predictions: int, vocabulary: int, layers: int, memory_mb: int) -> int:
    """How many chunks keep the logits of `layers` + 1 layers within `memory_mb` MiB of float32."""
    positions = max(1, memory_mb * 2**20 // (4 * vocabulary * (layers + 1)))
    return max(1, -(-predictions // positions))


def dtype_of(precision: str) -> torch.dtype:
    """ "float32" or "bfloat16" as a torch dtype."""
    return getattr(torch, precision)

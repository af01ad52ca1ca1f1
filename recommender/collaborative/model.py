"""Collaborative models: a history of item indices becomes one vector, whose products with item vectors are scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recommender.collaborative.config import CollaborativeModelConfig


@dataclass(frozen=True)
class TrainingBatch:
    """Windows of sequences to learn from, padded on the right.

    Attributes:
        items: int64 [B, T]; item indices, oldest first, 0 where padded.
        lengths: int64 [B]; items of each window.
        targets: bool [B, T]; items to predict. Never the first of a window, nor padding.
        draws: float32 [B, T]; uniform random numbers in [0, 1), one for each item of a window in each epoch.
        negatives: int64 [N]; uniformly drawn items, or None: targets compete with all items.
    """

    items: Tensor
    lengths: Tensor
    targets: Tensor
    draws: Tensor
    negatives: Tensor | None

    def to(self, device: torch.device) -> TrainingBatch:
        """Copy to a device."""
        negatives = None if self.negatives is None else self.negatives.to(device)
        items, lengths, targets, draws = (v.to(device) for v in (self.items, self.lengths, self.targets, self.draws))
        return TrainingBatch(items, lengths, targets, draws, negatives)


class CollaborativeModel(nn.Module, ABC):
    """A sequence embedding over a table of item vectors that is its prediction layer too.

    Args:
        config: shape of the model.
        items: items of the catalogue; indices 0 … items − 1.
        extra: further rows of the table (a mask, a padding), behind the items and never scored.

    Attributes:
        config: what it was made of.
        items: how many there are.
        table: the item vectors, [items + extra, dim].
        bias: float32 [items]; what an item scores whatever the history. An empty history scores just this.
    """

    def __init__(self, config: CollaborativeModelConfig, items: int, extra: int = 0):
        super().__init__()
        self.config = config
        self.items = items
        self.table = nn.Embedding(items + extra, config.dim)
        self.bias = nn.Parameter(torch.zeros(items))
        nn.init.normal_(self.table.weight, std=0.02)

    @abstractmethod
    def embed(self, histories: Sequence[np.ndarray]) -> Tensor:
        """Embeddings of histories: [B, dim].

        Args:
            histories: item indices, oldest first, of any length, 0 included; the last `max_length` of each are read.
        """

    def embed_prefixes(self, sequences: Sequence[np.ndarray], lengths: Sequence[np.ndarray]) -> Tensor:
        """Embeddings of several histories of each sequence, one sequence's after the other: [M, dim], as from `embed`.

        Args:
            sequences: int [n] each; item indices, oldest first.
            lengths: int [t] for each sequence, from 0 to n; its histories are the sequence's first lengths[i] items.
        """
        pairs = zip(sequences, lengths, strict=True)
        return self.embed([sequence[:length] for sequence, own in pairs for length in own])

    def scores(self, embedding: Tensor) -> Tensor:
        """Scores of all items, of which a softmax makes probabilities: float32 [B, items] from embeddings [B, dim]."""
        return F.linear(embedding.float(), self.table.weight[: self.items].float(), self.bias.float())

    @abstractmethod
    def loss_sum(self, batch: TrainingBatch) -> tuple[Tensor, int]:
        """The sum of the losses of a batch's targets, and how many of them it counts."""

    def prediction_loss(self, embeddings: Tensor, targets: Tensor, negatives: Tensor | None) -> Tensor:
        """Σ −log softmax at the targets: over all items, or over the target and the negatives.

        Uniform negatives need no correction: every item is as likely to be drawn. A negative that is the target of a
        row does not count in it.

        Args:
            embeddings: [M, dim].
            targets: int64 [M].
            negatives: int64 [N], or None.
        """
        if negatives is None:
            return F.cross_entropy(self.scores(embeddings), targets, reduction="sum")
        positive, negative = self.sampled_scores(embeddings, targets, negatives)
        logits = torch.cat([positive[:, None], negative], dim=1)
        return F.cross_entropy(logits, torch.zeros_like(targets), reduction="sum")

    def sampled_scores(self, embeddings: Tensor, targets: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the targets [M] and of the negatives [M, N], −inf where a negative is the target."""
        positive = (embeddings * self.table(targets)).sum(1) + self.bias[targets]
        negative = F.linear(embeddings, self.table(negatives), self.bias[negatives])
        return positive, negative.masked_fill(targets[:, None] == negatives, -torch.inf)

    def padded(self, histories: Sequence[np.ndarray], room: int = 0) -> tuple[Tensor, Tensor]:
        """The last `max_length` items of each history, padded with 0 on the right: int64 [B, T + room], lengths [B]."""
        lengths = np.array([min(len(history), self.config.max_length) for history in histories], np.int64)
        items = np.zeros((len(histories), max(int(lengths.max(initial=0)), 1) + room), np.int64)
        for row, (history, length) in enumerate(zip(histories, lengths, strict=True)):
            items[row, :length] = history[len(history) - length :]
        device = self.table.weight.device
        return torch.from_numpy(items).to(device), torch.from_numpy(lengths).to(device)


class CausalModel(CollaborativeModel):
    """A model whose state after an item depends on the items up to it: one forward serves all prefixes.

    Positions are counted from the start of what is read, so a prefix has the same embedding in a longer sequence.
    """

    @abstractmethod
    def states(self, items: Tensor) -> Tensor:
        """The embedding after each item: [B, T, dim] from int64 [B, T], T ≤ max_length."""

    def embed(self, histories: Sequence[np.ndarray]) -> Tensor:
        items, lengths = self.padded(histories)
        return _after(self.states(items), torch.arange(len(items), device=items.device), lengths)

    def embed_prefixes(self, sequences: Sequence[np.ndarray], lengths: Sequence[np.ndarray]) -> Tensor:
        longest = [int(np.max(own, initial=0)) for own in lengths]
        if max(longest, default=0) > self.config.max_length:
            return super().embed_prefixes(sequences, lengths)
        whole, _ = self.padded([sequence[:end] for sequence, end in zip(sequences, longest, strict=True)])
        rows = np.repeat(np.arange(len(sequences)), [len(own) for own in lengths])
        after = np.concatenate([np.asarray(own, np.int64) for own in lengths])
        return _after(
            self.states(whole), torch.from_numpy(rows).to(whole.device), torch.from_numpy(after).to(whole.device)
        )

    def loss_sum(self, batch: TrainingBatch) -> tuple[Tensor, int]:
        predicted = batch.targets[:, 1:]
        embeddings = self.states(batch.items[:, :-1])[predicted]
        return self.prediction_loss(embeddings, batch.items[:, 1:][predicted], batch.negatives), len(embeddings)


def _after(states: Tensor, rows: Tensor, lengths: Tensor) -> Tensor:
    """The states [t, dim] of `rows` [t] after `lengths` [t] items; zeros after none."""
    return states[rows, (lengths - 1).clamp(min=0)] * (lengths > 0)[:, None]

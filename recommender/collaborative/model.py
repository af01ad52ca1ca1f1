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
from recommender.collaborative.content import Content
from recommender.collaborative.losses import bpr, gbce, gbce_exponent, sampled_softmax


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
        content: while a model with `config.content` learns, what texts add to the table; see `fold_texts`.
        bias: float32 [items]; what an item scores whatever the history. An empty history scores just this.
    """

    def __init__(self, config: CollaborativeModelConfig, items: int, extra: int = 0):
        super().__init__()
        self.config = config
        self.items = items
        self.table = self.item_vectors(items + extra)
        self.bias = nn.Parameter(torch.zeros(items))
        self.content: Content | None = None
        nn.init.normal_(self.table.weight, std=0.02)

    def item_vectors(self, rows: int) -> nn.Embedding:
        """A table whose gradient holds just the rows that a batch reads, where no target competes with all items."""
        return nn.Embedding(rows, self.config.dim, sparse=self.config.negatives is not None)

    @torch.no_grad()
    def learn_texts(self, texts: Tensor, known: Tensor) -> None:
        """Add text vectors to the item vectors, until `fold_texts`.

        Args:
            texts: float32 [items, features].
            known: bool [items]; items that training saw. The others have no vector of their own.
        """
        assert self.config.content is not None
        self.content = Content(texts, known, self.config.dim, self.config.content.own)
        self.table.weight[: self.items][~known] = 0

    @torch.no_grad()
    def fold_texts(self) -> None:
        """Add what texts say to the table: the same scores from a model without texts."""
        assert self.content is not None
        self.table.weight[: self.items] += self.content.projection(self.content.texts)
        self.content = None

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
        vectors = self.table.weight[: self.items].float()
        if self.content is not None:
            vectors = self.content(vectors, torch.arange(self.items, device=vectors.device))
        return F.linear(self._query(embedding.float()), self._key(vectors), self.bias.float())

    @abstractmethod
    def loss_sum(self, batch: TrainingBatch) -> tuple[Tensor, int]:
        """The sum of the losses of a batch's targets, and how many of them it counts."""

    def prediction_loss(self, embeddings: Tensor, targets: Tensor, negatives: Tensor | None) -> Tensor:
        """The sum of the targets' losses, as `config.loss` says: beside all items, or beside the negatives.

        Uniform negatives need no correction: every item is as likely to be drawn. A negative that is the target of a
        row does not count in it.

        Args:
            embeddings: [M, dim].
            targets: int64 [M].
            negatives: int64 [N], or None.
        """
        if negatives is None:
            scores = self.scores(embeddings)
            if self.content is not None:  # what training never saw does not learn that it never comes
                scores = scores.masked_fill(~self.content.known, -torch.inf)
            return F.cross_entropy(scores, targets, reduction="sum")
        positive, negative = self.sampled_scores(embeddings, targets, negatives)
        if self.config.loss == "gbce":
            return gbce(positive, negative, gbce_exponent(len(negatives), self.items, self.config.calibration))
        return (bpr if self.config.loss == "bpr" else sampled_softmax)(positive, negative)

    def sampled_scores(self, embeddings: Tensor, targets: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the targets [M] and of the negatives [M, N], −inf where a negative is the target."""
        queries = self._query(embeddings)
        positive = (queries * self._key(self.vectors(targets))).sum(1) + self.bias[targets]
        negative = F.linear(queries, self._key(self.vectors(negatives)), self.bias[negatives])
        return positive, negative.masked_fill(targets[:, None] == negatives, -torch.inf)

    def vectors(self, items: Tensor) -> Tensor:
        """Vectors of items: [..., dim] from int64 [...]."""
        own = self.table(items)
        return own if self.content is None else self.content(own, items)

    def _query(self, embeddings: Tensor) -> Tensor:
        temperature = self.config.temperature
        return embeddings if temperature is None else F.normalize(embeddings, dim=1) / temperature

    def _key(self, vectors: Tensor) -> Tensor:
        return vectors if self.config.temperature is None else F.normalize(vectors, dim=1)

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

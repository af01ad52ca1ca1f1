"""Configuration of the collaborative models. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from recommender.config import StrictModel


class CollaborativeModelConfig(StrictModel):
    """What all collaborative models share: the vectors, the history, the optimisation."""

    dim: int = Field(128, ge=1, description="Size of the item vectors and of the sequence embedding.")
    dropout: float = Field(0.3, ge=0, lt=1, description="Share of activations dropped in training.")
    max_length: int = Field(50, ge=1, description="The most recent items of a history that are read.")
    epochs: int = Field(100, ge=1, description="The most passes over the training targets.")
    patience: int = Field(5, ge=1, description="Stop after this many epochs without a better validation NDCG@10.")
    learning_rate: float = Field(1e-3, gt=0, description="Step size of AdamW.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay; 0 = off.")
    batch: int = Field(64, ge=1, description="Sequences of one optimiser step, over all workers.")
    negatives: int | None = Field(
        None,
        ge=1,
        description="null: softmax over all items. N: over the target and N uniformly drawn items that the whole "
        "batch shares, for catalogues too large for that.",
    )
    seed: int = Field(0, description="Of fresh weights, the order of the sequences and dropout.")


class AttentionConfig(CollaborativeModelConfig):
    """Shape of a transformer over items."""

    layers: int = Field(2, ge=1, description="Transformer blocks.")
    heads: int = Field(2, ge=1, description="Attention heads of a block; they must divide `dim`.")

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> AttentionConfig:
        if self.dim % self.heads:
            raise ValueError(f"heads: {self.heads} do not divide dim ({self.dim})")
        return self


class SASRecConfig(AttentionConfig):
    """Self-attentive sequential recommendation (Kang and McAuley, 2018)."""

    kind: Literal["sasrec"] = "sasrec"


class BERT4RecConfig(AttentionConfig):
    """Bidirectional attention trained on masked items (Sun et al., 2019)."""

    kind: Literal["bert4rec"] = "bert4rec"
    epochs: int = Field(200, ge=1, description="The most passes over the sequences; each learns a few masks of them.")
    patience: int = Field(10, ge=1, description="As for the others; it learns more slowly.")
    masked: float = Field(0.2, gt=0, le=1, description="Share of the targets that are masked at once.")
    last_only: float = Field(
        0.2, ge=0, le=1, description="Share of the sequences in which just the last target is masked, as in use."
    )


class GRU4RecConfig(CollaborativeModelConfig):
    """Recurrent recommendation (Hidasi et al., 2016)."""

    kind: Literal["gru4rec"] = "gru4rec"
    layers: int = Field(1, ge=1, description="Recurrent layers.")
    hidden: int | None = Field(None, ge=1, description="Size of the recurrent state. null: that of the item vectors.")


class CaserConfig(CollaborativeModelConfig):
    """Convolutional sequence embedding (Tang and Wang, 2018)."""

    kind: Literal["caser"] = "caser"
    window: int = Field(5, ge=1, description="The last items that the convolutions see.")
    horizontal: int = Field(16, ge=1, description="Filters of each height 1 … window.")
    vertical: int = Field(4, ge=1, description="Weighted sums over the window.")


class BPRConfig(CollaborativeModelConfig):
    """Matrix factorisation under Bayesian personalised ranking (Rendle et al., 2009)."""

    kind: Literal["bpr"] = "bpr"
    negatives: int = Field(
        256, ge=1, description="Uniformly drawn items, shared by the batch, with which each target is compared."
    )


CollaborativeConfig = Annotated[
    SASRecConfig | GRU4RecConfig | BERT4RecConfig | CaserConfig | BPRConfig, Field(discriminator="kind")
]

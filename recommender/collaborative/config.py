"""Configuration of the collaborative models. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from recommender.config import StrictModel


class ContentConfig(StrictModel):
    """Text that item vectors are made of, beside a vector of each item's own: unseen items have a score then."""

    columns: list[str] = Field(["title"], min_length=1, description="Columns of the items file that hold the text.")
    dimensions: int = Field(128, ge=1, description="Of the text vectors: TF-IDF of words, reduced by an SVD.")
    own: float = Field(
        0.8,
        gt=0,
        le=1,
        description="Share of the items that keep the vector of their own in a training step; the others are read and "
        "predicted by their text alone, as unseen items are.",
    )


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
        description="null: each target competes with all items. N: with N uniformly drawn items that the whole batch "
        "shares; a step then touches no more of the item table than it reads.",
    )
    loss: Literal["softmax", "gbce", "bpr"] = Field(
        "softmax",
        description="softmax: over the target and the items that it competes with. gbce: binary cross-entropy, "
        "calibrated for the number of negatives (gSASRec). bpr: of pairs. The last two need `negatives`.",
    )
    calibration: float = Field(
        0.75, ge=0, le=1, description="gBCE's t. 0: plain binary cross-entropy; 1: probabilities as without sampling."
    )
    temperature: float | None = Field(
        None,
        gt=0,
        description="A score is the cosine of embedding and item vector, divided by this. null: their product.",
    )
    content: ContentConfig | None = Field(None, description="Text behind the item vectors. null: none.")
    seed: int = Field(0, description="Of fresh weights, the order of the sequences and dropout.")

    @model_validator(mode="after")
    def _pairs_need_negatives(self) -> CollaborativeModelConfig:
        if self.loss != "softmax" and self.negatives is None:
            raise ValueError(f"loss: {self.loss} compares targets with negatives; set negatives (say 256)")
        return self


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


class ESASRecConfig(AttentionConfig):
    """SASRec with gated layers, SwiGLU and sampled negatives (Tikhonovich et al., 2025)."""

    kind: Literal["esasrec"] = "esasrec"
    negatives: int | None = Field(
        256, ge=1, description="As for the others; the paper's number, which makes a step quicker than all items do."
    )


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
    loss: Literal["softmax", "gbce", "bpr"] = Field("bpr", description="As for the others.")


CollaborativeConfig = Annotated[
    SASRecConfig | ESASRecConfig | GRU4RecConfig | BERT4RecConfig | CaserConfig | BPRConfig, Field(discriminator="kind")
]

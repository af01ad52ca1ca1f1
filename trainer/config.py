"""Configuration of training, its cluster and evaluation. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from recommender.collaborative.config import CollaborativeConfig
from recommender.config import StrictModel
from recommender.errors import UserError
from recommender.floors.config import FloorConfig


class LanguageModelConfig(StrictModel):
    """A language model that names the next item; `backbone`, `objective` and `training` say more."""

    kind: Literal["language_model"] = "language_model"


RecommenderConfig = Annotated[LanguageModelConfig | CollaborativeConfig | FloorConfig, Field(discriminator="kind")]


class CollaborativeBundle(StrictModel):
    """A collaborative model that was trained before, on the same catalogue."""

    kind: Literal["bundle"] = "bundle"
    path: str = Field(description="Its name, name@version, or its bundle's path.")


RewardConfig = Annotated[CollaborativeConfig | CollaborativeBundle, Field(discriminator="kind")]


class TrainingConfig(StrictModel):
    """The optimisation."""

    epochs: int = Field(5, ge=1, description="Passes over the training targets.")
    windows: Literal["sliding", "anchored"] = Field(
        "anchored",
        description="History rule. sliding: each target sees just the last `prompt.history` items (the papers' rule). "
        "anchored: windows start every `stride` items and each later item of a window is a target of it; rows share "
        "far more.",
    )
    stride: int | None = Field(
        None, ge=1, description="anchored: items between window starts; default half the history."
    )
    batch_tokens: int = Field(
        8192, ge=1, description="Tokens of one optimiser step over all workers and micro-batches, padding aside."
    )
    accumulation: int = Field(1, ge=1, description="Micro-batches a worker runs for one optimiser step.")
    logits_memory_mb: int | None = Field(
        None,
        ge=1,
        description="Most memory for logits and losses; the prediction layer runs in pieces that fit, and small pieces "
        "cost time. null: 256 on CPUs, 2048 on GPUs.",
    )
    learning_rate: float = Field(1e-3, gt=0, description="Step size of AdamW after the warm-up.")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps over which the rate rises.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="The learning rate after the warm-up: cosine and linear fall to 0."
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW's weight decay; 0 = off.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's decay rates of its two moments.")
    gradient_clipping: float = Field(1.0, ge=0, description="Largest global gradient norm; 0 = off.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on embeddings and on each block's outputs.")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="What the model computes in; bfloat16 keeps float32 weights in the optimiser."
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="DeepSpeed ZeRO stage.")
    attention: Literal["auto", "sdpa", "flex"] = Field(
        "auto",
        description="What computes rows that branch. auto: FlexAttention on GPUs from 512 tokens on, where it gives "
        "what SDPA does, SDPA otherwise; flex: at any length; sdpa: always SDPA.",
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, about 1.3x the time.")
    seed: int = Field(0, description="Of the batch plan, fresh weights and dropout.")
    checkpoint_every: int | None = Field(None, ge=1, description="Optimiser steps between checkpoints, besides epochs.")
    patience: int = Field(2, ge=1, description="Stop after this many epochs without a better validation NDCG@10.")

    @model_validator(mode="after")
    def _stride_is_read(self) -> TrainingConfig:
        if self.stride is not None and self.windows == "sliding":
            raise ValueError("training.stride is of windows: anchored; leave it out for sliding ones")
        return self


class ClusterConfig(StrictModel):
    """What Ray provides."""

    workers: int = Field(2, ge=1, description="Ray Train workers (data-parallel ranks).")
    min_workers: int | None = Field(
        None,
        ge=1,
        description="Start with as few as this while the cluster has no room for `workers`, and go on with as many as "
        "there is room for when nodes leave or join (looked at once a minute), each time from the latest checkpoint. "
        "null: always `workers`.",
    )
    gpus_per_worker: float = Field(
        0, ge=0, le=1, description="0 = CPU, 1 = a GPU each. A single worker may do with a share of one."
    )
    cpus_per_worker: float = Field(1, gt=0, description="CPU cores that Ray reserves for a worker.")
    storage: str = Field(
        "runs", description="Directory where runs live; with several machines, one that all of them share (NFS, …)."
    )
    max_failures: int = Field(2, ge=0, description="Restarts from the latest checkpoint after a worker is lost.")

    @property
    def fewest_workers(self) -> int:
        """With fewer than these nothing is trained."""
        return self.min_workers or self.workers

    @model_validator(mode="after")
    def _can_be_had(self) -> ClusterConfig:
        if self.fewest_workers > self.workers:
            raise ValueError(f"cluster.min_workers is {self.min_workers}, and cluster.workers only {self.workers}")
        if 0 < self.gpus_per_worker < 1 < self.workers:  # NCCL refuses two ranks on one GPU
            raise ValueError(
                f"cluster.gpus_per_worker is {self.gpus_per_worker:g}, but {self.workers} workers need a GPU each: 1"
            )
        return self

    @field_validator("storage")
    @classmethod
    def _is_a_path(cls, storage: str) -> str:
        if "://" in storage:
            raise ValueError("give a directory that all machines share; URLs cannot hold a run yet (mount the bucket)")
        return storage


class MLflowConfig(StrictModel):
    """A tracking server, or a database."""

    uri: str = Field(
        description="http(s)://…, or sqlite:////absolute/path.db. A password belongs into "
        "MLFLOW_TRACKING_PASSWORD, on the machines of all workers."
    )
    experiment: str = Field("ilrec", description="Under which runs are listed; made if need be.")

    @field_validator("uri")
    @classmethod
    def _is_usable(cls, uri: str) -> str:
        if "@" in urlsplit(uri).netloc:  # not a ValueError, which repeats what was given
            raise UserError("tracking.mlflow.uri: give user and password in MLFLOW_TRACKING_USERNAME and …_PASSWORD")
        if not uri.startswith(("http://", "https://", "sqlite:////")):
            raise ValueError(
                "give http://…, https://… or sqlite:////absolute/path.db: workers run in other directories"
            )
        return uri


class WandbConfig(StrictModel):
    """Weights & Biases."""

    project: str = Field("ilrec", description="The project that runs are listed under.")
    mode: Literal["offline", "online"] = Field(
        "offline",
        description="offline: files below the run's directory, for `wandb sync`. online: WANDB_API_KEY must "
        "be set, on the machines of all workers.",
    )


class TrackingConfig(StrictModel):
    """Where curves go besides TensorBoard's files. Each needs its package: mlflow-skinny, wandb."""

    mlflow: MLflowConfig | None = None
    wandb: WandbConfig | None = None


class EvaluationConfig(StrictModel):
    """Ranking metrics on held-out targets."""

    cutoffs: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 5, 10, 20), min_length=1, description="K of HR@K and NDCG@K."
    )
    validation_targets: int | None = Field(
        2000, ge=1, description="Most validation targets ranked after each epoch (a seeded sample); null = all."
    )
    test_targets: int | None = Field(None, ge=1, description="Most test targets (a seeded sample); null = all.")
    exclude_seen: bool = Field(False, description="Never rank items of the history (right where nothing repeats).")
    batch: int = Field(64, ge=1, description="Histories searched at once.")
    precision: Literal["float32", "bfloat16"] | None = Field(
        None,
        description="Of a language model's weights in `ilrec evaluate`; bfloat16 is faster where the device multiplies "
        "in it, and moves a few ranks. null: as they were saved.",
    )
    bootstrap: int = Field(1000, ge=100, description="Resamples behind the 95 % intervals.")
    floors: tuple[Literal["itemknn", "tfidf"], ...] = Field(
        ("itemknn", "tfidf"),
        description="What stands beside the model and most-popular: fitted in seconds, chosen on validation, kept.",
    )
    both_policies: bool = Field(
        False,
        description="Rank with seen items allowed and left out. The floors and collaborative models always are; a "
        "language model is searched a second time for it.",
    )
    category: str | None = Field(
        None, description="A column of the items file: how far its values' shares in lists are from those in histories."
    )

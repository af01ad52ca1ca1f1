"""Configuration of the endpoint. Nothing heavy is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from recommender.config import SearchConfig, StrictModel


class ServingConfig(StrictModel):
    """The endpoint: where it listens, how it batches, how much a request may ask for, who may ask."""

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 opens the endpoint to the network.")
    port: int = Field(8000, ge=1, le=65535, description="Port to listen on.")
    storage: str | None = Field(
        None,
        description="Where models are looked for by name, the same on every node; null: the environment variable "
        "ILREC_STORAGE, or ./runs.",
    )
    follow_seconds: float = Field(
        2,
        ge=0,
        description="How often a replica looks whether a model's name stands for another version (`ilrec models "
        "promote`), which it then serves; 0: never.",
    )
    replicas: int = Field(1, ge=1, description="Processes that each hold every model.")
    max_replicas: int | None = Field(
        None, ge=1, description="If given, Ray Serve scales between `replicas` and this many with the load."
    )
    target_ongoing_requests: float = Field(
        16, gt=0, description="With `max_replicas`: the requests in progress that one replica should have."
    )
    drain_seconds: float = Field(20, ge=0, description="How long a replica that is stopped may finish its requests.")
    threads: int = Field(
        1, ge=1, description="CPU cores that Ray reserves for a replica; its search uses as many threads."
    )
    gpus_per_replica: float = Field(0, ge=0, description="GPUs of a replica, or a share of one; 0 serves on CPU.")
    max_batch_tokens: int = Field(
        4096,
        ge=1,
        description="Requests are searched together, oldest first, while their tokens stay within this: those of a "
        "prompt and 128 for its search (one that asks for a larger search than the model's own: the most that it may "
        "append), or of a prompt and its candidates. A larger one is searched alone. Bounds the memory of keys and "
        "values, and how long a request waits for the others of its batch.",
    )
    batch_wait_seconds: float = Field(
        0.0,
        ge=0,
        le=1,
        description="How long an idle replica waits for company before it searches. 0 is right unless requests come in "
        "bursts: whatever arrives during a search is batched anyway.",
    )
    max_queue: int = Field(
        256, ge=1, description="Requests to one model that may wait in a replica; more are refused with 503."
    )
    timeout_seconds: float = Field(
        10,
        gt=0,
        description="A request that is not answered by then is given up with 504, and not computed; one whose body is "
        "not here by then is cut off with 408.",
    )
    max_body_bytes: int = Field(64 * 1024, ge=256, description="Larger request bodies are refused with 413.")
    max_requests: int = Field(32, ge=1, description="Requests that one batch may hold.")
    max_history: int = Field(1000, ge=1, description="Items that a request's history may hold.")
    max_k: int = Field(100, ge=1, description="Items that a request may ask for.")
    max_filter: int = Field(
        5000,
        ge=1,
        description="Items that a request's `allow` and `deny` may each hold, and values a column in `where`.",
    )
    max_candidates: int = Field(500, ge=1, description="Items that a request may have ranked.")
    max_width: int = Field(100, ge=1, description="The widest search that a request may ask for.")
    max_node_budget: int = Field(1000, ge=1, description="The largest node budget that a request may ask for.")
    precision: Literal["float32", "bfloat16"] | None = Field(
        None,
        description="Of language models' weights; null: as they were saved. bfloat16 takes half the memory of float32 "
        "and, on a CPU with instructions for it (AVX-512 BF16, AMX), about half the time for the prompts.",
    )
    history_cache_bytes: int = Field(
        0,
        ge=0,
        description="Memory in which each language model keeps the keys and values of the histories that it read last: "
        "one that comes again, or grew by an item, is not computed anew. Of use while histories are shorter than "
        "prompt.history. 0 keeps none.",
    )
    search: SearchConfig | None = Field(None, description="In place of the bundles' own search settings.")
    fallback: str = Field(
        "popular",
        min_length=1,
        description="What answers where a model cannot, under the request's filters and marked as a fallback. popular: "
        "the most popular items, for a history without a known item; none: such requests are refused with 422; the "
        "name, name@version or path of an itemknn or tfidf: as popular, and this floor for requests that would be "
        "refused because too many wait (503) or time is over (504).",
    )
    token_file: str | None = Field(
        None, description="A file of bearer tokens, one a line, on every node; requests must then bring one of them."
    )
    token_variable: str | None = Field(
        None, description="An environment variable of the replicas that holds bearer tokens, parted by white space."
    )
    log: Literal["off", "requests", "histories"] = Field(
        "off",
        description="JSON lines on standard error, one a request. requests: id, route, status, milliseconds, models; "
        "histories: the items of the history as well.",
    )
    feedback_log: str | None = Field(
        None, description="A directory for JSON lines of what was served: request id, model, items. Absent: none."
    )

    @field_validator("storage", "token_file", "feedback_log")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        """Replicas run in directories of their own."""
        return path and str(Path(path).expanduser().absolute())

    @field_validator("fallback")
    @classmethod
    def _absolute_if_a_path(cls, reference: str) -> str:
        return cls._absolute(reference) or "" if "/" in reference or reference.startswith((".", "~")) else reference

    @property
    def floor(self) -> str | None:
        """The floor that `fallback` names, if it does."""
        return None if self.fallback in ("popular", "none") else self.fallback

    @model_validator(mode="after")
    def _fits(self) -> ServingConfig:
        if self.max_queue < self.max_requests:
            raise ValueError(f"max_queue ({self.max_queue}) must hold a batch of max_requests ({self.max_requests})")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas ({self.max_replicas}) is less than replicas ({self.replicas})")
        return self

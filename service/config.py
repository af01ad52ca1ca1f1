"""Configuration of the endpoint. Nothing heavy is imported here."""

from __future__ import annotations

from pydantic import Field

from recommender.config import SearchConfig, StrictModel


class ServingConfig(StrictModel):
    """The endpoint: where it listens, how it batches, how much a request may ask for."""

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 opens the endpoint to the network.")
    port: int = Field(8000, ge=1, le=65535, description="Port to listen on.")
    replicas: int = Field(1, ge=1, description="Processes that each hold the whole recommender.")
    threads: int = Field(
        1, ge=1, description="CPU cores that Ray reserves for a replica; its search uses as many threads."
    )
    gpus_per_replica: float = Field(0, ge=0, description="GPUs of a replica, or a share of one; 0 serves on CPU.")
    max_batch_size: int = Field(16, ge=1, description="Requests that are searched together at most.")
    batch_wait_seconds: float = Field(
        0.0,
        ge=0,
        le=1,
        description="How long an idle replica waits for company before it searches. 0 is right unless requests come in "
        "bursts: whatever arrives during a search is batched anyway.",
    )
    max_body_bytes: int = Field(64 * 1024, ge=256, description="Larger request bodies are refused with 413.")
    max_history: int = Field(1000, ge=1, description="Items that a request's history may hold.")
    max_k: int = Field(100, ge=1, description="Items that a request may ask for.")
    max_filter: int = Field(5000, ge=1, description="Items that a request's `allow` and `deny` may each hold.")
    search: SearchConfig | None = Field(None, description="In place of the bundle's own search settings.")

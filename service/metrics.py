"""What a replica counts, for Prometheus: `GET /metrics`.

Every series bears the replica's name. Behind Serve's proxy a scrape meets one replica; with several, each one's series
are read whenever it is met.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from recommender.recommendation import Recommendation

MEDIA_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_EXPANSIONS = (0, 1, 5, 10, 20, 50, 100, 200, 400, 1000, 2000)


class Metrics:
    """The counters of one replica."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._replica = f"{socket.gethostname()}-{os.getpid()}"

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"ilrec_{name}", text, [*labels, "replica"], registry=self.registry)

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            names = [*labels, "replica"]
            return Histogram(f"ilrec_{name}", text, names, buckets=buckets, registry=self.registry)

        self._requests = counter(
            "requests", "Requests by route and status; errors are those from 400 on.", "route", "status"
        )
        self._request_seconds = histogram("request_seconds", "From the first byte to the answer.", _SECONDS, "route")
        self._wait_seconds = histogram("wait_seconds", "In the queue, until a search began.", _SECONDS, "model")
        self._search_seconds = histogram("search_seconds", "Of one batch in the model.", _SECONDS, "model")
        self._batch_size = histogram("batch_size", "Requests searched together.", _SIZES, "model")
        self._lists = counter("lists", "Lists of recommendations.", "model", "exact", "fallback")
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were run.", "model")
        self._expansions = histogram("expansions", "Trie nodes expanded for a list.", _EXPANSIONS, "model")
        self._refused = counter("refused", "Requests refused for want of room or time.", "reason")
        self._swaps = counter("swaps", "Attempts to replace the models.", "outcome")
        self._models = Gauge("ilrec_models", "Models that are served.", ["replica"], registry=self.registry)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count an HTTP request."""
        self._requests.labels(route, str(status), self._replica).inc()
        self._request_seconds.labels(route, self._replica).observe(seconds)

    def batch(self, model: str, waits: Sequence[float], seconds: float) -> None:
        """Count a batch."""
        for wait in waits:
            self._wait_seconds.labels(model, self._replica).observe(wait)
        self._search_seconds.labels(model, self._replica).observe(seconds)
        self._batch_size.labels(model, self._replica).observe(len(waits))

    def list(self, model: str, found: Recommendation, fallback: bool) -> None:
        """Count a list of recommendations."""
        self._lists.labels(model, str(found.exact).lower(), str(fallback).lower(), self._replica).inc()
        self._prompt_tokens.labels(model, self._replica).inc(found.prompt_tokens)
        self._expansions.labels(model, self._replica).observe(found.expansions)

    def refused(self, reason: str) -> None:
        """Count a request that was refused: "busy" or "timeout"."""
        self._refused.labels(reason, self._replica).inc()

    def swap(self, models: int, failed: bool) -> None:
        """Count an attempt to replace the models, and say how many are served now."""
        self._swaps.labels("failed" if failed else "done", self._replica).inc()
        self._models.labels(self._replica).set(models)

    def exposition(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)

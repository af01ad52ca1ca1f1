"""What a replica serves: recommenders by name, and how they are replaced while requests come in."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from recommender import golden
from recommender.backbone.bases import Bases
from recommender.errors import UserError
from recommender.loading import load_recommender
from recommender.recommendation import AnyRecommender, Recommendation
from service.answering import answer, tokens
from service.batching import Batcher, SearchThread
from service.config import ServingConfig
from service.logs import logger
from service.metrics import Metrics
from service.queries import Query, RankQuery
from service.served import Served


class Model(Served):
    """What is served under one name, and the queue of those who ask it.

    Args:
        name, recommender: as in `Served`.
        config: the endpoint's.
        thread: that the replica's recommenders share.
        metrics: told of its batches.
    """

    def __init__(
        self, name: str, recommender: AnyRecommender, config: ServingConfig, thread: SearchThread, metrics: Metrics
    ):
        super().__init__(name, recommender, fallback=config.fallback == "popular")
        self.batcher: Batcher[Query | RankQuery, Recommendation] = Batcher(
            lambda queries: answer(self, queries),
            lambda query: tokens(self, query),
            thread,
            config.max_batch_tokens,
            config.batch_wait_seconds,
            config.max_queue,
            lambda waits, seconds: metrics.batch(name, waits, seconds),
        )


class Models:
    """The recommenders of a replica; the first is the default.

    Args:
        config: the endpoint.
        metrics: of the replica.

    Attributes:
        failed: why the latest bundles could not replace what is served; None after a swap that went well.
    """

    def __init__(self, config: ServingConfig, metrics: Metrics):
        self.config = config
        self.metrics = metrics
        self.failed: str | None = None
        self._thread = SearchThread(config.threads)
        self._bases = Bases()
        self._swapping = asyncio.Lock()
        self._served: dict[str, Model] = {}

    @property
    def served(self) -> list[Model]:
        """All of them, the default first."""
        return list(self._served.values())

    def get(self, name: str | None) -> Model | None:
        """A model by name, or the default; None when there is none."""
        return next(iter(self._served.values()), None) if name is None else self._served.get(name)

    def replace(self, recommenders: Mapping[str, AnyRecommender]) -> None:
        """Serve these, open already, from now on; requests under way end with the recommender that they began with."""
        self._served = {name: self._around(name, recommender) for name, recommender in recommenders.items()}

    async def swap(self, bundles: Mapping[str, str]) -> None:
        """Open bundles beside what is served, let each repeat its golden request, then replace all at once.

        Raises:
            UserError: one of them cannot be served, and nothing is served yet. Later on the reason goes to `failed`,
                and what was served stays.
        """
        async with self._swapping:
            try:
                loaded = await asyncio.to_thread(self._open, bundles)
            except UserError as error:
                self.keep(str(error))
            else:
                self._served, self.failed = loaded, None
                self.metrics.swap(len(loaded), failed=False)
            # What is not served any more goes: models hold cycles, and their weights would stay for long. What is left
            # is not looked at again, or a full collection would halt a request for some 300 ms now and then.
            gc.unfreeze()
            gc.collect()
            gc.freeze()

    def keep(self, reason: str) -> None:
        """Go on with what is served, because of what is wrong with that which was to come.

        Raises:
            UserError: the reason, where nothing is served yet.
        """
        self.metrics.swap(len(self._served), failed=True)
        if not self._served:
            raise UserError(reason)
        self.failed = reason
        logger.error(json.dumps({"models": "kept", "failed": reason}))

    def check(self) -> None:
        """Whether the replica is worth keeping.

        Raises:
            RuntimeError: it has no model, or a batch hangs.
        """
        if not self._served:
            raise RuntimeError(
                "no model is loaded; name bundles in the deployment's user_config: {models: {name: path}}"
            )
        if self._thread.busy_seconds > max(60.0, 10 * self.config.timeout_seconds):
            raise RuntimeError(f"a batch has been computed for {self._thread.busy_seconds:.0f} s")

    def _open(self, bundles: Mapping[str, str]) -> dict[str, Model]:
        return {name: self._opened(name, Path(path).expanduser()) for name, path in bundles.items()}

    def _opened(self, name: str, path: Path) -> Model:
        try:
            device = "cuda" if self.config.gpus_per_replica else "cpu"
            dtype = None if self.config.precision is None else getattr(torch, self.config.precision)
            cache = self.config.history_cache_bytes
            recommender = load_recommender(path, device, dtype, self.config.search, cache, self._bases)
            golden.check(recommender)
            return self._around(name, recommender)
        except UserError:
            raise
        except Exception as error:  # whatever a library says of a bundle, the replica lives on
            raise UserError(f"{path}: cannot be served: {type(error).__name__}: {error}") from error

    def _around(self, name: str, recommender: AnyRecommender) -> Model:
        return Model(name, recommender, self.config, self._thread, self.metrics)

"""What a replica serves: recommenders by name, and how they are replaced while requests come in: because the endpoint's
config changed, or because a name of a storage stands for another version now.
"""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch

from recommender import golden
from recommender.backbone.bases import Bases
from recommender.bundle import peek_manifest
from recommender.errors import UserError
from recommender.floors.recommender import FloorRecommender
from recommender.loading import load_recommender
from recommender.models import Model, Version, default_storage, find_bundle
from recommender.recommendation import AnyRecommender, Recommendation
from service.answering import answer, tokens
from service.batching import Batcher, SearchThread
from service.config import ServingConfig
from service.logs import logger
from service.metrics import Metrics
from service.queries import Query, RankQuery
from service.served import Served
from service.substitute import load_floor

_CONFIG = "models"  # all that a swap names


class Queued(Served):
    """What is served under one name, and the queue of those who ask it.

    Args:
        name, recommender: as in `Served`.
        bundle: it was opened from; None where it was not.
        config: the endpoint's.
        thread: that the replica's recommenders share.
        metrics: told of its batches.
        floor: answers where the recommender has no room or no time.
    """

    def __init__(
        self,
        name: str,
        bundle: Path | None,
        recommender: AnyRecommender,
        config: ServingConfig,
        thread: SearchThread,
        metrics: Metrics,
        floor: FloorRecommender | None = None,
    ):
        super().__init__(name, recommender, config.fallback != "none", floor)
        self.bundle = bundle
        self.version: int | None = recommender.manifest.version
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
    """

    def __init__(self, config: ServingConfig, metrics: Metrics):
        self.config = config
        self.metrics = metrics
        self._storage = Path(config.storage) if config.storage else default_storage()
        self._thread = SearchThread(config.threads)
        self._bases = Bases()
        self._swapping = asyncio.Lock()
        self._served: dict[str, Queued] = {}
        self._references: dict[str, str] = {}  # as the latest swap named them
        self._promoted: dict[str, Version | str | None] = {}  # what those of them stood for that are followed
        self._failed: dict[str, str] = {}  # why, by what failed: a model's name, or _CONFIG

    @property
    def served(self) -> list[Queued]:
        """All of them, the default first."""
        return list(self._served.values())

    def get(self, name: str | None) -> Queued | None:
        """A model by name, or the default; None when there is none."""
        return next(iter(self._served.values()), None) if name is None else self._served.get(name)

    @property
    def failed(self) -> str | None:
        """Why something that was to be served is not; None if all of it is."""
        return "; ".join(self._failed.values()) or None

    def replace(self, recommenders: Mapping[str, AnyRecommender]) -> None:
        """Serve these, open already, from now on; requests under way end with the recommender that they began with."""
        self._served = {name: self._around(name, None, recommender) for name, recommender in recommenders.items()}

    async def swap(self, references: Mapping[str, str]) -> None:
        """Open bundles beside what is served, let each repeat its golden request, then replace all at once.

        Args:
            references: by the name that requests call a model by: what `find_bundle` takes.

        Raises:
            UserError: one of them cannot be served, and nothing is served yet. Later on the reason goes to `failed`,
                and what was served stays.
        """
        async with self._swapping:
            self._references = dict(references)
            self._promoted = await asyncio.to_thread(self._look)
            await self._replace(self._references, _CONFIG)

    async def follow(self) -> None:
        """Look again and again whether a name stands for another version, and serve that; ends at once if not wanted.

        A version is tried once: if it cannot be served, the one before it stays until the name stands for a third.
        """
        while self.config.follow_seconds:
            await asyncio.sleep(self.config.follow_seconds)
            async with self._swapping:
                found = await asyncio.to_thread(self._look)
                changed = [name for name in found if found[name] != self._promoted.get(name)]
                self._promoted = found
                if changed and _CONFIG in self._failed:  # it may go well now, and replicas that start try it as well
                    await self._replace(self._references, _CONFIG)
                else:
                    for name in changed:
                        await self._replace({name: self._references[name]}, name)

    def keep(self, reason: str, what: str = "user_config") -> None:
        """Go on with what is served, because of what is wrong with that which was to come.

        Raises:
            UserError: the reason, where nothing is served yet.
        """
        self.metrics.swap(len(self._served), failed=True)
        if not self._served:
            raise UserError(reason)
        self._failed[what] = reason
        logger.error(json.dumps({"models": "kept", "failed": reason}))

    def check(self) -> None:
        """Whether the replica is worth keeping.

        Raises:
            RuntimeError: it has no model, or a batch hangs.
        """
        if not self._served:
            raise RuntimeError(
                "no model is loaded; name some in the deployment's user_config: {models: {name: reference}}"
            )
        if self._thread.busy_seconds > max(60.0, 10 * self.config.timeout_seconds):
            raise RuntimeError(f"a batch has been computed for {self._thread.busy_seconds:.0f} s")

    def _look(self) -> dict[str, Version | str | None]:
        """What the followed names stand for, by the name that requests use; what is wrong where that cannot be read."""
        found: dict[str, Version | str | None] = {}
        for name, reference in self._references.items():
            if "@" not in reference and not reference.startswith((".", "~", "/")):
                try:
                    found[name] = Model(self._storage, reference).promoted
                except (UserError, OSError) as error:
                    found[name] = str(error)
        return found

    async def _replace(self, references: Mapping[str, str], what: str) -> None:
        """Serve these, and what else is served of the latest swap; or none of them, because of `what`."""
        try:
            opened = await asyncio.to_thread(self._open, references)
        except UserError as error:
            self.keep(str(error), what)
        else:
            self._served = {name: opened.get(name) or self._served[name] for name in self._references}
            self._failed = {} if what == _CONFIG else {name: why for name, why in self._failed.items() if name != what}
            self.metrics.swap(len(self._served), failed=False)
            del opened
        # What is not served any more goes: models hold cycles, and their weights would stay for long. What is left
        # is not looked at again, or a full collection would halt a request for some 300 ms now and then.
        gc.unfreeze()
        gc.collect()
        gc.freeze()

    def _open(self, references: Mapping[str, str]) -> dict[str, Queued]:
        return {name: self._opened(name, reference) for name, reference in references.items()}

    def _opened(self, name: str, reference: str) -> Queued:
        try:
            bundle = find_bundle(reference, self._storage)
            if self._holds(name, bundle):
                return self._served[name]
            device = "cuda" if self.config.gpus_per_replica else "cpu"
            dtype = None if self.config.precision is None else getattr(torch, self.config.precision)
            cache = self.config.history_cache_bytes
            recommender = load_recommender(bundle, device, dtype, self.config.search, cache, self._bases)
            golden.check(recommender)
            return self._around(name, bundle, recommender)
        except UserError:
            raise
        except Exception as error:  # whatever a library says of a bundle, the replica lives on
            raise UserError(f"{reference}: cannot be served: {type(error).__name__}: {error}") from error

    def _holds(self, name: str, bundle: Path) -> bool:
        """Whether this is what is served under the name already; a path may hold something else by now."""
        served = self._served.get(name)
        if served is None or served.bundle != bundle:
            return False
        mine, theirs = served.recommender.manifest, peek_manifest(bundle)
        return (mine.checksum, mine.exported_at) == (theirs.checksum, theirs.exported_at)

    def _around(self, name: str, bundle: Path | None, recommender: AnyRecommender) -> Queued:
        return Queued(name, bundle, recommender, self.config, self._thread, self.metrics, self._floor)

    @cached_property
    def _floor(self) -> FloorRecommender | None:
        """What `fallback` names, opened once.

        Raises:
            UserError: it cannot be used.
        """
        reference = self.config.floor
        return None if reference is None else load_floor(find_bundle(reference, self._storage))

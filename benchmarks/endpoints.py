"""What `benchmarks.serving` compares the endpoint with, on Ray Serve as its manual shows it."""

# No `annotations` from `__future__`: Serve pickles the routes by value, and FastAPI would look for the names in vain.

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from ray import serve

_empty, _generating = FastAPI(), FastAPI()


# Serve's own limit of 5 would make its router back off under load, and what waits then is answered slowly for long.
@serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)
@serve.ingress(_empty)
class Empty:
    """Answers at once: what HTTP, Serve's proxy and a replica cost."""

    @_empty.post("/")
    async def answer(self) -> dict[str, str]:
        return {"status": "ok"}

    @_empty.post("/read")
    async def read(self, request: Request) -> dict[str, str]:
        """Answers once the body of the request is here, as everything must that is asked something."""
        await request.body()
        return {"status": "ok"}


@serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)
@serve.ingress(_generating)
class Generating:
    """The model of a bundle behind `generate` with constrained beams, in batches by `serve.batch`.

    Args:
        bundle: a language model's.
        k: beams, and items wanted.
        threads: of torch.
    """

    def __init__(self, bundle: str, k: int, threads: int) -> None:
        import torch

        from benchmarks.beams import GenerateBeams
        from recommender.recommender import Recommender

        torch.set_num_threads(threads)
        recommender = Recommender.load(Path(bundle))
        space = recommender.space
        self._catalogue, self._prompt = recommender.catalogue, space.prompt
        self._beams = GenerateBeams(recommender.backbone, space.trie, k, space.identifiers.end)

    @_generating.post("/")
    async def recommend(self, body: dict[str, Any]) -> list[str]:
        titles: list[str] = await self._search(self._catalogue.indices_of(body["history"]))
        return titles

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.01)
    async def _search(self, histories: list[list[int]]) -> list[list[str]]:
        found = self._beams.search([self._prompt.encode(history) for history in histories])
        return [[self._catalogue.titles[item] for item in items] for items in found]

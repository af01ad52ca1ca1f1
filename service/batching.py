"""Requests that wait while a search runs are searched together next."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

import torch

Query = TypeVar("Query")
Answer = TypeVar("Answer")


class Batcher(Generic[Query, Answer]):
    """One thread that answers queries in batches, so that the event loop stays free.

    A batch is put together when the thread is free, of all that waits by then: a lone query never waits for company,
    and under load batches grow by themselves. (`serve.batch` closes a batch when its time-out passes, even while the
    one before it still runs: its batches stay as small as what arrives within that time-out.)

    Args:
        answer: queries to as many answers.
        max_size: of a batch.
        wait_seconds: how long a batch that is not full is held open.
        threads: that torch may use in the answering thread.

    Example:
        >>> async def main() -> list[int]:
        ...     batcher = Batcher(lambda queries: [q * q for q in queries], max_size=8)
        ...     async with batcher.running():
        ...         return await asyncio.gather(*(batcher.submit(q) for q in range(4)))
        >>> asyncio.run(main())
        [0, 1, 4, 9]
    """

    def __init__(
        self,
        answer: Callable[[list[Query]], list[Answer]],
        max_size: int,
        wait_seconds: float = 0.0,
        threads: int = 1,
    ):
        self._answer = answer
        self._max_size = max_size
        self._wait_seconds = wait_seconds
        self._threads = threads
        self._waiting: asyncio.Queue[tuple[Query, asyncio.Future[Answer]]] = asyncio.Queue()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answer queries for as long as this context is open."""
        with ThreadPoolExecutor(1, "search", torch.set_num_threads, (self._threads,)) as thread:
            work = asyncio.create_task(self._work(thread))
            try:
                yield
            finally:
                work.cancel()

    async def submit(self, query: Query) -> Answer:
        """Wait for the answer; raises what `answer` raised for this query. Cancel it, and it is not computed."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((query, future))
        return await future

    async def _work(self, thread: ThreadPoolExecutor) -> None:
        while True:
            batch = [await self._waiting.get()]
            if self._wait_seconds and self._waiting.qsize() + 1 < self._max_size:
                await asyncio.sleep(self._wait_seconds)
            while len(batch) < self._max_size and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            await self._run([(query, future) for query, future in batch if not future.done()], thread)

    async def _run(self, batch: list[tuple[Query, asyncio.Future[Answer]]], thread: ThreadPoolExecutor) -> None:
        if not batch:
            return
        queries = [query for query, _ in batch]
        try:
            answers = await asyncio.get_running_loop().run_in_executor(thread, self._answer, queries)
        except Exception as error:
            if len(batch) == 1:
                if not batch[0][1].done():
                    batch[0][1].set_exception(error)
            else:  # one query may not fail its neighbours: each by itself
                for single in batch:
                    await self._run([single], thread)
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)

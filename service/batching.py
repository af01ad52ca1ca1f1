"""Requests that wait while a search runs are searched together next."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

Query = TypeVar("Query")
Answer = TypeVar("Answer")

_MOMENT = 0.1  # of the time that the latest batch took


class Busy(Exception):
    """The queue is full.

    Args:
        retry_after: whole seconds in which what waits now will be answered, at the pace of the latest batch.
    """

    def __init__(self, retry_after: int):
        super().__init__(f"busy; try again in {retry_after} s")
        self.retry_after = retry_after


class SearchThread:
    """The one thread in which models compute, whoever's turn it is; the event loop stays free.

    Args:
        threads: that torch may use in it.
    """

    def __init__(self, threads: int = 1):
        self.executor = ThreadPoolExecutor(1, "search", torch.set_num_threads, (threads,))
        self.turn = asyncio.Lock()
        self.busy_since: float | None = None

    @property
    def busy_seconds(self) -> float:
        """How long the batch that is computed now has been running."""
        return 0.0 if self.busy_since is None else time.monotonic() - self.busy_since


class Batcher(Generic[Query, Answer]):
    """Answers queries in batches.

    A batch is put together when the thread is free, of all that waits by then: a lone query never waits for company,
    and under load batches grow by themselves. Clients that were answered together come back one after the other, so
    the batch after one of several is held open for a moment until there are as many. (`serve.batch` closes a batch when
    its time-out passes, even while the one before it still runs: its batches stay as small as what arrives within that
    time-out.) It needs no closing: nothing runs when nothing waits.

    Args:
        answer: queries to as many answers.
        thread: that calls `answer`; may be shared.
        max_size: of a batch.
        wait_seconds: how long a batch that is not full is held open.
        max_open: queries that may wait or be computed.
        observe: told of each batch the seconds that its queries waited, and the seconds it took.

    Example:
        >>> async def main() -> list[int]:
        ...     batcher = Batcher(lambda queries: [q * q for q in queries], SearchThread(), max_size=8)
        ...     return await asyncio.gather(*(batcher.submit(q) for q in range(4)))
        >>> asyncio.run(main())
        [0, 1, 4, 9]
    """

    def __init__(
        self,
        answer: Callable[[list[Query]], list[Answer]],
        thread: SearchThread,
        max_size: int,
        wait_seconds: float = 0.0,
        max_open: int = 1000,
        observe: Callable[[list[float], float], None] = lambda waits, seconds: None,
    ):
        self._answer = answer
        self._thread = thread
        self._max_size = max_size
        self._wait_seconds = wait_seconds
        self._max_open = max_open
        self._observe = observe
        self._open = 0
        self._seconds_a_query = 0.0
        self._latest = 1  # queries of the latest batch
        self._waiting: deque[tuple[Query, asyncio.Future[Answer], float]] = deque()
        self._work: asyncio.Task[None] | None = None

    def submit(self, query: Query) -> asyncio.Future[Answer]:
        """Queue a query; the future raises what `answer` raised for it. Cancel it, and its place is free at once.

        Raises:
            Busy: there is no room.
        """
        if self._open >= self._max_open:
            raise Busy(1 + int(self._open * self._seconds_a_query))
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        future.add_done_callback(self._close)
        self._open += 1
        self._waiting.append((query, future, time.monotonic()))
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._empty())
        return future

    def _close(self, future: asyncio.Future[Answer]) -> None:
        self._open -= 1

    async def _empty(self) -> None:
        while self._waiting:
            hold = self._wait_seconds if len(self._waiting) < self._max_size else 0.0
            if len(self._waiting) < self._latest:
                hold = max(hold, _MOMENT * self._latest * self._seconds_a_query)
            if hold:
                await asyncio.sleep(hold)
            async with self._thread.turn:
                batch: list[tuple[Query, asyncio.Future[Answer], float]] = []
                while self._waiting and len(batch) < self._max_size:
                    query, future, since = self._waiting.popleft()
                    if not future.done():
                        batch.append((query, future, since))
                if batch:
                    await self._run(batch)

    async def _run(self, batch: list[tuple[Query, asyncio.Future[Answer], float]]) -> None:
        started = self._thread.busy_since = time.monotonic()
        waits = [started - since for _, _, since in batch]
        try:
            answers = await asyncio.get_running_loop().run_in_executor(
                self._thread.executor, self._answer, [query for query, _, _ in batch]
            )
        except Exception as error:
            if len(batch) > 1:  # one query may not fail its neighbours: each by itself
                for single in batch:
                    await self._run([single])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        finally:
            self._thread.busy_since = None
        seconds = time.monotonic() - started
        self._seconds_a_query, self._latest = seconds / len(batch), len(batch)
        self._observe(waits, seconds)
        for (_, future, _), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)

"""Requests that wait while a search runs are searched together next."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

Query = TypeVar("Query")
Answer = TypeVar("Answer")


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


@dataclass(eq=False)
class _Waiting(Generic[Query, Answer]):
    query: Query
    tokens: int
    future: asyncio.Future[Answer]
    since: float  # time.monotonic()


class Batcher(Generic[Query, Answer]):
    """Answers queries in batches.

    A batch is put together when the thread is free: what waits by then, oldest first, up to the first query with which
    it would hold more than `max_tokens`. So queries keep their order, none waits for others than those before it, and
    one that is larger than the budget runs alone. A lone query never waits for company, and under load batches grow by
    themselves. (`serve.batch` closes a batch when its time-out passes, even while the one before it still runs: its
    batches stay as small as what arrives within that time-out.) It needs no closing: nothing runs when nothing waits.

    Args:
        answer: queries to as many answers.
        tokens: what a query takes of a batch's budget.
        thread: that calls `answer`; may be shared.
        max_tokens: of a batch.
        wait_seconds: how long a batch within the budget is held open.
        max_open: queries that may wait or be computed.
        observe: told of each batch the seconds that its queries waited, and the seconds it took.

    Example:
        >>> async def main() -> list[int]:
        ...     batcher = Batcher(lambda queries: [q * q for q in queries], lambda q: 1, SearchThread(), 8)
        ...     return await asyncio.gather(*(batcher.submit(q) for q in range(4)))
        >>> asyncio.run(main())
        [0, 1, 4, 9]
    """

    def __init__(
        self,
        answer: Callable[[list[Query]], list[Answer]],
        tokens: Callable[[Query], int],
        thread: SearchThread,
        max_tokens: int,
        wait_seconds: float = 0.0,
        max_open: int = 1000,
        observe: Callable[[list[float], float], None] = lambda waits, seconds: None,
    ):
        self._answer = answer
        self._tokens = tokens
        self._thread = thread
        self._max_tokens = max_tokens
        self._wait_seconds = wait_seconds
        self._max_open = max_open
        self._observe = observe
        self._open = 0
        self._seconds_a_query = 0.0
        self._waiting: deque[_Waiting[Query, Answer]] = deque()
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
        self._waiting.append(_Waiting(query, self._tokens(query), future, time.monotonic()))
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._empty())
        return future

    def _close(self, future: asyncio.Future[Answer]) -> None:
        self._open -= 1

    async def _empty(self) -> None:
        while self._waiting:
            if self._wait_seconds and sum(each.tokens for each in self._waiting) < self._max_tokens:
                await asyncio.sleep(self._wait_seconds)
            async with self._thread.turn:
                if batch := self._next_batch():
                    await self._run(batch)

    def _next_batch(self) -> list[_Waiting[Query, Answer]]:
        batch: list[_Waiting[Query, Answer]] = []
        tokens = 0
        while self._waiting:
            first = self._waiting[0]
            if not first.future.done():
                tokens += first.tokens
                if batch and tokens > self._max_tokens:
                    break
                batch.append(first)
            self._waiting.popleft()
        return batch

    async def _run(self, batch: list[_Waiting[Query, Answer]]) -> None:
        started = self._thread.busy_since = time.monotonic()
        waits = [started - each.since for each in batch]
        try:
            answers = await asyncio.get_running_loop().run_in_executor(
                self._thread.executor, self._answer, [each.query for each in batch]
            )
        except Exception as error:
            if len(batch) > 1:  # one query may not fail its neighbours: each by itself
                for single in batch:
                    await self._run([single])
            elif not batch[0].future.done():
                batch[0].future.set_exception(error)
            return
        finally:
            self._thread.busy_since = None
        seconds = time.monotonic() - started
        self._seconds_a_query = seconds / len(batch)
        self._observe(waits, seconds)
        for each, answer in zip(batch, answers, strict=True):
            if not each.future.done():
                each.future.set_result(answer)

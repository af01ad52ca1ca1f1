"""Batches: who is searched with whom, what a failing or a departed query does to its neighbours."""

from __future__ import annotations

import asyncio
import threading

import pytest

from service.batching import Batcher, Busy, SearchThread


class Squares:
    """Squares numbers, once its gate is open; one number fails. Remembers its batches."""

    def __init__(self) -> None:
        self.fails: int | None = 0
        self.batches: list[list[int]] = []
        self.gate = threading.Event()

    def __call__(self, queries: list[int]) -> list[int]:
        self.gate.wait(10)
        self.batches.append(queries)
        if self.fails in queries:
            raise ValueError("zero")
        return [query * query for query in queries]


def one_each(query: int) -> int:
    return 1


async def submit_while_busy(
    batcher: Batcher[int, int], squares: Squares, queries: list[int]
) -> list[asyncio.Future[int]]:
    """Occupy the thread with 100, queue `queries` behind it."""
    tasks = [batcher.submit(100)]
    await asyncio.sleep(0.05)
    tasks += [batcher.submit(query) for query in queries]
    await asyncio.sleep(0.05)
    return tasks


def test_what_waits_is_answered_together_in_order() -> None:
    async def main() -> None:
        squares = Squares()
        batcher = Batcher(squares, one_each, SearchThread(), max_tokens=4)
        tasks = await submit_while_busy(batcher, squares, [1, 2, 3, 4, 5, 6])
        squares.gate.set()
        assert await asyncio.gather(*tasks) == [10_000, 1, 4, 9, 16, 25, 36]
        assert squares.batches == [[100], [1, 2, 3, 4], [5, 6]]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("tokens", "batches"),
    [
        ([3, 3, 3, 3], [[3, 3, 3], [3]]),  # nine of ten
        ([5, 5, 1], [[5, 5], [1]]),  # the budget may be filled
        ([9, 2, 1, 8], [[9], [2, 1], [8]]),  # the 1 would fit beside the 9, and does not overtake the 2
        ([4, 30, 4, 4, 2, 1], [[4], [30], [4, 4, 2], [1]]),  # more than the budget: alone, in its turn
        ([11, 11], [[11], [11]]),
        ([10, 0, 0, 1], [[10, 0, 0], [1]]),  # what takes nothing costs nothing
    ],
)
def test_a_batch_is_what_waits_within_the_budget_oldest_first(tokens: list[int], batches: list[list[int]]) -> None:
    async def main() -> None:
        squares = Squares()
        squares.fails = None
        batcher = Batcher(squares, lambda query: query, SearchThread(), max_tokens=10)
        tasks = await submit_while_busy(batcher, squares, tokens)
        squares.gate.set()
        assert await asyncio.gather(*tasks) == [query * query for query in [100, *tokens]]
        assert squares.batches == [[100], *batches]

    asyncio.run(main())


def test_those_who_left_take_nothing_of_the_budget() -> None:
    async def main() -> None:
        squares = Squares()
        batcher = Batcher(squares, lambda query: query, SearchThread(), max_tokens=10)
        tasks = await submit_while_busy(batcher, squares, [4, 5, 6, 7])
        tasks[2].cancel()
        squares.gate.set()
        assert await asyncio.gather(tasks[1], *tasks[3:]) == [16, 36, 49]
        assert squares.batches == [[100], [4, 6], [7]]

    asyncio.run(main())


def test_a_failing_query_fails_alone() -> None:
    async def main() -> None:
        squares = Squares()
        batcher = Batcher(squares, one_each, SearchThread(), max_tokens=8)
        tasks = await submit_while_busy(batcher, squares, [1, 0, 3])
        squares.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [results[i] for i in (0, 1, 3)] == [10_000, 1, 9]
        assert isinstance(results[2], ValueError)
        assert await batcher.submit(5) == 25

    asyncio.run(main())


def test_a_query_whose_client_left_is_not_computed() -> None:
    async def main() -> None:
        squares = Squares()
        batcher = Batcher(squares, one_each, SearchThread(), max_tokens=8)
        tasks = await submit_while_busy(batcher, squares, [1, 2, 3])
        tasks[0].cancel()  # this one is being computed
        tasks[2].cancel()
        squares.gate.set()
        assert await asyncio.gather(tasks[1], tasks[3]) == [1, 9]
        with pytest.raises(asyncio.CancelledError):
            await tasks[2]
        assert squares.batches == [[100], [1, 3]]

    asyncio.run(main())


def test_waiting_for_company_lets_a_burst_become_one_batch() -> None:
    async def main(wait_seconds: float) -> list[list[int]]:
        squares = Squares()
        squares.gate.set()
        batcher = Batcher(squares, one_each, SearchThread(), max_tokens=3, wait_seconds=wait_seconds)
        first = batcher.submit(1)
        await asyncio.sleep(0.05)
        second = batcher.submit(2)
        assert await asyncio.gather(first, second) == [1, 4]
        return squares.batches

    assert asyncio.run(main(wait_seconds=0.3)) == [[1, 2]]
    assert asyncio.run(main(wait_seconds=0.0)) == [[1], [2]]


def test_a_full_queue_refuses_and_a_departed_query_makes_room() -> None:
    async def main() -> None:
        squares = Squares()
        batcher = Batcher(squares, one_each, SearchThread(), max_tokens=8, max_open=3)
        tasks = await submit_while_busy(batcher, squares, [1, 2])
        with pytest.raises(Busy) as refused:
            batcher.submit(3)
        assert refused.value.retry_after >= 1
        tasks[1].cancel()
        await asyncio.sleep(0)
        third = batcher.submit(3)
        squares.gate.set()
        assert await asyncio.gather(tasks[0], tasks[2], third) == [10_000, 4, 9]
        assert await batcher.submit(4) == 16
        assert squares.batches == [[100], [2, 3], [4]]

    asyncio.run(main())


def test_batchers_share_a_thread() -> None:
    async def main() -> None:
        squares, others = Squares(), Squares()
        others.gate.set()
        observed: list[int] = []
        thread = SearchThread()
        batcher = Batcher(squares, one_each, thread, max_tokens=8)
        other = Batcher(others, one_each, thread, 8, observe=lambda waits, seconds: observed.append(len(waits)))
        busy = batcher.submit(5)
        await asyncio.sleep(0.05)
        waiting = [other.submit(1)]
        await asyncio.sleep(0.05)
        waiting.append(other.submit(2))  # its batch is only put together when the thread is free
        assert thread.busy_seconds > 0
        squares.gate.set()
        assert await asyncio.gather(busy, *waiting) == [25, 1, 4]
        assert (others.batches, observed, thread.busy_seconds) == ([[1, 2]], [2], 0.0)

    asyncio.run(main())

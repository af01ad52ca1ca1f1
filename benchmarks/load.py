"""Load on an HTTP endpoint from a process of its own, so that neither takes time from the other's event loop.

`python -m benchmarks.load` reads a `Plan` from standard input and writes `Measured` to standard output, both as JSON;
`measure` calls it.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import cycle
from typing import Literal

import numpy as np
from pydantic import Field

from recommender.config import StrictModel


class Closed(StrictModel):
    """Clients that each ask again as soon as they are answered: as fast as the endpoint can."""

    kind: Literal["closed"] = "closed"
    clients: int = Field(ge=1, description="Connections, each with one request under way.")


class Open(StrictModel):
    """Requests that come when they come (a Poisson process), whether or not earlier ones are answered."""

    kind: Literal["open"] = "open"
    rate: float = Field(gt=0, description="Requests a second.")


class Plan(StrictModel):
    """What to ask, and how."""

    host: str
    port: int
    path: str
    bodies: list[str] = Field(min_length=1, description="JSON, asked in turn.")
    loop: Closed | Open = Field(discriminator="kind")
    warm_up: float = Field(description="Seconds before anything is counted.")
    seconds: float = Field(gt=0, description="Seconds that are counted.")

    def requests(self) -> Iterator[bytes]:
        """The bodies as HTTP requests, for ever."""
        head = f"POST {self.path} HTTP/1.1\r\nhost: {self.host}\r\ncontent-type: application/json\r\n"
        encoded = [body.encode() for body in self.bodies]
        return cycle([f"{head}content-length: {len(body)}\r\n\r\n".encode() + body for body in encoded])


class Measured(StrictModel):
    """What was seen.

    Attributes:
        latencies: seconds of each request with status 200; in an open loop since it was due, not since it was sent.
        refused: requests by any other status.
        seconds: that were counted.
    """

    latencies: list[float]
    refused: dict[int, int]
    seconds: float

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.latencies) / self.seconds

    def percentile(self, share: float) -> float:
        """Milliseconds within which this share (of 100) was answered; NaN without answers."""
        return 1e3 * float(np.percentile(self.latencies, share)) if self.latencies else float("nan")


def arrivals(rate: float, seconds: float, seed: int = 0) -> np.ndarray:
    """float64, rising: when requests of a Poisson process are due within `seconds`."""
    rng = np.random.default_rng(seed)
    number = rng.poisson(rate * seconds)
    return np.sort(rng.uniform(0, seconds, number))


def measure(plan: Plan) -> Measured:
    """Carry out a plan in another process."""
    command = [sys.executable, "-m", "benchmarks.load"]
    done = subprocess.run(command, input=plan.model_dump_json(), stdout=subprocess.PIPE, text=True, check=True)
    return Measured.model_validate_json(done.stdout)


class _Connection:
    """A connection that is kept. A client library would cost more than some answers do."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, plan: Plan) -> _Connection:
        return cls(*await asyncio.open_connection(plan.host, plan.port))

    async def ask(self, request: bytes) -> int:
        """The status of the answer, once all of it is here."""
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        if length is None:  # in chunks, as Serve's own refusals are
            await self._reader.readuntil(b"0\r\n\r\n")
        else:
            await self._reader.readexactly(int(length[1]))
        return int(head.split(b" ", 2)[1])


class _Tally:
    def __init__(self) -> None:
        self.latencies: list[float] = []
        self.refused: Counter[int] = Counter()

    def add(self, status: int, seconds: float) -> None:
        if status == 200:
            self.latencies.append(seconds)
        else:
            self.refused[status] += 1


async def _closed(plan: Plan, clients: int, tally: _Tally) -> None:
    requests = plan.requests()
    begin = time.perf_counter() + plan.warm_up
    end = begin + plan.seconds

    async def client() -> None:
        connection = await _Connection.open(plan)
        while (asked := time.perf_counter()) < end:
            status = await connection.ask(next(requests))
            if begin <= (answered := time.perf_counter()) < end:
                tally.add(status, answered - asked)

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())


async def _open(plan: Plan, rate: float, tally: _Tally) -> None:
    idle: list[_Connection] = []
    begin = time.perf_counter()

    async def one(due: float, request: bytes) -> None:
        connection = idle.pop() if idle else await _Connection.open(plan)
        status = await connection.ask(request)
        idle.append(connection)
        if due >= plan.warm_up:
            tally.add(status, time.perf_counter() - begin - due)

    async with asyncio.TaskGroup() as group:
        for due, request in zip(arrivals(rate, plan.warm_up + plan.seconds).tolist(), plan.requests(), strict=False):
            await asyncio.sleep(max(0.0, begin + due - time.perf_counter()))
            group.create_task(one(due, request))


def main() -> None:
    plan = Plan.model_validate_json(sys.stdin.read())
    tally = _Tally()
    loop = plan.loop
    asyncio.run(_closed(plan, loop.clients, tally) if loop.kind == "closed" else _open(plan, loop.rate, tally))
    print(Measured(latencies=tally.latencies, refused=dict(tally.refused), seconds=plan.seconds).model_dump_json())


if __name__ == "__main__":
    main()

"""The load generator against a small server, and its pure parts."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from benchmarks.load import Closed, Measured, Open, Plan, arrivals, measure


def test_percentiles_and_rate() -> None:
    measured = Measured(latencies=[i / 1000 for i in range(1, 102)], refused={503: 2}, seconds=2.0)
    assert measured.rate == 50.5
    assert [measured.percentile(share) for share in (0, 50, 99, 100)] == pytest.approx([1, 51, 100, 101])
    nothing = Measured(latencies=[], refused={}, seconds=1)
    assert nothing.rate == 0
    assert np.isnan(nothing.percentile(50))


def test_arrivals_are_a_poisson_process() -> None:
    due = arrivals(rate=200, seconds=50)
    assert (np.diff(due) >= 0).all()
    assert 0 <= due[0] < due[-1] < 50
    assert abs(len(due) - 10_000) < 5 * 100  # five standard deviations
    gaps = np.diff(due)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # exponential, not even
    assert arrivals(200, 50).tolist() == due.tolist()
    assert arrivals(200, 50, seed=1)[0] != due[0]


def test_requests_are_http_and_come_in_turn() -> None:
    plan = a_plan(1, Closed(clients=1), bodies=["{}", '{"é": 1}'])
    first, second, third = islice(plan.requests(), 3)
    assert (
        first
        == third
        == b"POST /x HTTP/1.1\r\nhost: 127.0.0.1\r\n"
        + (b"content-type: application/json\r\ncontent-length: 2\r\n\r\n{}")
    )
    assert second.endswith('content-length: 9\r\n\r\n{"é": 1}'.encode())


def test_plans_are_checked() -> None:
    for loop in ({"kind": "open", "rate": 0}, {"kind": "closed", "clients": 0}, {"kind": "other"}):
        with pytest.raises(ValidationError):
            a_plan(1, loop)


def a_plan(port: int, loop: Any, bodies: list[str] | None = None) -> Plan:
    return Plan(host="127.0.0.1", port=port, path="/x", bodies=bodies or ["{}"], loop=loop, warm_up=0.1, seconds=0.5)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bodies: list[bytes]
    clients: set[Any]

    def do_POST(self) -> None:
        self.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        self.clients.add(self.client_address)
        self.send_response(503 if self.bodies[-1] == b'"no"' else 200)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"null")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    Handler.bodies, Handler.clients = [], set()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def test_closed_loop(port: int) -> None:
    measured = measure(a_plan(port, Closed(clients=3), ["{}", '"no"']))
    assert len(Handler.clients) == 3, "connections are kept"
    assert set(Handler.bodies) == {b"{}", b'"no"'}
    assert measured.latencies
    assert set(measured.refused) == {503}
    assert len(measured.latencies) + measured.refused[503] <= len(Handler.bodies)


def test_open_loop_asks_as_often_as_planned(port: int) -> None:
    measured = measure(a_plan(port, Open(rate=100)))
    due = arrivals(100, 0.6)
    assert len(Handler.bodies) == len(due)
    assert len(measured.latencies) == (due >= 0.1).sum()
    assert not measured.refused

"""What stands around Serve's proxies, without Serve: bodies that travel with their requests."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from service import ingress
from service.ingress import CARRIED, Carrying
from service.limits import BodyLimit

HEADERS = [(b"content-length", b"4")]


def request(body: bytes, more: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


class Application:
    """Receives all that there is, and remembers it and its scope."""

    def __init__(self) -> None:
        self.scope: Scope = {}
        self.received: list[Message] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        while not self.received or self.received[-1].get("more_body"):
            self.received.append(await receive())


def pass_through(app: Any, scope: Scope, arriving: Sequence[Message], after: float = 0.0) -> list[Message]:
    """What the application sends that is asked with `scope` and receives `arriving`, the first of it late."""
    sent: list[Message] = []

    async def main() -> None:
        messages = list(arriving)

        async def receive() -> Message:
            if len(messages) == len(arriving):
                await asyncio.sleep(after)
            if not messages:
                await asyncio.Event().wait()
            return messages.pop(0)

        async def send(message: Message) -> None:
            sent.append(message)

        await asyncio.wait_for(app(scope, receive, send), 30)

    asyncio.run(main())
    return sent


def test_a_body_that_is_here_goes_along_and_is_received_as_ever() -> None:
    app = Application()
    pass_through(Carrying(app), {"type": "http", "headers": HEADERS}, [request(b"body")])
    assert app.scope[CARRIED] == b"body"
    assert app.received == [request(b"body")]


@pytest.mark.parametrize(
    ("headers", "arriving", "after"),
    [
        (HEADERS, [request(b"body")], 0.2),
        (HEADERS, [request(b"bo", more=True), request(b"dy")], 0.0),
        (HEADERS, [{"type": "http.disconnect"}], 0.0),
        ([], [request(b"")], 0.0),
    ],
    ids=["late", "in pieces", "client left", "no body"],
)
def test_other_bodies_are_only_received(
    headers: list[tuple[bytes, bytes]], arriving: list[Message], after: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingress, "_MOMENT", 0.02)
    app = Application()
    pass_through(Carrying(app), {"type": "http", "headers": headers}, arriving, after)
    assert CARRIED not in app.scope
    assert app.received == arriving


def test_what_never_receives_leaves_nothing_behind() -> None:
    async def deaf(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "answer"})

    async def never() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def main() -> None:
        async def send(message: Message) -> None:
            assert message == {"type": "answer"}

        await Carrying(deaf)({"type": "http", "headers": HEADERS}, never, send)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_the_endpoint_takes_a_body_that_came_along_and_holds_it_to_its_limit() -> None:
    app = Application()
    limited = BodyLimit(app, max_bytes=4, seconds=5)
    scope = {"type": "http", "headers": HEADERS}
    pass_through(limited, scope | {CARRIED: b"body"}, [])  # nothing arrives: a replica does not wait for it
    assert [message["body"] for message in app.received] == [b"body"]
    [start, _] = pass_through(limited, scope | {CARRIED: b"longer"}, [])
    assert start["status"] == 413
    assert len(app.received) == 1

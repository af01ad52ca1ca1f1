"""What stands around Serve's HTTP proxies, where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names `middlewares`."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.problems import Problem

CARRIED = "ilrec.body"  # in a request's scope: its whole body, bytes, if it came with the head
_MOMENT = 0.005  # seconds; a client's second packet takes less, fetching the body from a replica more


def middlewares() -> list[Middleware]:
    """What Serve is to put around each of its HTTP proxies."""
    return [Middleware(Unanswered), Middleware(Carrying)]


class Unanswered:
    """ASGI middleware that asks the client to come back when the replica died that worked on its request.

    Serve's proxy sends nothing then, and its server makes a bare 500 of that.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and answer it if nobody does."""
        answered = False

        async def sending(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        await self.app(scope, receive, sending)
        if scope["type"] == "http" and not answered:
            problem = Problem(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "the replica that worked on this has gone; ask again",
                headers={"retry-after": "1"},
            )
            await problem.response()(scope, receive, send)


class Carrying:
    """ASGI middleware that sends a body that is here along with its request, in the scope under `CARRIED`.

    Serve's proxy hands the head to a replica, which has to come back for the body with a call of its own. Applications
    that do not look into the scope receive the body as ever, and so does everybody where it is late or in pieces.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with its body if that comes within a moment."""
        if scope["type"] != "http" or not any(name == b"content-length" for name, _ in scope["headers"]):
            return await self.app(scope, receive, send)
        first = asyncio.ensure_future(receive())
        pending = [first]

        async def receiving() -> Message:
            return await (pending.pop() if pending else receive())

        try:
            await asyncio.wait(pending, timeout=_MOMENT)
            if first.done() and "body" in (message := first.result()) and not message.get("more_body"):
                scope[CARRIED] = message["body"]
            await self.app(scope, receiving, send)
        finally:
            first.cancel()

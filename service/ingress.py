"""What stands around Serve's HTTP proxies, where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names `middlewares`."""

from __future__ import annotations

from http import HTTPStatus

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.problems import Problem


def middlewares() -> list[Middleware]:
    """What Serve is to put around each of its HTTP proxies."""
    return [Middleware(Unanswered)]


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

"""What holds requests within bounds: the size of their bodies, and the patience of whoever waits for them."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.ingress import CARRIED
from service.problems import Problem
from service.schema import FieldError


class BodyLimit:
    """ASGI middleware that refuses bodies above a size, by what they declare and by what really arrives, and those that
    take too long to arrive.

    When the client disconnects, the request is cancelled: what still waits for a search is not searched.

    Args:
        max_bytes: of a body.
        seconds: in which a body must be here; until then it holds one of Serve's places.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float):
        self.app = app
        self.max_bytes = max_bytes
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on once its body is here and small enough."""
        headers = dict(scope["headers"]) if scope["type"] == "http" else {}
        if b"content-length" not in headers and b"transfer-encoding" not in headers:
            return await self.app(scope, receive, send)  # there is no body
        declared = headers.get(b"content-length", b"")[:20]
        if declared.isdigit() and int(declared) > self.max_bytes:
            return await self._refuse(scope, receive, send)
        carried: bytes | None = scope.get(CARRIED)  # by the proxy; no need to ask it
        messages: list[Message] = []
        size = 0
        try:
            async with asyncio.timeout(self.seconds):
                while not messages or messages[-1].get("more_body"):
                    messages.append(await receive() if carried is None else {"type": "http.request", "body": carried})
                    if messages[-1]["type"] == "http.disconnect":
                        return None
                    size += len(messages[-1].get("body", b""))
                    if size > self.max_bytes:
                        return await self._refuse(scope, receive, send)
        except TimeoutError:
            late = Problem(
                HTTPStatus.REQUEST_TIMEOUT,
                f"the body did not arrive within {self.seconds:g} s",
                headers={"connection": "close"},
            )
            return await late.response()(scope, receive, send)
        gone = asyncio.Event()

        async def replay() -> Message:
            if messages:
                return messages.pop(0)
            await gone.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        work = asyncio.ensure_future(self.app(scope, replay, send))
        watching = asyncio.create_task(watch())
        try:
            await asyncio.wait({work, watching}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            work.cancel()
            watching.cancel()

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = Problem(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"the body is larger than {self.max_bytes} bytes; send fewer items",
            [FieldError(field="body", message=f"larger than {self.max_bytes} bytes")],
        )
        await problem.response()(scope, receive, send)

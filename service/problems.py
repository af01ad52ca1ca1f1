"""What a client is told when its request cannot be answered: problem documents (RFC 9457) that name the field."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import schema
from service.schema import FieldError

_MOST_ERRORS = 20


class Problem(Exception):
    """A request that is refused.

    Args:
        status: of the HTTP response, 4xx.
        detail: what is wrong and what to do, for a person.
        errors: the faulty fields.
    """

    def __init__(self, status: HTTPStatus, detail: str, errors: Sequence[FieldError] = ()):
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.errors = list(errors)

    @classmethod
    def of_fields(cls, errors: Sequence[FieldError]) -> Problem:
        """422 for fields that parse as JSON and are wrong. The first are reported, all are counted."""
        detail = "; ".join(f"{error.field}: {error.message}" for error in errors[:3])
        more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
        return cls(HTTPStatus.UNPROCESSABLE_ENTITY, detail + more, errors[:_MOST_ERRORS])

    @classmethod
    def of_validation(cls, error: ValidationError) -> Problem:
        """400 for what is no JSON, 422 for JSON of the wrong shape."""
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        if errors[0]["type"] == "json_invalid":
            return cls(HTTPStatus.BAD_REQUEST, f"the body is no valid JSON: {errors[0]['msg']}")
        return cls.of_fields(
            [FieldError(field=_path(e["loc"]), message=_sentence(e["type"], e["msg"])) for e in errors]
        )

    def response(self) -> Response:
        """The problem document."""
        document = schema.Problem(
            title=self.status.phrase, status=self.status, detail=self.detail, errors=self.errors
        ).model_dump_json()
        return Response(document, self.status, media_type="application/problem+json")


def _path(location: tuple[int | str, ...]) -> str:
    """("history", 3) → "history[3]"; the body itself is "body"."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return path.removeprefix(".")[:100] or "body"


def _sentence(kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        return "unknown field"
    return message[:1].lower() + message[1:]


def install(api: FastAPI) -> None:
    """Answer every error of `api` with a problem document, its own 404, 405 and 500 included."""

    def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)
        return error.response()

    def refuse_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = HTTPStatus(error.status_code)
        response = Problem(status, f"{request.method} {request.url.path[:100]}: {error.detail}").response()
        response.headers.update(error.headers or {})
        return response

    def fail(request: Request, error: Exception) -> Response:
        return Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "the server failed; its log says why").response()

    api.add_exception_handler(Problem, refuse)
    api.add_exception_handler(HTTPException, refuse_route)
    api.add_exception_handler(Exception, fail)


class BodyLimit:
    """ASGI middleware that refuses bodies above a size: by what they declare, and by what really arrives."""

    def __init__(self, app: ASGIApp, max_bytes: int):
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on once its body is here and small enough."""
        headers = dict(scope["headers"]) if scope["type"] == "http" else {}
        if b"content-length" not in headers and b"transfer-encoding" not in headers:
            return await self.app(scope, receive, send)  # there is no body
        declared = headers.get(b"content-length", b"")[:20]
        if declared.isdigit() and int(declared) > self.max_bytes:
            return await self._refuse(scope, receive, send)
        messages: list[Message] = []
        size = 0
        while not messages or messages[-1].get("more_body"):
            messages.append(await receive())
            if messages[-1]["type"] == "http.disconnect":
                return None
            size += len(messages[-1].get("body", b""))
            if size > self.max_bytes:
                return await self._refuse(scope, receive, send)

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, replay, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = Problem(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"the body is larger than {self.max_bytes} bytes; send fewer items",
            [FieldError(field="body", message=f"larger than {self.max_bytes} bytes")],
        )
        await problem.response()(scope, receive, send)

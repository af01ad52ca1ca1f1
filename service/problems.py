"""What a client is told when its request cannot be answered: problem documents (RFC 9457) that name the field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from service import schema
from service.schema import FieldError

_MOST_ERRORS = 20


class Problem(Exception):
    """A request that is refused.

    Args:
        status: of the HTTP response, 4xx or 5xx.
        detail: what is wrong and what to do, for a person.
        errors: the faulty fields.
        headers: of the HTTP response.
    """

    def __init__(
        self,
        status: HTTPStatus,
        detail: str,
        errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.errors = list(errors)
        self.headers = headers

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
        return Response(document, self.status, self.headers, media_type="application/problem+json")


def _path(location: tuple[int | str, ...]) -> str:
    """("history", 3) → "history[3]"; the body itself is "body"."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return path.removeprefix(".")[:100] or "body"


def _sentence(kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        return "unknown field"
    return message[:1].lower() + message[1:]


def install(api: FastAPI) -> None:
    """Answer refusals with problem documents, the framework's own 404 and 405 included."""

    def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)
        return error.response()

    def refuse_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = HTTPStatus(error.status_code)
        response = Problem(status, f"{request.method} {request.url.path[:100]}: {error.detail}").response()
        response.headers.update(error.headers or {})
        return response

    def refuse_parameters(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        faults = [FieldError(field=_path(e["loc"][1:]), message=_sentence(e["type"], e["msg"])) for e in error.errors()]
        return Problem.of_fields(faults).response()

    api.add_exception_handler(Problem, refuse)
    api.add_exception_handler(RequestValidationError, refuse_parameters)
    api.add_exception_handler(HTTPException, refuse_route)

"""A client of the endpoint, for programs that ask it from elsewhere: typed, with timeouts and retries."""

from __future__ import annotations

import random
import time
import uuid
from http import HTTPStatus
from types import TracebackType
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from service.schema import (
    BatchRequest,
    BatchResponse,
    Item,
    Items,
    Models,
    Problem,
    RankRequest,
    RankResponse,
    RecommendationRequest,
    RecommendationResponse,
)

Answer = TypeVar("Answer", bound=BaseModel)

_COME_BACK = (429, 502, 503)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0  # seconds


class Refused(Exception):
    """The endpoint refused a request.

    Args:
        problem: what it said.
    """

    def __init__(self, problem: Problem):
        super().__init__(f"{problem.status}: {problem.detail}")
        self.problem = problem


class Client:
    """Asks an endpoint. Threads may share one.

    What the endpoint has no room for (429, 503), what a replica left unanswered when it died, and connections that fail
    are tried again after a pause: what `Retry-After` says, and a random share of a time that doubles. An answer that
    does not come in time is not asked for again: that would add load where there is too much of it.

    Args:
        url: e.g. "http://127.0.0.1:8000".
        token: sent as a bearer token.
        timeout: seconds to wait for an answer, in each attempt.
        retries: attempts after the first.

    Example:
        >>> with Client("http://127.0.0.1:8000") as client:                                        # doctest: +SKIP
        ...     answer = client.recommend(RecommendationRequest(history=["i12", "i7"], k=5))
        ...     print([item.title for item in answer.items], answer.exact)
    """

    def __init__(self, url: str, token: str | None = None, timeout: float = 10.0, retries: int = 3):
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout)
        self._retries = retries

    def recommend(self, request: RecommendationRequest, request_id: str | None = None) -> RecommendationResponse:
        """The top-K for one history.

        Args:
            request: for whom, and what may be recommended.
            request_id: names the request in the endpoint's logs; default: a random one.

        Raises:
            Refused: what the endpoint says is wrong, or that it has no room after all attempts.
            ConnectionError: the endpoint cannot be reached, or did not answer in time.
        """
        return self._post("/v1/recommendations", request, RecommendationResponse, request_id)

    def recommend_batch(self, request: BatchRequest, request_id: str | None = None) -> list[RecommendationResponse]:
        """The top-K for several histories; otherwise as `recommend`."""
        return self._post("/v1/recommendations/batch", request, BatchResponse, request_id).answers

    def rank(self, request: RankRequest, request_id: str | None = None) -> RankResponse:
        """Given items, ordered for one history; otherwise as `recommend`."""
        return self._post("/v1/rank", request, RankResponse, request_id)

    def search_items(self, text: str, limit: int = 10, model: str | None = None) -> list[Item]:
        """Items by title; otherwise as `recommend`."""
        parameters = {"q": text, "limit": limit} | ({} if model is None else {"model": model})
        return self._get("/v1/items/search", Items, parameters).items

    def models(self) -> Models:
        """What is served; otherwise as `recommend`."""
        return self._get("/v1/models", Models, {})

    def _post(self, path: str, request: BaseModel, answer: type[Answer], request_id: str | None) -> Answer:
        headers = {"content-type": "application/json", "x-request-id": request_id or uuid.uuid4().hex}
        content = request.model_dump_json(exclude_unset=True)
        return self._ask(self._http.build_request("POST", path, content=content, headers=headers), answer)

    def _get(self, path: str, answer: type[Answer], parameters: dict[str, Any]) -> Answer:
        return self._ask(self._http.build_request("GET", path, params=parameters), answer)

    def _ask(self, request: httpx.Request, answer: type[Answer]) -> Answer:
        pause = _FIRST_PAUSE
        for left in range(self._retries, -1, -1):
            wait = 0.0
            try:
                response = self._http.send(request)
                if response.is_success:
                    return answer.model_validate_json(response.content)
                if not _may_pass(response) or not left:
                    raise Refused(_problem(response))
                stated = response.headers.get("retry-after", "")
                wait = min(float(stated), _LONGEST_PAUSE) if stated.isdecimal() else 0.0
            except httpx.TransportError as error:
                late = isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout)
                if late or not left:
                    message = f"{request.url}: {type(error).__name__}: {error}"
                    raise ConnectionError(message) from error
            time.sleep(wait + random.uniform(0, pause))
            pause = min(2 * pause, _LONGEST_PAUSE)
        raise AssertionError("the last attempt returns or raises")

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _may_pass(response: httpx.Response) -> bool:
    """Whether another attempt may do better. A 500 that is no problem document is not the endpoint's, but comes from a
    proxy whose replica died.
    """
    stranger = response.headers.get("content-type") != "application/problem+json"
    return response.status_code in _COME_BACK or (response.status_code == HTTPStatus.INTERNAL_SERVER_ERROR and stranger)


def _problem(response: httpx.Response) -> Problem:
    """The problem document; one is made up for what a proxy on the way says."""
    try:
        return Problem.model_validate_json(response.content)
    except ValidationError:
        title = response.reason_phrase
        return Problem(title=title, status=response.status_code, detail=response.text[:200] or title)

"""Request ids, one JSON line a request, and the log of what was served."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
import time
import traceback
import uuid
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recommender.errors import UserError
from service.metrics import Metrics
from service.problems import Problem
from service.schema import RecommendationResponse

REQUEST_ID = "x-request-id"
logger = logging.getLogger("ilrec.requests")
_SANE_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


def to_stderr(level: int) -> None:
    """Write the JSON lines of `level` and above to standard error, as they are."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(level)


class RequestLog:
    """ASGI middleware around everything: gives requests their ids, counts and logs them, answers crashes with a 500.

    What handlers put into `scope["details"]` is logged too.

    Args:
        metrics: counts the requests.
        answer_id: whether to send the id back; a proxy in front may do so itself.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, answer_id: bool = True):
        self.app = app
        self.metrics = metrics
        self.answer_id = answer_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and note what becomes of it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = time.perf_counter()
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        scope["request_id"], scope["details"] = request_id, {}
        status = 499  # unless an answer begins: the client left

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.answer_id:
                    MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        crash = None
        try:
            await self.app(scope, receive, sending)
        except Exception as error:
            crash = error
            if status != 499:
                raise
            failed = Problem(HTTPStatus.INTERNAL_SERVER_ERROR, f"the server failed; its log says why ({request_id})")
            await failed.response()(scope, receive, sending)
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "unknown")
            self.metrics.request(route, status, seconds)
            record: dict[str, Any] = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "request_id": request_id,
                "method": scope["method"],
                "route": route,
                "status": status,
                "ms": round(seconds * 1e3, 2),
            }
            if crash is not None:
                record["traceback"] = "".join(traceback.format_exception(crash))
            level = logging.INFO if crash is None else logging.ERROR
            logger.log(level, json.dumps(record | scope["details"], ensure_ascii=False))


class FeedbackLog:
    """JSON lines of what was served, to be joined with what was then clicked: a file a process and a day (UTC), in one
    directory, from which days that are over may be taken away.
    """

    def __init__(self, directory: str):
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"serving.feedback_log: {directory}: {error.strerror}") from error
        if not os.access(directory, os.W_OK):
            raise UserError(f"serving.feedback_log: {directory}: may not be written")
        self._directory, self._process = Path(directory), f"{socket.gethostname()}-{os.getpid()}"

    def write(self, request_id: str, place: int, answer: RecommendationResponse) -> None:
        """Add a list, the answer at `place` of its request; a full disk costs the line, not the answer."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": now, "request_id": request_id, "place": place, "model": answer.model}
        items = [item.item_id for item in answer.items]
        line |= {"model_version": answer.model_version, "items": items, "fallback": answer.fallback}
        try:
            with (self._directory / f"served-{now[:10]}-{self._process}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            logger.error(json.dumps({"feedback_log": str(error)}))

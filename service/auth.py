"""Bearer tokens: who may ask, if not everybody."""

from __future__ import annotations

import hmac
import os
from hashlib import sha256
from http import HTTPStatus
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from recommender.errors import UserError
from service import docs
from service.config import ServingConfig
from service.problems import Problem

# Browsers and probes bring no tokens; none of these shows data.
OPEN_PATHS = ("/", *docs.PATHS, "/openapi.json", "/health", "/ready")


def read_tokens(config: ServingConfig) -> list[bytes]:
    """Digests of the tokens that the config names; none where it names no source of tokens.

    Raises:
        UserError: a source is named, and holds none.
    """
    texts = []
    if config.token_file is not None:
        try:
            texts.append(Path(config.token_file).read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"serving.token_file: {config.token_file} cannot be read: {type(error).__name__}") from None
    if config.token_variable is not None:
        texts.append(os.environ.get(config.token_variable, ""))
    for text, source in zip(texts, filter(None, (config.token_file, config.token_variable)), strict=True):
        if not text.split():
            raise UserError(f"serving: {source} holds no token; put at least one there, parted by white space")
    return [_digest(token.encode()) for text in texts for token in text.split()]


def _digest(token: bytes) -> bytes:
    return sha256(token).digest()


def _path(scope: Scope) -> str:
    """Without the prefix that the application is mounted at."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


class Bearer:
    """ASGI middleware that lets in requests with a known token, and those that see nothing."""

    def __init__(self, app: ASGIApp, digests: list[bytes]):
        self.app = app
        self._digests = digests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on if it may ask."""
        if scope["type"] != "http" or _path(scope) in OPEN_PATHS or self._knows(scope):
            return await self.app(scope, receive, send)
        problem = Problem(
            HTTPStatus.UNAUTHORIZED,
            "send a token of this endpoint in the header `Authorization: Bearer <token>`",
            headers={"www-authenticate": "Bearer"},
        )
        await problem.response()(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        kind, _, token = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        digest = _digest(token.strip())
        known = [hmac.compare_digest(digest, own) for own in self._digests]  # all of them, whichever fits
        return kind.lower() == b"bearer" and any(known)

"""The HTTP interface of a recommender, as a FastAPI application. It knows nothing of Ray."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from pydantic import ValidationError

from recommender.catalogue import Catalogue
from recommender.errors import UserError
from recommender.recommendation import AnyRecommender, Recommendation
from service import problems, schema
from service.batching import Batcher
from service.config import ServingConfig
from service.problems import Problem
from service.schema import FieldError

DESCRIPTION = """The next items for a user's history: the top-K of the whole catalogue by the model's scores.

Errors are problem documents (RFC 9457, `application/problem+json`) that name the faulty field.
"""


@dataclass(frozen=True)
class Query:
    """A request in item indices."""

    history: list[int]
    k: int
    exclude: set[int]
    allow: set[int] | None


def create_api(recommender: AnyRecommender, config: ServingConfig) -> FastAPI:
    """The endpoint around a loaded recommender.

    The application must be run with its lifespan, which holds the thread that searches.
    """
    catalogue, name = recommender.catalogue, recommender.manifest.name
    request_model = schema.limited_request(config)

    def answer(queries: list[Query]) -> list[Recommendation]:
        return recommender.recommend(
            [query.history for query in queries],
            [query.k for query in queries],
            [query.exclude for query in queries],
            [query.allow for query in queries],
        )

    batcher = Batcher(answer, config.max_batch_size, config.batch_wait_seconds, config.threads)

    @asynccontextmanager
    async def lifespan(api: FastAPI) -> AsyncIterator[None]:
        async with batcher.running():
            yield

    api = _Api(title="ilrec", summary=f"Recommendations by {name}", description=DESCRIPTION, lifespan=lifespan)
    api.add_middleware(problems.BodyLimit, max_bytes=config.max_body_bytes)
    problems.install(api)

    @api.post(
        "/v1/recommendations",
        summary="Recommend the next items for one history",
        responses=_problems(400, 413, 415, 422),
        openapi_extra=_json_body(request_model),
    )
    async def recommend(request: Request) -> schema.RecommendationResponse:
        started = time.perf_counter()
        asked = _parse(request_model, request.headers.get("content-type", ""), await request.body())
        query = resolve(asked, catalogue)
        try:
            found = await batcher.submit(query)
        except UserError as error:
            raise Problem.of_fields([FieldError(field="history", message=str(error))]) from error
        return schema.RecommendationResponse(
            items=[
                schema.RecommendedItem(
                    rank=rank, item_id=catalogue.item_ids[item], title=catalogue.titles[item], score=score
                )
                for rank, (item, score) in enumerate(zip(found.items, found.scores, strict=True), 1)
            ],
            exact=found.exact,
            complete=len(found.items) == asked.k,
            model=name,
            latency_ms=round((time.perf_counter() - started) * 1e3, 2),
        )

    @api.get("/health", summary="Whether requests can be answered")
    async def health() -> schema.Health:
        return schema.Health(status="ok", model=name)

    @api.get("/v1/models", summary="What is served here")
    async def models() -> schema.Models:
        manifest = recommender.manifest
        model = schema.Model(
            name=name,
            items=len(catalogue),
            metrics=manifest.metrics,
            search=manifest.search.model_dump(),
            data_fingerprint=manifest.data_fingerprint,
        )
        return schema.Models(models=[model])

    return api


def _parse(model: type[schema.RecommendationRequest], content_type: str, body: bytes) -> schema.RecommendationRequest:
    # Pydantic's own JSON parser bounds depth and number length; `json.loads` does not.
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise Problem(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"content-type {content_type[:100]!r}: send application/json instead"
        )
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise Problem.of_validation(error) from error


def resolve(asked: schema.RecommendationRequest, catalogue: Catalogue) -> Query:
    """A request's ids and titles as item indices.

    Raises:
        Problem: 422, names each item that the catalogue does not hold.
    """
    unknown: list[FieldError] = []

    def indices(field: str, texts: Sequence[str]) -> list[int]:
        found = [catalogue.index_of(text) for text in texts]
        for place, (text, index) in enumerate(zip(texts, found, strict=True)):
            if index is None:
                unknown.append(FieldError(field=f"{field}[{place}]", message=_unknown(text, catalogue)))
        return [index for index in found if index is not None]

    history = indices("history", asked.history)
    exclude = set(indices("deny", asked.deny or []))
    allow = None if asked.allow is None else set(indices("allow", asked.allow))
    if unknown:
        raise Problem.of_fields(unknown)
    if asked.exclude_seen:
        exclude.update(history)
    return Query(history, asked.k, exclude, allow)


def _unknown(text: str, catalogue: Catalogue) -> str:
    message = f"unknown item {text[:80]!r}"
    close = catalogue.similar_titles(text)
    return message + (f"; did you mean {' or '.join(map(repr, close))}?" if close else "")


def _json_body(model: type[schema.RecommendationRequest]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": model.model_json_schema()}}}}


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"description": HTTPStatus(status).phrase, "model": schema.Problem} for status in statuses}


class _Api(FastAPI):
    """FastAPI documents every answer as application/json; problem documents have a media type of their own."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            operations = [op for path in super().openapi()["paths"].values() for op in path.values()]
            for response in (r for op in operations for status, r in op["responses"].items() if status >= "400"):
                response["content"]["application/problem+json"] = response["content"].pop("application/json")
        return super().openapi()

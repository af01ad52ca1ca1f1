"""The HTTP interface of recommenders, as a FastAPI application. It knows nothing of Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request, Response
from pydantic import BaseModel, ValidationError

from recommender.catalogue.columns import values_of
from recommender.errors import UserError
from recommender.recommendation import Recommendation
from service import docs, playground, problems, queries, schema
from service.answering import answer
from service.auth import Bearer, read_tokens
from service.batching import Busy
from service.limits import BodyLimit
from service.logs import FeedbackLog, RequestLog
from service.metrics import MEDIA_TYPE
from service.models import Models, Queued
from service.problems import Problem
from service.queries import Resolver
from service.schema import FieldError
from service.served import Served

DESCRIPTION = """The next items for a user's history: the top-K of the whole catalogue by the model's scores.

Errors are problem documents (RFC 9457, `application/problem+json`) that name the faulty field. Every answer bears an
`X-Request-ID`: yours, if you sent one.
"""
_ITEMS_AT_MOST = 100

Body = TypeVar("Body", bound=BaseModel)


def create_api(models: Models, answer_request_id: bool = True) -> FastAPI:
    """The endpoint around a replica's models.

    Args:
        models: loaded, or about to be.
        answer_request_id: whether to send `X-Request-ID` back, which Serve's proxy does by itself.

    Raises:
        UserError: the configured tokens cannot be read.
    """
    config = models.config
    requests = schema.limited_requests(config)
    asking = _Asking(models)
    tokens = read_tokens(config)
    api = _Api(
        title="ilrec",
        docs_url=None,
        redoc_url=None,
        summary="Recommendations that exist",
        description=DESCRIPTION,
        responses=_problems(401) if tokens else {},
    )
    api.requests = requests
    api.add_middleware(BodyLimit, max_bytes=config.max_body_bytes, seconds=config.timeout_seconds)
    if tokens:
        api.add_middleware(Bearer, digests=tokens)
    api.add_middleware(RequestLog, metrics=models.metrics, answer_id=answer_request_id)  # around the others
    problems.install(api)
    refusals = _problems(400, 408, 413, 415, 422, 503, 504)

    docs.install(api)
    page, page_headers = playground.page()

    @api.get("/", include_in_schema=False)
    async def try_it() -> Response:
        return Response(page, headers=page_headers, media_type="text/html")

    @api.post(
        "/v1/recommendations",
        summary="Recommend the next items for one history",
        responses=refusals,
        response_model_exclude_none=True,
        openapi_extra=_body(requests.recommend),
    )
    async def recommend(request: Request) -> schema.RecommendationResponse:
        [answered] = await asking.recommendations(request, [await _parsed(requests.recommend, request)], [""])
        return answered

    @api.post(
        "/v1/recommendations/batch",
        summary="Recommend the next items for several histories",
        responses=refusals,
        response_model_exclude_none=True,
        openapi_extra=_body(requests.batch),
    )
    async def recommend_batch(request: Request) -> schema.BatchResponse:
        asked = (await _parsed(requests.batch, request)).requests
        prefixes = [f"requests[{place}]." for place in range(len(asked))]
        return schema.BatchResponse(answers=await asking.recommendations(request, asked, prefixes))

    @api.post(
        "/v1/rank",
        summary="Order given items for one history",
        responses=refusals,
        response_model_exclude_none=True,
        openapi_extra=_body(requests.rank),
    )
    async def rank(request: Request) -> schema.RankResponse:
        return await asking.ranking(request, await _parsed(requests.rank, request))

    @api.get(
        "/v1/items/search", summary="Find items by title: by its opening, then by its words", responses=_problems(422)
    )
    async def search_items(
        q: Annotated[str, Query(min_length=1, max_length=200, description="What is typed.", examples=["norvik te"])],
        limit: Annotated[int, Query(ge=1, le=_ITEMS_AT_MOST, description="Items at most.")] = 10,
        model: Annotated[str | None, Query(description="Whose catalogue; default: the first model's.")] = None,
    ) -> schema.Items:
        served = asking.served(model)
        return schema.Items(items=[_item(served, item) for item in served.titles.search(q, limit)])

    @api.get("/v1/items/{item_id:path}", summary="One item of the catalogue", responses=_problems(404, 422))
    async def item(item_id: str, model: str | None = None) -> schema.Item:
        served = asking.served(model)
        index = served.catalogue.index_of_id(item_id)
        if index is None:
            raise Problem(HTTPStatus.NOT_FOUND, f"no item has the id {item_id[:80]!r}; /v1/items/search finds titles")
        return _item(served, index)

    @api.get("/health", summary="Whether the process is up")
    async def health() -> schema.Health:
        return schema.Health(status="ok")

    @api.get("/ready", summary="Whether recommenders answer", responses=_problems(503))
    async def ready() -> schema.Ready:
        try:
            models.check()
        except RuntimeError as error:
            raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from error
        return schema.Ready(
            status="ready", models=[served.name for served in models.served], swapped=models.failed is None
        )

    @api.get("/v1/models", summary="What is served here")
    async def list_models() -> schema.Models:
        return schema.Models(models=[_model(served) for served in models.served], failed=models.failed)

    @api.get("/metrics", summary="For Prometheus", response_class=Response)
    async def metrics() -> Response:
        return Response(models.metrics.exposition(), media_type=MEDIA_TYPE)

    return api


class _Asking:
    """From parsed requests to answers."""

    def __init__(self, models: Models):
        self.models = models
        self.config = models.config
        self.metrics = models.metrics
        self._feedback = FeedbackLog(self.config.feedback_log) if self.config.feedback_log else None

    def served(self, name: str | None, field: str = "model") -> Queued:
        """The model of this name.

        Raises:
            Problem: 503 when there is none at all, 422 for an unknown name.
        """
        served = self.models.get(name)
        if served is not None:
            return served
        if not self.models.served:
            raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, "no model is loaded yet", headers={"retry-after": "5"})
        known = ", ".join(served.name for served in self.models.served)
        raise Problem.of_fields([FieldError(field=field, message=f"no model {str(name)[:80]!r}; there are: {known}")])

    async def recommendations(
        self, request: Request, asked: Sequence[schema.RecommendationRequest], prefixes: Sequence[str]
    ) -> list[schema.RecommendationResponse]:
        """The answers to requests, one after the other; each may ask a model of its own."""
        started = time.perf_counter()
        chosen = [self.served(a.model, f"{p}model") for a, p in zip(asked, prefixes, strict=True)]
        resolvers = [Resolver(served, prefix) for served, prefix in zip(chosen, prefixes, strict=True)]
        resolved = [resolver.query(each) for resolver, each in zip(resolvers, asked, strict=True)]
        _refuse_faults(resolvers)
        self._note(request, chosen, requests=len(asked), history=[each.history for each in asked])
        found, by_floor = await self._answers(chosen, resolved)
        took = round((time.perf_counter() - started) * 1e3, 2)
        answers = []
        for place, (served, query, each) in enumerate(zip(chosen, resolved, found, strict=True)):
            fallback = by_floor or not query.history
            self.metrics.list(served.name, each, fallback)
            answered = schema.RecommendationResponse(
                items=_ranked(served, each),
                exact=each.exact,
                complete=len(each.items) == query.k,
                fallback=fallback,
                ignored=query.ignored,
                model=served.name,
                model_version=served.version,
                latency_ms=took,
            )
            if self._feedback is not None:
                self._feedback.write(request.scope["request_id"], place, answered)
            answers.append(answered)
        return answers

    async def ranking(self, request: Request, asked: schema.RankRequest) -> schema.RankResponse:
        """The candidates of a request, ordered."""
        started = time.perf_counter()
        served = self.served(asked.model)
        resolver = Resolver(served)
        query = resolver.rank_query(asked)
        _refuse_faults([resolver])
        self._note(request, [served], candidates=len(query.candidates), history=[asked.history])
        [found], by_floor = await self._answers([served], [query])
        return schema.RankResponse(
            items=_ranked(served, found),
            fallback=by_floor or not query.history,
            ignored=query.ignored,
            model=served.name,
            model_version=served.version,
            latency_ms=round((time.perf_counter() - started) * 1e3, 2),
        )

    async def _answers(
        self, chosen: Sequence[Queued], asked: Sequence[queries.Query | queries.RankQuery]
    ) -> tuple[list[Recommendation], bool]:
        """Wait for the answers; where there is no room or it took too long, let floors answer, or give up.

        Returns:
            The answers, and whether floors gave them.

        Raises:
            Problem: 503 where there is no room, 504 when it took too long, 422 for what the recommender cannot answer.
        """
        futures: list[asyncio.Future[Recommendation]] = []
        try:
            async with asyncio.timeout(self.config.timeout_seconds):
                for served, query in zip(chosen, asked, strict=True):
                    futures.append(served.batcher.submit(query))
                return await asyncio.gather(*futures), False
        except (Busy, TimeoutError) as reason:
            substitutes = [substitute for served in chosen if (substitute := served.substitute) is not None]
            if len(substitutes) < len(chosen):
                raise self._refused(reason) from None
            floors = zip(substitutes, asked, strict=True)
            return await asyncio.to_thread(lambda: [answer(floor, [query])[0] for floor, query in floors]), True
        except UserError as error:
            raise Problem.of_fields([FieldError(field="history", message=str(error))]) from error
        finally:
            for future in futures:
                future.cancel()

    def _refused(self, reason: Busy | TimeoutError) -> Problem:
        if isinstance(reason, Busy):
            self.metrics.refused("busy")
            retry = {"retry-after": str(reason.retry_after)}
            message = f"too many requests wait; try again in {reason.retry_after} s"
            return Problem(HTTPStatus.SERVICE_UNAVAILABLE, message, headers=retry)
        self.metrics.refused("timeout")
        message = f"not answered within {self.config.timeout_seconds:g} s; ask for less, or again later"
        return Problem(HTTPStatus.GATEWAY_TIMEOUT, message)

    def _note(
        self, request: Request, chosen: Sequence[Served], history: Sequence[Sequence[str]], **details: int
    ) -> None:
        noted = {"models": list(dict.fromkeys(served.name for served in chosen)), **details}
        if self.config.log == "histories":
            noted["histories"] = list(history)
        request.scope["details"].update(noted)


def _refuse_faults(resolvers: Sequence[Resolver]) -> None:
    errors = [error for resolver in resolvers for error in resolver.errors]
    if errors:
        raise Problem.of_fields(errors)


async def _parsed(model: type[Body], request: Request) -> Body:
    # Pydantic's own JSON parser bounds depth and number length; `json.loads` does not.
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise Problem(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"content-type {content_type[:100]!r}: send application/json instead"
        )
    try:
        return model.model_validate_json(await request.body())
    except ValidationError as error:
        raise Problem.of_validation(error) from error


def _ranked(served: Served, found: Recommendation) -> list[schema.RankedItem]:
    ids, titles = served.catalogue.item_ids, served.catalogue.titles
    ranked = [
        schema.RankedItem(rank=rank, item_id=ids[item], title=titles[item], score=score)
        for rank, (item, score) in enumerate(zip(found.items, found.scores, strict=True), 1)
    ]
    for item, spelling in zip(ranked, found.spellings or (), strict=False):
        item.tokens = [schema.Token(text=text, log_probability=value) for text, value in spelling]
    return ranked


def _item(served: Served, item: int) -> schema.Item:
    catalogue = served.catalogue
    return schema.Item(
        item_id=catalogue.item_ids[item],
        title=catalogue.titles[item],
        columns=values_of(catalogue, item),
        popularity=None if catalogue.popularity is None else int(catalogue.popularity[item]),
    )


def _model(served: Queued) -> schema.Model:
    manifest = served.recommender.manifest
    return schema.Model(
        name=served.name,
        bundle=manifest.name,
        version=manifest.version,
        checksum=manifest.checksum,
        exported_at=manifest.exported_at or None,
        trained_until=manifest.trained_until or None,
        items=len(served.catalogue),
        columns=sorted(served.columns),
        fallback=served.popular is not None,
        metrics=manifest.metrics,
        search=manifest.search.model_dump(),
        data_fingerprint=manifest.data_fingerprint,
    )


_SCHEMAS = "#/components/schemas/{model}"


def _body(model: type[BaseModel]) -> dict[str, Any]:
    shown = {"$ref": _SCHEMAS.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": shown}}}}


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"description": HTTPStatus(status).phrase, "model": schema.Problem} for status in statuses}


class _Api(FastAPI):
    """FastAPI documents every answer as application/json, where problem documents have a media type of their own, and
    knows nothing of bodies that it does not parse.
    """

    requests: schema.Requests

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            operations = [op for path in document["paths"].values() for op in path.values()]
            for response in (r for op in operations for status, r in op["responses"].items() if status >= "400"):
                response["content"]["application/problem+json"] = response["content"].pop("application/json")
            for model in self.requests:
                shown = model.model_json_schema(ref_template=_SCHEMAS)
                document["components"]["schemas"] |= shown.pop("$defs", {}) | {model.__name__: shown}
        return super().openapi()

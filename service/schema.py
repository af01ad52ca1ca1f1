"""The endpoint's requests and answers, as its OpenAPI document shows them."""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Le, MaxLen
from pydantic import BaseModel, ConfigDict, Field, create_model

from service.config import ServingConfig

EXAMPLE_REQUEST: dict[str, Any] = {"history": ["B0001", "Norvik Trail Tent, 2 persons"], "k": 2, "deny": ["B0007"]}
EXAMPLE_ANSWER: dict[str, Any] = {
    "items": [
        {"rank": 1, "item_id": "B0042", "title": "Norvik Sleeping Bag, down", "score": -2.31},
        {"rank": 2, "item_id": "B0003", "title": "Norvik Camping Stove", "score": -2.87},
    ],
    "exact": True,
    "complete": True,
    "model": "demo",
    "latency_ms": 41.7,
}


class RecommendationRequest(BaseModel):
    """Whom to recommend to, and what may be recommended. An item is named by its id or its title (case ignored)."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [EXAMPLE_REQUEST]})

    history: list[str] = Field(min_length=1, description="The user's items, oldest first: ids or titles.")
    k: int = Field(10, ge=1, description="How many items to recommend.")
    exclude_seen: bool = Field(True, description="Leave out the items of the history.")
    allow: list[str] | None = Field(None, description="If given, only these items are recommended.")
    deny: list[str] | None = Field(None, description="These items are not recommended.")


def limited_request(config: ServingConfig) -> type[RecommendationRequest]:
    """RecommendationRequest with this endpoint's limits, so that the OpenAPI document and the checks are one."""
    limits = {
        "history": MaxLen(config.max_history),
        "k": Le(config.max_k),
        "allow": MaxLen(config.max_filter),
        "deny": MaxLen(config.max_filter),
    }
    fields = RecommendationRequest.model_fields
    limited: dict[str, Any] = {
        name: (Annotated[fields[name].annotation, limit], fields[name]) for name, limit in limits.items()
    }
    return create_model(
        RecommendationRequest.__name__,
        __base__=RecommendationRequest,
        __doc__=RecommendationRequest.__doc__,
        **limited,
    )


class RecommendedItem(BaseModel):
    """One place of the list."""

    rank: int = Field(description="1 is the best.")
    item_id: str
    title: str
    score: float = Field(description="Sum of log-probabilities along the item's title; comparable within one list.")


class RecommendationResponse(BaseModel):
    """The top-K."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE_ANSWER]})

    items: list[RecommendedItem] = Field(description="Best first.")
    exact: bool = Field(description="Whether this is proven to be the true top-K of what may be recommended.")
    complete: bool = Field(description="False when there are fewer than k items, because the filters leave no more.")
    model: str = Field(description="Name of the recommender that answered.")
    latency_ms: float = Field(description="Milliseconds in the recommender, waiting for its batch included.")


class Health(BaseModel):
    """The endpoint is up and its recommender is loaded."""

    status: str = Field(examples=["ok"])
    model: str


class Model(BaseModel):
    """A recommender that is served."""

    name: str
    items: int = Field(description="Size of the catalogue.")
    metrics: dict[str, float] = Field(description="On the validation split, when it was selected.")
    search: dict[str, Any] = Field(description="How the top-K is found.")
    data_fingerprint: str = Field(description="Of the data set it was trained on.")


class Models(BaseModel):
    """Everything served here."""

    models: list[Model]


class FieldError(BaseModel):
    """What is wrong with one field of the request."""

    field: str = Field(description="e.g. `k` or `history[3]`.")
    message: str


class Problem(BaseModel):
    """A problem document (RFC 9457), sent as application/problem+json."""

    type: str = Field("about:blank", description="The status says it all.")
    title: str = Field(examples=["Unprocessable Entity"])
    status: int = Field(examples=[422])
    detail: str = Field(examples=["history[1]: unknown item 'Norvik Tent'; did you mean 'Norvik Trail Tent'?"])
    errors: list[FieldError] = Field(default=[], description="The faulty fields, if it is about fields.")

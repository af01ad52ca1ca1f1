"""The endpoint's requests and answers, as its OpenAPI document shows them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Le, MaxLen
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, PositiveInt, WithJsonSchema, create_model
from pydantic_core import PydanticCustomError

from recommender.config import Score, Weight
from service.config import ServingConfig


def _scalar(value: object) -> object:
    if not isinstance(value, str | int | float):
        raise PydanticCustomError("scalar", "input should be a text, a number, true or false")
    return value


# One error for what a union of the four would report four times.
_OF_COLUMN = {"type": ["string", "number", "boolean"]}
Value = Annotated[str | bool | int | float, PlainValidator(_scalar), WithJsonSchema(_OF_COLUMN)]

EXAMPLE_REQUEST: dict[str, Any] = {
    "history": ["B0001", "Norvik Trail Tent, 2 persons"],
    "k": 2,
    "deny": ["B0007"],
    "where": {"category": ["Stoves", "Sleeping bags"]},
    "max_per": {"category": 1},
}
EXAMPLE_ITEMS: list[dict[str, Any]] = [
    {"rank": 1, "item_id": "B0042", "title": "Norvik Sleeping Bag, down", "score": -2.31},
    {"rank": 2, "item_id": "B0003", "title": "Norvik Camping Stove", "score": -2.87},
]
EXAMPLE_ANSWER: dict[str, Any] = {
    "items": EXAMPLE_ITEMS,
    "exact": True,
    "complete": True,
    "fallback": False,
    "ignored": [],
    "model": "demo",
    "model_version": 3,
    "latency_ms": 41.7,
}
EXAMPLE_RANK_REQUEST: dict[str, Any] = {"history": ["B0001"], "candidates": ["B0003", "B0042"]}
EXAMPLE_ITEM: dict[str, Any] = {
    "item_id": "B0003",
    "title": "Norvik Camping Stove",
    "columns": {"category": "Stoves", "price": 39.5},
    "popularity": 118,
}


_FALLBACK = (
    "Whether another one answered for the model: popularity, as the history held no known item, or the floor that "
    "`serving.fallback` names, as the model had no room or no time."
)
_SCORE = (
    "valid: the probability of each token among those that lead to an item; full: among the whole vocabulary, as "
    "`generate` ranks; default: the model's own."
)
_LOG_PROBABILITIES = (
    "Whether to give the items' tokens with their log-probabilities, which takes a further forward pass. Collaborative "
    "models and the fallback have none."
)


def _request(example: dict[str, Any]) -> ConfigDict:
    return ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [example]})


def _answer(example: dict[str, Any]) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [example]})


# ---- Requests --------------------------------------------------------------------------------------------------------


class HistoryRequest(BaseModel):
    """For whom. An item is named by its id or its title (case ignored)."""

    history: list[str] = Field(
        description="The user's items, oldest first: ids or titles. Without a known item, the most popular answer."
    )
    unknown_items: Literal["error", "ignore"] = Field(
        "error", description="What items of the history that the catalogue does not hold are: a mistake, or skipped."
    )
    model: str | None = Field(None, description="Name of the model that is to answer; default: the first.")
    boost: dict[str, Weight] = Field(
        default={},
        description="Other weights of the model's priors, by their names, within the limits that the model sets them "
        "(`search.priors` of /v1/models).",
    )


class SearchRequest(BaseModel):
    """What to look for and how hard, in place of the model's own settings. Of no effect on collaborative models, which
    have one score and give it to every item.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    score: Score | None = Field(None, description=_SCORE)
    mode: Literal["exact", "beam"] | None = Field(None, description="exact: until the top-K is proven; beam: faster.")
    width: int | None = Field(
        None, ge=1, description="Nodes expanded a forward pass, twice as many after every four; of a beam, nodes kept."
    )
    node_budget: int | None = Field(None, ge=1, description="exact: nodes expanded at most.")


class RecommendationRequest(HistoryRequest):
    """Whom to recommend to, and what may be recommended."""

    model_config = _request(EXAMPLE_REQUEST)

    k: int = Field(10, ge=1, description="How many items to recommend.")
    exclude_seen: bool = Field(True, description="Leave out the items of the history.")
    allow: list[str] | None = Field(None, description="If given, only these items are recommended.")
    deny: list[str] | None = Field(None, description="These items are not recommended.")
    where: dict[str, list[Value]] = Field(
        default={}, description="For columns of the catalogue, the values of which an item must have one."
    )
    max_per: dict[str, PositiveInt] = Field(
        default={}, description="For columns of the catalogue, how many items of one value the list may hold."
    )
    search: SearchRequest | None = Field(
        None, description="What to look for and how hard; default: the model's settings."
    )
    log_probabilities: bool = Field(False, description=_LOG_PROBABILITIES)


class BatchRequest(BaseModel):
    """Several requests at once; they are answered all or, if one is faulty, none."""

    model_config = _request({"requests": [{"history": ["B0001"], "k": 2}, {"history": ["B0003", "B0042"]}]})

    requests: list[RecommendationRequest] = Field(min_length=1, description="Each as to /v1/recommendations.")


class RankRequest(HistoryRequest):
    """For whom, and what is to be ranked."""

    model_config = _request(EXAMPLE_RANK_REQUEST)

    candidates: list[str] = Field(min_length=1, description="The items to rank: ids or titles.")
    score: Score | None = Field(None, description=f"{_SCORE} Of no effect on collaborative models.")
    log_probabilities: bool = Field(False, description=_LOG_PROBABILITIES)


class Requests(NamedTuple):
    """The request models with an endpoint's limits, so that its OpenAPI document and its checks are one."""

    recommend: type[RecommendationRequest]
    batch: type[BatchRequest]
    rank: type[RankRequest]


def limited_requests(config: ServingConfig) -> Requests:
    """The request models with the limits of `config`."""
    search = _limited(SearchRequest, {"width": Le(config.max_width), "node_budget": Le(config.max_node_budget)})
    history, items = MaxLen(config.max_history), MaxLen(config.max_filter)
    recommend = _limited(
        RecommendationRequest,
        {"history": history, "k": Le(config.max_k), "allow": items, "deny": items},
        where=dict[str, Annotated[list[Value], items]],
        search=search | None,
    )
    batch = _limited(BatchRequest, {}, requests=Annotated[list[recommend], MaxLen(config.max_requests)])  # type: ignore[valid-type]
    rank = _limited(RankRequest, {"history": history, "candidates": MaxLen(config.max_candidates)})
    return Requests(recommend, batch, rank)


def _limited(model: Any, limits: dict[str, Any], **types: Any) -> Any:
    fields = model.model_fields
    types |= {name: Annotated[fields[name].annotation, limit] for name, limit in limits.items()}
    changed: dict[str, Any] = {name: (kind, fields[name]) for name, kind in types.items()}
    return create_model(model.__name__, __base__=model, __doc__=model.__doc__, **changed)


# ---- Answers ---------------------------------------------------------------------------------------------------------


class Token(BaseModel):
    """A token of a title."""

    text: str = Field(description="What it decodes to by itself; a part of a character shows as \ufffd.")
    log_probability: float = Field(description="0 where the score is `valid` and no other token could come.")


class RankedItem(BaseModel):
    """One place of the list."""

    rank: int = Field(description="1 is the best.")
    item_id: str
    title: str
    score: float = Field(
        description="Sum of log-probabilities along the item's title, and what priors add; comparable within one list."
    )
    tokens: list[Token] | None = Field(
        None,
        description="Its title as the model spells it, the end token last, then the model's priors, in square "
        "brackets, with what they add; all adds up to `score`, rounding aside. Absent unless the request says "
        "`log_probabilities`.",
    )


class RankResponse(BaseModel):
    """The candidates, ordered."""

    model_config = _answer(
        {
            "items": EXAMPLE_ITEMS,
            "fallback": False,
            "ignored": [],
            "model": "demo",
            "model_version": 3,
            "latency_ms": 18.2,
        }
    )

    items: list[RankedItem] = Field(description="Best first.")
    fallback: bool = Field(description=_FALLBACK)
    ignored: list[str] = Field(description="Items of the history that the catalogue does not hold.")
    model: str = Field(description="Name of the model that answered.")
    model_version: int | None = Field(None, description="Its version; absent where its bundle has none.")
    latency_ms: float = Field(description="Milliseconds in the recommender, waiting for its batch included.")


class RecommendationResponse(RankResponse):
    """The top-K."""

    model_config = _answer(EXAMPLE_ANSWER)

    exact: bool = Field(description="Whether this is proven to be the true top-K of what may be recommended.")
    complete: bool = Field(
        description="False when there are fewer than k items: filters and caps leave no more or, where `exact` is "
        "false too, the search came to its limits before."
    )


class BatchResponse(BaseModel):
    """The answers, in the order of the requests."""

    model_config = _answer({"answers": [EXAMPLE_ANSWER]})

    answers: list[RecommendationResponse]


class Item(BaseModel):
    """An item of the catalogue."""

    model_config = _answer(EXAMPLE_ITEM)

    item_id: str
    title: str
    columns: dict[str, Any] = Field(description="Its other columns.")
    popularity: int | None = Field(description="Its training interactions; null where the bundle does not know.")


class Items(BaseModel):
    """Items of the catalogue that match."""

    model_config = _answer({"items": [EXAMPLE_ITEM]})

    items: list[Item] = Field(description="Those whose titles open with the query first.")


class Health(BaseModel):
    """The process is up."""

    status: str = Field(examples=["ok"])


class Ready(BaseModel):
    """Which models answer."""

    model_config = _answer({"status": "ready", "models": ["demo"], "swapped": True})

    status: str
    models: list[str]
    swapped: bool = Field(description="Whether the latest change of models was carried out; /v1/models says why not.")


class Model(BaseModel):
    """A recommender that is served."""

    name: str = Field(examples=["demo"])
    bundle: str = Field(description="Name that the bundle was exported under.", examples=["demo"])
    version: int | None = Field(description="Of the model; null where the bundle has none.", examples=[3])
    checksum: str = Field(description="Of the bundle: two that have the same one hold the same files.")
    exported_at: str | None = Field(
        description="When the bundle was written, in UTC; null where it does not say.",
        examples=["2026-03-01T04:12:07+00:00"],
    )
    trained_until: str | None = Field(
        description="The latest time of an interaction that training saw, as the data give times; null if unknown."
    )
    items: int = Field(description="Size of the catalogue.", examples=[5000])
    columns: list[str] = Field(description="Columns of the catalogue that requests may filter by.")
    fallback: bool = Field(description="Whether a history without known items is answered, by popularity.")
    metrics: dict[str, float] = Field(description="On the validation split, when it was selected.")
    search: dict[str, Any] = Field(description="How the top-K is found.")
    data_fingerprint: str = Field(description="Of the data set it was trained on.")


class Models(BaseModel):
    """Everything served here; the first is the default."""

    models: list[Model]
    failed: str | None = Field(
        description="Why the latest change, of the config or of a name's version, was not carried out; null if it was."
    )


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

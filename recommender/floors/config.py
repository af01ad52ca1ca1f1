"""Configuration of the floors: what is tried on validation. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field

from recommender.config import StrictModel

Value = TypeVar("Value")
Tried = Annotated[
    tuple[Value, ...], BeforeValidator(lambda given: given if isinstance(given, list | tuple) else (given,))
]
Decay = Annotated[float, Field(gt=0, le=1)]
Normalisation = Literal["cosine", "jaccard", "conditional"]
Terms = Literal["words", "word_pairs", "characters"]

_TRIED = " One value, or a list to choose from by validation NDCG@10."


class ItemKNNSettings(StrictModel):
    """What item vectors are made with; see `ItemKNN`."""

    kind: Literal["itemknn"] = "itemknn"
    normalisation: Normalisation
    shrinkage: float
    backward: float
    window: int
    neighbours: int


class ItemKNNConfig(StrictModel):
    """Item-to-item counts: items that come soon after one another in histories are similar."""

    kind: Literal["itemknn"] = "itemknn"
    normalisation: Tried[Normalisation] = Field(
        ("cosine", "conditional"),
        min_length=1,
        description="What a count of two items is divided by. cosine: the root of the product of their own counts; "
        "jaccard: the number of times either occurs; conditional: the count of the item in the history." + _TRIED,
    )
    shrinkage: Tried[Annotated[float, Field(ge=0)]] = Field(
        (10.0,), min_length=1, description="Added to what is divided by, against chance in small counts." + _TRIED
    )
    backward: Tried[Annotated[float, Field(ge=0, le=1)]] = Field(
        (0.0, 0.5), min_length=1, description="Weight of what came before an item, beside what came after it." + _TRIED
    )
    decay: Tried[Decay] = Field(
        (0.5, 0.8, 0.9), min_length=1, description="Weight of an item of the history, by the one after it." + _TRIED
    )
    window: int = Field(
        10, ge=1, description="Places between two items of a sequence that still count; those d apart count 1/d."
    )
    neighbours: int = Field(200, ge=1, description="The most similar items that are kept for each.")

    def settings(self) -> Iterator[ItemKNNSettings]:
        """Everything that is tried, but for the decay."""
        fixed: dict[str, Any] = {"window": self.window, "neighbours": self.neighbours}
        for backward, normalisation, shrinkage in product(self.backward, self.normalisation, self.shrinkage):
            yield ItemKNNSettings(backward=backward, normalisation=normalisation, shrinkage=shrinkage, **fixed)


class TfidfSettings(StrictModel):
    """What item vectors are made with; see `Tfidf`."""

    kind: Literal["tfidf"] = "tfidf"
    columns: tuple[str, ...]
    terms: Terms
    most_terms: int


class TfidfConfig(StrictModel):
    """Similar texts: the cosine between an item's text and those of the history."""

    kind: Literal["tfidf"] = "tfidf"
    columns: tuple[str, ...] = Field(
        ("title",), min_length=1, description="Columns of the items file whose texts are read, one after the other."
    )
    terms: Tried[Terms] = Field(
        ("words", "word_pairs", "characters"),
        min_length=1,
        description="What a text is made of. word_pairs: words and neighbouring words; characters: pieces of two to "
        "four characters within words." + _TRIED,
    )
    decay: Tried[Decay] = Field(
        (0.2, 0.5, 0.8, 1.0),
        min_length=1,
        description="Weight of an item of the history, by the one after it." + _TRIED,
    )
    most_terms: int = Field(1 << 18, ge=1, description="The most frequent terms that are told apart.")

    def settings(self) -> Iterator[TfidfSettings]:
        """Everything that is tried, but for the decay."""
        for terms in self.terms:
            yield TfidfSettings(columns=self.columns, terms=terms, most_terms=self.most_terms)


FloorConfig = Annotated[ItemKNNConfig | TfidfConfig, Field(discriminator="kind")]
FloorSettings = Annotated[ItemKNNSettings | TfidfSettings, Field(discriminator="kind")]

"""Configuration of what is served: identifiers, prompt, backbone, search. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from recommender.errors import UserError


class StrictModel(BaseModel):
    """Base of every config: unknown keys are refused by name, values cannot change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class CustomClass(StrictModel):
    """A class of your own, by import path; see `recommender/custom.py`."""

    model_config = ConfigDict(serialize_by_alias=True)

    path: str = Field(
        alias="class",
        pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$",
        description="Where it is: module:Class, as in my.losses:Focal. The module is imported.",
    )
    options: dict[str, Any] = Field({}, description="Keyword arguments that it is made with.")


class IdentifierConfig(StrictModel):
    """How an item is spelled in tokens."""

    kind: Literal["title", "item"] = Field(
        "title",
        description="'title': the item's title (BIGRec); 'item': one token of its own, added to the tokenizer and "
        "learnt from interactions alone, so that items without any are at chance.",
    )
    template: str = Field("{title}", description="The text that is spelled, e.g. '\"{title}\"' to quote titles.")
    max_tokens: int = Field(
        32,
        ge=1,
        description="Titles are cut to this many tokens, in histories and in responses alike; items that then "
        "collide get a distinguishing suffix.",
    )

    @field_validator("template")
    @classmethod
    def _has_title(cls, template: str) -> str:
        if template.count("{title}") != 1:
            raise ValueError("must hold {title} exactly once")
        return template

    @model_validator(mode="after")
    def _is_read(self) -> IdentifierConfig:
        fields = type(self).model_fields
        given = [name for name in ("template", "max_tokens") if getattr(self, name) != fields[name].default]
        if self.kind == "item" and given:
            raise ValueError(f"identifier.{given[0]} is of kind: title; leave it out for kind: item, which spells none")
        return self


class PromptTemplate(NamedTuple):
    """What stands around the items of a history; '{end}' is the end token."""

    prefix: str
    separator: str
    suffix: str


# "compact" has no words: a history reads like a chain of responses, and a training row holds every item once. It suits
# presets, which know no language anyway. "items" has nothing between items either, for identifiers of one token: what
# predicts the next item is the last item itself. The others suit pretrained backbones.
TEMPLATES = {
    "compact": PromptTemplate("", "{end}", "{end}"),
    "items": PromptTemplate("{end}", "", ""),
    "products": PromptTemplate("A customer bought these products, oldest first:", "\n- ", "\nThe next product:\n- "),
    "books": PromptTemplate("A reader read these books, oldest first:", "\n- ", "\nThe next book:\n- "),
    "movies": PromptTemplate("A viewer watched these movies, oldest first:", "\n- ", "\nThe next movie:\n- "),
    "music": PromptTemplate("A listener played these artists, oldest first:", "\n- ", "\nThe next artist:\n- "),
    "games": PromptTemplate("A player bought these games, oldest first:", "\n- ", "\nThe next game:\n- "),
}


class PromptConfig(StrictModel):
    """The text around a history. Each piece is tokenised by itself, so that no token crosses an item's border."""

    template: Literal["compact", "items", "products", "books", "movies", "music", "games"] | CustomClass = Field(
        "compact",
        description="A ready prompt for a domain; 'compact' (no words) for presets trained from scratch, 'items' "
        "(nothing between items) with identifier.kind: item. Or a Wording of your own: {class: my.prompts:Mine, "
        "options: {…}}.",
    )
    prefix: str | None = Field(None, description="In place of the template's: opens the prompt, the instruction.")
    separator: str | None = Field(None, description="In place of the template's: precedes each item of the history.")
    suffix: str | None = Field(None, description="In place of the template's: closes the prompt; the response follows.")
    chat: bool = Field(
        False, description="Wrap prefix and suffix with the tokenizer's chat template (instruction-tuned backbones)."
    )
    history: int = Field(20, ge=1, description="The most recent items of a history that enter the prompt.")

    def texts(self, template: PromptTemplate) -> PromptTemplate:
        """A template, with what is given in its place."""
        given = {name: value for name in PromptTemplate._fields if (value := getattr(self, name)) is not None}
        return template._replace(**given)


class LoraConfig(StrictModel):
    """Low-rank adapters (peft). Absent: full fine-tuning."""

    rank: int = Field(8, ge=1, description="Rank of an adapter's two matrices.")
    alpha: float = Field(16, gt=0, description="Scale: an adapter adds alpha / rank times its product.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout on what an adapter reads.")
    target_modules: tuple[str, ...] | Literal["all-linear"] = Field(
        "all-linear", description="Module names, e.g. [q_proj, v_proj], or 'all-linear'."
    )


class Preset(NamedTuple):
    """Shape of a from-scratch Llama."""

    hidden: int
    layers: int
    heads: int
    mlp: int


PRESETS = {
    "mini": Preset(64, 2, 2, 176),
    "tiny": Preset(128, 4, 4, 352),
    "small": Preset(256, 6, 8, 704),
    "base": Preset(512, 8, 8, 1408),
}


class PresetBackbone(StrictModel):
    """A small Llama trained from scratch, with a tokenizer trained on the catalogue. Needs no download."""

    kind: Literal["preset"] = "preset"
    size: Literal["mini", "tiny", "small", "base"] = Field(
        "tiny",
        description="tiny ≈ 1M, small ≈ 6M, base ≈ 30M weights; mini ≈ 0.1M and 64 an item, for identifier.kind: item.",
    )
    vocabulary: int = Field(
        4096, ge=300, description="Size of the byte-level BPE vocabulary that spells titles; bytes need 256."
    )
    embedding_scale: float = Field(
        1.0,
        gt=0,
        description="What token vectors are multiplied by when they are read; not in the prediction layer, which is "
        "the same table. √hidden (mini: 8) lets items with a token each learn faster, and titles more slowly. Other "
        "than 1: the model is a Granite, a Llama with this factor.",
    )
    lora: LoraConfig | None = Field(None, description="Train adapters only (of use with `init_from`).")


class PretrainedBackbone(StrictModel):
    """A causal language model that `transformers` loads and in which every token sees all before it: Llama, Qwen2,
    Qwen3, GPT-2, OPT and the like. What reads otherwise (sliding windows, recurrence) is refused when it is loaded.
    """

    kind: Literal["pretrained"]
    path: str = Field(description="A local directory, or a hub name (the one download that you ask for).")
    revision: str | None = Field(None, description="Hub revision to pin.")
    lora: LoraConfig | None = Field(None, description="Train adapters only; absent: every weight is trained.")

    @field_validator("path")
    @classmethod
    def _absolute_where_local(cls, path: str) -> str:
        """Workers run in directories of their own, and an adapter's bundle names its base as it is named here."""
        local = Path(path).expanduser()
        return str(local.absolute()) if local.is_dir() else path


BackboneConfig = Annotated[PresetBackbone | PretrainedBackbone, Field(discriminator="kind")]


Score = Literal["valid", "full"]
Weight = Annotated[float, Field(allow_inf_nan=False)]


class _Prior(StrictModel):
    """A term of each item that is added to its score, times `weight`. The sign is free: a negative one takes away."""

    weight: Weight = Field(1.0, description="What the term is multiplied by before it is added.")
    limits: tuple[Weight, Weight] | None = Field(
        None, description="Between what a request may set the weight (`boost`); null: requests cannot change it."
    )

    @field_validator("limits")
    @classmethod
    def _limits_rise(cls, limits: tuple[float, float] | None) -> tuple[float, float] | None:
        if limits is not None and limits[0] > limits[1]:
            raise ValueError("give the lower one first")
        return limits


class ModelPrior(_Prior):
    """What another model says of the items for the same history: log R(· | history) of a collaborative model, counts of
    an ItemKNN, the cosine of a TF-IDF.
    """

    kind: Literal["model"]
    path: str = Field(description="The model: its name, name@version, or a bundle's path. Bundles take it in.")
    transform: Literal["none", "log"] = Field(
        "none", description="none: the score over `scale`; log: ln(score / scale + offset), for counts."
    )
    scale: float = Field(1.0, gt=0, allow_inf_nan=False, description="Divides the score.")
    offset: float = Field(
        0.1, gt=0, allow_inf_nan=False, description="log: what an item without a score counts as, so that it has one."
    )


class UnconditionalPrior(_Prior):
    """log p(item | no history), of the model itself. With a negative weight what is left is how much the history speaks
    for an item.
    """

    kind: Literal["unconditional"]


class PopularityPrior(_Prior):
    """ln(1 + interactions of the item in training). A negative weight takes popularity out of the lists."""

    kind: Literal["popularity"]


class NewPrior(_Prior):
    """1 for items without an interaction in training, 0 for others."""

    kind: Literal["new"]


class ColumnPrior(_Prior):
    """A column of the items file: numbers, truth values, or dates (days since 1970). Items without a value have the
    mean of the others.
    """

    kind: Literal["column"]
    column: str = Field(description="Its name.")
    transform: Literal["none", "log", "standard"] = Field(
        "standard", description="none: as it is; log: ln(1 + value), of values from 0 on; standard: mean 0, variance 1."
    )


PriorConfig = Annotated[
    ModelPrior | UnconditionalPrior | PopularityPrior | NewPrior | ColumnPrior, Field(discriminator="kind")
]
PriorName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$")]


class SearchConfig(StrictModel):
    """How the top-K is found in the trie."""

    score: Score | None = Field(
        None,
        description="valid: each step normalised over the valid tokens; full: over the whole vocabulary, as "
        "`generate` ranks. null: the distribution that the objective trained.",
    )
    mode: Literal["exact", "beam"] = Field(
        "exact", description="exact: widen until the top-K is proven or the node budget is spent; beam: `width` only."
    )
    width: int = Field(
        20,
        ge=1,
        description="beam: nodes kept per level of branching; exact: nodes expanded a forward, twice as many after "
        "every four.",
    )
    node_budget: int = Field(400, ge=1, description="exact: the most nodes that are expanded for one history.")
    temperature: float | None = Field(
        None,
        gt=0,
        description="Divides the logits before the softmax; changes the order. null: the temperature that the model "
        "was trained at.",
    )
    priors: dict[PriorName, PriorConfig] | None = Field(
        None,
        description="Terms that are added to an item's score, by a name of yours. In an experiment they are what "
        "`ilrec blend` weighs, and other verbs do not read them. null: all that can be had; {}: none. In "
        "`serving.search`: of the model's own priors those that are added, with these weights.",
    )

    def unblended(self) -> SearchConfig:
        """Without priors that are still to be weighed: a model's own stay, and `{}` leaves these out as well."""
        return self if not self.priors else self.model_copy(update={"priors": None})

    def boosted(self, weights: Mapping[str, float]) -> SearchConfig:
        """With other weights of some of its priors.

        Raises:
            UserError: there is no such prior, or a weight is not finite.
        """
        priors = dict(self.priors or {})
        for name, weight in weights.items():
            if not isfinite(weight):
                raise UserError(f"boost.{name}: {weight} is no finite number")
            if name not in priors:
                raise UserError(f"boost.{name}: the model has no such prior; it has: {', '.join(priors) or 'none'}")
            priors[name] = priors[name].model_copy(update={"weight": weight})
        return self.model_copy(update={"priors": priors})

    def at_temperature(self, trained: float) -> SearchConfig:
        """These settings at the temperature `trained`, unless they name one of their own."""
        return self if self.temperature is not None else self.model_copy(update={"temperature": trained})

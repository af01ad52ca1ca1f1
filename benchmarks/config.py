"""What a study is: methods, their trials, seeds. Nothing heavy is imported here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from recommender.config import StrictModel
from recommender.errors import UserError

Settings = dict[str, Any]
_END_OF_SCALAR = "...\n"  # which YAML writes behind a document that is a single value

MethodName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]


class Method(StrictModel):
    """One row of the report: tuned by its trials, or a variant of a tuned method."""

    set: Settings = Field({}, description="Fields of the experiment, by path: {objective.kind: msl}.")
    trials: tuple[Settings, ...] = Field((), description="Further fields; the trial that validates best is the method.")
    of: str | None = Field(None, description="An ablation: this method's best trial with `set` on top, not tuned.")

    @model_validator(mode="after")
    def _is_tuned_or_derived(self) -> Method:
        if bool(self.trials) == (self.of is not None):
            raise ValueError("give either `trials` (at least one, {} will do) or `of`, another method that has them")
        return self


class StudyConfig(StrictModel):
    """Methods that are tuned with the same budget and compared on the same test targets."""

    base: str = Field(description="The experiment that all share; relative to where the command runs, as data are.")
    set: Settings = Field({}, description="Fields of the experiment that change for all methods.")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0, 1, 2), min_length=1, description="Training seeds. Trials run with the first one."
    )
    reference: str = Field(description="The method that differences are taken to.")
    metric: Literal["NDCG@10", "HR@10"] = Field("NDCG@10", description="Chooses the trial, on validation.")
    methods: dict[MethodName, Method] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_fair(self) -> StudyConfig:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)}: give each once")
        if self.reference not in self.methods:
            raise ValueError(f"reference {self.reference!r} is no method; choose from {', '.join(self.methods)}")
        for name, method in self.methods.items():
            if method.of is not None and (method.of not in self.methods or not self.methods[method.of].trials):
                raise ValueError(f"methods.{name}.of: {method.of!r} is no method with trials of its own")
        budgets = {name: len(method.trials) for name, method in self.methods.items() if method.trials}
        if len(set(budgets.values())) > 1:
            raise ValueError(
                "methods: the same tuning budget for all, or the comparison is not fair; trials: "
                + ", ".join(f"{name} {number}" for name, number in budgets.items())
            )
        return self

    @property
    def budget(self) -> int:
        """Trials of each tuned method."""
        return max(len(method.trials) for method in self.methods.values())

    def tuned(self, method: str) -> str:
        """The method whose trials `method` uses: itself, or what it is an ablation of."""
        return self.methods[method].of or method

    def settings(self, method: str, trial: int) -> Settings:
        """All fields that `method` changes in the base with trial number `trial` (1-based), later ones on top."""
        parent, own = self.methods[self.tuned(method)], self.methods[method]
        derived = {} if own is parent else own.set
        return _layered(self.set, parent.set, parent.trials[trial - 1], derived)


def _layered(*layers: Settings) -> Settings:
    """One dict in which later layers win; a field that is set again moves behind what it may replace."""
    merged: Settings = {}
    for layer in layers:
        for path, value in layer.items():
            merged.pop(path, None)
            merged[path] = value
    return merged


def as_override(path: str, value: Any) -> str:
    """`path=value` as `ilrec --set` reads it."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return f"{path}={text.removesuffix(_END_OF_SCALAR).strip()}"


def load_study(path: Path) -> StudyConfig:
    """Read a study file.

    Raises:
        UserError: names the file, the field and the remedy.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; see benchmarks/studies") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        return StudyConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}:\n" + "\n".join(_explained(item) for item in error.errors())) from None


def _explained(error: Any) -> str:
    field = ".".join(str(part) for part in error["loc"]) or "study"
    if error["type"] == "extra_forbidden":
        known = Method if error["loc"][0] == "methods" else StudyConfig
        return f"  {field}: unknown field; known fields: {', '.join(known.model_fields)}"
    return f"  {field}: {error['msg'].removeprefix('Value error, ')}"

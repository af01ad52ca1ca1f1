"""Configuration of a sweep (`ilrec tune`). Nothing heavy is imported here."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from recommender.config import StrictModel


class _Range(StrictModel):
    low: float = Field(allow_inf_nan=False, description="The smallest value.")
    high: float = Field(allow_inf_nan=False, description="The largest value.")

    @model_validator(mode="after")
    def _is_a_range(self) -> _Range:
        if not self.low < self.high:
            raise ValueError(f"low must be less than high, {self.low:g} is not less than {self.high:g}")
        return self

    @property
    def corners(self) -> tuple[JsonValue, ...]:
        """Values that stand for all: both ends, and one between them that is no integer."""
        return self.low, self.high, self.low + (self.high - self.low) / math.pi


class Uniform(_Range):
    """A number between `low` and `high`."""

    kind: Literal["uniform"]


class LogUniform(_Range):
    """A number between `low` and `high` whose logarithm is uniform: each order of magnitude is as likely."""

    kind: Literal["loguniform"]
    low: float = Field(gt=0, allow_inf_nan=False, description="The smallest value.")


class _Values(StrictModel):
    values: tuple[JsonValue, ...] = Field(min_length=1, description="The values to try, each once.")

    @model_validator(mode="after")
    def _differ(self) -> _Values:
        if len({repr(value) for value in self.values}) < len(self.values):
            raise ValueError("give each value once")
        return self

    @property
    def corners(self) -> tuple[JsonValue, ...]:
        return self.values


class Choice(_Values):
    """One of `values`, drawn for each trial."""

    kind: Literal["choice"]


class Grid(_Values):
    """Each of `values` in turn, with each value of every other grid."""

    kind: Literal["grid"]


Parameter = Annotated[Uniform | LogUniform | Choice | Grid, Field(discriminator="kind")]


class AshaConfig(StrictModel):
    """Asynchronous successive halving: a trial goes on past an epoch of the ladder only if it is among the best there.

    The ladder is grace_period x reduction_factor^0, ^1, ^2 …; of the trials that have come to an epoch of it, the best
    1/reduction_factor go on.
    """

    kind: Literal["asha"] = "asha"
    grace_period: int = Field(1, ge=1, description="Epochs that every trial runs.")
    reduction_factor: float = Field(3, gt=1, description="One trial in so many goes on.")


class SweepConfig(StrictModel):
    """Trials with different values of some fields; the best validation NDCG@10 wins."""

    parameters: dict[str, Parameter] = Field(
        min_length=1,
        description="Fields of the experiment by path: {objective.beta: {kind: loguniform, low: 0.01, high: 0.5}}.",
    )
    trials: int | None = Field(
        None,
        ge=1,
        description="Samples to draw, for each point of the grid if there is one. Not for mere grids.",
    )
    scheduler: AshaConfig | None = Field(
        AshaConfig(), description="Stops trials early. null: each runs all its epochs."
    )
    search: Literal["random", "optuna"] = Field(
        "random", description="How values are drawn. optuna (a package of its own): by what earlier trials found."
    )
    concurrent: int | None = Field(
        None, ge=1, description="Trials at once. null: as many as the cluster has room for, when the sweep begins."
    )
    seed: int = Field(0, ge=0, description="Of the values that are drawn.")

    @model_validator(mode="after")
    def _trials_fit_the_grid(self) -> SweepConfig:
        grids = [path for path, parameter in self.parameters.items() if isinstance(parameter, Grid)]
        if self.search == "optuna" and grids:
            raise ValueError(f"optuna draws values and walks no grid; write kind: choice for {', '.join(grids)}")
        if len(grids) == len(self.parameters):
            if self.trials is not None:
                raise ValueError(
                    "all parameters are grids, so `trials` would only repeat the same ones; leave trials out, or draw "
                    "some parameter (kind: choice, uniform, loguniform)"
                )
        elif self.trials is None:
            raise ValueError("say how many samples to draw, e.g. trials: 20")
        return self

    @property
    def total(self) -> int:
        """Trials in all: samples x points of the grid."""
        points = math.prod(len(p.values) for p in self.parameters.values() if isinstance(p, Grid))
        return (self.trials or 1) * points

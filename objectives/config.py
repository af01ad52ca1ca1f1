"""Configuration of the objectives, one model a loss. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from recommender.config import StrictModel


class LMLConfig(StrictModel):
    """Language-modelling loss over the response: plain supervised fine-tuning."""

    kind: Literal["lml"] = "lml"


class MSLConfig(StrictModel):
    """Masked softmax loss: softmax over the valid tokens only."""

    kind: Literal["msl"] = "msl"
    temperature: float = Field(1.0, gt=0, description="τ, divides the logits.")


class ILRecConfig(StrictModel):
    """Self-hard negatives from intermediate layers: cross-layer preference optimisation + distillation."""

    kind: Literal["ilrec"] = "ilrec"
    k: int = Field(1, ge=1, description="How many layers below the last one give the negatives: L−k … L−1.")
    layers: tuple[int, ...] | None = Field(None, description="An explicit list of layers instead of k (1 … L−1).")
    alpha: float = Field(0.8, gt=0, description="α: v is a negative when its probability is at least α times y's.")
    beta: float = Field(0.1, ge=0, description="β: the strength of the penalty on negatives.")
    distillation: float = Field(0.01, ge=0, description="λ: weight of cross-layer preference distillation; 0 = off.")
    vocabulary: Literal["full", "valid"] = Field(
        "full", description="full: softmaxes run over the vocabulary (paper); valid: over the valid tokens only."
    )
    penalty: Literal["scaled", "additive"] = Field(
        "scaled", description="scaled: exp(z(1+βw)), the paper's; additive: exp(z+βw), which ignores shifts of z."
    )

    @model_validator(mode="after")
    def _layers_are_distinct(self) -> ILRecConfig:
        if self.layers is not None and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise ValueError("objective.layers: give at least one layer, each once")
        return self


ObjectiveConfig = Annotated[LMLConfig | MSLConfig | ILRecConfig, Field(discriminator="kind")]

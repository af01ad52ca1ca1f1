"""Configuration of the objectives, one model a loss. Nothing heavy is imported here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from recommender.config import CustomClass, StrictModel
from recommender.errors import UserError

Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["adaptive"]


class LMLConfig(StrictModel):
    """Language-modelling loss over the response: plain supervised fine-tuning."""

    kind: Literal["lml"] = "lml"


class MSLConfig(StrictModel):
    """Masked softmax loss: softmax over the valid tokens only."""

    kind: Literal["msl"] = "msl"
    temperature: Temperature = Field(
        1.0, description="τ, divides the logits, in training and in search. adaptive: MSL's adaptive temperature (ATS)."
    )


class ILRecConfig(StrictModel):
    """ILRec: CPO + λ CPD + μ CRR on self-hard negatives from intermediate layers. A weight of 0 switches a term off."""

    kind: Literal["ilrec"] = "ilrec"
    k: int | None = Field(
        None, ge=1, description="How many layers below the last one give the negatives: L−k … L−1. null: one."
    )
    layers: tuple[int, ...] | None = Field(None, description="An explicit list of layers instead of k (1 … L−1).")
    ensemble: Literal["mean", "variance", "entropy", "max_prob"] = Field(
        "mean", description="The layers' logits are averaged; by anything but `mean`, confident layers weigh more."
    )
    negatives_from: Literal["intermediate", "final"] = Field(
        "intermediate", description="Which logits propose the negatives; final: the ablation `w/o CNS`."
    )
    alpha: float = Field(0.8, gt=0, description="α: v is a negative when its probability is at least α times y's.")
    threshold: Literal["probability", "logit"] = Field(
        "probability", description="What α compares. logit depends on the logits' scale and inverts below 0."
    )
    beta: float = Field(0.1, ge=0, description="β: strength of CPO's penalty on negatives; 0: plain cross-entropy.")
    penalty: Literal["scaled", "additive"] = Field(
        "scaled", description="scaled: exp(z(1+βw)), the paper's; additive: exp(z+βw), which ignores shifts of z."
    )
    cpd_weight: float = Field(0.01, ge=0, description="λ: weight of the distillation into the layers; 0 = off.")
    cpd_direction: Literal["student_teacher", "teacher_student"] = Field(
        "student_teacher", description="KL(layer ‖ final), the paper's, or KL(final ‖ layer)."
    )
    crr_weight: float = Field(0.0, ge=0, description="μ: weight of the collaborative reward; 0 = off.")
    crr_temperature: float = Field(1.0, gt=0, description="T of the soft labels softmax(r/T); 1 in the paper.")
    crr_support: Literal["H", "H_valid"] = Field(
        "H", description="Tokens that get a soft label: negatives and target (H), or just the valid ones among them."
    )
    crr_items: int | None = Field(
        None,
        ge=1,
        description="Rewards from the target and the model's N best other items only; null: from all items.",
    )
    vocabulary: Literal["full", "valid"] = Field(
        "full", description="full: softmaxes run over the vocabulary (paper); valid: over the valid tokens only."
    )

    @model_validator(mode="after")
    def _layers_are_named_once(self) -> ILRecConfig:
        if self.layers is not None:
            if not self.layers or len(set(self.layers)) != len(self.layers):
                raise ValueError("objective.layers: give at least one layer, each once")
            if self.k is not None:
                raise ValueError("objective: give k or layers, not both")
        return self

    def intermediate_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers that give the negatives: those listed, or the k below the last one.

        Raises:
            UserError: some are not in 1 … L−1.
        """
        layers = self.layers or tuple(range(num_layers - (self.k or 1), num_layers))
        outside = [layer for layer in layers if not 1 <= layer < num_layers]
        if outside:
            raise UserError(
                f"objective: layers {outside} are not intermediate layers of a backbone with {num_layers} layers; "
                f"choose k < {num_layers}, or layers from 1 to {num_layers - 1}"
            )
        return layers


class CustomConfig(CustomClass):
    """A token-level objective of your own: a subclass of `objectives.objective.TokenObjective`."""

    kind: Literal["custom"] = "custom"


ObjectiveConfig = Annotated[LMLConfig | MSLConfig | ILRecConfig | CustomConfig, Field(discriminator="kind")]


def needs_rewards(config: ObjectiveConfig) -> bool:
    """Whether the objective takes token rewards from a collaborative model."""
    return isinstance(config, ILRecConfig) and config.crr_weight > 0

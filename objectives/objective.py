"""Objectives: what a training step asks of the backbone, and the loss it makes of the answer.

The worker loop knows an objective by three things: the intermediate `layers` it reads, whether it counts only
`branching` positions, and `losses(...)`. Adding one is a function in `losses.py`, a config, a class here.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from objectives import losses
from objectives.config import ILRecConfig, LMLConfig, MSLConfig, ObjectiveConfig
from recommender.errors import UserError


class Objective(Protocol):
    """A token-level objective.

    Attributes:
        layers: intermediate layers whose logits `losses` wants, each in 1 … L−1.
        branching_only: only positions with more than one valid token are counted; forced ones are never computed.
        valid_only: logits outside the valid tokens are −inf.
    """

    layers: tuple[int, ...]
    branching_only: bool
    valid_only: bool

    def losses(self, logits: Tensor, layer_logits: list[Tensor], target: Tensor) -> dict[str, Tensor]:
        """Per-position values [P]: "loss" is what is minimised; everything else is reported."""
        ...


class LML:
    """Plain language modelling over the response."""

    layers: tuple[int, ...] = ()
    branching_only = False
    valid_only = False

    def losses(self, logits: Tensor, layer_logits: list[Tensor], target: Tensor) -> dict[str, Tensor]:
        return {"loss": losses.language_modelling(logits, target)}


class MSL:
    """Masked softmax loss at a fixed temperature. A forced token's loss is exactly 0, so those are not computed."""

    layers: tuple[int, ...] = ()
    branching_only = True
    valid_only = True

    def __init__(self, config: MSLConfig):
        self.config = config

    def losses(self, logits: Tensor, layer_logits: list[Tensor], target: Tensor) -> dict[str, Tensor]:
        return {"loss": losses.masked_softmax(logits, target, self.config.temperature)}


class ILRec:
    """Cross-layer preference optimisation and distillation (ILRec without its collaborative reward)."""

    def __init__(self, config: ILRecConfig, num_layers: int):
        self.config = config
        layers = config.layers or tuple(range(num_layers - config.k, num_layers))
        outside = [layer for layer in layers if not 1 <= layer < num_layers]
        if outside:
            raise UserError(
                f"objective: layers {outside} are not intermediate layers of a backbone with {num_layers} layers; "
                f"choose k < {num_layers}, or layers from 1 to {num_layers - 1}"
            )
        self.layers = layers
        self.branching_only = self.valid_only = config.vocabulary == "valid"

    def losses(self, logits: Tensor, layer_logits: list[Tensor], target: Tensor) -> dict[str, Tensor]:
        config = self.config
        negatives = losses.self_hard_negatives(layer_logits, target, config.alpha)
        cpo = losses.cross_layer_preference(logits, target, negatives, config.beta, config.penalty == "additive")
        values = {"cpo": cpo, "negatives": negatives.mask.sum(1).float()}
        values["with_negatives"] = negatives.mask.any(1).float()
        if config.distillation:
            values["cpd"] = losses.cross_layer_distillation(layer_logits, logits)
            return {"loss": cpo + config.distillation * values["cpd"], **values}
        return {"loss": cpo, **values}


def build_objective(config: ObjectiveConfig, num_layers: int) -> Objective:
    """The objective for a backbone with `num_layers` decoder layers.

    Raises:
        UserError: it asks for layers that the backbone does not have.
    """
    if isinstance(config, LMLConfig):
        return LML()
    if isinstance(config, MSLConfig):
        return MSL(config)
    return ILRec(config, num_layers)

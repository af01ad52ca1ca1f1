"""Objectives: what a training step asks of the backbone, and the loss it makes of the answer.

The worker loop knows an objective by what it reads (`layers`, rewards), which positions and tokens it counts, its
`losses`, and the state that it carries from step to step. Adding one is a function in `losses.py`, a config, a class
here; or, outside of this project, a subclass of `TokenObjective` that the experiment names by its import path.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from objectives import losses
from objectives.config import CustomConfig, ILRecConfig, LMLConfig, MSLConfig, ObjectiveConfig
from objectives.losses import SelfHardNegatives
from objectives.temperature import FIRST, OpeningLogits, moved
from recommender.custom import made
from recommender.errors import UserError
from recommender.items.trie import RadixTrie


@dataclass(frozen=True)
class Predictions:
    """What an objective sees: n response positions, w columns.

    Attributes:
        logits: float32 [n, w], of the last layer.
        layer_logits: the same of each intermediate layer asked for.
        target: int64 [n]; column of the target.
        node: int64 [n]; trie node, −1 where the target is forced.
        valid: bool [n, w], or None where all columns count; logits outside are −inf.
        reward: float32 [n, w], where the objective takes rewards: see `losses.soft_labels`.
    """

    logits: Tensor
    layer_logits: list[Tensor]
    target: Tensor
    node: Tensor
    valid: Tensor | None = None
    reward: Tensor | None = None


class Objective(Protocol):
    """A token-level objective.

    Attributes:
        layers: intermediate layers whose logits `losses` wants, each in 1 … L−1.
        layers_learn: whether the losses have a gradient with respect to those.
        branching_only: only positions with more than one valid token are counted; forced ones are never computed.
        valid_only: the columns are the valid tokens instead of the vocabulary.
        floats: how many float32 values `losses` and its gradient hold at once for each column, the logits included.
        temperature: what divides the logits in the distribution that is trained; search uses the same.
        state: what changes from step to step, as JSON; it is in the checkpoint and equal on all ranks.
    """

    layers: tuple[int, ...]
    layers_learn: bool
    branching_only: bool
    valid_only: bool
    floats: int
    state: dict[str, Any]

    @property
    def temperature(self) -> float: ...

    def losses(self, predictions: Predictions) -> dict[str, Tensor]:
        """Per-position values [n]: "loss" is what is minimised; everything else is summed for `advance`."""
        ...

    def advance(self, sums: Mapping[str, float], counted: int) -> dict[str, float]:
        """Take an optimiser step's sums over the global batch; return what to report, means over counted positions."""
        ...


def _means(sums: Mapping[str, float], counted: int) -> dict[str, float]:
    return {name: value / max(counted, 1) for name, value in sums.items()}


class TokenObjective:
    """What objectives share, and the base of one of your own. Only `losses` has to be written:

        class Focal(TokenObjective):
            valid_only = True                        # the softmax runs over the valid tokens
            branching_only = True                    # and where only one is valid there is nothing to learn

            def __init__(self, gamma: float = 2.0):  # the experiment's `options`
                super().__init__()
                self.gamma = gamma

            def losses(self, predictions: Predictions) -> dict[str, Tensor]:
                log_p = -cross_entropy(predictions.logits, predictions.target, reduction="none")
                return {"loss": -((1 - log_p.exp()) ** self.gamma) * log_p, "log_p": log_p}

    The experiment names it: `objective: {kind: custom, class: my.losses:Focal, options: {gamma: 1.5}}`. The other
    attributes are those of `Objective`, with these defaults. What `losses` returns beside "loss" is reported as its
    mean over the counted positions. A batch is cut into pieces, so `losses` must treat each position by itself. Rewards
    are not given to it.
    """

    layers: tuple[int, ...] = ()
    layers_learn = False
    branching_only = False
    valid_only = False
    floats = 8
    temperature = 1.0

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def losses(self, predictions: Predictions) -> dict[str, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} has no losses(self, predictions)")

    def advance(self, sums: Mapping[str, float], counted: int) -> dict[str, float]:
        return _means(sums, counted)


class LML(TokenObjective):
    """Plain language modelling over the response."""

    floats = 4

    def losses(self, predictions: Predictions) -> dict[str, Tensor]:
        return {"loss": losses.language_modelling(predictions.logits, predictions.target)}


class MSL(TokenObjective):
    """Masked softmax loss at a fixed temperature. A forced token's loss is exactly 0, so those are not computed."""

    branching_only = True
    valid_only = True
    floats = 4

    def __init__(self, temperature: float):
        super().__init__()
        self.temperature = temperature

    def losses(self, predictions: Predictions) -> dict[str, Tensor]:
        return {"loss": losses.masked_softmax(predictions.logits, predictions.target, self.temperature)}


class AdaptiveMSL:
    """Masked softmax loss times τ, at the adaptive temperature.

    τ moves once an optimiser step, by the logits at the first branching node over the whole global batch, and takes
    effect from the next step on.
    """

    layers: tuple[int, ...] = ()
    layers_learn = False
    branching_only = True
    valid_only = True
    floats = 6

    def __init__(self, trie: RadixTrie):
        self._opening = trie.first_branching
        self._children = int(trie.child_count[self._opening])
        self.state: dict[str, Any] = {"temperature": FIRST}

    @property
    def temperature(self) -> float:
        return float(self.state["temperature"])

    def losses(self, predictions: Predictions) -> dict[str, Tensor]:
        logits, target, tau = predictions.logits, predictions.target, self.temperature
        values = {"loss": tau * losses.masked_softmax(logits, target, tau)}
        with torch.no_grad():
            opens = predictions.node == self._opening
            kept = logits if predictions.valid is None else logits.masked_fill(~predictions.valid, 0.0)
            values["openings"] = opens.double()
            values["opening_target"] = logits.gather(1, target[:, None]).squeeze(1).double() * opens
            values["opening_sum"] = kept.sum(1, dtype=torch.float64) * opens
            values["opening_squares"] = kept.square().sum(1, dtype=torch.float64) * opens
        return values

    def advance(self, sums: Mapping[str, float], counted: int) -> dict[str, float]:
        report = _means({"loss": sums["loss"]}, counted) | {"temperature": self.temperature}
        if sums["openings"] > 0 and math.isfinite(sums["opening_squares"]):
            opening = OpeningLogits.from_sums(
                sums["openings"], sums["opening_target"], sums["opening_sum"], sums["opening_squares"], self._children
            )
            self.state["temperature"] = moved(self.temperature, opening)
        return report


class ILRec:
    """CPO + λ CPD + μ CRR (ILRec, Eq. 7–11)."""

    temperature = 1.0

    def __init__(self, config: ILRecConfig, num_layers: int):
        self.config = config
        layers = config.intermediate_layers(num_layers)
        needs_layers = config.negatives_from == "intermediate" or config.cpd_weight > 0
        self.layers = layers if needs_layers else ()
        self.layers_learn = config.cpd_weight > 0
        self.branching_only = self.valid_only = config.vocabulary == "valid"
        # Logits and their gradients; negatives, weights, penalised logits and their likes; each layer's divergence.
        self.floats = 10 + 4 * len(self.layers)
        self.state: dict[str, Any] = {}

    def losses(self, predictions: Predictions) -> dict[str, Tensor]:
        config, valid = self.config, predictions.valid
        logits, target = predictions.logits, predictions.target
        if config.negatives_from == "final":
            ensemble = logits.detach()
        else:
            ensemble = losses.layer_ensemble([z.detach() for z in predictions.layer_logits], config.ensemble, valid)
        negatives = losses.self_hard_negatives(ensemble, target, config.alpha, config.threshold)
        cpo = losses.cross_layer_preference(logits, target, negatives, config.beta, config.penalty)
        values = {"loss": cpo, "cpo": cpo, **self._diagnostics(logits, negatives, valid)}
        if not (config.cpd_weight or config.crr_weight):
            return values

        # As CPD's teacher it takes no gradient.
        log_probabilities = (logits if config.crr_weight else logits.detach()).log_softmax(1)
        if config.cpd_weight:
            for layer, layer_logits in zip(self.layers, predictions.layer_logits, strict=True):
                cpd = losses.cross_layer_distillation(layer_logits, log_probabilities, config.cpd_direction, valid)
                values[f"cpd_{layer}"] = cpd
                values["loss"] = values["loss"] + config.cpd_weight * cpd
        if config.crr_weight:
            if predictions.reward is None:
                raise ValueError("crr_weight > 0 takes rewards, and there are none")
            labels = losses.soft_labels(
                predictions.reward, target, negatives.mask, config.crr_temperature, config.crr_support
            )
            values["crr"] = losses.collaborative_reward(log_probabilities, labels, valid)
            values["loss"] = values["loss"] + config.crr_weight * values["crr"]
            on_target = labels.gather(1, target[:, None]).squeeze(1)
            values["crr_log_q_target"] = on_target.clamp(min=1e-30).log()  # with small T it may underflow
            values["crr_off_target"] = 1 - on_target
        return values

    @torch.no_grad()
    def _diagnostics(self, logits: Tensor, negatives: SelfHardNegatives, valid: Tensor | None) -> dict[str, Tensor]:
        """What the negatives look like: how many (|V_N|), how many below zero, the sum of their penalties."""
        finite = logits.detach() if valid is None else logits.masked_fill(~valid, 0.0)
        count = negatives.mask.sum(1)
        of_logits = self.config.penalty == "scaled"
        added = torch.linalg.vecdot(negatives.weight, finite) if of_logits else negatives.weight.sum(1)
        is_below = finite.mul(1e30).clamp_(-1, 0)  # −1 or 0
        return {
            "negatives": count,
            "with_negatives": (count > 0).float(),
            "below_zero": -torch.linalg.vecdot(negatives.mask, is_below),
            "penalty": self.config.beta * added,
        }

    def advance(self, sums: Mapping[str, float], counted: int) -> dict[str, float]:
        """Means over positions, but `penalty` (what is added to a logit) and `below_zero` (a share) over negatives."""
        negatives = max(sums["negatives"], 1.0)
        of_negatives = {name: sums[name] / negatives for name in ("penalty", "below_zero")}
        return _means(sums, counted) | of_negatives


def build_objective(config: ObjectiveConfig, num_layers: int, trie: RadixTrie) -> Objective:
    """The objective for a backbone with `num_layers` decoder layers and a catalogue.

    Raises:
        UserError: it asks for layers that the backbone does not have, or is the user's and cannot be made.
    """
    if isinstance(config, LMLConfig):
        return LML()
    if isinstance(config, MSLConfig):
        return AdaptiveMSL(trie) if config.temperature == "adaptive" else MSL(config.temperature)
    if isinstance(config, CustomConfig):
        return made(config, TokenObjective, "objective")
    return ILRec(config, num_layers)


def check_custom(config: CustomConfig, num_layers: int) -> None:
    """Make an objective of the user's, and try it on logits drawn at random.

    Raises:
        UserError: it cannot be imported or made, asks for layers that the backbone does not have, or its losses are not
            what a training step needs.
    """
    objective, name = made(config, TokenObjective, "objective"), f"objective: {config.path}"
    if not all(isinstance(layer, int) and 1 <= layer < num_layers for layer in objective.layers):
        raise UserError(f"{name}: its layers {objective.layers} are not all intermediate ones, 1 … {num_layers - 1}")
    generator = torch.Generator().manual_seed(0)
    first, *others = (torch.randn(3, 5, generator=generator).requires_grad_() for _ in range(1 + len(objective.layers)))
    target, valid = torch.tensor([0, 3, 4]), torch.ones(3, 5, dtype=torch.bool) if objective.valid_only else None
    try:
        found = objective.losses(Predictions(first, others, target, torch.zeros(3, dtype=torch.int64), valid))
        shapes = {key: tuple(value.shape) for key, value in found.items()}
        reported = objective.advance({key: float(value.detach().sum()) for key, value in found.items()}, 3)
        json.dumps(objective.state)
    except Exception as error:  # of the user's code
        raise UserError(f"{name} failed on 3 positions of 5 tokens: {type(error).__name__}: {error}") from error
    if "loss" not in found or "loss" not in reported:
        raise UserError(f'{name}: neither losses nor advance may leave out "loss" (there are {", ".join(found)})')
    if wrong := [key for key, shape in shapes.items() if shape != (3,)]:
        raise UserError(
            f"{name}: losses gave {wrong[0]!r} of shape {shapes[wrong[0]]} for 3 positions; give one value each"
        )
    if not (found["loss"].requires_grad and found["loss"].isfinite().all()):
        raise UserError(f"{name}: its loss has no gradient, or is not finite, where logits are ordinary numbers")

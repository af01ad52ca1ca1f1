"""Token-level losses as pure functions of logits.

Shapes: P response positions, V columns (the vocabulary, or the valid tokens of each position). Logits are float32
[P, V]. `valid`, bool [P, V], marks the columns that count; where it is False the logit is −inf and takes no part. None
stands for "all", and spares the masks. Every function gives one value a position, [P]; the caller sums them and divides
by the number of positions counted in the global batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def language_modelling(logits: Tensor, target: Tensor) -> Tensor:
    """LML: −log softmax(z)[y].

    >>> z = torch.tensor([[0.5, 0.25, 0.25]]).log()
    >>> language_modelling(z, torch.tensor([1]))  # −log 1/4
    tensor([1.3863])
    """
    return F.cross_entropy(logits, target, reduction="none")


def masked_softmax(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """MSL (Eq. 9 without its factor τ): −log( exp(z_y/τ) / Σ_{v∈C} exp(z_v/τ) ), −inf outside C.

    >>> z = torch.tensor([[4.0, 1.0, 0.0]]).log()  # log 0: not in C
    >>> masked_softmax(z, torch.tensor([0]), temperature=2.0)  # −log( √4 / (√4 + √1) )
    tensor([0.4055])
    """
    return F.cross_entropy(logits / temperature, target, reduction="none")


@torch.no_grad()
def layer_ensemble(
    layer_logits: Sequence[Tensor],
    how: Literal["mean", "variance", "entropy", "max_prob"] = "mean",
    valid: Tensor | None = None,
) -> Tensor:
    """ẑ [P, V] (ILRec Eq. 3): the mean of the layers' logits, or one that weighs confident layers more (A.6).

    A.6 gives no formulas; ours: per position, a softmax over the layers of the logits' variance, of minus the entropy,
    or of the top probability.

    >>> layers = [torch.tensor([[0.0, 4.0]]), torch.tensor([[2.0, 2.0]])]
    >>> layer_ensemble(layers), layer_ensemble(layers, "variance")  # variances 4 and 0: weights e⁴ and e⁰ over the sum
    (tensor([[1., 3.]]), tensor([[0.0360, 3.9640]]))
    """
    if len(layer_logits) == 1:
        return layer_logits[0].detach()
    stacked = torch.stack(list(layer_logits))
    if how == "mean":
        return stacked.mean(0)
    if how == "variance":
        confidence = _variance(stacked, valid)
    elif how == "entropy":
        log_p = _zero_outside(stacked.log_softmax(2), valid)
        confidence = (log_p.exp() * log_p).sum(2)  # where log p was set to 0, the product is 0 as well
    else:
        confidence = stacked.softmax(2).amax(2)
    weighted = (_zero_outside(stacked, valid) * confidence.softmax(0)[:, :, None]).sum(0)
    return weighted if valid is None else weighted.masked_fill(~valid, -torch.inf)


def _variance(logits: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return logits.var(2, correction=0)
    count = valid.sum(1)
    kept = _zero_outside(logits, valid)
    mean = kept.sum(2) / count
    return (_zero_outside(kept - mean[:, :, None], valid) ** 2).sum(2) / count


@dataclass(frozen=True)
class SelfHardNegatives:
    """The negatives that the model itself proposes.

    Attributes:
        mask: float32 [P, V], 1 for the members of V_N, else 0.
        weight: float32 [P, V], w: softmax of the ensemble's logits over V_N, 0 outside; rows without negatives are 0.
    """

    mask: Tensor
    weight: Tensor


_OUTSIDE, _TARGET = -1e4, -5e3  # far below any excess; a softmax gives them nothing, but where there is nothing else


@torch.no_grad()
def self_hard_negatives(
    ensemble: Tensor,
    target: Tensor,
    alpha: float,
    threshold: Literal["probability", "logit"] = "probability",
) -> SelfHardNegatives:
    """ILRec Eq. 4–6: V_N = {v ≠ y : p̂(v) ≥ α p̂(y)} for p̂ = softmax(ẑ), and w = softmax of ẑ over V_N.

    On logits: ẑ_v ≥ ẑ_y + ln α; with `threshold="logit"`, ẑ_v ≥ α ẑ_y. Neither the selection nor the weights take a
    gradient (A.3). V_N may be most of the vocabulary, so this is a mask, made by operations that vectorise: boolean
    ones cost several times as much on CPUs.

    Args:
        ensemble: ẑ, float32 [P, V].

    >>> z = torch.tensor([[0.3, 0.4, 0.25, 0.05]]).log()
    >>> self_hard_negatives(z, torch.tensor([0]), alpha=0.8).weight  # p̂ ≥ 0.24: 0.4 / 0.65 and 0.25 / 0.65
    tensor([[0.0000, 0.6154, 0.3846, 0.0000]])
    """
    of_target = ensemble.gather(1, target[:, None])
    excess = ensemble - (of_target + math.log(alpha) if threshold == "probability" else of_target * alpha)
    torch.threshold_(excess, -1e-30, _OUTSIDE)  # keeps what is above, so also an excess of exactly 0
    excess.scatter_(1, target[:, None], _TARGET)
    weight = excess.softmax(1).scatter_(1, target[:, None], 0.0)
    return SelfHardNegatives(excess.clamp_(-1, 0).add_(1), weight)


def cross_layer_preference(
    logits: Tensor,
    target: Tensor,
    negatives: SelfHardNegatives,
    beta: float,
    penalty: Literal["scaled", "additive"] = "scaled",
) -> Tensor:
    """CPO (ILRec Eq. 7): −z_y + log Σ_v exp( z_v (1 + β w_v) ); additive: exp( z_v + β w_v ).

    Without negatives this is plain cross-entropy. The scaled form is not invariant to a shift of z, and for z_v < 0 a
    negative is rewarded instead of penalised. w_y = 0, so the penalised logit of the target is z_y.

    >>> z, one = torch.tensor([[4.0, 2.0]]).log(), torch.tensor([[0.0, 1.0]])
    >>> cross_layer_preference(z, torch.tensor([0]), SelfHardNegatives(mask=one, weight=one), 1.0)  # log((4 + 2²) / 4)
    tensor([0.6931])
    """
    if penalty == "additive":
        penalised = torch.add(logits, negatives.weight, alpha=beta)
    else:
        penalised = logits * negatives.weight.mul(beta).add_(1)
    return F.cross_entropy(penalised, target, reduction="none")


def cross_layer_distillation(
    layer_logits: Tensor,
    log_probabilities: Tensor,
    direction: Literal["student_teacher", "teacher_student"] = "student_teacher",
    valid: Tensor | None = None,
) -> Tensor:
    """CPD of one layer (a term of ILRec Eq. 8): KL( softmax z^l ‖ softmax sg(z^L) ), or the other direction.

    Args:
        layer_logits: z^l, the student.
        log_probabilities: log softmax z^L, the teacher; takes no gradient.

    >>> student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    >>> cross_layer_distillation(student, teacher)  # 1/2 log( (1/2) / (1/4) ) + 1/2 log( (1/2) / (3/4) )
    tensor([0.1438])
    """
    teacher = _zero_outside(log_probabilities.detach(), valid)
    if direction == "student_teacher":
        return _StudentTeacher.apply(layer_logits, teacher, valid)
    student = _zero_outside(layer_logits.log_softmax(1), valid)
    return torch.linalg.vecdot(_zero_outside(teacher.exp(), valid), teacher - student)


class _StudentTeacher(torch.autograd.Function):
    """KL(p ‖ q) with dKL/dz = p (log p − log q − KL), worked out in the forward pass: half the work of autograd's."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
        student = logits.log_softmax(1)
        difference = _zero_outside(student - teacher, valid)
        probability = student.exp_()
        divergence = torch.linalg.vecdot(probability, difference)
        if ctx.needs_input_grad[0]:
            ctx.gradient = difference.sub_(divergence[:, None]).mul_(probability)
        return divergence

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gradient * scale[:, None], None, None


@torch.no_grad()
def soft_labels(
    reward: Tensor,
    target: Tensor,
    negatives: Tensor,
    temperature: float = 1.0,
    support: Literal["H", "H_valid"] = "H",
) -> Tensor:
    """q (ILRec Eq. 11): softmax of r/T over H = V_N ∪ {y}, 0 outside. float32 [P, V]; takes no gradient.

    Args:
        reward: float32 [P, V]: r_v ∈ [0, 1] where a token leads to items; −1 where it leads to none, and counts as 0.
        negatives: V_N as float32 [P, V], 1 or 0.
        support: H_valid drops the negatives that lead to no item.

    >>> reward, negatives = torch.tensor([[1.0, 0.0, 0.5]]), torch.tensor([[0.0, 1.0, 0.0]])
    >>> soft_labels(reward, torch.tensor([0]), negatives)  # e¹ / (e¹ + e⁰) and e⁰ / (e¹ + e⁰); the third is not in H
    tensor([[0.7311, 0.2689, 0.0000]])
    """
    held = negatives if support == "H" else negatives * (reward >= 0)
    held = held.scatter(1, target[:, None], 1.0)
    scaled = reward.clamp(min=0).mul_(held)  # at least 0 in H, 0 outside: so its largest is the largest in H
    shares = (scaled - scaled.amax(1, keepdim=True)).div_(temperature).exp_().mul_(held)
    return shares.div_(shares.sum(1, keepdim=True))


def collaborative_reward(log_probabilities: Tensor, labels: Tensor, valid: Tensor | None = None) -> Tensor:
    """CRR (ILRec Eq. 11): −Σ_{v∈H} q_v log softmax(z^L)_v.

    Args:
        log_probabilities: log softmax z^L.
        labels: q, from `soft_labels`.

    >>> log_p, q = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]])
    >>> collaborative_reward(log_p, q)  # −1/2 log 1/4 − 1/2 log 3/4
    tensor([0.8370])
    """
    return -torch.linalg.vecdot(labels, _zero_outside(log_probabilities, valid))


def _zero_outside(values: Tensor, valid: Tensor | None) -> Tensor:
    return values if valid is None else values.masked_fill(~valid, 0.0)

"""Token-level losses as pure functions of logits.

Shapes: P response positions, V tokens. Logits are float32 [P, V]; a token outside a mask has the logit −inf and takes
no part. Every function gives one value a position, [P]; the caller sums them and divides by the number of positions
counted in the global batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def language_modelling(logits: Tensor, target: Tensor) -> Tensor:
    """LML: −log softmax(z)[y]."""
    return F.cross_entropy(logits, target, reduction="none")


def masked_softmax(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """MSL (Eq. 9 without its factor τ): −log( exp(z_y/τ) / Σ_{v∈C} exp(z_v/τ) ), −inf outside C."""
    return F.cross_entropy(logits / temperature, target, reduction="none")


@dataclass(frozen=True)
class SelfHardNegatives:
    """The negatives that the intermediate layers propose.

    Attributes:
        mask: bool [P, V], V_N.
        weight: float32 [P, V], w: softmax of the ensemble's logits over V_N, 0 outside; rows without negatives are 0.
    """

    mask: Tensor
    weight: Tensor


@torch.no_grad()
def self_hard_negatives(layer_logits: Sequence[Tensor], target: Tensor, alpha: float) -> SelfHardNegatives:
    """ILRec Eq. 3–6: V_N = {v ≠ y : p̂(v) ≥ α p̂(y)} of the layers' mean logits ẑ, and w = softmax of ẑ over V_N.

    On logits: ẑ_v ≥ ẑ_y + ln α. Neither the selection nor the weights take a gradient (A.3).
    """
    ensemble = torch.stack(list(layer_logits)).mean(0)
    threshold = ensemble.gather(1, target[:, None]) + torch.log(ensemble.new_tensor(alpha))
    mask = (ensemble >= threshold) & torch.isfinite(ensemble)
    mask.scatter_(1, target[:, None], False)
    weight = ensemble.masked_fill(~mask, -torch.inf).softmax(1).nan_to_num(0.0)
    return SelfHardNegatives(mask, weight)


def cross_layer_preference(
    logits: Tensor, target: Tensor, negatives: SelfHardNegatives, beta: float, additive: bool = False
) -> Tensor:
    """CPO (ILRec Eq. 7): −z_y + log Σ_v exp( z_v (1 + β w_v) ); additive: exp( z_v + β w_v ).

    Without negatives this is plain cross-entropy. The scaled form is not invariant to a shift of z, and for z_v < 0 a
    negative is rewarded instead of penalised.
    """
    penalty = beta * negatives.weight
    # −inf · (1 + 0) is −inf, as it should be; −inf is kept out of the product's gradient all the same.
    penalised = logits + (penalty if additive else penalty * logits.masked_fill(torch.isinf(logits), 0.0))
    return penalised.logsumexp(1) - logits.gather(1, target[:, None]).squeeze(1)


def cross_layer_distillation(layer_logits: Sequence[Tensor], logits: Tensor) -> Tensor:
    """CPD (ILRec Eq. 8): Σ_l KL( softmax z^l ‖ softmax sg(z^L) ); tokens at −inf take no part."""
    valid = torch.isfinite(logits)
    teacher = logits.detach().log_softmax(1).masked_fill(~valid, 0.0)
    total = logits.new_zeros(len(logits))
    for student in layer_logits:
        log_p = student.log_softmax(1).masked_fill(~valid, 0.0)
        total = total + (log_p.exp() * (log_p - teacher)).masked_fill(~valid, 0.0).sum(1)
    return total

"""Losses of collaborative models where targets compete with a sample of the items, as pure functions of scores.

s⁺ is the score of a target, s⁻ that of one of N negatives; a negative with a score of −∞ does not count.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sampled_softmax(positive: Tensor, negative: Tensor) -> Tensor:
    """Softmax over the target and the negatives, summed over targets (Klenitskiy and Vasilev, RecSys 2023).

        −log( e^s⁺ / (e^s⁺ + Σ e^s⁻) )

    Args:
        positive: [M].
        negative: [M, N].
    """
    everything = torch.cat([positive[:, None], negative], dim=1)
    return (everything.logsumexp(1) - positive).sum()


def gbce(positive: Tensor, negative: Tensor, beta: float) -> Tensor:
    """Generalised binary cross-entropy, summed over targets (gSASRec; Petrov and Macdonald, RecSys 2023).

        −( β log σ(s⁺) + Σ log(1 − σ(s⁻)) ) / (N + 1)

    Args:
        positive: [M].
        negative: [M, N].
        beta: see `gbce_exponent`; 1 is plain binary cross-entropy.
    """
    return (beta * F.softplus(-positive) + F.softplus(negative).sum(1)).sum() / (negative.shape[1] + 1)


def gbce_exponent(negatives: int, items: int, calibration: float) -> float:
    """The β of gBCE: α (t (1 − 1/α) + 1/α), where α = N / (items − 1) is the share of items that are negatives.

    A calibration t of 0 gives 1: σ(s⁺) is as overconfident as negative sampling makes it. 1 gives α, which undoes that.
    """
    share = min(1.0, negatives / (items - 1))
    return share * (calibration * (1 - 1 / share) + 1 / share)


def bpr(positive: Tensor, negative: Tensor) -> Tensor:
    """Bayesian personalised ranking, summed over targets (Rendle et al., UAI 2009).

        −(1/N) Σ log σ(s⁺ − s⁻)

    Args:
        positive: [M].
        negative: [M, N].
    """
    return F.softplus(negative - positive[:, None]).mean(1).sum()

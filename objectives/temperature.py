"""MSL's adaptive temperature (ATS): τ from the spread of the logits where responses begin."""

from __future__ import annotations

import math
from dataclasses import dataclass

ETA = 0.25  # the paper's η
RATE, FIRST, LOWEST, HIGHEST = 0.05, 1.5, 1.5, 5.0  # moving average, τ_0 and bounds as in the authors' code


@dataclass(frozen=True)
class OpeningLogits:
    """Moments of the logits at the first branching node, over the whole global batch.

    Attributes:
        target_mean: μ⁺, mean logit of the targets' first tokens.
        mean, variance: μ and the unbiased σ² of all valid logits there, targets included.
        children: m, number of valid tokens there.
    """

    target_mean: float
    mean: float
    variance: float
    children: int

    @classmethod
    def from_sums(cls, positions: float, target: float, total: float, squares: float, children: int) -> OpeningLogits:
        """From sums over `positions` positions with `children` logits each.

        >>> OpeningLogits.from_sums(positions=2, target=6.0, total=4.0, squares=8.0, children=2)  # σ² = (8 − 4·1²) / 3
        OpeningLogits(target_mean=3.0, mean=1.0, variance=1.3333333333333333, children=2)
        """
        count = positions * children
        mean = total / count
        return cls(target / positions, mean, max(squares - count * mean**2, 0.0) / max(count - 1, 1), children)


def adaptive_temperature(logits: OpeningLogits) -> float | None:
    """τ* = (Δ + √(max(Δ² − 2Cσ², 0))) / 2C with Δ = μ⁺ − μ and C = ln(mη), clamped; None where mη ≤ 1.

    MSL's paper prints the other root; this is the authors' code.

    >>> opening = OpeningLogits(target_mean=9.0, mean=-1.0, variance=4.0, children=40)  # Δ = 10, C = ln 10
    >>> round(adaptive_temperature(opening), 4)  # (10 + √(100 − 8 ln 10)) / (2 ln 10)
    4.1328
    """
    constant = math.log(logits.children * ETA) if logits.children * ETA > 1 else 0.0
    if constant <= 0:
        return None
    delta = logits.target_mean - logits.mean
    root = math.sqrt(max(delta**2 - 2 * constant * logits.variance, 0.0))
    return min(max((delta + root) / (2 * constant), LOWEST), HIGHEST)


def moved(temperature: float, logits: OpeningLogits, rate: float = RATE) -> float:
    """The moving average of τ after one optimiser step: τ ← (1 − rate) τ + rate τ*.

    >>> far = OpeningLogits(target_mean=99.0, mean=0.0, variance=0.0, children=40)  # τ* = 99 / ln 10, which is cut to 5
    >>> moved(2.0, far, rate=0.5)
    3.5
    """
    wanted = adaptive_temperature(logits)
    return temperature if wanted is None else (1 - rate) * temperature + rate * wanted

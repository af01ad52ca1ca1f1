"""Weights of priors, found on validation targets.

The model's score has weight 1. A conditional logit (the softmax of the weighted sum over a pool, L-BFGS) gives weights
to begin with; from there one weight after the other is moved to where NDCG@10 is best, until nothing gains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from recommender.config import ModelPrior, PriorConfig
from recommender.metrics import metric_values
from trainer.evaluation.pools import BASE, Pools

_OFFSETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_FACTORS = (0.0, 0.25, 0.5, 0.7, 0.85, 1.2, 1.4, 2.0, 4.0)
_CURVE = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0)
_STEPS = (-0.5, -0.2, -0.1, 0.1, 0.2, 0.5)  # where a weight is 0; in units of what the term varies by
_GAIN = 1e-4  # of NDCG@10: less is noise
_ROUNDS = 6
_LEAST_BASE = 0.01  # of the model's own score, beside the others


@dataclass(frozen=True)
class Blend:
    """A weighted sum.

    Attributes:
        configs: the priors with their weights and transforms.
        ndcg: NDCG@10 on the targets that it was fitted on.
    """

    configs: dict[str, PriorConfig]
    ndcg: float


class Weighing:
    """The sums that can be tried on some targets.

    Args:
        pools: of the targets.
        configs: the priors; transforms of models that give counts are found as well.
    """

    def __init__(self, pools: Pools, configs: Mapping[str, PriorConfig]):
        self.pools = pools
        self.configs = dict(configs)
        self._filled = pools.items >= 0
        self.deviation = {name: self._deviation(self.term(name)) for name in configs}

    def term(self, name: str, config: PriorConfig | None = None) -> np.ndarray:
        """float32 [M, P], a prior without its weight."""
        config, scores = config or self.configs[name], self.pools.scores[name]
        if isinstance(config, ModelPrior):
            scaled = scores / config.scale
            return np.log(np.maximum(scaled, 0) + config.offset) if config.transform == "log" else scaled
        return scores

    def total(self, configs: Mapping[str, PriorConfig]) -> np.ndarray:
        """float32 [M, P]."""
        total = self.pools.scores[BASE].copy()
        for name, config in configs.items():
            if config.weight:
                total += np.float32(config.weight) * self.term(name, config)
        return total

    def values(self, configs: Mapping[str, PriorConfig]) -> np.ndarray:
        """float [M], NDCG@10 of each target."""
        return metric_values(self.pools.ranks(self.total(configs)), [10])["NDCG@10"]

    def ndcg(self, configs: Mapping[str, PriorConfig]) -> float:
        return float(self.values(configs).mean())

    def fitted(self) -> Blend:
        """The best weights that were found."""
        configs = self._start()
        best = self.ndcg(configs)
        for _ in range(_ROUNDS):
            before = best
            for name in configs:
                for tried in self._others(name, configs[name]):
                    found = self.ndcg(configs | {name: tried})
                    if found > best + _GAIN:
                        best, configs = found, configs | {name: tried}
            for factor in _FACTORS[1:]:  # of all together: what the model's own score counts
                tried_all = {name: _weighted(config, config.weight * factor) for name, config in configs.items()}
                if (found := self.ndcg(tried_all)) > best + _GAIN:
                    best, configs = found, tried_all
            if best == before:
                break
        for name, config in configs.items():  # what does nothing goes
            if config.weight and self.ndcg(configs | {name: _weighted(config, 0.0)}) >= best - _GAIN:
                configs = configs | {name: _weighted(config, 0.0)}
                best = self.ndcg(configs)
        return Blend({name: _rounded(config) for name, config in configs.items() if config.weight}, best)

    def curves(self, blend: Blend, segments: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """NDCG@10 of each segment (bool [M]) as one prior's weight alone changes: prior → weights, segment → values."""
        found = {}
        for name, config in blend.configs.items():
            weights = [config.weight * factor for factor in _CURVE]
            values = [self.values(blend.configs | {name: _weighted(config, weight)}) for weight in weights]
            lines = {label: [float(v[mask].mean()) for v in values] for label, mask in segments.items() if mask.any()}
            found[name] = {"weights": weights, "NDCG@10": lines}
        return found

    def _deviation(self, term: np.ndarray) -> float:
        return max(float(term[self._filled].std()), 1e-6)

    def _others(self, name: str, config: PriorConfig) -> list[PriorConfig]:
        """What is tried in place of a prior's config."""
        weights = [config.weight * factor for factor in _FACTORS]
        if not config.weight:
            weights = [step / self.deviation[name] for step in _STEPS]
        found: list[PriorConfig] = [_weighted(config, weight) for weight in weights]
        if isinstance(config, ModelPrior) and config.transform == "log":
            found += [config.model_copy(update={"offset": offset}) for offset in _OFFSETS]
        return found

    def _start(self) -> dict[str, PriorConfig]:
        """By maximum likelihood of the targets that are in their pools."""
        rows = np.flatnonzero(self.pools.place >= 0)
        names = list(self.configs)
        if not len(rows):
            return {name: _weighted(config, 0.0) for name, config in self.configs.items()}
        pools = self.pools.take(rows)
        terms = [pools.scores[BASE], *(self.term(name)[rows] for name in names)]
        deviations = [self._deviation(self.pools.scores[BASE]), *(self.deviation[name] for name in names)]
        features = torch.from_numpy(np.stack([t / d for t, d in zip(terms, deviations, strict=True)], 2))
        mask = torch.from_numpy(pools.items < 0)
        target = torch.from_numpy(pools.place)
        weights = torch.full((len(terms),), 0.1, requires_grad=True)
        optimiser = torch.optim.LBFGS([weights], max_iter=50, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimiser.zero_grad()
            logits = (features @ weights).masked_fill(mask, -torch.inf)
            loss = torch.nn.functional.cross_entropy(logits, target) + 1e-4 * weights.square().sum()
            loss.backward()
            return loss

        optimiser.step(closure)
        found = (weights.detach() / torch.tensor(deviations)).tolist()
        base = max(found[0], _LEAST_BASE / deviations[0])
        return {
            name: _weighted(config, weight / base)
            for (name, config), weight in zip(self.configs.items(), found[1:], strict=True)
        }


def _weighted(config: PriorConfig, weight: float) -> PriorConfig:
    return config.model_copy(update={"weight": weight})


def _rounded(config: PriorConfig) -> PriorConfig:
    return _weighted(config, float(f"{config.weight:.3g}"))


def with_scales(pools: Pools, configs: Mapping[str, PriorConfig]) -> dict[str, PriorConfig]:
    """Counts over what the best item of a history has on average, so that offsets mean the same everywhere."""
    found = dict(configs)
    for name, config in configs.items():
        if isinstance(config, ModelPrior) and config.transform == "log":
            best = np.where(pools.items >= 0, pools.scores[name], -np.inf).max(1)
            found[name] = config.model_copy(update={"scale": float(f"{max(best[best > -np.inf].mean(), 1e-9):.3g}")})
    return found

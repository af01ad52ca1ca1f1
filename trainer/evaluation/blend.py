"""Weights of priors, found on validation targets by a conditional logit.

Each target was one of the items of its pool, with probability softmax(Σ_j w_j · term_j); the weights make the targets
likeliest (L-BFGS; the likelihood is concave), and are given by that of the model's own score, which is 1 then. Fitted
on the earlier targets and tried on the later ones, this ranks better than weights that are moved to where NDCG@10 is
best: NDCG sees the few targets that are near the top only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from recommender.config import ModelPrior, PriorConfig
from recommender.errors import UserError
from recommender.metrics import metric_values
from recommender.priors import transformed
from trainer.evaluation.pools import BASE, Pools

_OFFSETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
_CURVE = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0)
_SHRINKAGE = 1e-4  # of the squared weights, in units of what each term varies by
LEAST = 0.01  # a weight, beside the model's own, in the same units: one below it does nothing


@dataclass(frozen=True)
class Blend:
    """A weighted sum.

    Attributes:
        configs: the priors with their weights and transforms.
        ndcg: NDCG@10 on the targets that it was fitted on.
        loss: mean −log-likelihood of the targets that are in their pools.
        base: the weight of the model's own score before it was made 1, in units of what the score varies by.
    """

    configs: dict[str, PriorConfig]
    ndcg: float
    loss: float
    base: float


class Weighing:
    """The sums that can be tried on some targets.

    Args:
        pools: of the targets.
        configs: the priors; transforms of models that give counts are found as well.
    """

    def __init__(self, pools: Pools, configs: Mapping[str, PriorConfig]):
        self.pools = pools
        self.configs = dict(configs)

    def term(self, name: str, config: PriorConfig | None = None) -> np.ndarray:
        """float32 [M, P], a prior without its weight."""
        config, scores = config or self.configs[name], self.pools.scores[name]
        return transformed(torch.from_numpy(scores), config).numpy() if isinstance(config, ModelPrior) else scores

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

    def fitted(self, importance: np.ndarray) -> Blend:
        """The weights under which the targets are likeliest.

        Args:
            importance: float [M], how much each target counts.

        Raises:
            UserError: no target is in its pool.
        """
        if not ((self.pools.place >= 0) & (importance > 0)).any():
            raise UserError(
                f"none of the {len(self.pools.place)} validation targets is in a list of the model or of a prior, so "
                "weights cannot be found; train the model further"
            )
        configs = self.configs
        best = self._likeliest(configs, importance)
        for name, config in self.configs.items():  # of counts, what an item without any counts as
            if isinstance(config, ModelPrior) and config.transform == "log" and "offset" not in config.model_fields_set:
                for offset in _OFFSETS:
                    tried = configs | {name: config.model_copy(update={"offset": offset})}
                    if (found := self._likeliest(tried, importance)).loss < best.loss:
                        configs, best = tried, found
        return best

    def curves(self, blend: Blend, segments: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """NDCG@10 of each segment (bool [M]) as one prior's weight alone changes: prior → weights, segment → values."""
        found = {}
        for name, config in blend.configs.items():
            weights = [config.weight * factor for factor in _CURVE]
            values = [self.values(blend.configs | {name: _weighted(config, weight)}) for weight in weights]
            lines = {label: [float(v[mask].mean()) for v in values] for label, mask in segments.items() if mask.any()}
            found[name] = {"weights": weights, "NDCG@10": lines}
        return found

    def _likeliest(self, configs: Mapping[str, PriorConfig], importance: np.ndarray) -> Blend:
        """Weights for priors with these transforms."""
        rows = np.flatnonzero((self.pools.place >= 0) & (importance > 0))
        pools, names = self.pools.take(rows), list(configs)
        terms = [pools.scores[BASE], *(self.term(name, configs[name])[rows] for name in names)]
        deviations = torch.tensor([max(float(each[pools.items >= 0].std()), 1e-6) for each in terms])
        features = torch.from_numpy(np.stack(terms, 2)) / deviations
        empty, target = torch.from_numpy(pools.items < 0), torch.from_numpy(pools.place)
        share = torch.from_numpy((importance[rows] / importance[rows].sum()).astype(np.float32))
        weights = torch.full((len(terms),), 0.1, requires_grad=True)
        optimiser = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            logits = (features @ weights).masked_fill(empty, -torch.inf)
            return (share * torch.nn.functional.cross_entropy(logits, target, reduction="none")).sum()

        def closure() -> torch.Tensor:
            optimiser.zero_grad()
            value = loss() + _SHRINKAGE * weights.square().sum()
            value.backward()
            return value

        optimiser.step(closure)
        found = weights.detach()
        base = max(float(found[0]), LEAST)
        shares = (found[1:] / base).tolist()
        kept = {
            name: _weighted(configs[name], float(f"{share * float(deviations[0] / of):.3g}"))
            for name, share, of in zip(names, shares, deviations[1:], strict=True)
            if abs(share) > LEAST
        }
        return Blend(kept, self.ndcg(kept), float(loss().detach()), float(found[0]))


def _weighted(config: PriorConfig, weight: float) -> PriorConfig:
    return config.model_copy(update={"weight": weight})


def with_scales(pools: Pools, configs: Mapping[str, PriorConfig]) -> dict[str, PriorConfig]:
    """Counts over what the best item of a history has on average, so that offsets mean the same everywhere."""
    found = dict(configs)
    for name, config in configs.items():
        if isinstance(config, ModelPrior) and config.transform == "log" and "scale" not in config.model_fields_set:
            best = np.where(pools.items >= 0, pools.scores[name], -np.inf).max(1)
            found[name] = config.model_copy(update={"scale": float(f"{max(best[best > -np.inf].mean(), 1e-9):.3g}")})
    return found

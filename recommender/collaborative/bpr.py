"""BPR."""

from __future__ import annotations

from torch import Tensor, nn

from recommender.collaborative.config import BPRConfig
from recommender.collaborative.history import running_mean
from recommender.collaborative.model import CausalModel


class BPR(CausalModel):
    """Matrix factorisation under Bayesian personalised ranking (Rendle et al., UAI 2009).

    The loss is the paper's, −log σ(score of the target − score of an item drawn uniformly), here its mean over
    `negatives` draws. The user's vector is not: a history must be scored without knowing whose it is, so it is the mean
    of the history's vectors in a second item table, as in FISM (Kabbur et al., KDD 2013). The order of a history does
    not matter.
    """

    def __init__(self, config: BPRConfig, items: int):
        super().__init__(config, items)
        self.taste = self.item_vectors(items)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.taste.weight, std=0.02)

    def states(self, items: Tensor) -> Tensor:
        return running_mean(self.dropout(self.taste(items)))

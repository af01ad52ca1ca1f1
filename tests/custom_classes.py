"""Classes as users write them, named by import path in experiments; most of them with a mistake."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from objectives.objective import Predictions, TokenObjective
from recommender.catalogue.catalogue import Catalogue
from recommender.config import PromptTemplate
from recommender.items.prompt import Wording


class Focal(TokenObjective):
    """(1 − p)^γ · −log p over the valid tokens."""

    valid_only = branching_only = True

    def __init__(self, gamma: float = 2.0):
        super().__init__()
        self.gamma = gamma

    def losses(self, predictions: Predictions) -> dict[str, Tensor]:
        loss = cross_entropy(predictions.logits, predictions.target, reduction="none")
        return {"loss": (1 - (-loss).exp()) ** self.gamma * loss, "log_p": -loss}


class Deep(Focal):
    layers = (9,)


class Summed(TokenObjective):
    def losses(self, predictions: Predictions) -> dict[str, Tensor]:
        return {"loss": predictions.logits.sum()}


class Still(TokenObjective):
    def losses(self, predictions: Predictions) -> dict[str, Tensor]:
        return {"loss": torch.zeros(len(predictions.target))}


class Silent(TokenObjective):
    def losses(self, predictions: Predictions) -> dict[str, Tensor]:
        return {"focal": predictions.logits[:, 0]}


class Branded(Wording):
    """Says each item's brand behind its title."""

    def __init__(self, opening: str = "Bought:"):
        self.opening = opening

    def texts(self, catalogue: Catalogue) -> PromptTemplate:
        return PromptTemplate(self.opening, "\n- ", "\nNext:\n- ")

    def about(self, catalogue: Catalogue, item: int) -> str:
        assert catalogue.columns is not None
        return f" by {catalogue.columns['brand'][item]}"

"""A floor that answers in place of a model which has no room or no time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recommender import golden
from recommender.bundle import FLOORS, kind_of
from recommender.catalogue.catalogue import Catalogue
from recommender.errors import UserError
from recommender.floors.recommender import FloorRecommender
from recommender.scored import ScoredRecommender


def load_floor(bundle: Path) -> FloorRecommender:
    """The ItemKNN or TF-IDF that `serving.fallback` names.

    Raises:
        UserError: it is something else, or damaged.
    """
    if (kind := kind_of(bundle)) not in FLOORS:
        raise UserError(
            f"serving.fallback: {bundle} holds {kind}, which takes time itself; name an itemknn or a tfidf, or give "
            "popular or none"
        )
    floor = FloorRecommender.load(bundle)
    golden.check(floor)
    return floor


class Substitute(ScoredRecommender):
    """A floor over the catalogue of another model. Items are the same by their ids; those it does not know score 0.

    Args:
        floor: answers.
        catalogue: of the model that it stands in for.
    """

    def __init__(self, floor: ScoredRecommender, catalogue: Catalogue):
        super().__init__(catalogue, floor.manifest)
        self._floor = floor
        known = {item_id: number for number, item_id in enumerate(floor.catalogue.item_ids)}
        self._numbers = np.array([known.get(item_id, -1) for item_id in catalogue.item_ids], np.int64)

    def scores(self, histories: Sequence[Sequence[int] | np.ndarray]) -> Tensor:
        theirs = [self._numbers[np.asarray(history, np.int64)] for history in histories]
        scores = self._floor.scores([history[history >= 0] for history in theirs])
        found: Tensor = torch.nn.functional.pad(scores, (0, 1))[:, self._numbers]  # −1 is the 0 at the end
        return found

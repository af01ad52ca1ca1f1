"""A recommender with what requests need around it."""

from __future__ import annotations

from copy import copy

from recommender.catalogue.catalogue import Catalogue
from recommender.catalogue.columns import columns_of
from recommender.catalogue.title_search import TitleSearch
from recommender.collaborative.popularity import MostPopular
from recommender.floors.recommender import FloorRecommender
from recommender.recommendation import AnyRecommender
from service.substitute import Substitute


class Served:
    """A recommender, indices of its catalogue, its fallback.

    Args:
        name: that requests call it by.
        recommender: has passed its self-check.
        fallback: whether the most popular items answer where there is no history, if the bundle knows them.
        floor: answers where the recommender has no room or no time.
    """

    def __init__(self, name: str, recommender: AnyRecommender, fallback: bool, floor: FloorRecommender | None = None):
        self.name = name
        self.recommender = recommender
        self.catalogue: Catalogue = recommender.catalogue
        self.columns = columns_of(self.catalogue)
        self.titles = TitleSearch(self.catalogue)
        self.popular = None
        if fallback and self.catalogue.popularity is not None:
            self.popular = MostPopular(self.catalogue.popularity)
        self._substitute = None if floor is None else Substitute(floor, self.catalogue)

    @property
    def substitute(self) -> Served | None:
        """The same with the floor as its recommender; None where there is none."""
        if self._substitute is None:
            return None
        other = copy(self)
        other.recommender = self._substitute
        return other

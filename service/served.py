"""A recommender with what requests need around it."""

from __future__ import annotations

from recommender.catalogue.catalogue import Catalogue
from recommender.catalogue.columns import columns_of
from recommender.catalogue.title_search import TitleSearch
from recommender.collaborative.popularity import MostPopular
from recommender.recommendation import AnyRecommender


class Served:
    """A recommender, indices of its catalogue, its fallback.

    Args:
        name: that requests call it by.
        recommender: has passed its self-check.
        fallback: whether the most popular items answer where there is no history, if the bundle knows them.
    """

    def __init__(self, name: str, recommender: AnyRecommender, fallback: bool):
        self.name = name
        self.recommender = recommender
        self.catalogue: Catalogue = recommender.catalogue
        self.columns = columns_of(self.catalogue)
        self.titles = TitleSearch(self.catalogue)
        self.popular = None
        if fallback and self.catalogue.popularity is not None:
            self.popular = MostPopular(self.catalogue.popularity)

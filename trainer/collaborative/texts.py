"""Text vectors of items, for collaborative models that learn from them."""

from __future__ import annotations

import numpy as np

from recommender.collaborative.config import ContentConfig
from recommender.floors.config import TfidfSettings
from recommender.floors.tfidf import Tfidf, texts_of
from trainer.data.dataset import Dataset


def text_vectors(config: ContentConfig, dataset: Dataset) -> np.ndarray:
    """TF-IDF of words, reduced by a truncated SVD: float32 [items, dimensions] of length 1; 0 for items without text.

    Raises:
        UserError: the items have no such column, or no text.
    """
    from sklearn.decomposition import TruncatedSVD  # takes a second, and few need it

    settings = TfidfSettings(columns=tuple(config.columns), terms="words", most_terms=50_000)
    terms = Tfidf.fit(settings, texts_of(dataset.items_table, config.columns)).vectors
    width = min(config.dimensions, min(terms.shape) - 1)
    reduced = TruncatedSVD(width, random_state=0).fit_transform(terms)
    vectors = np.zeros((terms.shape[0], config.dimensions), np.float32)
    vectors[:, :width] = reduced / np.maximum(np.linalg.norm(reduced, axis=1, keepdims=True), 1e-9)
    return vectors

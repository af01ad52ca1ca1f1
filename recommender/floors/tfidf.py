"""Cosine of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from scipy.sparse import csr_matrix, vstack

from recommender.catalogue.catalogue import normalise_title
from recommender.errors import UserError
from recommender.floors.config import Terms, TfidfSettings
from recommender.floors.model import Floor, matrix_of, parts_of

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

_ROWS = 128  # histories scored at once: as many dense columns over all terms
_WORD = r"\w+"  # one character is enough: "Part 2" is not "Part 3"
_ANALYSIS: dict[Terms, dict[str, Any]] = {
    "words": {"analyzer": "word", "ngram_range": (1, 1), "token_pattern": _WORD},
    "word_pairs": {"analyzer": "word", "ngram_range": (1, 2), "token_pattern": _WORD},
    "characters": {"analyzer": "char_wb", "ngram_range": (2, 4)},
}


class Tfidf(Floor):
    """Scores an item by the cosine between its text and those of a history.

    An item's vector x_j is scikit-learn's TF-IDF, (1 + ln tf) · (ln((1 + n) / (1 + df)) + 1), with length 1; that of a
    history is p = Σ_i w_i x_i over its items with their weights. The score of j is x_j · p / |p|, from 0 to 1; 0 for
    all items where no item of the history has text. It asks for no interactions: items that nobody has bought have
    scores too.

    Args:
        settings: what the vectors were made with.
        vectors: float32 [items, terms]; x.
        terms: of each column.
        idf: float32 [terms].
    """

    def __init__(self, settings: TfidfSettings, vectors: csr_matrix, terms: Sequence[str], idf: np.ndarray):
        self.settings: TfidfSettings = settings
        self.vectors = vectors
        self.terms = list(terms)
        self.idf = idf

    @classmethod
    def fit(cls, settings: TfidfSettings, texts: Sequence[str]) -> Tfidf:
        """Read the items' texts.

        Raises:
            UserError: none of them holds a term.
        """
        vectorizer = _vectorizer(settings)
        try:
            vectors = vectorizer.fit_transform(texts)
        except ValueError as error:  # an empty vocabulary
            columns = ", ".join(settings.columns)
            raise UserError(
                f"recommender.columns: none of the {len(texts)} items has text in {columns}, and a TF-IDF reads "
                "nothing else; name columns of the items file that hold text, or choose itemknn"
            ) from error
        return cls(settings, _sorted(vectors), vectorizer.get_feature_names_out().tolist(), vectorizer.idf_)

    @property
    def items(self) -> int:
        return int(self.vectors.shape[0])

    def encode(self, texts: Sequence[str]) -> csr_matrix:
        """Vectors of further texts: float32 [texts, terms]; terms that no item has do not count."""
        vectorizer = _vectorizer(self.settings, self.terms)
        vectorizer.idf_ = self.idf
        return _sorted(vectorizer.transform(texts))

    def extended(self, texts: Sequence[str]) -> Tfidf:
        """With further items, of these texts, behind its own; terms and their weights stay."""
        vectors = _sorted(vstack([self.vectors, self.encode(texts)]))
        return Tfidf(self.settings, vectors, self.terms, self.idf)

    def scores(self, histories: csr_matrix) -> np.ndarray:
        parts = [self._scores(histories[begin : begin + _ROWS]) for begin in range(0, histories.shape[0], _ROWS)]
        return np.concatenate([np.zeros((0, histories.shape[1]), np.float32), *parts])

    def _scores(self, histories: csr_matrix) -> np.ndarray:
        # Texts share terms with so many others that dense columns are faster than a product of sparse matrices.
        profiles = (histories @ self.vectors).T.toarray()
        length = np.sqrt((profiles * profiles).sum(0))
        found: np.ndarray = self.vectors @ (profiles / np.where(length > 0, length, 1))
        return np.ascontiguousarray(found.T)

    def tensors(self) -> dict[str, np.ndarray]:
        return parts_of(self.vectors, "vectors") | {"idf": self.idf}

    @classmethod
    def of(cls, settings: TfidfSettings, tensors: Mapping[str, np.ndarray], terms: Sequence[str]) -> Tfidf:
        """What `tensors` gave, read back."""
        return cls(settings, matrix_of(tensors, "vectors", len(terms)), terms, tensors["idf"])


def texts_of(items: pa.Table, columns: Sequence[str]) -> list[str]:
    """The texts of items: their values in some columns, one after the other; lists are opened.

    Raises:
        UserError: there is no such column.
    """
    for name in columns:
        if name not in items.column_names:
            known = ", ".join(items.column_names)
            raise UserError(f"recommender.columns: the items have no column {name!r}; there are: {known}")
    rows = zip(*(items[name].to_pylist() for name in columns), strict=True)
    return [normalise_title(" ".join(_text(value) for value in row)) for row in rows]


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value))
    return "" if value is None else str(value)


def _vectorizer(settings: TfidfSettings, vocabulary: Sequence[str] | None = None) -> TfidfVectorizer:
    from sklearn.feature_extraction.text import TfidfVectorizer  # takes a second, and only fitting needs it

    return TfidfVectorizer(
        **_ANALYSIS[settings.terms],
        sublinear_tf=True,
        max_features=settings.most_terms if vocabulary is None else None,
        vocabulary=vocabulary,
        dtype=np.float32,
    )


def _sorted(vectors: Any) -> csr_matrix:
    """As scipy's plain matrix, columns rising within a row."""
    found = csr_matrix(vectors)
    found.sort_indices()
    return found

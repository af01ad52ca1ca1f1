"""What the floors share: a history becomes a sparse row of weights over items, and that a row of scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.sparse import csr_matrix

from recommender.floors.config import ItemKNNSettings, TfidfSettings


class Floor(ABC):
    """A recommender without training.

    Attributes:
        settings: what it was made with.
    """

    settings: ItemKNNSettings | TfidfSettings

    @property
    @abstractmethod
    def items(self) -> int:
        """How many it knows."""

    @abstractmethod
    def scores(self, histories: csr_matrix) -> np.ndarray:
        """Scores of all items, float32 [B, items], from histories as weights, float32 [B, items]."""

    @abstractmethod
    def tensors(self) -> dict[str, np.ndarray]:
        """What is saved of it, by name."""


def weighted(histories: Sequence[np.ndarray], decay: float, items: int) -> csr_matrix:
    """Histories as weights of items: float32 [histories, items].

    The last item weighs 1, the one before it `decay`, then decay², …; an item that comes again adds up.

    Example:
        >>> weighted([np.array([2, 0, 2])], 0.5, items=4).toarray().tolist()
        [[0.5, 0.0, 1.25, 0.0]]
    """
    lengths = np.array([len(history) for history in histories], np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    age = np.repeat(starts[1:], lengths) - 1 - np.arange(starts[-1])
    columns = np.concatenate([*histories, np.zeros(0, np.int64)]).astype(np.int64)
    found = csr_matrix((np.float32(decay) ** age, columns, starts), shape=(len(histories), items), dtype=np.float32)
    found.sum_duplicates()
    return found


def parts_of(matrix: csr_matrix, name: str) -> dict[str, np.ndarray]:
    """The arrays of a sparse matrix by name, as `matrix_of` reads them."""
    return {f"{name}.{part}": getattr(matrix, part) for part in ("data", "indices", "indptr")}


def matrix_of(tensors: Mapping[str, np.ndarray], name: str, columns: int) -> csr_matrix:
    """The sparse matrix whose arrays `parts_of` gave.

    Raises:
        KeyError: they are not there.
        ValueError: they do not fit together.
    """
    data, indices, indptr = (tensors[f"{name}.{part}"] for part in ("data", "indices", "indptr"))
    matrix = csr_matrix((data, indices, indptr), shape=(len(indptr) - 1, columns))
    matrix.check_format(full_check=True)
    return matrix

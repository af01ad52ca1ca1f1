"""Item-to-item counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from scipy.sparse import coo_matrix, csr_matrix, vstack

from recommender.floors.config import ItemKNNSettings
from recommender.floors.model import Floor, matrix_of, parts_of

PAIRS = 1 << 22  # counted at once, some 100 MB
_POPULAR = 1e-9  # what popularity adds to a score: it decides where no count does


class ItemKNN(Floor):
    """Scores an item by how often it stood near the items of a history in the training sequences.

    Every pair of places of a sequence that are d ≤ window apart counts 1/d for (earlier item, later item) and
    backward/d for the reverse; c_ij is the sum over all sequences, n_i how often i occurs. An item's similarity to
    item i of a history is

        s_ij = c_ij / (norm_ij + shrinkage),   norm_ij = √(n_i n_j), n_i + n_j − c_ij, or n_i

    for `cosine`, `jaccard` and `conditional`; each i keeps its `neighbours` largest. (Sarwar et al., WWW 2001, and
    Deshpande and Karypis, TOIS 2004, count whole baskets: window = ∞, without 1/d and both ways alike.)

    The score of j is Σ_i w_i s_ij over the items of the history with their weights, plus 1e-9 times j's share of the
    training interactions: what no count speaks for comes in the order of popularity.

    Args:
        settings: as above.
        similar: float32 [items, items]; s, sorted by column within a row.
        counts: int64 [items]; n.
    """

    def __init__(self, settings: ItemKNNSettings, similar: csr_matrix, counts: np.ndarray):
        self.settings: ItemKNNSettings = settings
        self.similar = similar
        self.counts = counts
        self._popular = (_POPULAR * counts / max(counts.sum(), 1)).astype(np.float32)

    @classmethod
    def fit(cls, settings: ItemKNNSettings, sequence: np.ndarray, items: np.ndarray, catalogue: int) -> ItemKNN:
        """Count.

        Args:
            sequence: int [N], rising; whose each interaction is.
            items: int [N]; its item, oldest first within a sequence.
            catalogue: number of items.
        """
        counts = np.bincount(items, minlength=catalogue)
        rows = [
            _largest(_similarities(first, counted, counts, settings), settings.neighbours)
            for first, counted in _co_occurrences(sequence, items, counts, settings)
        ]
        similar = vstack(rows, format="csr", dtype=np.float32)
        return cls(settings, similar, counts.astype(np.int64))

    @property
    def items(self) -> int:
        return len(self.counts)

    def scores(self, histories: csr_matrix) -> np.ndarray:
        found: np.ndarray = (histories @ self.similar).toarray()
        return found + self._popular

    def tensors(self) -> dict[str, np.ndarray]:
        return parts_of(self.similar, "similar") | {"counts": self.counts}

    @classmethod
    def of(cls, settings: ItemKNNSettings, tensors: Mapping[str, np.ndarray]) -> ItemKNN:
        """What `tensors` gave, read back."""
        counts = tensors["counts"]
        return cls(settings, matrix_of(tensors, "similar", len(counts)), counts)


def _co_occurrences(
    sequence: np.ndarray, items: np.ndarray, counts: np.ndarray, settings: ItemKNNSettings
) -> Iterator[tuple[int, csr_matrix]]:
    """c, a block of rows at a time, so that memory does not grow with the catalogue: its first row, [rows, items]."""
    places = np.argsort(items, kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts)])
    steps = [(step, 1 / step) for step in range(1, settings.window + 1)]
    steps += [(-step, weight * settings.backward) for step, weight in steps if settings.backward]
    most = max(1, PAIRS // len(steps))
    first = 0
    while first < len(counts):
        end = max(first + 1, int(np.searchsorted(starts, starts[first] + most, side="right")) - 1)
        block = csr_matrix((end - first, len(counts)), dtype=np.float64)
        for begin in range(starts[first], starts[end], most):  # once, but for an item that fills a block by itself
            at = places[begin : min(begin + most, starts[end])]
            block += _pairs(sequence, items, at, steps, first, block.shape)
        yield first, block
        first = end


def _pairs(
    sequence: np.ndarray,
    items: np.ndarray,
    at: np.ndarray,
    steps: list[tuple[int, float]],
    first: int,
    shape: tuple[int, int],
) -> csr_matrix:
    """The weights of the pairs that places `at` make with those some steps away, summed."""
    rows, columns, weights = [], [], []
    for step, weight in steps:
        inside = at[(at + step >= 0) & (at + step < len(items))]
        own = inside[sequence[inside] == sequence[inside + step]]
        rows.append(items[own] - first)
        columns.append(items[own + step])
        weights.append(np.full(len(own), weight))
    found = coo_matrix((np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns))), shape=shape)
    return found.tocsr()


def _similarities(first: int, counted: csr_matrix, counts: np.ndarray, settings: ItemKNNSettings) -> coo_matrix:
    """s of a block of rows, without the items themselves."""
    found = counted.tocoo()
    other = found.row + first != found.col
    row, column, count = found.row[other], found.col[other], found.data[other]
    mine, theirs = counts[row + first].astype(float), counts[column].astype(float)
    if settings.normalisation == "cosine":
        norm = np.sqrt(mine * theirs)
    elif settings.normalisation == "jaccard":
        norm = np.maximum(mine + theirs - count, count)  # an item that comes again may count more often than it occurs
    else:
        norm = mine
    return coo_matrix((count / (norm + settings.shrinkage), (row, column)), shape=found.shape)


def _largest(block: coo_matrix, most: int) -> csr_matrix:
    """The largest values of each row, of equal ones those of lower columns; columns rise."""
    order = np.lexsort((block.col, -block.data, block.row))
    row = block.row[order]
    place = np.arange(len(row)) - np.searchsorted(row, row)
    kept = order[place < most]
    found = csr_matrix((block.data[kept].astype(np.float32), (block.row[kept], block.col[kept])), shape=block.shape)
    found.sort_indices()
    return found

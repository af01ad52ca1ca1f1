"""A recommender that scores every item, so that its top-K needs no search."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from recommender.bundle import Manifest, write_bundle
from recommender.catalogue.catalogue import Catalogue
from recommender.config import PriorConfig, SearchConfig
from recommender.golden import record
from recommender.recommendation import Recommendation, Spelling, allowed_items


class Terms(Protocol):
    """What is added to scores, see `recommender/priors.py`."""

    def of(
        self, histories: Sequence[Sequence[int] | np.ndarray], configs: Mapping[str, PriorConfig] | None
    ) -> Tensor | None:
        """The weighted sum of the terms, float32 [histories, items]; None where there are none."""
        ...

    def each(
        self, history: Sequence[int], items: Sequence[int], configs: Mapping[str, PriorConfig] | None
    ) -> list[Spelling]:
        """Of each item the names of the terms and what they add."""
        ...

    def save(self, directory: Path) -> None: ...


class ScoredRecommender(ABC):
    """What a collaborative model and the floors share: the top-K of a row of scores, filters, given candidates.

    Args:
        catalogue: the items, in the order of the scores.
        manifest: name, metrics.

    Attributes:
        priors: what is added to the scores, if anything.
    """

    priors: Terms | None = None

    def __init__(self, catalogue: Catalogue, manifest: Manifest):
        self.catalogue = catalogue
        self.manifest = manifest

    @property
    def items(self) -> int:
        """How many have scores: all, but for a model that was trained before some were added."""
        return len(self.catalogue)

    def save_model(self, directory: Path) -> None:
        """Write what a bundle of it holds beside the catalogue and the manifest."""
        raise NotImplementedError(f"{type(self).__name__} has no bundle")

    def save(self, directory: str | Path) -> None:
        """Write the bundle; complete or absent."""

        def write_files(aside: Path) -> None:
            self.catalogue.save(aside)
            self.save_model(aside)
            if self.priors is not None:
                self.priors.save(aside)

        write_bundle(Path(directory), self.manifest.model_copy(update={"golden": record(self)}), write_files)

    @abstractmethod
    def scores(self, histories: Sequence[Sequence[int] | np.ndarray]) -> Tensor:
        """Scores of all items: float32 [histories, items]; the higher the better.

        Args:
            histories: item indices, oldest first, of any length, 0 included.
        """

    @torch.inference_mode()
    def recommend(
        self,
        histories: Sequence[Sequence[int] | np.ndarray],
        k: int | Sequence[int] = 10,
        exclude: Sequence[Collection[int]] | None = None,
        allow: Sequence[Collection[int] | None] | None = None,
        search: SearchConfig | None = None,
    ) -> list[Recommendation]:
        """The top-K items for each history; filters never change a score.

        Args:
            histories: item indices, oldest first.
            k: how many items, for all or for each.
            exclude: items that may not be recommended, for each history.
            allow: if not None, the only items that may be, for each history.
            search: whose priors are added in place of its own; the rest is of no effect: every item is scored.
        """
        scores = self._added(histories, search)
        allowed = allowed_items(len(histories), len(self.catalogue), exclude, allow)
        if allowed is not None:
            scores = scores.masked_fill(~allowed.to(scores.device), -torch.inf)
        wanted = [k] * len(histories) if isinstance(k, int) else list(k)
        return [_best(row, wanted[number]) for number, row in enumerate(scores)]

    @torch.inference_mode()
    def rank(
        self,
        histories: Sequence[Sequence[int] | np.ndarray],
        candidates: Sequence[Sequence[int]],
        search: SearchConfig | None = None,
    ) -> list[list[float]]:
        """The scores of given candidates, as `recommend` would give them.

        Args:
            histories: as in `recommend`.
            candidates: item indices, for each history.
            search: whose priors are added in place of its own.
        """
        found = self._added(histories, search)
        return [row[list(items)].tolist() for row, items in zip(found, candidates, strict=True)]

    def _added(self, histories: Sequence[Sequence[int] | np.ndarray], search: SearchConfig | None) -> Tensor:
        scores = self.scores(histories)
        added = None if self.priors is None else self.priors.of(histories, self.manifest.searched(search).priors)
        return scores if added is None else scores + added.to(scores.device)

    def spellings(self, history: Sequence[int], items: Sequence[int], search: SearchConfig | None = None) -> None:
        """Nothing: items are not spelled in tokens."""
        return

    def tokens(
        self, history: Sequence[int], candidates: Sequence[int] | None = None, search: SearchConfig | None = None
    ) -> int:
        """Items of the history that are read. Candidates and searches take nothing: every item is scored anyway."""
        return len(history)


def _best(scores: Tensor, k: int) -> Recommendation:
    """The k best finite scores [items]; of equal ones the lower index comes first, which `topk` does not promise."""
    smallest = scores.topk(min(k, len(scores))).values[-1]
    found = ((scores >= smallest) & scores.isfinite()).nonzero().flatten()
    order = scores[found].sort(descending=True, stable=True).indices[:k]
    items = found[order]
    return Recommendation(items.tolist(), scores[items].tolist(), exact=True, expansions=0)

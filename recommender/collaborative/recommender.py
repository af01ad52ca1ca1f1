"""A recommender whose model is collaborative: every item is scored, so its top-K needs no search."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from recommender.bundle import LANGUAGE_MODEL, Manifest, read_manifest, write_bundle
from recommender.catalogue.catalogue import Catalogue
from recommender.collaborative.bert4rec import BERT4Rec
from recommender.collaborative.bpr import BPR
from recommender.collaborative.caser import Caser
from recommender.collaborative.config import (
    BERT4RecConfig,
    CaserConfig,
    CollaborativeConfig,
    GRU4RecConfig,
    SASRecConfig,
)
from recommender.collaborative.gru4rec import GRU4Rec
from recommender.collaborative.model import CollaborativeModel
from recommender.collaborative.sasrec import SASRec
from recommender.config import Score, SearchConfig
from recommender.errors import UserError
from recommender.golden import record
from recommender.recommendation import Recommendation, allowed_items

_CONFIG: TypeAdapter[CollaborativeConfig] = TypeAdapter(CollaborativeConfig)
CONFIG = "collaborative.json"
WEIGHTS = "model.safetensors"


def build_model(config: CollaborativeConfig, items: int) -> CollaborativeModel:
    """A model with fresh weights, drawn from torch's global generator, over a catalogue of `items`."""
    if isinstance(config, SASRecConfig):
        return SASRec(config, items)
    if isinstance(config, GRU4RecConfig):
        return GRU4Rec(config, items)
    if isinstance(config, BERT4RecConfig):
        return BERT4Rec(config, items)
    if isinstance(config, CaserConfig):
        return Caser(config, items)
    return BPR(config, items)


def load_model(bundle: str | Path, device: str | torch.device = "cpu") -> CollaborativeModel:
    """The model of a bundle in eval mode; its items are those of `Catalogue.load(bundle).item_ids`, in that order.

    Raises:
        UserError: missing, damaged, of another version, or the bundle of a language model.
    """
    return CollaborativeRecommender.load(bundle, device).model


class CollaborativeRecommender:
    """What is served, with a collaborative model behind it.

    Args:
        catalogue: the items, in the order of the model's table.
        model: trained.
        manifest: name, metrics.
    """

    def __init__(self, catalogue: Catalogue, model: CollaborativeModel, manifest: Manifest):
        self.catalogue = catalogue
        self.model = model.eval()
        self.manifest = manifest

    @classmethod
    def load(cls, bundle: str | Path, device: str | torch.device = "cpu") -> CollaborativeRecommender:
        """Open a bundle.

        Raises:
            UserError: missing, damaged, of another version, or the bundle of a language model.
        """
        directory = Path(bundle).expanduser()
        manifest = read_manifest(directory)
        if manifest.kind == LANGUAGE_MODEL:
            raise UserError(
                f"{directory}: holds a language model, and a collaborative one is needed here; train one with "
                "ilrec train … --set recommender.kind=sasrec --set name=…"
            )
        catalogue = Catalogue.load(directory)
        try:
            config = _CONFIG.validate_json((directory / CONFIG).read_text())
            model = build_model(config, len(catalogue))
            model.load_state_dict(load_file(directory / WEIGHTS))
        except (OSError, ValidationError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"{directory}: its model cannot be read: {error}; copy or train the bundle again"
            ) from error
        return cls(catalogue, model.to(device), manifest)

    def save(self, directory: str | Path) -> None:
        """Write the bundle; complete or absent."""

        def write_files(aside: Path) -> None:
            self.catalogue.save(aside)
            (aside / CONFIG).write_text(self.model.config.model_dump_json(indent=2))
            save_file(self.model.state_dict(), aside / WEIGHTS)

        write_bundle(Path(directory), self.manifest.model_copy(update={"golden": record(self)}), write_files)

    @torch.inference_mode()
    def recommend(
        self,
        histories: Sequence[Sequence[int] | np.ndarray],
        k: int | Sequence[int] = 10,
        exclude: Sequence[Collection[int]] | None = None,
        allow: Sequence[Collection[int] | None] | None = None,
        search: SearchConfig | None = None,
    ) -> list[Recommendation]:
        """The top-K items for each history, by log-probability over all items; filters never change a score.

        Args:
            histories: item indices, oldest first; the last `max_length` of them are read.
            k: how many items, for all or for each.
            exclude: items that may not be recommended, for each history.
            allow: if not None, the only items that may be, for each history.
            search: of no effect: every item is scored.
        """
        scores = self._scores(histories)
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
        score: Score | None = None,
    ) -> list[list[float]]:
        """The scores of given candidates, as `recommend` would give them.

        Args:
            histories: as in `recommend`.
            candidates: item indices, for each history.
            score: of no effect: there is one.
        """
        return [row[list(items)].tolist() for row, items in zip(self._scores(histories), candidates, strict=True)]

    def spellings(self, history: Sequence[int], items: Sequence[int], score: Score | None = None) -> None:
        """Nothing: items are not spelled in tokens."""
        return

    def tokens(
        self, history: Sequence[int], candidates: Sequence[int] | None = None, search: SearchConfig | None = None
    ) -> int:
        """Items of the history that are read. Candidates and searches take nothing: every item is scored anyway."""
        return min(len(history), self.model.config.max_length)

    def _scores(self, histories: Sequence[Sequence[int] | np.ndarray]) -> Tensor:
        """Log-probabilities [histories, items]."""
        embedded = self.model.embed([np.asarray(history, np.int64) for history in histories])
        return self.model.scores(embedded).log_softmax(1)


def _best(scores: Tensor, k: int) -> Recommendation:
    """The k best finite scores [items]; of equal ones the lower index comes first, which `topk` does not promise."""
    smallest = scores.topk(min(k, len(scores))).values[-1]
    found = ((scores >= smallest) & scores.isfinite()).nonzero().flatten()
    order = scores[found].sort(descending=True, stable=True).indices[:k]
    items = found[order]
    return Recommendation(items.tolist(), scores[items].tolist(), exact=True, expansions=0)

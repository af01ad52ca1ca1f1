"""A recommender whose model is collaborative."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from recommender.bundle import FLOORS, LANGUAGE_MODEL, Manifest, read_manifest
from recommender.catalogue.catalogue import Catalogue
from recommender.collaborative.bert4rec import BERT4Rec
from recommender.collaborative.bpr import BPR
from recommender.collaborative.caser import Caser
from recommender.collaborative.config import (
    BERT4RecConfig,
    CaserConfig,
    CollaborativeConfig,
    ESASRecConfig,
    GRU4RecConfig,
    SASRecConfig,
)
from recommender.collaborative.esasrec import ESASRec
from recommender.collaborative.gru4rec import GRU4Rec
from recommender.collaborative.model import CollaborativeModel
from recommender.collaborative.sasrec import SASRec
from recommender.config import SearchConfig
from recommender.errors import UserError
from recommender.scored import ScoredRecommender

_CONFIG: TypeAdapter[CollaborativeConfig] = TypeAdapter(CollaborativeConfig)
CONFIG = "collaborative.json"
WEIGHTS = "model.safetensors"


def build_model(config: CollaborativeConfig, items: int) -> CollaborativeModel:
    """A model with fresh weights, drawn from torch's global generator, over a catalogue of `items`."""
    if isinstance(config, SASRecConfig):
        return SASRec(config, items)
    if isinstance(config, ESASRecConfig):
        return ESASRec(config, items)
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
        UserError: missing, damaged, of another version, or the bundle of something else.
    """
    return CollaborativeRecommender.load(bundle, device).model


class CollaborativeRecommender(ScoredRecommender):
    """What is served, with a collaborative model behind it.

    Args:
        catalogue: the items, in the order of the model's table.
        model: trained.
        manifest: name, metrics.
    """

    def __init__(self, catalogue: Catalogue, model: CollaborativeModel, manifest: Manifest):
        super().__init__(catalogue, manifest)
        self.model = model.eval()

    @classmethod
    def load(cls, bundle: str | Path, device: str | torch.device = "cpu") -> CollaborativeRecommender:
        """Open a bundle.

        Raises:
            UserError: missing, damaged, of another version, or the bundle of something else.
        """
        directory = Path(bundle).expanduser()
        manifest = read_manifest(directory)
        if manifest.kind in (LANGUAGE_MODEL, *FLOORS):
            held = "a language model" if manifest.kind == LANGUAGE_MODEL else manifest.kind
            raise UserError(
                f"{directory}: holds {held}, and a collaborative one is needed here; train one with "
                "ilrec train … --set recommender.kind=sasrec --set name=…"
            )
        return cls.around(directory, Catalogue.load(directory), manifest, device)

    @classmethod
    def around(
        cls, directory: Path, catalogue: Catalogue, manifest: Manifest, device: str | torch.device = "cpu"
    ) -> CollaborativeRecommender:
        """With the model that `save_model` wrote.

        Raises:
            UserError: it cannot be read.
        """
        try:
            config = _CONFIG.validate_json((directory / CONFIG).read_text())
            weights = load_file(directory / WEIGHTS)
            model = build_model(config, len(weights["bias"]))
            model.load_state_dict(weights)
        except (OSError, KeyError, ValidationError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"{directory}: its model cannot be read: {error}; copy or train the bundle again"
            ) from error
        return cls(catalogue, model.to(device), manifest)

    @property
    def items(self) -> int:
        return self.model.items

    def save_model(self, directory: Path) -> None:
        (directory / CONFIG).write_text(self.model.config.model_dump_json(indent=2))
        save_file(self.model.state_dict(), directory / WEIGHTS)

    @torch.inference_mode()
    def scores(self, histories: Sequence[Sequence[int] | np.ndarray]) -> Tensor:
        """Log-probabilities over all items: [histories, items]; the last `max_length` items of a history are read."""
        embedded = self.model.embed([np.asarray(history, np.int64) for history in histories])
        return self.model.scores(embedded).log_softmax(1)

    def tokens(
        self, history: Sequence[int], candidates: Sequence[int] | None = None, search: SearchConfig | None = None
    ) -> int:
        return min(len(history), self.model.config.max_length)

"""A floor as a recommender: catalogue, model, how fast a history fades."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from recommender.bundle import Manifest, read_manifest
from recommender.catalogue.catalogue import Catalogue
from recommender.config import StrictModel
from recommender.errors import UserError
from recommender.floors.config import FloorSettings, ItemKNNSettings
from recommender.floors.itemknn import ItemKNN
from recommender.floors.model import Floor, weighted
from recommender.floors.tfidf import Tfidf, texts_of
from recommender.scored import ScoredRecommender

SETTINGS = "floor.json"
TENSORS = "model.safetensors"
TERMS = "terms.json"


class _Saved(StrictModel):
    """What floor.json holds."""

    decay: float
    model: FloorSettings


class FloorRecommender(ScoredRecommender):
    """An ItemKNN or a TF-IDF. Scores are the model's own, no log-probabilities: see there.

    Args:
        catalogue: the items, in the order of the model's.
        model: fitted.
        decay: weight of an item of the history, by the one after it.
        manifest: name, metrics.
    """

    def __init__(self, catalogue: Catalogue, model: Floor, decay: float, manifest: Manifest):
        super().__init__(catalogue, manifest)
        self.model = model
        self.decay = decay

    @classmethod
    def load(cls, bundle: str | Path) -> FloorRecommender:
        """Open a bundle.

        Raises:
            UserError: missing, damaged, of another version.
        """
        directory = Path(bundle).expanduser()
        manifest = read_manifest(directory)
        return cls.around(directory, Catalogue.load(directory), manifest)

    @classmethod
    def around(cls, directory: Path, catalogue: Catalogue, manifest: Manifest) -> FloorRecommender:
        """With the model that `save_model` wrote.

        Raises:
            UserError: it cannot be read.
        """
        try:
            saved = TypeAdapter(_Saved).validate_json((directory / SETTINGS).read_text())
            tensors = load_file(directory / TENSORS)
            if isinstance(saved.model, ItemKNNSettings):
                return cls(catalogue, ItemKNN.of(saved.model, tensors), saved.decay, manifest)
            terms = json.loads((directory / TERMS).read_text())
            return cls(catalogue, Tfidf.of(saved.model, tensors, terms), saved.decay, manifest)
        except (OSError, ValueError, KeyError, ValidationError, SafetensorError) as error:
            raise UserError(
                f"{directory}: its model cannot be read: {error}; copy the bundle again, or fit it again"
            ) from error

    @property
    def items(self) -> int:
        return self.model.items

    def save_model(self, directory: Path) -> None:
        saved = _Saved(decay=self.decay, model=self.model.settings)
        (directory / SETTINGS).write_text(saved.model_dump_json(indent=2))
        save_file(self.model.tensors(), directory / TENSORS)
        if isinstance(self.model, Tfidf):
            (directory / TERMS).write_text(json.dumps(self.model.terms, ensure_ascii=False))

    def extended(self, catalogue: Catalogue, further: Catalogue) -> FloorRecommender:
        """A TF-IDF reads the texts of further items as well; counts know nothing of them, and stay as they are."""
        if not isinstance(self.model, Tfidf):
            return self
        texts: dict[str, Any] = {name: pa.nulls(len(further), pa.string()) for name in self.model.settings.columns}
        if further.columns is not None:
            texts |= {name: further.columns[name] for name in texts if name in further.columns.column_names}
        table = pa.table(texts | {"title": further.titles})
        model = self.model.extended(texts_of(table, self.model.settings.columns))
        return FloorRecommender(catalogue, model, self.decay, self.manifest)

    def scores(self, histories: Sequence[Sequence[int] | np.ndarray]) -> Tensor:
        rows = [np.asarray(history, np.int64) for history in histories]
        return torch.from_numpy(self.model.scores(weighted(rows, self.decay, self.items)))

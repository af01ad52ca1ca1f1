"""Terms of items that are added to a recommender's scores: s(i) = log p(i | history) + Σ_j w_j · prior_j(i).

    priors/<name>/            in a bundle: the model of a `model` prior, as its own bundle has it
    priors/vectors.safetensors    what was computed once: log p(i | no history)

The rest is in the catalogue: popularity, columns. See `recommender/search/bounds.py` for how a search stays exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from recommender.bundle import Manifest
from recommender.catalogue.catalogue import Catalogue
from recommender.collaborative.recommender import CollaborativeRecommender
from recommender.config import (
    ColumnPrior,
    ModelPrior,
    PopularityPrior,
    PriorConfig,
    SearchConfig,
    UnconditionalPrior,
)
from recommender.errors import UserError
from recommender.floors.recommender import SETTINGS, FloorRecommender
from recommender.recommendation import AnyRecommender, Spelling
from recommender.scored import ScoredRecommender

DIRECTORY = "priors"
VECTORS = "vectors.safetensors"
UNCONDITIONAL = "unconditional"

Configs = Mapping[str, PriorConfig]


class Priors:
    """The priors of a recommender.

    Args:
        catalogue: the recommender's.
        configs: its own priors, by name.
        models: of each `model` prior, over all items or, where some were added since, the first of them.
        unconditional: float32 [items], log p(i | no history), where a prior asks for it.

    Raises:
        UserError: a prior lacks what it is computed from, or that is not finite; names the field.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        configs: Configs | None = None,
        models: Mapping[str, ScoredRecommender] | None = None,
        unconditional: Tensor | None = None,
    ):
        self.catalogue = catalogue
        self.configs = dict(configs or {})
        self.models = dict(models or {})
        self.unconditional = unconditional
        self._kept: dict[str, Tensor] = {}
        for name, config in self.configs.items():
            if not isinstance(config, ModelPrior):
                self._check(name, config)

    @classmethod
    def load(cls, bundle: Path, catalogue: Catalogue, configs: Configs | None, device: str = "cpu") -> Priors:
        """Those of a bundle.

        Raises:
            UserError: their files cannot be read.
        """
        models: dict[str, ScoredRecommender] = {}
        for name, config in (configs or {}).items():
            if isinstance(config, ModelPrior):
                directory, manifest = bundle / DIRECTORY / name, Manifest(name=name)
                if (directory / SETTINGS).exists():
                    models[name] = FloorRecommender.around(directory, catalogue, manifest)
                else:
                    models[name] = CollaborativeRecommender.around(directory, catalogue, manifest, device)
        unconditional = None
        if any(isinstance(config, UnconditionalPrior) for config in (configs or {}).values()):
            try:
                unconditional = load_file(bundle / DIRECTORY / VECTORS)[UNCONDITIONAL]
            except (OSError, KeyError, SafetensorError) as error:
                raise UserError(f"{bundle / DIRECTORY / VECTORS}: cannot be read: {error}; copy it again") from error
        return cls(catalogue, configs, models, unconditional)

    def save(self, directory: Path) -> None:
        """Write what they are computed from into a bundle."""
        for name, model in self.models.items():
            (directory / DIRECTORY / name).mkdir(parents=True)
            model.save_model(directory / DIRECTORY / name)
        if self.unconditional is not None:
            (directory / DIRECTORY).mkdir(exist_ok=True)
            save_file({UNCONDITIONAL: self.unconditional.contiguous()}, directory / DIRECTORY / VECTORS)

    def extended(self, catalogue: Catalogue, further: Catalogue, unconditional: Tensor | None) -> Priors:
        """Over a catalogue with `further` items behind its own; what reads texts reads theirs.

        Args:
            unconditional: float32 [items], of all of them.
        """
        models = {
            name: model.extended(catalogue, further) if isinstance(model, FloorRecommender) else model
            for name, model in self.models.items()
        }
        return Priors(catalogue, self.configs, models, unconditional)

    def of(self, histories: Sequence[Sequence[int] | np.ndarray], configs: Configs | None = None) -> Tensor | None:
        """The weighted sum of the terms: float32 [histories, items]; None where there are none.

        Args:
            histories: item indices, oldest first.
            configs: in place of its own: some of them, with other weights or transforms.

        Raises:
            UserError: there is no such prior, or values are not finite.
        """
        configs = self.checked(configs)
        if not any(config.weight for config in configs.values()):
            return None
        total = torch.zeros(1, len(self.catalogue))
        for name, config in configs.items():
            if config.weight:
                total = total + config.weight * self.term(name, config, histories)
        if not total.isfinite().all():
            raise UserError(
                f"search.priors: with these weights {', '.join(configs)} add up to values that are not finite"
            )
        return total.expand(len(histories), -1)

    def each(self, history: Sequence[int], items: Sequence[int], configs: Configs | None = None) -> list[Spelling]:
        """Of each item, the names of the terms and what they add to its score."""
        rows = {
            name: (config.weight * self.term(name, config, [history]))[0, list(items)].tolist()
            for name, config in self.checked(configs).items()
        }
        return [[(name, row[place]) for name, row in rows.items()] for place in range(len(items))]

    def term(self, name: str, config: PriorConfig, histories: Sequence[Sequence[int] | np.ndarray]) -> Tensor:
        """One of them, without its weight: float32 [histories, items], or [1, items] where histories do not matter."""
        if isinstance(config, ModelPrior):
            return transformed(self._scores(self.models[name], histories), config)
        return self._static(config)[None]

    def checked(self, configs: Configs | None) -> Configs:
        """What is asked for, or its own.

        Raises:
            UserError: there is no such prior, or it cannot be computed so.
        """
        if configs is None or configs is self.configs:
            return self.configs
        for name, config in configs.items():
            if name not in self.configs or self.configs[name].kind != config.kind:
                known = ", ".join(self.configs) or "none"
                raise UserError(
                    f"search.priors.{name}: the model was exported without it (it has: {known}); "
                    "`ilrec blend` adds priors"
                )
            if not isinstance(config, ModelPrior) and config != self.configs[name]:
                self._check(name, config)
        return configs

    def _scores(self, model: ScoredRecommender, histories: Sequence[Sequence[int] | np.ndarray]) -> Tensor:
        """Items that were added since score as the last one of those that the model knows, and are not read."""
        known = [np.asarray(history, np.int64) for history in histories]
        scores = model.scores([history[history < model.items] for history in known]).float().cpu()
        missing = len(self.catalogue) - scores.shape[1]
        if missing:
            scores = torch.cat([scores, scores.amin(1, keepdim=True).expand(-1, missing)], 1)
        return scores

    def _check(self, name: str, config: PriorConfig) -> None:
        try:
            values = self._static(config)
        except UserError as error:
            raise UserError(f"search.priors.{name}: {error}") from None
        if len(values) != len(self.catalogue) or not values.isfinite().all():
            raise UserError(f"search.priors.{name}: its values are not all finite numbers, one an item")

    def _static(self, config: PriorConfig) -> Tensor:
        """float32 [items]; kept, since it is asked for with every batch."""
        key = config.model_dump_json(exclude={"weight", "limits"})
        if key not in self._kept:
            self._kept[key] = self._computed(config)
        return self._kept[key]

    def _computed(self, config: PriorConfig) -> Tensor:
        if isinstance(config, UnconditionalPrior):
            if self.unconditional is None:
                raise UserError("log p(item | no history) was not computed; ilrec blend does it")
            return self.unconditional
        if isinstance(config, ColumnPrior):
            return column_values(self.catalogue, config)
        return self._counts.log1p() if isinstance(config, PopularityPrior) else (self._counts == 0).float()

    @cached_property
    def _counts(self) -> Tensor:
        if self.catalogue.popularity is None:
            raise UserError("the bundle does not know how often items occur in training; export it again")
        return torch.from_numpy(np.asarray(self.catalogue.popularity, np.float32))


def transformed(scores: Tensor, config: ModelPrior) -> Tensor:
    """A model's scores, as its prior adds them.

    >>> transformed(torch.tensor([0.0, 2.0]), ModelPrior(kind="model", path="", transform="log", scale=2, offset=1))
    tensor([0.0000, 0.6931])
    """
    scaled = scores / config.scale
    return (scaled.clamp(min=0) + config.offset).log() if config.transform == "log" else scaled


def column_values(catalogue: Catalogue, config: ColumnPrior) -> Tensor:
    """A column's values, float32 [items], transformed.

    Raises:
        UserError: there is no such column, or it holds no numbers.
    """
    names = [] if catalogue.columns is None else catalogue.columns.column_names
    if catalogue.columns is None or config.column not in names:
        raise UserError(f"the items have no column {config.column!r}; there are: {', '.join(names) or 'none'}")
    array = catalogue.columns[config.column].combine_chunks()
    try:
        if pa.types.is_temporal(array.type):
            array = pc.divide(array.cast(pa.timestamp("s"), safe=False).cast(pa.int64()), 86_400.0)
        values = np.asarray(array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False), np.float64)
    except pa.ArrowException as error:
        raise UserError(f"column {config.column!r} holds neither numbers nor dates ({array.type})") from error
    known = values[np.isfinite(values)]
    if not len(known):
        raise UserError(f"column {config.column!r} holds no value at all")
    values = np.where(np.isfinite(values), values, known.mean())
    if config.transform == "log":
        if values.min() < 0:
            raise UserError(f"column {config.column!r} holds values below 0, which have no logarithm; choose standard")
        values = np.log1p(values)
    elif config.transform == "standard":
        values = (values - values.mean()) / max(values.std(), 1e-9)
    return torch.from_numpy(values.astype(np.float32))


def without_priors(recommender: AnyRecommender) -> SearchConfig:
    """A recommender's own search, by its own score alone."""
    return recommender.manifest.searched().model_copy(update={"priors": {}})


def unconditional(recommender: AnyRecommender, at_once: int = 512) -> torch.Tensor:
    """log p(item | no history), float32 [items]."""
    search, items = without_priors(recommender), len(recommender.catalogue)
    found: list[float] = []
    for begin in range(0, items, at_once):
        [scores] = recommender.rank([[]], [range(begin, min(begin + at_once, items))], search)
        found += scores
    return torch.tensor(found)

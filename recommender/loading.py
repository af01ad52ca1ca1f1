"""Opening a bundle, whatever kind of recommender it holds."""

from __future__ import annotations

from pathlib import Path

import torch

from recommender.backbone.bases import Bases
from recommender.bundle import FLOORS, LANGUAGE_MODEL, kind_of
from recommender.collaborative.recommender import CollaborativeRecommender
from recommender.config import SearchConfig
from recommender.floors.recommender import FloorRecommender
from recommender.priors import Priors
from recommender.recommendation import AnyRecommender
from recommender.recommender import Recommender


def load_recommender(
    bundle: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    search: SearchConfig | None = None,
    history_cache: int = 0,
    bases: Bases | None = None,
) -> AnyRecommender:
    """Open a bundle as the recommender that its manifest names.

    Args:
        bundle: the directory that `ilrec train` or `ilrec export` wrote.
        device: e.g. "cpu", "cuda"; an ItemKNN or TF-IDF always computes on the CPU.
        dtype: of a language model's weights; None = as they were saved.
        search: in place of the model's own search settings; priors aside, of no effect where every item is scored.
        history_cache: bytes of keys and values of histories that a language model keeps.
        bases: where a language model shares the weights that others have as well.

    Raises:
        UserError: missing, damaged or of another version.
    """
    directory = Path(bundle).expanduser()
    kind = kind_of(directory)
    if kind == LANGUAGE_MODEL:
        return Recommender.load(directory, device, dtype, search, history_cache, bases)
    if kind in FLOORS:
        return FloorRecommender.load(directory)
    recommender = CollaborativeRecommender.load(directory, device)
    priors = Priors.load(directory, recommender.catalogue, recommender.manifest.search.priors, device)
    recommender.priors = priors
    recommender.manifest = recommender.manifest.model_copy(update={"search": recommender.manifest.searched(search)})
    priors.checked(recommender.manifest.search.priors)
    return recommender

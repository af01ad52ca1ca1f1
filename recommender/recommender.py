"""A recommender: an item space, a backbone and a search. Load a bundle, hand it histories, get items that exist."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from recommender.backbone.backbone import Backbone, add_lora, make_room, shortened
from recommender.backbone.bases import Bases, load_model
from recommender.bundle import LANGUAGE_MODEL, MANIFEST, Manifest, read_manifest, write_bundle
from recommender.catalogue.catalogue import Catalogue
from recommender.config import LoraConfig, Score, SearchConfig
from recommender.errors import UserError
from recommender.golden import record
from recommender.items.item_space import ItemSpace
from recommender.models import base_of
from recommender.priors import Priors, unconditional
from recommender.recommendation import Recommendation, Spelling
from recommender.search.prefixes import Prefixes
from recommender.search.scoring import CandidateScorer
from recommender.search.search import HEADROOM, TreeSearch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER = "adapter_config.json"  # marks a bundle that holds an adapter


class Recommender:
    """What is served.

    Args:
        space: items, identifiers, trie, prompt.
        backbone: the trained model, in eval mode; its weights may not change any more.
        manifest: name, search settings, metrics.
        history_cache: bytes of keys and values of histories to keep; see `recommender/search/prefixes.py`.
        priors: what is added to the items' scores.

    Example:
        >>> recommender = Recommender.load("runs/demo/bundle")                                # doctest: +SKIP
        >>> history = recommender.catalogue.indices_of(["Some title", "another title"])       # doctest: +SKIP
        >>> [recommender.catalogue.titles[i] for i in recommender.recommend([history], k=5)[0].items]  # doctest: +SKIP
    """

    def __init__(
        self,
        space: ItemSpace,
        backbone: Backbone,
        manifest: Manifest,
        history_cache: int = 0,
        priors: Priors | None = None,
    ):
        self.space = space
        self.backbone = backbone
        self.manifest = manifest.model_copy(update={"search": manifest.searched()})
        self.priors = priors or Priors(space.catalogue)
        self.catalogue = space.catalogue
        self.backbone.model.eval()
        self._longest_response = int(np.diff(space.identifiers.offsets).max())
        self.prefixes = Prefixes(backbone, space.prompt.prefix, len(space.prompt.suffix), history_cache)
        config = self.manifest.search.at_temperature(manifest.temperature)
        self._search = TreeSearch(backbone, space.trie, config, self.prefixes)

    @cached_property
    def _scorer(self) -> CandidateScorer:
        return CandidateScorer(self._search, self.space.trie)

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        search: SearchConfig | None = None,
        history_cache: int = 0,
        bases: Bases | None = None,
    ) -> Recommender:
        """Open a bundle.

        Args:
            bundle: the directory that `ilrec train` or `ilrec export` wrote.
            device: e.g. "cpu", "cuda".
            dtype: of the weights; None = as they were saved.
            search: in place of the bundle's own search settings.
            history_cache: bytes of keys and values of histories to keep.
            bases: where to share the weights of the model, or of the one under an adapter.

        Raises:
            UserError: missing, damaged, of another version, or the bundle of something else.
        """
        directory = Path(bundle).expanduser()
        manifest = language_model_manifest(directory)
        space = ItemSpace.load(directory)
        priors = Priors.load(directory, space.catalogue, manifest.search.priors, device)
        manifest = manifest.model_copy(update={"search": manifest.searched(search)})
        priors.checked(manifest.search.priors)
        load = load_model if bases is None else bases.load
        model: Any = _open(directory, lambda path, revision: load(path, revision, device, dtype))
        return cls(space, Backbone(model.to(device), space.tokenizer), manifest, history_cache, priors)

    def save(self, directory: str | Path) -> None:
        """Write the bundle; complete or absent."""

        def write_files(aside: Path) -> None:
            self.space.save(aside)
            self.backbone.model.save_pretrained(str(aside))
            self.priors.save(aside)

        added = {"base": _base_weights(self.backbone.model), "golden": record(self)}
        write_bundle(Path(directory), self.manifest.model_copy(update=added), write_files)

    def recommend(
        self,
        histories: Sequence[Sequence[int]],
        k: int | Sequence[int] = 10,
        exclude: Sequence[Collection[int]] | None = None,
        allow: Sequence[Collection[int] | None] | None = None,
        search: SearchConfig | None = None,
    ) -> list[Recommendation]:
        """The top-K items for each history.

        Args:
            histories: item indices, oldest first; the last `prompt.history` of them are read, fewer where the
                backbone's context would not hold them.
            k: how many items, for all or for each.
            exclude: items that may not be recommended, for each history.
            allow: if not None, the only items that may be, for each history.
            search: whose score, mode, width, node budget and priors are kept in place of this recommender's own.
        """
        search = self.manifest.searched(search)
        prompts = [self._prompt(history) for history in histories]
        rankings = self._search.within(search).search(
            prompts,
            k if isinstance(k, int) else list(k),
            exclude,
            allow,
            self._terms(histories, search),
        )
        return [
            Recommendation(
                ranking.items.tolist(), ranking.scores.tolist(), ranking.exact, ranking.expansions, len(prompt)
            )
            for ranking, prompt in zip(rankings, prompts, strict=True)
        ]

    def rank(
        self,
        histories: Sequence[Sequence[int]],
        candidates: Sequence[Sequence[int]],
        search: SearchConfig | None = None,
    ) -> list[list[float]]:
        """The scores of given candidates, as `recommend` would give them; one forward pass a history.

        Args:
            histories: as in `recommend`.
            candidates: item indices, at least one for each history.
            search: whose score and priors are taken in place of this recommender's own.
        """
        search = self.manifest.searched(search)
        found = [
            self._scorer.score(self._prompt(history), items, _score(search))
            for history, items in zip(histories, candidates, strict=True)
        ]
        terms = self._terms(histories, search)
        if terms is not None:
            found = [each + terms[row, list(candidates[row])].numpy() for row, each in enumerate(found)]
        return [each.tolist() for each in found]

    def _terms(self, histories: Sequence[Sequence[int]], search: SearchConfig) -> torch.Tensor | None:
        """What priors add to all items, float32 [histories, items]."""
        return self.priors.of(histories, search.priors) if len(histories) else None

    def spellings(
        self, history: Sequence[int], items: Sequence[int], search: SearchConfig | None = None
    ) -> list[Spelling]:
        """The tokens of each item and their log-probabilities, then priors and what they add: together, its score.

        One forward pass. A token's text is what it decodes to by itself, a prior's its name in square brackets. Of the
        score `valid`, tokens that are forced have 0.

        Args:
            history, search: as in `rank`.
            items: item indices, at least one.
        """
        search = self.manifest.searched(search)
        found = self._scorer.log_probabilities(self._prompt(history), items, _score(search))
        texts = [
            [str(self.space.tokenizer.decode([token])) for token in self.space.identifiers.spelled(i)] for i in items
        ]
        added = self.priors.each(history, items, search.priors)
        return [
            [*zip(text, steps.tolist(), strict=True), *((f"[{name}]", value) for name, value in more)]
            for text, steps, more in zip(texts, found, added, strict=True)
        ]

    def tokens(
        self, history: Sequence[int], candidates: Sequence[int] | None = None, search: SearchConfig | None = None
    ) -> int:
        """Tokens that one history takes of a batch's time and memory, counted beforehand.

        Args:
            history: as in `recommend`; its prompt.
            candidates: those of `rank`, with all their tokens; None: those that a search appends.
            search: as in `recommend`.
        """
        prompt = min(self.space.prompt.length(history), self.backbone.context)
        if candidates is None:
            return prompt + self._appended(self.manifest.searched(search))
        offsets, items = self.space.identifiers.offsets, np.asarray(candidates)
        return prompt + int((offsets[items + 1] - offsets[items]).sum())

    def _appended(self, search: SearchConfig) -> int:
        """What a search keeps room for in the cache; the most it may need, if it may do more than the model's own."""
        own = self.manifest.search
        nodes = self._nodes_at_most(search)
        if search.score == own.score and search.mode == own.mode and nodes <= self._nodes_at_most(own):
            return HEADROOM
        return max(HEADROOM, math.ceil(nodes * self.space.trie.mean_chain))

    def _nodes_at_most(self, search: SearchConfig) -> int:
        return search.node_budget if search.mode == "exact" else search.width * self._longest_response

    def _prompt(self, history: Sequence[int]) -> np.ndarray:
        """The prompt of as many of the latest items as leave room for the longest response."""
        prompt = self.space.prompt.encode(history)
        while len(prompt) + self._longest_response > self.backbone.context and len(history):
            history = history[-self.space.prompt.config.history :][1:]
            prompt = self.space.prompt.encode(history)
        return prompt


def _score(search: SearchConfig) -> Score:
    assert search.score is not None  # `Manifest.searched` fills it in
    return search.score


def starting_point(
    bundle: str | Path,
    lora: LoraConfig | None,
    dtype: torch.dtype,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Backbone:
    """A bundle's model to train on: an adapter is folded in, LoRA adapters drawn from `seed` go on top if asked for.

    Args:
        tokenizer: the bundle's with tokens for further items, whose vectors are drawn from `seed`; None = the bundle's.

    Raises:
        UserError: no language model's bundle, or adapters that cannot be saved or would leave new vectors untrained.
    """
    source = Path(bundle).expanduser().absolute()
    if lora is not None and (source / ADAPTER).exists():
        raise UserError(
            f"init_from: {source} holds an adapter, and another one on top could not be saved by itself; fold it in "
            "first (ilrec export BUNDLE OUT --merge) and start from that, or train without backbone.lora"
        )
    model: Any = _merged(source, dtype)
    own = ItemSpace.load(source).tokenizer
    tokenizer = tokenizer or own
    if lora is not None and len(tokenizer) > len(own):
        raise UserError(
            f"backbone.lora: {len(tokenizer) - len(own)} items have no token in {source}, and adapters do not train "
            "the vectors of new ones; leave lora out, or train on the items that the model knows"
        )
    make_room(model, tokenizer, seed)
    if lora is not None:
        model = add_lora(model, lora, seed)
    return Backbone(model, tokenizer)


def language_model_manifest(bundle: Path) -> Manifest:
    """The manifest of a language model's bundle, its files checked against it.

    Raises:
        UserError: missing, damaged, of another version, or the bundle of something else.
    """
    manifest = read_manifest(bundle)
    if manifest.kind != LANGUAGE_MODEL:
        raise UserError(f"{bundle}: holds no language model ({manifest.kind}), and one is needed here")
    return manifest


def _base_weights(model: Any) -> dict[str, str]:
    """The checksums of the weights under an adapter, where these are a bundle's."""
    configs = getattr(model, "peft_config", None)
    base = Path(str(next(iter(configs.values())).base_model_name_or_path)) if configs else None
    return {} if base is None or not (base / MANIFEST).exists() else read_manifest(base).weights


def _open(bundle: Path, load: Callable[[str, str | None], PreTrainedModel]) -> Any:
    """The model of a bundle: plain or, over a base that lies elsewhere, with its adapter.

    Args:
        load: gives the model at a path or hub name, of a revision.
    """
    if not (bundle / ADAPTER).exists():
        return load(str(bundle), None)
    import peft

    config = peft.PeftConfig.from_pretrained(str(bundle))
    name = base_of(bundle, str(config.base_model_name_or_path))
    try:
        base = load(name, config.revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{bundle}: its adapter belongs to the base {name}, which cannot be loaded: {shortened(error)}; put it "
            "back; ilrec export BUNDLE OUT --merge then makes a bundle that needs no base"
        ) from error
    adapted = peft.PeftModel.from_pretrained(base, str(bundle))
    adapted.active_peft_config.base_model_name_or_path = name  # for what is saved from here on
    return adapted


def _merged(source: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    language_model_manifest(source)
    model = _open(source, lambda path, revision: load_model(path, revision, "cpu", dtype))
    return model.merge_and_unload() if (source / ADAPTER).exists() else model


def merge_adapter(bundle: str | Path, directory: str | Path, version: int | None = None, made_from: str = "") -> None:
    """Fold a bundle's LoRA adapter into its backbone and write the result as a bundle of its own.

    Args:
        version, made_from: of the new bundle's manifest.

    Raises:
        UserError: the bundle holds no adapter.
    """
    source = Path(bundle).expanduser()
    manifest = language_model_manifest(source)
    if not (source / ADAPTER).exists():
        raise UserError(f"{source}: holds full weights, there is no adapter to merge")
    space = ItemSpace.load(source)
    manifest = manifest.model_copy(update={"version": version, "made_from": made_from})
    priors = Priors.load(source, space.catalogue, manifest.search.priors)
    Recommender(space, Backbone(_merged(source, None), space.tokenizer), manifest, priors=priors).save(directory)


def extend_bundle(
    bundle: str | Path, further: Catalogue, directory: str | Path, version: int | None = None, made_from: str = ""
) -> None:
    """Write a bundle with the same weights over a larger catalogue: what has a title can be named without training.

    Args:
        version, made_from: of the new bundle's manifest.

    Raises:
        UserError: the bundle holds no language model, or an item id is known already.
    """
    recommender = Recommender.load(bundle)
    manifest = recommender.manifest.model_copy(update={"version": version, "made_from": made_from})
    extended = Recommender(recommender.space.extended(further), recommender.backbone, manifest)
    # Anew for all items: where titles part earlier than before, the old ones' tokens are as likely as before no more.
    vector = None if recommender.priors.unconditional is None else unconditional(extended)
    extended.priors = recommender.priors.extended(extended.catalogue, further, vector)
    extended.save(directory)

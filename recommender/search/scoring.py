"""Scores of given candidates: one prompt tree a history, in which every candidate is a branch.

What is kept of how the prompt begins (`recommender/search/prefixes.py`) is not computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from recommender.backbone.cache import TreeCache
from recommender.backbone.packing import Packing
from recommender.backbone.tree import Batch, Sample, ancestor_mask, build_row, collate
from recommender.ragged import ragged
from recommender.search.logits import log_softmax_within

if TYPE_CHECKING:
    from recommender.config import Score
    from recommender.items.trie import RadixTrie
    from recommender.search.search import TreeSearch


class CandidateScorer:
    """The search's scores of single items, without the search.

    Args:
        search: gives backbone and temperature.
        trie: the one that is searched, on the CPU.
    """

    def __init__(self, search: TreeSearch, trie: RadixTrie):
        self._search = search
        self._trie = trie
        self._tokens, self._offsets = trie.identifiers()
        self._nodes = trie.prediction_nodes()

    def score(self, prompt: np.ndarray, candidates: Sequence[int], score: Score) -> np.ndarray:
        """The scores of `candidates` after `prompt`, from one forward pass: float32, in the candidates' order.

        Args:
            prompt: int32 [t].
            candidates: item indices, at least one; repeated ones are computed once.
            score: of the two, which.
        """
        steps, sample, place = self._steps(prompt, candidates, score)
        return np.bincount(sample, steps).astype(np.float32)[place]

    def log_probabilities(self, prompt: np.ndarray, candidates: Sequence[int], score: Score) -> list[np.ndarray]:
        """What adds up to the score of each candidate: the log-probabilities of its tokens, float32 [t].

        Args:
            prompt, candidates, score: as in `score`.
        """
        steps, sample, place = self._steps(prompt, candidates, score)
        spelled = np.split(steps[np.argsort(sample, kind="stable")], np.bincount(sample).cumsum()[:-1])
        lengths = self._offsets[1:] - self._offsets[:-1]
        found = zip(candidates, [spelled[each] for each in place], strict=True)
        return [np.pad(known, (0, lengths[item] - len(known))) for item, known in found]  # what is forced adds 0

    @torch.inference_mode()
    def _steps(
        self, prompt: np.ndarray, candidates: Sequence[int], score: Score
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The log-probability of each token that may add to a score, float32 [E]; whose it is, int64 [E]; and where the
        candidates are among those, int64 [C]. An item's tokens come in order.
        """
        items, place = np.unique(np.asarray(candidates), return_inverse=True)
        backbone, device = self._search.backbone, self._search.backbone.device
        samples = [self._sample(prompt, item, score) for item in items]
        batch = collate([build_row(samples)], backbone.padding).to(device)
        kept, hidden = self._hidden(prompt, batch)
        source, predictor = torch.unique(batch.source - kept, return_inverse=True)
        steps = self._valid if score == "valid" else self._full
        found = steps(hidden[source], predictor, batch.target, batch.nodes).float().cpu().numpy()
        if np.isnan(found).any():
            raise FloatingPointError("the backbone returned NaN logits")
        return found, batch.sample.cpu().numpy(), place

    def _hidden(self, prompt: np.ndarray, batch: Batch) -> tuple[int, torch.Tensor]:
        """How many of the row's first tokens are kept, and the hidden states [L', D] of the others."""
        backbone, prefixes = self._search.backbone, self._search.prefixes
        kept, states = prefixes.longest(prompt)
        length = batch.input_ids.shape[1]
        cache = TreeCache(backbone.num_layers, 1, length)
        mask = None if batch.end is None else ancestor_mask(batch.end)
        if kept:
            cache.load(slice(None), states, kept)
            causal = torch.ones(1, 1, length, length, dtype=torch.bool, device=backbone.device).tril()
            mask = (causal if mask is None else mask)[:, :, kept:]
        packing = Packing.of_row(kept, length, mask, backbone.device)
        hidden = backbone.appended(batch.input_ids[0, kept:], batch.position_ids[0, kept:], packing, cache)
        prefixes.keep([prompt], cache)
        return kept, hidden

    def _sample(self, prompt: np.ndarray, item: int, score: Score) -> Sample:
        """A candidate's branch. What is forced after its last choice adds 0 to the `valid` score and is left out."""
        begin, end = self._offsets[item], self._offsets[item + 1]
        if score == "valid":
            choices = np.flatnonzero(self._nodes[begin:end] >= 0)
            end = begin + (choices[-1] + 1 if len(choices) else 1)
        return Sample(prompt, self._tokens[begin:end], self._nodes[begin:end])

    def _full(
        self, hidden: torch.Tensor, predictor: torch.Tensor, target: torch.Tensor, nodes: torch.Tensor
    ) -> torch.Tensor:
        return self._search.logits.log_probabilities(hidden, predictor, target)

    def _valid(
        self, hidden: torch.Tensor, predictor: torch.Tensor, target: torch.Tensor, nodes: torch.Tensor
    ) -> torch.Tensor:
        """Log-probabilities [E] of targets among the children of their nodes; 0 where a target is forced."""
        trie = self._search.trie
        node_of = nodes.new_zeros(len(hidden)).scatter(0, predictor, nodes)  # a place in the tree is one trie node
        choosing = node_of >= 0
        counts = torch.where(choosing, trie.child_count[node_of.clamp(min=0)], 0)
        owner, nth = ragged(counts)
        if not len(owner):  # one candidate in all the catalogue: nothing is ever chosen
            return torch.zeros(len(nodes), device=nodes.device)
        child = trie.first_child[node_of[owner]] + nth
        logits = self._search.logits.of(hidden, owner, trie.first_token[child])
        used = torch.cumsum(choosing, 0) - 1  # groups without elements are no groups
        steps = log_softmax_within(logits, counts[choosing], used[owner])
        chosen = self._trie.child_of(nodes.cpu().numpy(), target.cpu().numpy())
        at = torch.from_numpy(chosen).to(nodes.device) - trie.first_child[nodes.clamp(min=0)]
        begin = (counts.cumsum(0) - counts)[predictor]
        return torch.where(nodes >= 0, steps[(begin + at).clamp(0, len(steps) - 1)], 0.0)

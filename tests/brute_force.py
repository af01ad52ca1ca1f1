"""Scores and ranks by enumeration: every item spelled out in a row of its own, through plain `transformers`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from recommender.items.item_space import ItemSpace


class BruteForce:
    """A bundle's scores without trie, tree, cache and search."""

    def __init__(self, bundle: Path) -> None:
        self.space = ItemSpace.load(bundle)
        self.model = AutoModelForCausalLM.from_pretrained(bundle).eval()
        self.items = [self.space.identifiers.spelled(i).tolist() for i in range(len(self.space.catalogue))]
        self.known: dict[tuple[int, ...], np.ndarray] = {}
        self.continuations: dict[tuple[int, ...], set[int]] = {}
        for tokens in self.items:
            for at, token in enumerate(tokens):
                self.continuations.setdefault(tuple(tokens[:at]), set()).add(token)

    def scores(self, history: Sequence[int]) -> np.ndarray:
        """Log-probability of every item after `history`, each step normalised over the valid tokens: float64 [n]."""
        key = tuple(map(int, history))
        if key not in self.known:
            self.known[key] = self._scores(history)
        return self.known[key]

    @torch.inference_mode()
    def _scores(self, history: Sequence[int]) -> np.ndarray:
        prompt = self.space.prompt.encode(history).tolist()
        longest = max(map(len, self.items))
        rows = torch.tensor([prompt + tokens + [0] * (longest - len(tokens)) for tokens in self.items])
        logits = torch.cat([self.model(part).logits[:, len(prompt) - 1 :].double() for part in rows.split(50)])
        scores = np.zeros(len(self.items))
        for item, tokens in enumerate(self.items):
            for at, token in enumerate(tokens):
                valid = sorted(self.continuations[tuple(tokens[:at])])
                row = logits[item, at, valid].log_softmax(0)
                scores[item] += row[valid.index(token)].item()
        return scores

    def rank(self, history: Sequence[int], target: int, exclude: Collection[int] = ()) -> int:
        """Rank of `target` among all items but the excluded ones; 1 = first."""
        scores = self.scores(history)
        rivals = np.ones(len(scores), bool)
        rivals[list(exclude)] = False
        return 1 + int((scores[rivals] > scores[target]).sum())

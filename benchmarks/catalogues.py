"""Simulated catalogues and collaborative models, of any size."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def random_titles(items: int, vocabulary: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Distinct spelled titles, int32, each closed by token 1."""
    words = rng.permutation(np.arange(2, vocabulary))
    openings = max(items // 6, 2)  # Office: 2,414 items, some 400 first tokens; Games: 16,859 and 2,500
    titles: set[tuple[int, ...]] = set()
    while len(titles) < items:
        opening = int(openings * rng.beta(0.6, 1.6))
        following = (opening * 7 + rng.integers(0, 12, int(rng.integers(2, 7)))) % (vocabulary - 2)
        titles.add((int(words[opening % len(words)]), *map(int, words[following])))
    return [np.array([*title, 1], np.int32) for title in sorted(titles)]


def extended_titles(
    tokens: np.ndarray, offsets: np.ndarray, items: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A catalogue of `items` spelled titles that begins with a real one.

    A new title is the beginning of any title so far, up to a token, and what follows that token in a real title. So
    all its pairs of neighbouring tokens are pairs of real titles: a model that was trained on these gives it
    probability, it lies in the subtrees where they lie, and a search has to tell it from them. What does not grow are
    the first tokens.

    Args:
        tokens, offsets: the real titles, each closed by a token that occurs nowhere else.

    Raises:
        ValueError: the real titles are too few or too unlike each other to make so many.
    """
    longest = int(np.diff(offsets).max())
    places = np.arange(longest)
    owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    titles = np.full((len(offsets) - 1, longest), -1, np.int32)
    titles[owner, np.arange(len(tokens)) - offsets[owner]] = tokens
    by_token = np.argsort(tokens, kind="stable")
    first_with, number_with = np.searchsorted(tokens[by_token], np.arange(tokens.max() + 1)), np.bincount(tokens)
    mix = rng.integers(1, 2**62, longest)
    while len(titles) < items:
        made = 2 * (items - len(titles)) + 1000
        head = titles[rng.integers(0, len(titles), made)]
        kept = rng.integers(0, (head >= 0).sum(1) - 1)[:, None]  # the place of the last token that is kept
        token = head[np.arange(made), kept[:, 0]]
        real = by_token[first_with[token] + rng.integers(0, number_with[token])][:, None]
        at = real + np.maximum(places - kept, 0)
        goes_on = at < offsets[owner[real] + 1]
        tail = np.where(goes_on, tokens[np.minimum(at, len(tokens) - 1)], -1)
        fits = offsets[owner[real[:, 0]] + 1] - real[:, 0] + kept[:, 0] <= longest
        both = np.concatenate([titles, np.where(places <= kept, head, tail)[fits]])
        _, distinct = np.unique((both * mix).sum(1), return_index=True)
        if len(distinct) < len(titles) + made / 1000:
            raise ValueError(f"{len(offsets) - 1} real titles make no more than {len(distinct)}, not {items}")
        titles = both[np.sort(distinct)][:items]
    return titles[titles >= 0], np.concatenate([[0], np.cumsum((titles >= 0).sum(1))])


class SimulatedModel(nn.Module):
    """Stands in for a collaborative model: a random embedding a history, Gaussian scores of a given spread."""

    def __init__(self, items: int, width: int, spread: float):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(items, width, generator=generator) * spread / width**0.5)

    def embed_prefixes(self, sequences: Any, lengths: Any) -> Tensor:
        count = sum(map(len, lengths))
        return torch.randn(count, self.table.shape[1], generator=torch.Generator().manual_seed(1))

    def scores(self, embedding: Tensor) -> Tensor:
        return embedding @ self.table.T

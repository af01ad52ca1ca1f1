"""Random catalogues, and what competes at each token of their identifiers, found by looking through all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from recommender.items.trie import RadixTrie

END = 0


class Stub(nn.Module):
    """A collaborative model: scores between −`scale` and `scale`, drawn anew for each history."""

    def __init__(self, items: int, scale: float):
        super().__init__()
        drawn = torch.rand(101, items, generator=torch.Generator().manual_seed(3))
        self.table = nn.Parameter(scale * (2 * drawn - 1))

    def embed(self, history: np.ndarray) -> Tensor:
        return torch.tensor([float(sum((place + 1) * (int(i) + 1) for place, i in enumerate(history)) % 101)])

    def embed_prefixes(self, sequences: Sequence[np.ndarray], lengths: Sequence[np.ndarray]) -> Tensor:
        return torch.stack([self.embed(s[:n]) for s, ns in zip(sequences, lengths, strict=True) for n in ns])

    def scores(self, embedding: Tensor) -> Tensor:
        return self.table[embedding[:, 0].long()]


class Catalogue:
    """Random identifiers of at most `items` items.

    Args:
        alphabets: how many tokens there are to choose from at each place.
        opening: how many tokens all identifiers have in common, before those.

    Attributes:
        node: int32 [tokens]; the trie node that predicts each token, −1 where it is forced.
        competing: the tokens that may stand in its place, itself included.
    """

    def __init__(self, alphabets: list[int], items: int, opening: int, seed: int):
        rng = np.random.default_rng(seed)
        drawn = {
            tuple(int(rng.integers(1, size + 1)) for size in alphabets[: rng.integers(1, len(alphabets) + 1)])
            for _ in range(items)
        }
        self.identifiers = [[*[90 + i for i in range(opening)], *body, END] for body in sorted(drawn)]
        rng.shuffle(self.identifiers)
        self.tokens = np.array([token for identifier in self.identifiers for token in identifier], np.int32)
        self.offsets = np.cumsum([0, *map(len, self.identifiers)])
        self.trie = RadixTrie.build(self.tokens, self.offsets)
        self.node = self.trie.prediction_nodes()
        self.items_under: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for item, identifier in enumerate(self.identifiers):
            for t in range(len(identifier) + 1):
                self.items_under[tuple(identifier[:t])].append(item)
        following = defaultdict(set)
        for prefix in self.items_under:
            following[prefix[:-1]].add(prefix[-1:])
        self.competing = [
            sorted(token for (token,) in following[tuple(identifier[:t])] - {()})
            for identifier in self.identifiers
            for t in range(len(identifier))
        ]

    def __len__(self) -> int:
        return len(self.identifiers)

    def branching(self) -> np.ndarray:
        """The places of all tokens that others compete with."""
        return np.flatnonzero([len(tokens) > 1 for tokens in self.competing])

    def nodes_of(self, item: int) -> np.ndarray:
        """int32: the trie node that predicts each token of an item."""
        return self.node[self.offsets[item] : self.offsets[item + 1]]

    def shares(self, prefix: tuple[int, ...], scores: Tensor, of: set[int] | None = None) -> dict[int, float]:
        """r_v of each token v that may follow a prefix (ILRec, Eq. 10), by token.

        Args:
            scores: float64 [items]; R is their softmax.
            of: R is the softmax over these items only.
        """

        def log_sum(items: list[int]) -> Tensor:
            kept = [item for item in items if of is None or item in of]
            return scores[kept].logsumexp(0) if kept else torch.tensor(-torch.inf)

        whole = log_sum(self.items_under[prefix])
        follow = sorted({self.identifiers[item][len(prefix)] for item in self.items_under[prefix]})
        return {token: float((log_sum(self.items_under[(*prefix, token)]) - whole).exp()) for token in follow}

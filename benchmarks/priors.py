"""What priors cost the exact search: expansions and milliseconds, by the kind of term and the size of the catalogue.

    python -m benchmarks.priors --bundle demo
    python -m benchmarks.priors --bundle demo --items 17000 1000000 --batch 8

Terms are drawn, so that catalogues of any size have them; the model and its histories are the bundle's. Contenders take
turns in one process over the same histories.

- none: the search without terms.
- popularity: Gaussian, the same for all histories (standard deviation 1).
- collaborative: a log-softmax over all items, another one for each history (standard deviation of its logits 2).
- content: 0 for nearly all items, up to 8 for a hundred of them, others for each history.
- against: minus the collaborative one.

Bounds: milliseconds a list for the largest term below every node, which the other column includes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.catalogues import extended_titles
from benchmarks.search import Served
from benchmarks.timing import in_turns
from recommender.items.trie import RadixTrie
from recommender.models import find_bundle
from recommender.search.bounds import Bounds
from recommender.search.frontier import Ranking
from recommender.search.search import TreeSearch

Terms = Callable[[int, int, np.random.Generator], np.ndarray]  # histories, items → float32 [histories, items]
_SPARSE = 100


def popularity(histories: int, items: int, rng: np.random.Generator) -> np.ndarray:
    return np.repeat(rng.normal(size=(1, items)), histories, 0)


def collaborative(histories: int, items: int, rng: np.random.Generator) -> np.ndarray:
    return torch.from_numpy(2 * rng.normal(size=(histories, items))).log_softmax(1).numpy()


def content(histories: int, items: int, rng: np.random.Generator) -> np.ndarray:
    terms = np.zeros((histories, items))
    for row in terms:
        row[rng.choice(items, min(_SPARSE, items), replace=False)] = 8 * rng.random(min(_SPARSE, items))
    return terms


KINDS: dict[str, Terms] = {
    "popularity": popularity,
    "collaborative": collaborative,
    "content": content,
    "against": lambda *of: -collaborative(*of),
}


def rows(served: Served, trie: RadixTrie, k: int, batch: int, histories: int) -> list[list[str]]:
    """A row for each kind of term on one catalogue."""
    config = served.recommender.manifest.search
    search = TreeSearch(served.backbone, trie, served.configs[config.score or "valid"], served.recommender.prefixes)
    prompts = served.prompts[:histories]
    rng, items = np.random.default_rng(0), len(trie)
    batches = [slice(begin, begin + batch) for begin in range(0, len(prompts), batch)]
    drawn = {
        name: [torch.from_numpy(make(len(prompts[at]), items, rng).astype(np.float32)) for at in batches]
        for name, make in KINDS.items()
    }

    def answers(name: str) -> list[Ranking]:
        terms = drawn.get(name, [None] * len(batches))
        return [
            each for at, own in zip(batches, terms, strict=True) for each in search.search(prompts[at], k, terms=own)
        ]

    names = ["none", *KINDS]
    seconds = in_turns([partial(answers, name) for name in names], 3, str(served.backbone.device))
    started = time.process_time()
    for terms in drawn["popularity"]:
        Bounds.of(search.expansion.levels, terms)
    bounds = (time.process_time() - started) / len(prompts)
    found = []
    for name, own in zip(names, seconds, strict=True):
        rankings = answers(name)
        found.append([
            f"{items:,}", name, f"{1000 * float(np.median(own)) / len(prompts):.1f}",
            "–" if name == "none" else f"{1000 * bounds:.1f}",
            f"{np.mean([each.expansions for each in rankings]):.0f}",
            f"{np.mean([each.exact for each in rankings]):.0%}",
        ])  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="demo", help="a language model: its name, name@version, or a path")
    parser.add_argument("--items", type=int, nargs="*", default=[17_000], help="sizes of simulated catalogues")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--histories", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    bundle = find_bundle(asked.bundle)
    served = Served.load(bundle, Path(bundle), asked.histories, asked.device)
    table = Table("items", "terms", "ms a list", "of it bounds", "expansions", "proven")
    own = served.recommender.space.trie
    sizes = [
        own,
        *(RadixTrie.build(*extended_titles(*own.identifiers(), n, np.random.default_rng(0))) for n in asked.items),
    ]
    for trie in sizes:
        for row in rows(served, trie, asked.k, asked.batch, asked.histories):
            table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()

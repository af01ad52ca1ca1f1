"""What token rewards cost, and what taking them from the best N items only loses (ILRec, Eq. 10).

    python -m benchmarks.rewards                                    # simulated catalogues of 17k, 100k and 1M items
    python -m benchmarks.rewards --bundle sasrec --run demo    # a trained model on its own data

Simulated: titles that part as real ones do, and a collaborative model whose softmax is as peaked as a trained one's
(scores are Gaussian, their spread is set by --spread). Printed: CPU seconds for a batch of samples, from all items and
from the best N, and how far the rewards of all children at the samples' positions move (mean over positions of the
summed and of the largest change). A sum of r over the children of a node is 1.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.catalogues import SimulatedModel, random_titles
from objectives.rewards import Histories, Rewards, RewardSource
from recommender.items.trie import RadixTrie
from recommender.models import find_bundle


def simulated(items: int, samples: int, spread: float) -> tuple[Any, RadixTrie, Histories]:
    titles = random_titles(items, 32_000, np.random.default_rng(0))
    tokens, offsets = np.concatenate(titles), np.concatenate([[0], np.cumsum([len(title) for title in titles])])
    model = SimulatedModel(items, 64, spread)
    # Targets as a trained model would rank them: some at the top, some anywhere.
    with torch.no_grad():
        ranks = model.scores(model.embed_prefixes(None, [range(samples)])).argsort(1, descending=True)
    rng = np.random.default_rng(2)
    at = np.minimum((rng.pareto(0.5, samples) * 5).astype(np.int64), items - 1)
    targets = ranks[torch.arange(samples), torch.from_numpy(at)].numpy()
    nothing = np.zeros(1, np.int64)
    return (
        model,
        RadixTrie.build(tokens, offsets),
        Histories([nothing] * samples, [np.ones(1, np.int64)] * samples, list(targets[:, None])),
    )


def trained(bundle: Path, run: Path, samples: int) -> tuple[Any, RadixTrie, Histories]:
    from recommender.catalogue.catalogue import Catalogue
    from recommender.collaborative.recommender import load_model
    from recommender.items.item_space import ItemSpace
    from trainer.data.dataset import Dataset
    from trainer.evaluation.ranking import held_out
    from trainer.run import prepared_of

    prepared = prepared_of(run)
    dataset, space = Dataset.load(prepared.dataset), ItemSpace.load(prepared.items)
    if Catalogue.load(bundle).item_ids != dataset.item_ids:
        raise SystemExit(f"{bundle} and {run} are of different catalogues")
    split = held_out(dataset, "validation", samples)
    histories = [history[-space.prompt.config.history :] for history in split.histories]
    lengths = [np.array([len(history)]) for history in histories]
    return load_model(bundle, "cpu"), space.trie, Histories(histories, lengths, list(split.targets[:, None]))


def predictions(trie: RadixTrie, histories: Histories) -> tuple[np.ndarray, np.ndarray]:
    """The sample and the node of every branching prediction of the targets."""
    nodes = trie.prediction_nodes()
    offsets = np.concatenate([[0], np.cumsum(np.diff(trie.leaf_offsets)[trie.leaf_of_item])])
    sample, node = [], []
    for number, target in enumerate(np.concatenate(histories.targets)):
        own = nodes[offsets[target] : offsets[target + 1]]
        own = own[own >= 0]
        node.append(own)
        sample.append(np.full(len(own), number))
    return np.concatenate(sample), np.concatenate(node)


def timed(
    source: RewardSource, histories: Histories, sample: np.ndarray, node: np.ndarray, repeats: int
) -> tuple[Rewards, list[float]]:
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        rewards = source.rewards(histories, sample, node)
        seconds.append(time.process_time() - started)
    return rewards, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[17_000, 100_000, 1_000_000])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--spread", type=float, default=3.0, help="standard deviation of the simulated scores")
    parser.add_argument("--top", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bundle", help="a collaborative model (name or path), in place of simulated scores")
    parser.add_argument("--run", help="a language model on the same data: its catalogue, trie, validation histories")
    args = parser.parse_args()
    if (args.bundle is None) != (args.run is None):
        parser.error("--bundle and --run go together")
    torch.set_num_threads(1)
    if args.bundle:
        cases = [trained(find_bundle(args.bundle), find_bundle(args.run), args.samples)]
    else:
        cases = [simulated(items, args.samples, args.spread) for items in args.items]
    table = Table(
        "items",
        "rewards from",
        "CPU s min/median/max",
        "ms a sample",
        "Σ|Δr| a position",
        "max|Δr|",
        "positions with any > .05",
    )
    for model, trie, histories in cases:
        sample, node = predictions(trie, histories)
        whole: Tensor | None = None
        for top in (None, *(n for n in args.top if n < len(trie))):
            rewards, seconds = timed(RewardSource(model, trie, top), histories, sample, node, args.repeats)
            whole = rewards.values if whole is None else whole
            change = (
                (rewards.values - whole).abs().split(trie.child_count[node][np.argsort(sample, kind="stable")].tolist())
            )
            moved = torch.stack([each.max() for each in change])
            table.add_row(
                f"{len(trie):,}", "all" if top is None else f"top {top:,}",
                "/".join(f"{f(seconds):.2f}" for f in (min, np.median, max)),
                f"{1e3 * np.median(seconds) / len(np.concatenate(histories.targets)):.2f}",
                f"{float(torch.stack([each.sum() for each in change]).mean()):.4f}", f"{float(moved.max()):.3f}",
                f"{float((moved > 0.05).float().mean()):.1%}",
            )  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    main()

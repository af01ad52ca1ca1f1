"""What the exact top-K costs beside the bare prompt, beam search with `generate`, and beam search with masks.

    python -m benchmarks.search --bundle demo
    python -m benchmarks.search --bundle games --items 100000 1000000 --batch 1 32 --k 10

Histories are a seeded sample of the run's validation targets; nothing is filtered, as `generate` has no filters.
Contenders take turns in one process, over the same histories; on a CPU, seconds are the process's own CPU seconds.

- prefill: the prompts and the logits after them, and no search, padded to the longest of a batch as is usual. "x
  prefill" is beside it. Packed: the same without padding, as our search runs prompts. Nothing can answer for less.
- exact: the search that is served, with the bundle's width and node budget; beam: its beam mode, K wide.
- masked beams: K beams; every step gathers the children from sparse rows and masks the vocabulary (STATIC).
- generate: K beams, `prefix_allowed_tokens_fn` over a marisa-trie.

Each row names the score that it ranks by. `full` is the sum of log-probabilities over the vocabulary, which `generate`
ranks by; `valid` normalises over the valid tokens at each step, at the temperature that the model was trained at.
Recall is the share of the true top K *of that score*, over the histories whose truth is known. An exact search with a
large budget proves most by `valid`. By `full` it may prove none: a model that was trained over the valid tokens leaves
arbitrary mass on others, so that every path looks unlikely and nothing can be ruled out. Then, on the bundle's own
catalogue, every item is scored for `--exhaustive` histories.

Simulated catalogues begin with the bundle's own items and go on with titles that cross real ones: every pair of
neighbouring tokens is one of a real title (`benchmarks.catalogues.extended_titles`). So the model gives them
probability and the subtrees that it favours fill up, which a catalogue of random titles would not do to a search; how
many of the true top 10 are simulated is printed. What does not grow is the number of first tokens.

The last table is the quality on the bundle's own catalogue by node budget and by width (nodes expanded a forward).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.beams import GenerateBeams, MaskedBeams, TokenTrie, padded_prefill
from benchmarks.catalogues import extended_titles
from benchmarks.timing import in_turns, milliseconds, ratio
from recommender.backbone.backbone import Backbone
from recommender.config import SearchConfig
from recommender.errors import UserError
from recommender.items.trie import RadixTrie
from recommender.metrics import metric_values
from recommender.models import find_bundle
from recommender.recommender import Recommender
from recommender.search.frontier import Ranking
from recommender.search.prefill import prefill
from recommender.search.prefixes import Prefixes
from recommender.search.scoring import CandidateScorer
from recommender.search.search import TreeSearch
from trainer.data.dataset import Dataset
from trainer.evaluation.ranking import held_out
from trainer.run import prepared_of

Prompts = Sequence[np.ndarray]
_SCORED_AT_ONCE = 128  # items
PREFILL, PACKED = "prefill", "prefill, packed"
EXACT, BEAM, MASKED, GENERATE = "exact", "beam", "masked beams", "generate"


class Tally:
    """Counts the forwards of a backbone and the tokens that go through it, padding included."""

    def __init__(self, backbone: Backbone) -> None:
        self.forwards = self.tokens = 0
        backbone.decoder.register_forward_hook(self._count, with_kwargs=True)

    def _count(self, _module: Any, _arguments: Any, named: dict[str, Any], _output: Any) -> None:
        self.forwards += 1
        self.tokens += named["input_ids"].numel()

    def take(self) -> tuple[int, int]:
        """What was counted since the last call."""
        counted = self.forwards, self.tokens
        self.forwards = self.tokens = 0
        return counted


@dataclass
class Contender:
    """One way to answer the histories of all batches.

    Attributes:
        catalogue: a name; "" for the prefills, which know none.
        score: "full" or "valid"; "" for the prefills.
        search: answers a batch.
        answers: of the latest run.
        forwards, tokens: of the latest run.
    """

    name: str
    catalogue: str
    score: str
    search: Callable[[Prompts], Sequence[Any]]
    answers: list[Any] = field(default_factory=list)
    forwards: int = 0
    tokens: int = 0

    def run(self, batches: Sequence[Prompts], tally: Tally) -> None:
        tally.take()
        self.answers = [answer for batch in batches for answer in self.search(batch)]
        self.forwards, self.tokens = tally.take()

    @property
    def items(self) -> list[np.ndarray]:
        """The answers' items, best first."""
        return [answer.items if isinstance(answer, Ranking) else answer for answer in self.answers]

    @property
    def rankings(self) -> list[Ranking]:
        """The answers of a search that says how exact it was."""
        return [answer for answer in self.answers if isinstance(answer, Ranking)]


def batched(prompts: Prompts, batch: int) -> list[Prompts]:
    return [prompts[begin : begin + batch] for begin in range(0, len(prompts), batch)]


def recall(found: Sequence[np.ndarray], truth: Sequence[np.ndarray | None], k: int) -> float | None:
    """The share of the true top k that was found, over the histories whose truth is known; None where none is."""
    known = [(mine, true[:k]) for mine, true in zip(found, truth, strict=True) if true is not None]
    return float(np.mean([np.isin(true, mine).mean() for mine, true in known])) if known else None


def true_top(
    backbone: Backbone, trie: RadixTrie, config: SearchConfig, prompts: Prompts, k: int, budget: int
) -> list[np.ndarray | None]:
    """The true top k of each history by exact searches with a large budget; None where even that gives no proof."""
    patient = config.model_copy(update={"mode": "exact", "width": 50, "node_budget": budget})
    search = TreeSearch(backbone, trie, patient)
    answers = [answer for batch in batched(prompts, 8) for answer in search.search(batch, k)]
    return [answer.items if answer.exact else None for answer in answers]


def scored_top(backbone: Backbone, trie: RadixTrie, config: SearchConfig, prompt: np.ndarray, k: int) -> np.ndarray:
    """The true top k of a history, by the score of every item."""
    kept = Prefixes(backbone, np.empty(0, np.int32), max_bytes=2**40)
    scorer, scores = CandidateScorer(TreeSearch(backbone, trie, config, kept), trie), np.empty(len(trie), np.float32)
    for items in np.array_split(trie.item_of_leaf, -(-len(trie) // _SCORED_AT_ONCE)):  # neighbours share tokens
        scores[items] = scorer.score(prompt, items.tolist(), config.score or "valid")
    return np.argsort(-scores, kind="stable")[:k].astype(np.int32)


@dataclass(frozen=True)
class Served:
    """A bundle, some histories of its run, and the two scores to rank by.

    Attributes:
        configs: the bundle's own search settings by score.
        histories: item indices, oldest first, of the prompts.
        targets: int64 [M]; what followed each history.
    """

    recommender: Recommender
    histories: list[np.ndarray]
    prompts: list[np.ndarray]
    targets: np.ndarray
    configs: dict[str, SearchConfig]
    tally: Tally

    @property
    def backbone(self) -> Backbone:
        return self.recommender.backbone

    @property
    def end(self) -> int:
        return self.recommender.space.identifiers.end

    @classmethod
    def load(cls, bundle: Path, run: Path, histories: int, device: str, width: int | None = None) -> Served:
        """Open a bundle and draw histories of the validation split of a run on the same catalogue.

        `width` takes the place of the bundle's own.
        """
        recommender = Recommender.load(bundle, device)
        dataset = Dataset.load(prepared_of(run).dataset)
        if dataset.item_ids != recommender.catalogue.item_ids:
            raise UserError(f"{bundle} and {run} are of different catalogues")
        split = held_out(dataset, "validation", histories)
        split = split.take(np.random.default_rng(0).permutation(len(split)))
        manifest = recommender.manifest
        exact = manifest.search.model_copy(update={"mode": "exact", "width": width or manifest.search.width})
        return cls(
            recommender,
            split.histories,
            [recommender.space.prompt.encode(history) for history in split.histories],
            split.targets,
            {
                "valid": exact.model_copy(update={"score": "valid"}).at_temperature(manifest.temperature),
                "full": exact.model_copy(update={"score": "full", "temperature": 1.0}),
            },
            Tally(recommender.backbone),
        )

    def tree(self, trie: RadixTrie, k: int, score: str, **changes: object) -> Callable[[Prompts], list[Ranking]]:
        """The search that is served, with changed settings."""
        config = self.configs[score].model_copy(update=changes)
        search = TreeSearch(self.backbone, trie, config, self.recommender.prefixes)
        return lambda prompts: search.search(prompts, k)

    def masked(self, trie: TokenTrie, k: int, score: str) -> Callable[[Prompts], list[np.ndarray]]:
        temperature = self.configs[score].temperature or 1.0
        return MaskedBeams(self.backbone, trie, k, self.end, score, temperature).search


@dataclass(frozen=True)
class Case:
    """A catalogue, and the true top items of the histories by each score."""

    name: str
    trie: RadixTrie
    masks: TokenTrie
    truth: dict[str, list[np.ndarray | None]]


def make_case(served: Served, items: int | None, histories: int, k: int, budget: int, exhaustive: int = 0) -> Case:
    """The bundle's own catalogue or, with `items`, a simulated one; the truth for the first `histories`.

    What no proof is found for is scored item by item, for the first `exhaustive` histories.
    """
    trie = served.recommender.space.trie
    if items is not None:
        trie = RadixTrie.build(*extended_titles(*trie.identifiers(), items, np.random.default_rng(0)))
    name = f"{len(trie):,} {'own' if items is None else 'simulated'}"
    prompts = served.prompts[:histories]
    truth = {
        score: true_top(served.backbone, trie, config, prompts, k, budget) for score, config in served.configs.items()
    }
    for score, config in served.configs.items():
        for row, prompt in enumerate(prompts[:exhaustive]):
            if truth[score][row] is None:
                truth[score][row] = scored_top(served.backbone, trie, config, prompt, k)
    return Case(name, trie, TokenTrie(trie, served.backbone.device), truth)


def prefills(backbone: Backbone) -> list[Contender]:
    """The bare prompts, padded and packed."""
    nothing_kept = Prefixes(backbone, np.empty(0, np.int32))

    @torch.inference_mode()
    def packed(prompts: Prompts) -> list[torch.Tensor]:
        run = prefill(backbone, prompts, nothing_kept, 0)
        return list(backbone.logits(run.hidden[run.order.argsort()]))

    return [
        Contender(PREFILL, "", "", lambda prompts: list(padded_prefill(backbone, prompts))),
        Contender(PACKED, "", "", packed),
    ]


def contenders(served: Served, cases: Sequence[Case], k: int, with_generate: bool) -> list[Contender]:
    """The prefills, and every search on every catalogue."""
    backbone = served.backbone
    made = prefills(backbone)
    for case in cases:
        for score in ("valid", "full"):
            made.append(Contender(EXACT, case.name, score, served.tree(case.trie, k, score)))
        made.append(Contender(BEAM, case.name, "valid", served.tree(case.trie, k, "valid", mode="beam", width=k)))
        for score in ("valid", "full"):
            made.append(Contender(MASKED, case.name, score, served.masked(case.masks, k, score)))
        if with_generate:
            generate = GenerateBeams(backbone, case.trie, k, served.end)
            made.append(Contender(GENERATE, case.name, "full", generate.search))
    return made


def catalogues_table(cases: Sequence[Case]) -> Table:
    """What the catalogues are like, and how many truths are known."""
    table = Table(
        "catalogue", "tokens an item", "prefixes", "trie nodes", "first tokens", "most children", "valid: truths known",
        "simulated in the true top 10", "full: truths known", "simulated in the true top 10", title="catalogues",
    )  # fmt: skip
    own = len(cases[0].trie)
    for case in cases:
        cells = [case.name, f"{len(case.trie.leaf_tokens) / len(case.trie):.1f}", f"{len(case.masks.item):,}"]
        cells += [f"{case.trie.nodes:,}", f"{case.trie.child_count[0]:,}", f"{case.trie.child_count.max():,}"]
        for score in ("valid", "full"):
            known = [top[:10] for top in case.truth[score] if top is not None]
            cells.append(f"{len(known)} of {len(case.truth[score])}")
            cells.append(f"{np.mean([(top >= own).mean() for top in known]):.0%}" if known else "–")
        table.add_row(*cells)
    return table


def timed(served: Served, made: Sequence[Contender], batches: Sequence[Prompts], repeats: int) -> list[list[float]]:
    """Seconds of each contender for all batches; answers and counts are left with it."""
    runs = [partial(each.run, batches, served.tally) for each in made]
    return in_turns(runs, repeats, served.backbone.device.type)


def latency_table(
    served: Served, cases: Sequence[Case], batch: int, k: int, histories: int, repeats: int, with_generate: bool
) -> Table:
    """Milliseconds, work and recall of all contenders, for batches of one size."""
    batches = batched(served.prompts[: max(histories, batch)], batch)
    number, asked = len(batches), sum(map(len, batches))
    made = contenders(served, cases, k, with_generate)
    seconds = timed(served, made, batches, repeats)
    of = {(each.name, each.catalogue, each.score): own for each, own in zip(made, seconds, strict=True)}
    truth = {(case.name, score): top[:asked] for case in cases for score, top in case.truth.items()}

    table = Table(
        "catalogue", "contender", "score", "ms a batch min/median/max", "x prefill", "x own catalogue",
        "x faster than generate", "forwards", "tokens", "expansions mean/max", "exact", f"recall@{k}",
        title=f"{number} batches of {batch}, K = {k}",
    )  # fmt: skip
    for each, own in zip(made, seconds, strict=True):
        cells = [each.catalogue, each.name, each.score, milliseconds([s / number for s in own])]
        cells.append(f"{ratio(own, seconds[0]):.2f}")
        work = [f"{each.forwards / number:.1f}", f"{each.tokens / number:,.0f}"]
        if not each.catalogue:
            table.add_row(*cells, "", "", *work)
            continue
        generate = of.get((GENERATE, each.catalogue, "full"))
        table.add_row(
            *cells, f"{ratio(own, of[each.name, cases[0].name, each.score]):.2f}",
            f"{ratio(generate, own):.1f}" if generate else "–", *work, *certainty(each.rankings),
            rounded(recall(each.items, truth[each.catalogue, each.score], k)),
        )  # fmt: skip
    return table


def rounded(share: float | None) -> str:
    return "–" if share is None else f"{share:.4f}"


def certainty(rankings: Sequence[Ranking]) -> tuple[str, str]:
    """Expansions and the share of exact answers."""
    if not rankings:
        return "–", "–"
    expansions = [ranking.expansions for ranking in rankings]
    exact = np.mean([ranking.exact for ranking in rankings])
    return f"{np.mean(expansions):.1f}/{max(expansions)}", f"{exact:.1%}"


def quality_table(
    served: Served, case: Case, budgets: Sequence[int], widths: Sequence[int], batch: int, repeats: int
) -> Table:
    """What each budget and width buys, for the first ten of the bundle's own catalogue."""
    k, prompts = 10, served.prompts[: len(case.truth["valid"])]
    made = prefills(served.backbone)
    for score in ("valid", "full"):
        for budget in budgets:
            search = served.tree(case.trie, k, score, node_budget=budget)
            made.append(Contender(f"exact, budget {budget}", case.name, score, search))
        for width in widths:
            search = served.tree(case.trie, k, score, width=width)
            made.append(Contender(f"exact, width {width}", case.name, score, search))
            search = served.tree(case.trie, k, score, mode="beam", width=width)
            made.append(Contender(f"beam, width {width}", case.name, score, search))
            masked = served.masked(case.masks, width, score)
            made.append(Contender(f"masked beams, {width}", case.name, score, masked))
    seconds = timed(served, made, batched(prompts, batch), repeats)

    table = Table(
        "contender", "score", "ms a history min/median/max", "x prefill", "expansions mean/max", "exact", "recall@10",
        "HR@10", "NDCG@10", title=f"{case.name} items, {len(prompts)} histories, batches of {batch}",
    )  # fmt: skip
    for each, own in zip(made, seconds, strict=True):
        cells = [
            each.name,
            each.score,
            milliseconds([s / len(prompts) for s in own], ".2f"),
            f"{ratio(own, seconds[0]):.2f}",
        ]
        if each.catalogue:
            top = [items[:k] for items in each.items]
            cells += [*certainty(each.rankings), rounded(recall(top, case.truth[each.score], k))]
            ranks = ranks_of(top, served.targets[: len(prompts)])
            cells += [f"{values.mean():.4f}" for values in metric_values(ranks, [k]).values()]
        table.add_row(*cells)
    return table


def ranks_of(lists: Sequence[np.ndarray], targets: np.ndarray) -> np.ndarray:
    """int64 [M]; the target's place in each list, 1 = first, 0 = not there."""
    places = [np.flatnonzero(items == target) for items, target in zip(lists, targets, strict=True)]
    return np.array([int(at[0]) + 1 if len(at) else 0 for at in places])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True, help="a trained language model: name, name@version, or path")
    parser.add_argument("--run", help="a model whose validation histories are asked; default: the bundle itself")
    parser.add_argument("--width", type=int, help="nodes expanded a forward; default: the bundle's")
    parser.add_argument("--items", type=int, nargs="*", default=[17_000, 100_000, 1_000_000], help="simulated")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--k", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--histories", type=int, default=8, help="for latency; a batch at least")
    parser.add_argument("--quality-histories", type=int, default=128)
    parser.add_argument("--budgets", type=int, nargs="+", default=[10, 30, 100, 400], help="nodes, of the last table")
    parser.add_argument("--widths", type=int, nargs="+", default=[5, 10, 20, 50], help="of the last table")
    parser.add_argument(
        "--exhaustive", type=int, default=8, help="histories whose unproven truth is scored item by item"
    )
    parser.add_argument("--truth-budget", type=int, default=1500, help="nodes that a proof may take")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--without-generate", action="store_true", help="which takes most of the time")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        bundle, run = find_bundle(args.bundle), find_bundle(args.run or args.bundle)
        served = Served.load(bundle, run, args.quality_histories, args.device, args.width)
    except UserError as error:
        parser.error(str(error))
    own = len(served.recommender.catalogue)
    if any(items <= own for items in args.items):
        parser.error(f"--items: the bundle's own catalogue has {own:,} already; name larger ones, or none")
    console, asked = Console(width=190), max(args.histories, *args.batch)
    console.print(
        f"{len(served.prompts)} histories of {np.mean([len(prompt) for prompt in served.prompts]):.0f} tokens; "
        f"{served.configs['valid']}; {args.threads} threads; {args.repeats} rounds in turns"
    )
    cases = [make_case(served, None, args.quality_histories, max(args.k), args.truth_budget, args.exhaustive)]
    cases += [make_case(served, items, asked, max(args.k), args.truth_budget) for items in args.items]
    console.print(catalogues_table(cases))
    for batch in args.batch:
        for k in args.k:
            console.print(
                latency_table(served, cases, batch, k, args.histories, args.repeats, not args.without_generate)
            )
    console.print(quality_table(served, cases[0], args.budgets, args.widths, max(args.batch), args.repeats))


if __name__ == "__main__":
    main()

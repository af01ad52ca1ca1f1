"""Where the time of a search goes: into the model's matrix products, and into all that is not.

    python -m benchmarks.profile_search --bundle demo

Histories are drawn as in `benchmarks.search`. The first table times, in turns and without the profiler, the bare
prefill, padded and packed, and the search: with nothing kept of how prompts begin, with the instruction kept, and with
every history kept but for its last item, as if each user came back with one item more.

The second splits the search with nothing kept under the profiler, each figure the least of all rounds. The profiler's
own cost falls on operators and on the Python between them: read shares rather than milliseconds. A step of the search
waits for the device once, to learn the sizes of the next; `waits` counts what would make a GPU wait beyond that.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.search import Contender, Served, batched, prefills, timed
from benchmarks.timing import milliseconds, ratio
from recommender.backbone.backbone import Backbone, cast
from recommender.config import TEMPLATES, PromptConfig
from recommender.errors import UserError
from recommender.items.prompt import Prompt
from recommender.models import find_bundle
from recommender.search.prefixes import Prefixes
from recommender.search.search import TreeSearch

FORWARD = "forward"
PREFILLS, EXPANSIONS = "prefill", "expansions"
LOGITS, CHOOSE, EXPAND = "logits", "choice of nodes", "tokens and masks of a step"
RECEIVE, REST = "scores and merge of children", "the rest"
PARTS = (PREFILLS, EXPANSIONS, LOGITS, CHOOSE, EXPAND, RECEIVE, REST)
PRODUCTS, ATTENTION, OTHER, PYTHON = "matrix products", "attention", "other operators", "Python"
KINDS = (PRODUCTS, ATTENTION, OTHER, PYTHON)
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm"}
_WAITS = {"aten::_local_scalar_dense", "aten::nonzero"}


class SpannedBackbone(Backbone):
    """A backbone whose forwards the profiler knows by name."""

    def appended(self, *args: Any) -> torch.Tensor:
        with record_function(FORWARD):
            return super().appended(*args)

    def logits(self, *args: Any) -> torch.Tensor:
        with record_function(LOGITS):
            return super().logits(*args)

    def logits_of(self, *args: Any) -> torch.Tensor:
        with record_function(LOGITS):
            return super().logits_of(*args)

    def logits_among(self, *args: Any) -> torch.Tensor:
        with record_function(LOGITS):
            return super().logits_among(*args)


class SpannedSearch(TreeSearch):
    """A search whose parts the profiler knows by name."""

    def _choose(self, *args: Any) -> Any:
        with record_function(CHOOSE):
            return super()._choose(*args)

    def _expand(self, *args: Any) -> None:
        with record_function(EXPAND):
            super()._expand(*args)

    def _receive(self, *args: Any) -> None:
        with record_function(RECEIVE):
            super()._receive(*args)


_SPANS = {FORWARD, CHOOSE, EXPAND, RECEIVE, LOGITS}


def part_of(event: FunctionEvent) -> str:
    """The part of the search that an event belongs to."""
    spans = []
    at: FunctionEvent | None = event
    while at is not None:
        if at.name in _SPANS:
            spans.append(at.name)
        at = at.cpu_parent
    if not spans:
        return REST
    return (EXPANSIONS if EXPAND in spans else PREFILLS) if spans[0] == FORWARD else spans[0]


def kind_of(event: FunctionEvent) -> str:
    """What an event's own time is spent on."""
    if event.name in _PRODUCTS:
        return PRODUCTS
    if "scaled_dot_product" in event.name:
        return ATTENTION
    return OTHER if event.name.startswith("aten::") else PYTHON


def profiled(run: Callable[[], object], rounds: int) -> tuple[dict[tuple[str, str], float], Counter[str], Counter[str]]:
    """Milliseconds by part and kind, the least of all rounds; operators by part, waits by part."""
    least: dict[tuple[str, str], float] = {}
    for _ in range(rounds):
        with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function(REST):
            run()
        spent, operators, waits = dict.fromkeys(product(PARTS, KINDS), 0.0), Counter[str](), Counter[str]()
        for event in profiler.events() or []:
            part, kind = part_of(event), kind_of(event)
            spent[part, kind] += event.self_cpu_time_total / 1e3
            operators[part] += kind != PYTHON
            waits[part] += event.name in _WAITS
        least = {key: min(value, least.get(key, value)) for key, value in spent.items()}
    return least, operators, waits


def parts_table(of: dict[tuple[str, str], float], operators: Counter[str], waits: Counter[str], number: int) -> Table:
    """The profile of one batch, part by part."""
    table = Table("part", "ms", "share", *KINDS, "operators", "waits", title="one batch under the profiler")
    whole = sum(of.values())
    for part in PARTS:
        own = sum(of[part, kind] for kind in KINDS)
        kinds = [f"{of[part, kind] / number:.2f}" for kind in KINDS]
        counts = [f"{count[part] / number:.0f}" for count in (operators, waits)]
        table.add_row(part, f"{own / number:.2f}", f"{own / whole:.0%}", *kinds, *counts)
    kinds = [f"{sum(of[part, kind] for part in PARTS) / whole:.0%}" for kind in KINDS]
    counts = [f"{sum(count.values()) / number:.0f}" for count in (operators, waits)]
    table.add_row("all", f"{whole / number:.2f}", "100%", *kinds, *counts)
    return table


def prompt_of(served: Served, template: str | None) -> Prompt:
    """The bundle's own prompt, or one of another template."""
    space = served.recommender.space
    if template is None:
        return space.prompt
    return Prompt(PromptConfig.model_validate({"template": template}), space.tokenizer, space.identifiers)


def contenders(served: Served, prompt: Prompt, k: int) -> list[Contender]:
    """The bare prefills, and the search with more and more kept of how its prompts begin."""
    trie, backbone = served.recommender.space.trie, served.backbone
    kept = Prefixes(backbone, prompt.prefix, len(prompt.suffix), max_bytes=2**40)
    made = prefills(backbone)
    for name, prefixes in (
        ("exact, nothing kept", None),
        ("exact, instruction kept", Prefixes(backbone, prompt.prefix)),
        ("exact, histories kept but for the last item", kept),
    ):
        search = TreeSearch(backbone, trie, served.configs["valid"], prefixes)
        made.append(Contender(name, "", "valid", partial(search.search, k=k)))
    search.search([prompt.encode(history[-prompt.config.history : -1]) for history in served.histories], k)
    kept.max_bytes = 0  # no more is kept: every round is answered from the same
    return made


def times_table(made: Sequence[Contender], seconds: Sequence[Sequence[float]], number: int) -> Table:
    """Milliseconds and work a batch, without the profiler."""
    table = Table("contender", "ms a batch min/median/max", "x prefill", "forwards", "tokens", "expansions")
    for each, own in zip(made, seconds, strict=True):
        table.add_row(
            each.name,
            milliseconds([s / number for s in own]),
            f"{ratio(own, seconds[0]):.2f}",
            f"{each.forwards / number:.1f}",
            f"{each.tokens / number:,.0f}",
            f"{sum(ranking.expansions for ranking in each.rankings) / number:.0f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True, help="a trained language model: name, name@version, or path")
    parser.add_argument("--run", help="a model whose validation histories are asked; default: the bundle itself")
    parser.add_argument("--width", type=int, help="nodes expanded a forward; default: the bundle's")
    parser.add_argument("--template", choices=TEMPLATES, help="a prompt other than the bundle's, for what words cost")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], help="of the weights; default: as saved")
    parser.add_argument("--histories", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        bundle, run = find_bundle(args.bundle), find_bundle(args.run or args.bundle)
        served = Served.load(bundle, run, args.histories, "cpu", args.width)
    except UserError as error:
        parser.error(str(error))
    if args.precision:
        cast(served.backbone.model, getattr(torch, args.precision))
    prompt = prompt_of(served, args.template)
    prompts = [prompt.encode(history) for history in served.histories]
    batches, console = batched(prompts, args.batch), Console(width=170)
    console.print(
        f"{len(prompts)} histories, {np.mean([len(each) for each in prompts]):.0f} tokens a prompt, "
        f"{len(prompt.prefix)} of them the instruction; batches of {args.batch}, K = {args.k}, {args.threads} threads"
    )
    made = contenders(served, prompt, args.k)
    console.print(times_table(made, timed(served, made, batches, args.repeats), len(batches)))

    backbone = SpannedBackbone(served.backbone.model, served.backbone.tokenizer)
    search = SpannedSearch(backbone, served.recommender.space.trie, served.configs["valid"])
    found = profiled(lambda: [search.search(batch, args.k) for batch in batches], args.repeats)
    console.print(parts_table(*found, len(batches)))


if __name__ == "__main__":
    main()

"""What the endpoint serves under load, beside what Serve alone costs, `generate` behind Serve, and the bare search.

    python -m benchmarks.serving --bundle demo
    python -m benchmarks.serving --bundle demo --seconds 60 --clients 1 8 32 --soak 60

All run on a local Ray Serve, one replica each, and are asked from another process over connections that are kept, in
turn, with the same requests: a seeded sample of the run's validation histories, nothing filtered, as `generate` has no
filters.

- empty: a FastAPI app that returns a constant. No endpoint on Serve can do with less.
- reading: the same, once it has received the body of its request.
- ilrec: the endpoint with its default limits.
- generate: the same model, K beams with `prefix_allowed_tokens_fn` over a marisa-trie, batched by `serve.batch`.
- bare search: the search that ilrec's replica runs, in this process, in batches of the mean size that was seen there.

First closed loops: N clients that ask again as soon as they are answered. Below that of one client stands what ilrec
adds to its search, in milliseconds and in empty endpoints. Then, for each endpoint, an open loop at 70 %
of the most answers a second that it gave: latency counts from when a request was due. Latencies are of status 200;
the others are counted. `--soak` goes on with ilrec's open loop and prints by the minute what memory Serve's processes
hold.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import cycle, islice

import psutil
import torch
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from rich.console import Console
from rich.table import Table

from benchmarks.endpoints import Empty, Generating
from benchmarks.load import Closed, Measured, Open, Plan, measure
from recommender.errors import UserError
from recommender.models import find_bundle
from recommender.recommender import Recommender
from service.app import run
from service.config import ServingConfig
from trainer.cluster import connect
from trainer.data.dataset import Dataset
from trainer.evaluation.ranking import held_out
from trainer.run import prepared_of

EMPTY, READING, ILREC, GENERATE, BARE = "empty", "reading", "ilrec", "generate", "bare search"
PATHS = {EMPTY: "/empty/", READING: "/empty/read", ILREC: "/v1/recommendations", GENERATE: "/generate/"}
SHARE = 0.7  # of the capacity, in open loops
HOST = "127.0.0.1"

Asked = Callable[[str, Closed | Open], Measured]


def bare_search(
    recommender: Recommender, histories: Sequence[Sequence[int]], k: int, batch: int, seconds: float
) -> Measured:
    """The search in this process, batch after batch."""
    waiting = cycle(histories)
    recommender.recommend(list(islice(waiting, batch)), k)
    latencies: list[float] = []
    begin = now = time.perf_counter()
    while now - begin < seconds:
        started = now
        recommender.recommend(list(islice(waiting, batch)), k)
        now = time.perf_counter()
        latencies += [now - started] * batch
    return Measured(latencies=latencies, refused={}, seconds=now - begin)


class Replica:
    """The endpoint's replica, by what it says at `/metrics`."""

    def __init__(self, port: int) -> None:
        self._url = f"http://{HOST}:{port}/metrics"
        self._seen = (0.0, 0.0)

    def mean_batch(self) -> float:
        """Requests searched together, since this was asked last."""
        families = text_string_to_metric_families(self._text())
        samples = [sample for family in families for sample in family.samples]
        queries, batches = (
            sum(sample.value for sample in samples if sample.name == f"ilrec_batch_size_{name}")
            for name in ("sum", "count")
        )
        before, self._seen = self._seen, (queries, batches)
        return (queries - before[0]) / max(batches - before[1], 1)

    def _text(self) -> str:
        with urllib.request.urlopen(self._url, timeout=60) as response:
            text: str = response.read().decode()
            return text


def row(name: str, measured: Measured, base: Measured, batch: float | None = None) -> list[str]:
    """Cells of a table: what was measured, and how many times as much as `base`."""
    middle = measured.percentile(50)
    cells = [name, f"{measured.rate:.1f}", *(f"{measured.percentile(share):.1f}" for share in (50, 95, 99))]
    cells += [f"{measured.rate / base.rate:.2f}" if base.rate else "–", f"{middle / base.percentile(50):.2f}"]
    refused = ", ".join(f"{number} × {status}" for status, number in sorted(measured.refused.items()))
    return [*cells, "–" if batch is None else f"{batch:.1f}", refused or "0"]


def table(title: str) -> Table:
    return Table(
        "", "requests/s", "p50 ms", "p95 ms", "p99 ms", "requests/s × ilrec's", "p50 × ilrec's", "mean batch",
        "refused", title=title,
    )  # fmt: skip


def added(asked: Measured, searched: Measured, empty: Measured, reading: Measured) -> str:
    """What an endpoint adds to its search, beside what endpoints cost that do nothing; by the medians."""
    more = asked.percentile(50) - searched.percentile(50)
    return (
        f"added to the bare search: {more:.1f} ms, {more / empty.percentile(50):.2f} × an empty endpoint, "
        f"{more / reading.percentile(50):.2f} × one that reads its body"
    )


def closed_loop(
    ask: Asked, replica: Replica, bare: Callable[[int], Measured], names: Sequence[str], clients: int
) -> tuple[Table, dict[str, float]]:
    """What a number of clients get, and the answers a second by endpoint."""
    replica.mean_batch()
    measured = {name: ask(name, Closed(clients=clients)) for name in names}
    batch = replica.mean_batch()
    size = max(1, round(batch))
    shown = table(f"closed loop, {clients} clients")
    for name, each in measured.items():
        shown.add_row(*row(name, each, measured[ILREC], batch if name == ILREC else None))
    searched = bare(size)
    shown.add_row(*row(BARE, searched, measured[ILREC], size))
    if clients == 1:  # of more, most of a latency is waiting for others' searches
        shown.caption = added(measured[ILREC], searched, measured[EMPTY], measured[READING])
    return shown, {name: each.rate for name, each in measured.items()}


def open_loops(ask: Asked, replica: Replica, rates: Mapping[str, float]) -> Table:
    """What requests get that come at these rates."""
    replica.mean_batch()
    measured = {name: ask(name, Open(rate=rate)) for name, rate in rates.items()}
    batch = replica.mean_batch()
    shown = table(f"open loops, each at {SHARE:.0%} of its capacity")
    for name, each in measured.items():
        shown.add_row(*row(name, each, measured[ILREC], batch if name == ILREC else None))
    return shown


def memory() -> dict[str, float]:
    """MiB resident in each of Serve's processes on the Ray that was started here, by what they run."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # Ray's idle workers come and go
            title = re.match(r"ray::(?:ServeReplica:\w+:)?(\w+)", " ".join(process.cmdline()))
            if title and ("ServeReplica" in title[0] or title[1] in ("ServeController", "ProxyActor")):
                found[title[1]] = process.memory_info().rss / 2**20
    return found


def soak(ask: Callable[[float], Measured], minutes: float) -> Table:
    """An open loop that goes on: what it got and what Serve's processes held, minute by minute after a warm-up."""
    rows = max(1, round(minutes))
    lengths = [6 * minutes, *[60 * minutes / rows] * rows]
    names = sorted(memory())
    shown = Table("minute", "requests/s", "p50 ms", "p99 ms", "refused", *(f"{each} MiB" for each in names))
    shown.title = f"soak: {minutes:g} minutes after a warm-up of {6 * minutes:g} s"
    held = []
    for minute, seconds in enumerate(lengths):
        measured = ask(seconds)
        held.append(dict.fromkeys(names, float("nan")) | memory())  # one may be about to be replaced
        figures = [f"{value:.1f}" for value in (measured.rate, measured.percentile(50), measured.percentile(99))]
        figures.append(str(sum(measured.refused.values())))
        shown.add_row(str(minute or "warm-up"), *figures, *(f"{held[-1][name]:.1f}" for name in names))
    growth = [f"{held[-1][name] / held[0][name] - 1:+.1%}" for name in names]
    shown.add_row("growth after warm-up", "", "", "", "", *growth)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True, help="a trained language model: name, name@version, or path")
    parser.add_argument("--run", help="a model whose validation histories are asked; default: the bundle itself")
    parser.add_argument("--histories", type=int, default=256)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="of the closed loops")
    parser.add_argument("--seconds", type=float, default=20, help="that each loop is counted")
    parser.add_argument("--warm-up", type=float, default=3, help="seconds before each count")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="go on with ilrec's open loop")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="of each replica")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--without-generate", action="store_true", help="which takes long to answer")
    args = parser.parse_args()

    console = Console(width=160)
    config = ServingConfig(host=HOST, port=args.port, threads=args.threads)
    torch.set_num_threads(args.threads)  # of the bare search, as of a replica's
    try:
        bundle = find_bundle(args.bundle)
        recommender = Recommender.load(bundle)
        dataset = Dataset.load(prepared_of(find_bundle(args.run or args.bundle)).dataset)
        if dataset.item_ids != recommender.catalogue.item_ids:
            raise UserError(f"{args.bundle} and {args.run} are of different catalogues")
        split = held_out(dataset, "validation", args.histories)
        histories = [history[-config.max_history :].tolist() for history in split.histories]
        connect(num_cpus=args.threads + 2)
        run([bundle], config, blocking=False)
    except UserError as error:
        parser.error(str(error))
    named = [[dataset.item_ids[item] for item in history] for history in histories]
    bodies = [json.dumps({"history": each, "k": args.k, "exclude_seen": False}) for each in named]

    def ask(name: str, loop: Closed | Open, seconds: float = args.seconds) -> Measured:
        plan = Plan(
            host=HOST, port=args.port, path=PATHS[name], bodies=bodies, loop=loop, warm_up=args.warm_up, seconds=seconds
        )
        return measure(plan)

    try:
        names = [EMPTY, READING, ILREC] + ([] if args.without_generate else [GENERATE])
        serve.run(Empty.bind(), name=EMPTY, route_prefix="/empty")  # type: ignore[attr-defined]  # decorated
        if not args.without_generate:
            generating = Generating.bind(str(bundle), args.k, args.threads)  # type: ignore[attr-defined]
            serve.run(generating, name=GENERATE, route_prefix="/generate")
        replica = Replica(args.port)
        console.print(f"{len(bodies)} histories, K = {args.k}, {args.threads} threads, {args.seconds:g} s a loop")
        bare = partial(bare_search, recommender, histories, args.k, seconds=args.seconds)
        rates = dict.fromkeys(names, 0.0)
        for clients in args.clients:
            shown, seen = closed_loop(ask, replica, bare, names, clients)
            console.print(shown)
            rates = {name: max(rate, SHARE * seen[name]) for name, rate in rates.items()}
        if silent := [name for name, rate in rates.items() if not rate]:
            raise UserError(f"{', '.join(silent)}: answered nothing in time; give it more --seconds or --warm-up")
        console.print(open_loops(ask, replica, rates))
        if args.soak is not None:
            console.print(soak(lambda seconds: ask(ILREC, Open(rate=rates[ILREC]), seconds), args.soak))
    except UserError as error:
        parser.error(str(error))
    finally:
        serve.shutdown()


if __name__ == "__main__":
    main()

"""`ilrec demo`: an experiment end to end, ending with a served recommendation."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from recommender.bundle import read_manifest
from recommender.files import read_json, write_json
from recommender.models import Version
from trainer.data.dataset import Dataset
from trainer.evaluation.evaluation import Report, evaluate
from trainer.evaluation.floors import floors_of
from trainer.evaluation.ranking import held_out
from trainer.evaluation.standing import NAMES, standing
from trainer.experiment import Experiment
from trainer.fit import check_model, train
from trainer.parts import Prepared, Say
from trainer.prepare import prepare, world_of
from trainer.reporting.report import write_report


def run(experiment: Experiment, say: Say = print, fresh: bool = False) -> dict[str, Any]:
    """Prepare, train, evaluate, serve, ask once; print and save (`summary.json`) what was seen.

    Returns:
        The summary: seconds by stage, data statistics, metrics by system, the recommendation, where things lie.
    """
    seconds: dict[str, float] = {}

    def timed(stage: str, function: Any, *arguments: Any) -> Any:
        say(f"── {stage}")
        started = time.monotonic()
        result = function(*arguments)
        seconds[stage] = round(time.monotonic() - started, 1)
        return result

    check_model(experiment)
    prepared: Prepared = timed("prepare", prepare, experiment, say)
    version: Version = timed("train", train, experiment, prepared, say, fresh)
    report, saved = timed(
        "evaluate",
        evaluate,
        version.bundle,
        prepared.dataset,
        "test",
        experiment.evaluation,
        experiment.cluster,
        say,
        experiment.search.unblended(),
        floors_of(experiment),
    )
    page = write_report(experiment, version.directory, prepared)
    history, answer = timed("serve", ask, experiment, version.bundle, Dataset.load(prepared.dataset))

    metrics = dict(report.metrics)
    if experiment.world is not None:
        metrics["oracle"] = read_json(world_of(experiment) / "oracle.json")["test"]["oracle"]
    print_recommendation(history, answer)
    print_report(metrics, report.intervals)
    print_audience(report)
    summary = {
        "name": experiment.name,
        "metrics": metrics,
        "intervals": report.intervals,
        "validation": read_manifest(version.bundle).metrics,
        "exact_rate": report.exact_rate,
        "invalid_rate": report.invalid_rate,
        "expansions": report.expansions,
        "seconds": seconds,
        "data": prepared.stats(),
        "request": {"history": history, "response": answer},
        "paths": {
            "data": str(prepared.dataset),
            "bundle": str(version.bundle),
            "evaluation": str(saved.directory),
        },
    }
    path = version.directory / "summary.json"
    write_json(path, summary)
    say("seconds: " + ", ".join(f"{stage} {value}" for stage, value in seconds.items()))
    say(f"everything lies in {version.directory}")
    say(f"  report      {page}\n  bundle      {version.bundle}\n  evaluation  {saved.directory}\n  summary     {path}")
    say(f"serve it: ilrec serve {version}")
    say(f"test: {standing(report.metrics, report.differences)}")
    return summary


def ask(experiment: Experiment, bundle: Path, dataset: Dataset) -> tuple[list[str], dict[str, Any]]:
    """Serve the bundle, post the first test history, stop serving. Returns the history's titles and the answer."""
    from ray import serve

    from service.app import run as run_service
    from service.client import Client
    from service.schema import RecommendationRequest

    here = {"host": "127.0.0.1", "port": _free_port(), "token_file": None, "token_variable": None, "feedback_log": None}
    serving = experiment.serving.model_copy(update=here)
    run_service([bundle], serving, blocking=False)
    items = held_out(dataset, "test").histories[0][-serving.max_history :]
    request = RecommendationRequest(history=[dataset.item_ids[i] for i in items], k=min(10, serving.max_k))
    try:
        with Client(f"http://{serving.host}:{serving.port}", timeout=60) as client:
            answer = client.recommend(request)
    finally:
        serve.shutdown()
    return [dataset.titles[i] for i in items], answer.model_dump()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def print_recommendation(history: list[str], answer: dict[str, Any]) -> None:
    """The history and the served list, as tables."""
    console = Console()
    table = Table("history (oldest first)", title="POST /v1/recommendations")
    for title in history[-10:]:
        table.add_row(title)
    console.print(table)
    table = Table("rank", "score", "recommended title")
    for item in answer["items"]:
        table.add_row(str(item["rank"]), f"{item['score']:.3f}", item["title"])
    console.print(table)


def print_report(metrics: dict[str, dict[str, float]], intervals: dict[str, dict[str, tuple[float, float]]]) -> None:
    """Metrics by system, with their intervals where they were bootstrapped."""
    table = Table("metric", *(NAMES.get(system, system) for system in metrics), title="full ranking")
    for name in metrics["model"]:
        cells = []
        for system, values in metrics.items():
            low_high = intervals.get(system, {}).get(name)
            interval = f" [{low_high[0]:.4f}, {low_high[1]:.4f}]" if low_high else ""
            cells.append(f"{values[name]:.4f}{interval}" if name in values else "–")
        table.add_row(name, *cells)
    Console().print(table)


def print_audience(report: Report) -> None:
    """NDCG@10 by kind of target and by policy, what lists are made of, and what could be reached."""
    console = Console()
    systems = list(report.metrics)
    table = Table("NDCG@10 of …", "targets", *(NAMES[system] for system in systems), title="for whom")
    for labels in report.segments.values():
        for label, of in labels.items():
            table.add_row(label, f"{of['model']['targets']:,}", *(f"{of[system]['NDCG@10']:.4f}" for system in systems))
    for policy, of in report.policies.items():
        values = (f"{of[system]['NDCG@10']:.4f}" if system in of else "–" for system in systems)
        table.add_row(policy, f"{report.targets:,}", *values)
    console.print(table)
    table = Table("lists of 10", *(NAMES[system] for system in report.lists), title="what they are made of")
    for name in report.lists["model"]:
        table.add_row(name, *(f"{figures[name]:.3f}" for figures in report.lists.values()))
    console.print(table)
    if chosen := report.candidates:
        of = ", ".join(f"{NAMES[system]} {figures['HR@1']:.4f}" for system, figures in chosen["systems"].items())
        valid = min(figures["valid"] for figures in chosen["systems"].values())
        console.print(
            f"HR@1 of {chosen['items']:g} candidates ({chosen['targets']:,} targets): {of}; valid ratio {valid:g}, as "
            "nothing but the candidates is scored"
        )
    found = report.reachable
    console.print(
        f"{found['unseen']:.1%} of the targets are unseen in training, {found['seen']:.1%} stand in their own history; "
        f"the best list of items that training has seen would name {found['known_items']:.1%}"
    )

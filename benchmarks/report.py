"""What a study found, as values and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.config import as_override
from benchmarks.runs import Run, Study
from benchmarks.statistics import paired_difference
from recommender.errors import UserError
from recommender.metrics import metric_values
from trainer.evaluation.standing import NAMES

COMPARED = ("NDCG@10", "HR@10")
SHOWN = ("HR@5", "HR@10", "NDCG@10")

Values = dict[str, np.ndarray]


def make_report(study: Study) -> dict[str, Any]:
    """All figures of the methods that are finished; the others are named under `unfinished`.

    Raises:
        UserError: two runs did not rank the same targets.
    """
    config = study.config
    finished = {
        method: runs
        for method in config.methods
        if (runs := study.finals(method)) and all(run.is_tested for run in runs)
    }
    report: dict[str, Any] = {
        "study": study.name,
        "base": config.base,
        "set": config.set,
        "seeds": list(config.seeds),
        "metric": config.metric,
        "budget": config.budget,
        "reference": config.reference,
        "unfinished": [method for method in config.methods if method not in finished],
        "methods": {},
    }
    if not finished:
        return report
    targets, values, floors = _per_target(finished)
    users = targets["user_id"].to_numpy(zero_copy_only=False)
    report |= {"targets": len(users), "users": len(np.unique(users))}
    report["floors"] = {
        floor: {"test": {metric: float(each.mean()) for metric, each in of.items()}} for floor, of in floors.items()
    }
    for method, runs in finished.items():
        report["methods"][method] = _row(study, method, runs, values[method])
    if config.reference in finished:
        compared = [(report["methods"][method], values[method]) for method in finished.keys() - {config.reference}]
        for row, of in [*compared, *((report["floors"][floor], of) for floor, of in floors.items())]:
            row["difference"] = {
                metric: _difference(of[metric], values[config.reference][metric], users) for metric in COMPARED
            }
    return report


def _per_target(finished: dict[str, list[Run]]) -> tuple[pa.Table, dict[str, Values], dict[str, Values]]:
    """The targets, and by method and metric the per-target values [seeds, targets]; by floor the same [1, targets]."""
    targets: pa.Table | None = None
    values: dict[str, Values] = {}
    floors: dict[str, Values] = {}
    for method, runs in finished.items():
        ranks = []
        for run in runs:
            path = run.evaluation.per_target
            table = pq.read_table(path)
            who = table.select(["user_id", "target_item_id"])
            targets = who if targets is None else targets
            if not targets.equals(who):
                raise UserError(
                    f"{path}: not the targets that the other runs ranked; the data have changed since. Remove the "
                    "directories of the runs on the old data, or give the study another name"
                )
            ranks.append(table["rank"].to_numpy())
            for floor in NAMES:  # the same in each, but that a method which is a floor has none of itself beside it
                if floor not in floors and f"{floor}_rank" in table.column_names:
                    floors[floor] = metric_values(table[f"{floor}_rank"].to_numpy()[None], [5, 10])
        cutoffs = [int(name.removeprefix("HR@")) for name in runs[0].test["metrics"]["model"] if name.startswith("HR@")]
        values[method] = metric_values(np.stack(ranks), sorted({5, 10, *cutoffs}))
    assert targets is not None
    return targets, values, floors


def _row(study: Study, method: str, runs: Sequence[Run], values: Values) -> dict[str, Any]:
    config, trial = study.config, runs[0].trial
    return {
        "of": config.methods[method].of,
        "trial": trial,
        "trials": len(config.methods[method].trials),
        "settings": config.settings(method, trial),
        "tuning": [run.validation(config.metric) for run in study.trials(method)],
        "validation": _over_seeds([run.validation(config.metric) for run in runs]),
        "test": {metric: _over_seeds(each.mean(axis=1)) for metric, each in values.items()},
        "seconds": float(np.mean([run.seconds for run in runs])),
        "exact_rate": min(run.test["exact_rate"] for run in runs),
        "invalid_rate": max(run.test["invalid_rate"] for run in runs),
    }


def _over_seeds(values: Sequence[float] | np.ndarray) -> dict[str, float | None]:
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "deviation": deviation}


def _difference(values: np.ndarray, reference: np.ndarray, users: np.ndarray) -> dict[str, Any]:
    found = paired_difference(values, reference, users)
    base = float(reference.mean())
    return {
        "mean": found.mean,
        "share": found.mean / base if base else None,
        "interval": list(found.interval),
        "standard_error": found.standard_error,
        "detectable": found.detectable,
        "detectable_share": found.detectable / base if base else None,
    }


def write_report(report: dict[str, Any], directory: Path) -> None:
    """`report.json` and `report.md` in a study's directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.json").write_text(json.dumps(report, indent=2))
    (directory / "report.md").write_text(as_markdown(report))


# -- As Markdown -------------------------------------------------------------------------------------------------------


def as_markdown(report: dict[str, Any]) -> str:
    """Two tables: the methods, and their differences to the reference."""
    parts = [f"# Study `{report['study']}`\n"]
    if report["methods"]:
        parts += [_about(report), _methods(report), _choices(report), _differences(report)]
    if report["unfinished"]:
        parts.append(f"Not finished: {', '.join(report['unfinished'])}.\n")
    return "\n".join(parts)


def _about(report: dict[str, Any]) -> str:
    return (
        f"`{report['base']}`, {report['targets']:,} test targets of {report['users']:,} users, training seeds "
        f"{', '.join(map(str, report['seeds']))}. {report['budget']} trials a tuned method at the first seed; "
        f"validation {report['metric']} chose one. Means over seeds ± their standard deviation.\n"
    )


def _methods(report: dict[str, Any]) -> str:
    metric = report["metric"]
    header = ["method", "trial", f"validation {metric}", *SHOWN, "training, s"]
    rows = []
    for name, row in report["methods"].items():
        trial = f"{row['trial']} (of {row['of']})" if row["of"] else f"{row['trial']} of {row['trials']}"
        shown = [_spread(row["test"][each]) for each in SHOWN]
        rows.append([name, trial, _spread(row["validation"]), *shown, f"{row['seconds']:.0f}"])
    for floor, row in report["floors"].items():
        rows.append([NAMES[floor], "floor", "", *(f"{row['test'][each]:.4f}" for each in SHOWN), ""])
    exact = min(row["exact_rate"] for row in report["methods"].values())
    invalid = max(row["invalid_rate"] for row in report["methods"].values())
    note = f"Proven exact: at least {exact:.1%} of any run's lists. Invalid: at most {invalid:.1%} of their items.\n"
    return _table(header, rows) + "\n" + note


def _choices(report: dict[str, Any]) -> str:
    lines = []
    for name, row in report["methods"].items():
        own = {path: value for path, value in row["settings"].items() if report["set"].get(path) != value}
        settings = ", ".join(as_override(path, value) for path, value in own.items())
        lines.append(f"- {name}: `{settings}`" + (f"; trials {_list(row['tuning'])}" if not row["of"] else ""))
    return f"What was chosen, and validation {report['metric']} of the trials:\n\n" + "\n".join(lines) + "\n"


def _differences(report: dict[str, Any]) -> str:
    floors = {NAMES[floor]: row for floor, row in report["floors"].items()}
    rows_of = {**report["methods"], **floors}
    compared = {name: row["difference"] for name, row in rows_of.items() if "difference" in row}
    if not compared:
        return ""
    header = ["method"]
    for metric in COMPARED:
        header += [metric, "95 % interval", "detectable"]
    rows = []
    for name, difference in compared.items():
        row = [name]
        for metric in COMPARED:
            found = difference[metric]
            low, high = found["interval"]
            mean = f"{found['mean']:+.4f}{_percent(found['share'], '+')}"
            row += [
                f"**{mean}**" if low > 0 or high < 0 else mean,
                f"[{low:+.4f}, {high:+.4f}]",
                f"{found['detectable']:.4f}{_percent(found['detectable_share'])}",
            ]
        rows.append(row)
    return (
        f"## Difference to {report['reference']}\n\n"
        + _table(header, rows)
        + "\nBold: the interval leaves out 0. Intervals: paired bootstrap over users and seeds, each comparison by "
        "itself. Detectable: the smallest true difference that a study of this size would find in 80 % of cases.\n"
    )


def _spread(value: dict[str, float | None]) -> str:
    deviation = value["deviation"]
    return f"{value['mean']:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")


def _percent(share: float | None, sign: str = "") -> str:
    return "" if share is None else f" ({share:{sign}.1%})"


def _list(values: Sequence[float]) -> str:
    return " / ".join(f"{value:.4f}" for value in values)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

"""`ilrec runs`: tables of runs, of what tells them apart, and of what can go."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from recommender.errors import UserError
from trainer.reporting.runs import Run, differences, find_runs, named_run, prunable, remove, size

Say = Callable[[str], None]


def print_runs(storage: Path, say: Say) -> None:
    """A row for each run of a storage, the latest last; what is none is named below."""
    runs, notes = find_runs(storage)
    table = Table(Column("run", overflow="fold"), "kind", "objective", "state", "validation", "test", "size", "age")
    for run in sorted(runs, key=lambda run: run.changed):
        figures = [_figure(run.validation), _figure(run.test.get("NDCG@10"))]
        disk, age = bytes_shown(size(run.directory)), age_shown(time.time() - run.changed)
        table.add_row(run.name, run.kind or "–", run.objective or "–", run.state, *figures, disk, age)
    Console().print(table)
    say("validation, test: NDCG@10; validation of the best epoch so far")
    for note in notes:
        say(f"note: {note}")


def print_comparison(storage: Path, names: Sequence[str], say: Say) -> None:
    """What tells runs apart: their fields, their metrics, and the paired differences of the first to the others."""
    if len(names) < 2:
        raise UserError("name two runs or more: ilrec runs compare A B")
    runs = [named_run(storage, name) for name in names]
    table = Table("field", *(run.name for run in runs))
    for field, values in differences(runs).items():
        table.add_row(field, *map(_value, values))
    table.add_section()
    table.add_row("state", *(run.state for run in runs))
    table.add_row("validation NDCG@10", *(_figure(run.validation) for run in runs))
    for name in dict.fromkeys(name for run in runs for name in run.test):
        table.add_row(f"test {name}", *(_figure(run.test.get(name)) for run in runs))
    Console().print(table)
    first = runs[0]
    for other in runs[1:]:
        say(_paired(first, other))


def prune(storage: Path, agreed: bool, confirm: Callable[[str], bool], say: Say) -> None:
    """Remove what `prunable` names, once the user has seen how much it is and agrees."""
    runs, notes = find_runs(storage)
    found: list[tuple[Path, int]] = []
    table = Table("run", "what", "size")
    for run in runs:
        try:
            for path, what in prunable(run):
                found.append((path, size(path)))
                table.add_row(run.name, f"{path.relative_to(run.directory)}: {what}", bytes_shown(found[-1][1]))
        except UserError as error:
            notes.append(f"{run.name} keeps its checkpoints: {error}")
    for note in notes:
        say(f"note: {note}")
    if not found:
        say("nothing to prune: no finished run has checkpoints, no write was interrupted")
        return
    Console().print(table)
    total = bytes_shown(sum(amount for _, amount in found))
    say(
        "Bundles, prepared data and evaluations stay. A run without checkpoints is over; `ilrec train --fresh` "
        "repeats it."
    )
    if not (agreed or confirm(f"Remove {total}?")):
        say("nothing was removed")
        return
    for path, _ in found:
        remove(path)
    say(f"removed {total}")


def _paired(first: Run, other: Run) -> str:
    title = f"{first.name} minus {other.name}"
    if not (first.per_target.exists() and other.per_target.exists()):
        return f"{title}: not both have evaluation/test.parquet (`ilrec evaluate`), so no paired difference"
    from trainer.evaluation.evaluation import compare

    try:
        found = compare(first.per_target, other.per_target)
    except UserError as error:
        return f"{title}: {error}"
    low, high = found["interval"]
    return f"{title}: test {found['metric']} {found['difference']:+.4f}, 95 % interval [{low:+.4f}, {high:+.4f}]"


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else "–" if value is None else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def bytes_shown(amount: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} TB"


def age_shown(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"

"""`ilrec runs`: tables of runs, of what tells them apart, and of what can go."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from recommender.errors import UserError
from recommender.lock import unused
from recommender.models import Model
from trainer.reporting.runs import Run, differences, find_runs, named_run, prunable, remove, size

Say = Callable[[str], None]


def print_runs(storage: Path, say: Say) -> None:
    """A row for each version of a storage, the latest last; what is none is named below. Fits 80 columns."""
    runs, notes = find_runs(storage)
    figures = [Column(name, justify="right", no_wrap=True) for name in ("valid.", "test", "size", "age")]
    named = [Column(name, overflow="fold") for name in ("run", "what", "state")]
    table = Table(*named, *figures, box=SIMPLE, padding=(0, 1, 0, 0))
    promoted = {run.version.name: Model(storage, run.version.name).promoted for run in runs}
    for run in sorted(runs, key=lambda run: run.changed):
        reached = _figure(run.validation), _figure(run.test.get("NDCG@10"))
        disk, age = bytes_shown(size(run.directory)), age_shown(time.time() - run.changed)
        name = f"{run.name}*" if promoted[run.version.name] == run.version else run.name
        table.add_row(name, _what(run), run.state, *reached, disk, age)
    Console().print(table)
    say("* what the name stands for; valid. (of the best epoch so far), test: NDCG@10")
    for note in notes:
        say(f"note: {note}")


def _what(run: Run) -> str:
    kind = {"language model": "LM", "collaborative": "", "sweep": "sweep"}.get(run.kind, run.kind)
    return " ".join(filter(None, (kind, run.objective)))


def print_comparison(storage: Path, names: Sequence[str], say: Say) -> None:
    """What tells runs apart: their fields, their metrics, whom they serve well, the floors beside them, and the paired
    differences of the first to the others."""
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
    _print_segments(runs)
    first = runs[0]
    for other in runs[1:]:
        say(_paired(first, other))


def _print_segments(runs: Sequence[Run]) -> None:
    """The test targets of the runs by popularity, the floors beside; nothing where none was evaluated."""
    files = {run.name: run.per_target for run in runs if run.per_target is not None}
    if not files:
        return
    from trainer.evaluation.side_by_side import side_by_side

    found = side_by_side(files)
    if not found:
        return
    systems = [name for name in found["all targets"] if name != "targets"]
    table = Table("test NDCG@10 of …", "targets", *systems)
    for label, of in found.items():
        table.add_row(label, f"{of['targets']:,}", *(_figure(of[system]) for system in systems))
    Console().print(table)


def prune(storage: Path, keep: int | None, parts: bool, agreed: bool, confirm: Callable[[str], bool], say: Say) -> None:
    """Remove what `prunable` names, once the user has seen how much it is and agrees."""
    with unused(storage) as idle:
        found, notes = prunable(storage, keep, parts, idle)
    for note in notes:
        say(f"note: {note}")
    if not found:
        say("nothing to prune")
        return
    table = Table(Column("directory", overflow="fold"), "what", "size")
    sizes = [size(path) for path, _ in found]
    for (path, what), amount in zip(found, sizes, strict=True):
        table.add_row(str(path.relative_to(storage)), what, bytes_shown(amount))
    Console().print(table)
    total = bytes_shown(sum(sizes))
    say("All else stays. A version without checkpoints cannot be trained on; its bundle and evaluations are whole.")
    if not (agreed or confirm(f"Remove {total}?")):
        say("nothing was removed")
        return
    with unused(storage) as idle:  # meanwhile something may have been promoted, or trained on
        still = {path for path, _ in prunable(storage, keep, parts, idle)[0]}
        for path, _ in found:
            if path in still:
                remove(path)
            else:
                say(f"note: {path} stays, it is needed now")
    say(f"removed {bytes_shown(sum(amount for (path, _), amount in zip(found, sizes, strict=True) if path in still))}")


def _paired(first: Run, other: Run) -> str:
    title = f"{first.name} minus {other.name}"
    mine, theirs = first.per_target, other.per_target
    if mine is None or theirs is None:
        return f"{title}: not both were evaluated on the test targets (`ilrec evaluate`), so no paired difference"
    from trainer.evaluation.evaluation import compare

    try:
        found = compare(mine, theirs)
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

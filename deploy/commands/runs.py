"""`ilrec runs`: what lies in a storage, what tells runs apart, and what can go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deploy.commands.options import Storage, say

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""List and compare runs, and remove what finished ones no longer need.

\b
ilrec runs list
ilrec runs compare demo@1 demo@2
ilrec runs prune --keep 3
ilrec runs convert                  # of releases before versions""",
)


@app.command("list")
def list_runs(storage: Storage = Path("runs")) -> None:
    """All runs of a storage: what they are, how far they got, what they reached, what they take."""
    from deploy.runs import print_runs

    print_runs(storage, say)


@app.command("compare")
def compare_runs(
    names: Annotated[list[str], typer.Argument(metavar="RUN RUN …", help="name@2, or a name: its latest version.")],
    storage: Storage = Path("runs"),
) -> None:
    """The fields in which runs differ, their metrics, and the first's paired difference to each of the others.

    Beside them the floors, and NDCG@10 by popularity of the targets, those unseen in training first.
    """
    from deploy.runs import print_comparison

    print_comparison(storage, names, say)


@app.command()
def prune(
    storage: Storage = Path("runs"),
    keep: Annotated[
        int | None,
        typer.Option(min=1, help="Also remove versions: all but the latest N, the promoted, and the one before it."),
    ] = None,
    parts: Annotated[bool, typer.Option("--parts", help="Also remove prepared data that no version needs.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove the checkpoints of finished runs and what interrupted writes left; shows what and how much, and asks.

    The only command that removes anything.

    \b
    ilrec runs prune
    ilrec runs prune --keep 3 --parts
    """
    from deploy.runs import prune as prune_runs

    prune_runs(storage, keep, parts, yes, typer.confirm, say)


@app.command()
def convert(
    storage: Storage = Path("runs"),
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Make runs of releases before versions version 1 of their model; shows which, and asks. Nothing is removed."""
    from deploy.convert import convert as convert_runs

    convert_runs(storage, yes, typer.confirm, say)

"""`ilrec submit` and `ilrec jobs`: verbs on a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from deploy.commands.options import Address, Config, Job, Set, say
from recommender.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""List, show, follow and stop the jobs of a Ray cluster.

\b
ilrec jobs list --address http://head:8265
ilrec jobs status raysubmit_x
ilrec jobs logs raysubmit_x --follow
ilrec jobs stop raysubmit_x""",
)


def submit(
    context: typer.Context,
    verb: Annotated[Literal["prepare", "train", "tune", "evaluate"], typer.Argument(help="What to run.")],
    config: Config,
    address: Address,
    options: Annotated[list[str] | None, typer.Argument(help="After --: further options of the verb.")] = None,
    wheel: Annotated[Path | None, typer.Option(help="Send this wheel's code, not the checkout's.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the log until the job ends.")] = True,
    overrides: Set = [],  # noqa: B006
) -> None:
    """Run a verb as a job of a Ray cluster, and follow it: its log, its exit status. Ctrl-C does not stop it.

    The config is checked here and travels with the code. Paths in it must be absolute, of files that all machines of
    the cluster see. The cluster's token is sent where RAY_AUTH_MODE=token.

    With --address ray://… it is no job, and ends with this command: Ctrl-C stops it, and what it has saved stays.

    \b
    ilrec submit train my.yaml --address http://head:8265
    ilrec submit train my.yaml --address ray://head:10001
    ilrec submit train my.yaml --address http://head:8265 --set training.epochs=3 --no-wait -- --fresh
    """
    from trainer.experiment import load_experiment, read_values

    experiment, values = load_experiment(config, overrides), read_values(config, overrides)
    if verb == "tune":
        from tune.space import check_sweep

        check_sweep(experiment)
    if {"--set", "-s"} & set(options or []):
        raise UserError("give --set before the --, so that it is checked here")
    verbs: Any = context.parent and context.parent.command
    verbs.commands[verb].make_context(verb, [str(config), *(options or [])])  # refuses bad options
    if address.startswith("ray://"):
        if not wait:
            raise UserError(f"--no-wait: at {address} it would end with this command; submit it to http://<head>:8265")
        from deploy.client import run

        raise typer.Exit(run(address, verb, experiment, values, options or [], wheel, say))
    from deploy import jobs

    client = jobs.connect(address)
    job = jobs.submit(client, verb, experiment, values, options or [], wheel, say)
    say(jobs.submitted(client, job))
    if wait:
        raise typer.Exit(jobs.follow(client, job, say))


@app.command("list")
def list_jobs(address: Address) -> None:
    """All jobs that were submitted to the cluster."""
    from deploy import jobs

    jobs.show(jobs.connect(address))


@app.command()
def status(job: Job, address: Address) -> None:
    """One job: its status, and what went wrong."""
    from deploy import jobs

    jobs.show(jobs.connect(address), job)


@app.command()
def logs(
    job: Job,
    address: Address,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends, with its exit status.")] = False,
) -> None:
    """What a job has printed."""
    from deploy import jobs

    client = jobs.connect(address)
    if follow:
        raise typer.Exit(jobs.follow(client, job, say))
    say(jobs.logs(client, job))


@app.command()
def stop(job: Job, address: Address) -> None:
    """Stop a job; its checkpoints stay, and the same experiment submitted again goes on from the latest."""
    from deploy import jobs

    jobs.stop(jobs.connect(address), job, say)

"""The command line: all verbs, and what becomes of mistakes. Heavy packages are imported by the verb that runs."""

from __future__ import annotations

import errno
import sys
from typing import NoReturn

import typer

from deploy.commands import experiments, jobs, models, runs, serving
from recommender.errors import UserError
from recommender.quiet import quiet

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Train, evaluate and serve recommenders, language models and collaborative ones, on Ray.

A first run, start to end:

  ilrec train configs/demo.yaml
  ilrec evaluate demo
  ilrec serve demo

Every verb explains itself: ilrec train --help.""",
)
for _verb in (
    experiments.simulate,
    experiments.prepare,
    experiments.train,
    experiments.tune,
    experiments.evaluate,
    experiments.blend,
    models.recommend,
    serving.serve,
    models.export,
    models.extend,
    experiments.schema,
    experiments.demo,
    experiments.plan,
    jobs.submit,
):
    app.command()(_verb)
app.add_typer(jobs.app, name="jobs")
app.add_typer(runs.app, name="runs")
app.add_typer(models.app, name="models")


def _is_full(error: BaseException | None) -> bool:
    """Whether a disk without room caused it, whatever library says so."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return True
        error = error.__cause__
    return False


def main() -> NoReturn:
    """Run the command line; a user's mistake is one message and status 2, never a traceback."""
    paths = (NotADirectoryError, IsADirectoryError, FileNotFoundError, FileExistsError, PermissionError)
    quiet()
    try:
        app(standalone_mode=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if _is_full(error):
            said = "the disk is full: what was there is whole; make room, and the same command goes on"
            print(f"error: {said} ({error})", file=sys.stderr)
        elif isinstance(error, OSError) and error.filename and (isinstance(error, paths) or error.errno == errno.EROFS):
            print(f"error: {error.filename}: {error.strerror}; check the path and who may write there", file=sys.stderr)
        else:
            raise
        sys.exit(2)
    sys.exit(0)

"""Arguments and options that several verbs share, and how verbs speak."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path, typer.Argument(help="The experiment, a YAML file (see configs/ and `ilrec schema`).")]
Set = Annotated[
    list[str],
    typer.Option("--set", "-s", metavar="FIELD=VALUE", help="Override a field: --set training.epochs=3. Repeatable."),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Begin a new version, even where there is one of this config; keeps all others.")
]
Promote = Annotated[
    bool, typer.Option("--promote", help="Let the name stand for what was trained; without it only the first is.")
]
Reference = Annotated[
    str, typer.Argument(help="A model: name (what is promoted), name@2, name@latest, or the path of a bundle.")
]
Storage = Annotated[
    Path, typer.Option(envvar="ILREC_STORAGE", help="Where models and runs lie: cluster.storage of their experiments.")
]
Address = Annotated[
    str,
    typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard, http://<head>:8265."),
]
Job = Annotated[str, typer.Argument(help="A job's id, as `ilrec submit` and `ilrec jobs list` print it.")]
Out = Annotated[
    Path | None,
    typer.Argument(help="A directory for the new bundle; default: it becomes the model's next version."),
]


def say(text: str) -> None:
    """One line or more of progress, at once."""
    print(text, flush=True)

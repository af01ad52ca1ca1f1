"""`ilrec serve`: models over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL …",
            help="A model's name, name@version or the path of a bundle; name=… gives it another name for requests.",
        ),
    ],
    host: Annotated[str | None, typer.Option(help="Address to listen on; default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port; default 8000.")] = None,
    config: Annotated[Path | None, typer.Option(help="Take the `serving` section of this experiment.")] = None,
    storage: Annotated[
        Path | None, typer.Option(help="Where models are looked for by name; default: ILREC_STORAGE, or runs.")
    ] = None,
) -> None:
    """Serve models over HTTP with Ray Serve until Ctrl-C. A bare name follows what is promoted.

    \b
    ilrec serve demo
    ilrec serve shop old=shop@1
    ilrec serve /models/shop
    curl -s localhost:8000/v1/recommendations -H 'content-type: application/json' \\
         -d '{"history": ["<id or title>"], "k": 5}'
    """
    from service.config import ServingConfig

    settings = ServingConfig()
    if config is not None:
        from trainer.experiment import load_experiment

        settings = load_experiment(config).serving
    place = None if storage is None else str(storage.expanduser().absolute())
    asked = {"host": host, "port": port, "storage": place}
    given = {name: value for name, value in asked.items() if value is not None}
    from service.app import run

    run(models, settings.model_copy(update=given), blocking=True)

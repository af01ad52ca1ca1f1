"""`ilrec models`: tables of models and versions; promoting one, and taking that back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from recommender.bundle import peek_manifest
from recommender.errors import UserError
from recommender.models import Model, Version, find_models

Say = Callable[[str], None]

_SELECTION = "validation_NDCG@10"
_GAP = (0, 1, 0, 0)


def print_models(storage: Path) -> None:
    """A row for each model of a storage. Fits 80 columns."""
    figures = map(_narrow, ("kind", "valid.", "exported"))
    table = Table(Column("model", overflow="fold"), _narrow("promoted"), "versions", *figures, box=SIMPLE, padding=_GAP)
    for model in find_models(storage):
        promoted = model.promoted
        assert promoted is not None
        numbers = [str(version.number) for version in model.complete]
        table.add_row(model.name, f"@{promoted.number}", ", ".join(numbers), *_described(promoted))
    Console().print(table)


def print_model(storage: Path, name: str, say: Say) -> None:
    """A row for each version of a model, and its history. Fits 80 columns."""
    model = Model(storage, name)
    model.version()  # refuses a name without any
    figures = map(_narrow, ("version", "kind", "valid.", "exported", "checksum"))
    table = Table(*figures, Column("made from", overflow="fold"), box=SIMPLE, padding=_GAP)
    for version in model.complete:
        manifest = peek_manifest(version.bundle)
        star = "*" if version == model.promoted else ""
        table.add_row(f"@{version.number}{star}", *_described(version), manifest.checksum[:8], manifest.made_from)
    Console().print(table)
    say("* what the name stands for; valid.: NDCG@10 on the validation targets")
    for event in model.events:
        say(f"{event.at}  {event.action:8}  {name}@{event.version}")


def _narrow(name: str) -> Column:
    return Column(name, no_wrap=True)


def _described(version: Version) -> tuple[str, str, str]:
    manifest = peek_manifest(version.bundle)
    validation = manifest.metrics.get(_SELECTION)
    return manifest.kind, "–" if validation is None else f"{validation:.4f}", manifest.exported_at[:16] or "–"


def promote(storage: Path, reference: str, say: Say) -> None:
    """Let a name stand for a version; without a number, for the latest."""
    name, _, which = reference.partition("@")
    model = Model(storage, name)
    version, before = model.version(which or "latest"), model.promoted
    if version == before:
        say(f"{name} stands for {version} already")
        return
    model.promote(version)
    say(f"{name} stands for {version}, and no longer for {before}; `ilrec models rollback {name}` takes it back")


def rollback(storage: Path, name: str, say: Say) -> None:
    """Let a name stand for what it stood for before."""
    if "@" in name:
        raise UserError(f"{name}: give the model's name alone; `ilrec models promote {name}` chooses a version")
    model = Model(storage, name)
    before = model.version()
    say(f"{name} stands for {model.rollback()} again, and no longer for {before}")


def conclude(version: Version, promote: bool, say: Say) -> None:
    """Promote a new version if asked to, and say what can be done with it."""
    model = Model(version.storage, version.name)
    if promote:
        model.promote(version)
    serve_it = f"ilrec serve {version.name}"
    if model.promoted != version:
        serve_it = f"ilrec models promote {version} (the name stands for {model.promoted})"
    say(f"next: ilrec evaluate {version}, or {serve_it}")

"""Bundles that are made from others without training: as the next version of a model, or at a path."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from recommender.bundle import check_free
from recommender.errors import UserError
from recommender.lock import in_use
from recommender.models import Model, Version, find_version
from trainer.run import record


class Make(Protocol):
    """Writes a bundle made from `source` to `target`, with these fields of its manifest."""

    def __call__(self, source: Path, target: Path, /, *, version: int | None, made_from: str) -> None: ...


def derived(reference: str, storage: Path, out: Path | None, verb: str, make: Make) -> Version | None:
    """Have a bundle made, aside from the one that it is made from.

    Args:
        reference: the model that it is made from.
        out: where it goes; None: it becomes the model's next version.

    Returns:
        The version, where it becomes one.

    Raises:
        UserError: `out` is there, or is missing although the reference is no model's version.
    """
    with in_use(storage):
        return _derived(reference, storage, out, verb, make)


def _derived(reference: str, storage: Path, out: Path | None, verb: str, make: Make) -> Version | None:
    found = find_version(reference, storage)
    source = found.bundle if isinstance(found, Version) else found
    if out is not None:
        out = out.expanduser().absolute()
        check_free(out)
        make(source, out, version=None, made_from=str(found))
        return None
    if not isinstance(found, Version):
        raise UserError(f"{reference}: is a path, so say where the new bundle goes")
    version = Model(found.storage, found.name).begin()
    record(version, verb, {}, made_from=str(found))
    make(source, version.bundle, version=version.number, made_from=str(found))
    return version

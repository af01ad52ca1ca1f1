"""Models by name: each has numbered versions, of which one is promoted. Nothing heavy is imported.

    <storage>/shop/         the model `shop`, and the runs that made it
        1/  2/  …           versions; what lies in one is written once
            bundle/         complete or absent
        model.json          which versions were promoted, one after the other; written by `promote` and `rollback` only

A version is a model's once its bundle is complete. Until somebody promotes another one, the one that was exported first
is promoted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from recommender.bundle import MANIFEST, Manifest, peek_manifest, read_manifest
from recommender.errors import UserError
from recommender.files import read_json, write_json
from recommender.lock import in_use, locked

STORAGE = "ILREC_STORAGE"  # the environment variable that says where models are looked for
_EVENTS = "model.json"
_LOCK = ".model.lock"


@dataclass(frozen=True)
class Version:
    """A version of a model: a directory that is written once.

    Attributes:
        storage: where models lie.
        name: of the model; its directory below the storage.
        number: from 1.
    """

    storage: Path
    name: str
    number: int

    @property
    def directory(self) -> Path:
        return self.storage / self.name / str(self.number)

    @property
    def bundle(self) -> Path:
        return self.directory / "bundle"

    @property
    def manifest(self) -> Manifest:
        """Of the bundle: metrics, when it was exported, what it was trained with."""
        return peek_manifest(self.bundle)

    @property
    def is_complete(self) -> bool:
        """Whether there is a bundle."""
        return (self.bundle / MANIFEST).exists()

    def __str__(self) -> str:
        return f"{self.name}@{self.number}"


@dataclass(frozen=True)
class Event:
    """What was done with a model: "first" is the version that stood promoted before anybody promoted one."""

    at: str
    action: Literal["first", "promote", "rollback"]
    version: int


@dataclass(frozen=True)
class Model:
    """A name in a storage, whether or not anything lies there yet."""

    storage: Path
    name: str

    @property
    def home(self) -> Path:
        return self.storage / self.name

    @property
    def versions(self) -> list[Version]:
        """All that were begun, by number."""
        if not self.home.is_dir():
            return []
        numbers = sorted(int(path.name) for path in self.home.iterdir() if path.name.isdigit() and path.is_dir())
        return [Version(self.storage, self.name, number) for number in numbers]

    @property
    def complete(self) -> list[Version]:
        """Those that have a bundle, by number."""
        return [version for version in self.versions if version.is_complete]

    @property
    def events(self) -> list[Event]:
        """What was promoted and rolled back, the latest last."""
        try:
            return [Event(**event) for event in (read_json(self.home / _EVENTS) or {"events": []})["events"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.home / _EVENTS}: damaged ({error}); put back a copy, or remove it") from None

    @property
    def promoted(self) -> Version | None:
        """The version that the name stands for; None while there is no bundle."""
        standing = self._standing()
        return Version(self.storage, self.name, standing[-1]) if standing else None

    @property
    def before(self) -> Version | None:
        """The version that a rollback goes to, if any."""
        earlier = [Version(self.storage, self.name, number) for number in self._standing()[:-1]]
        return next((version for version in reversed(earlier) if version.is_complete), None)

    def version(self, which: str = "") -> Version:
        """A complete version: the promoted one, "latest", or one by its number.

        Raises:
            UserError: there is none; says which there are.
        """
        complete = self.complete
        if not complete:
            raise UserError(f"{self.name}: no version in {self.home} is trained yet; `ilrec train` makes one")
        if which == "":
            found = self.promoted
        elif which == "latest":
            found = complete[-1]
        else:
            found = next((version for version in complete if str(version.number) == which), None)
        if found is None or not found.is_complete:
            known = ", ".join(map(str, complete))
            raise UserError(f"{self.name}@{which or 'promoted'}: there is no such version; there are {known}")
        return found

    def begin(self) -> Version:
        """A new version, its directory empty, behind all that there are."""
        self.home.mkdir(parents=True, exist_ok=True)
        number = max((version.number for version in self.versions), default=0)
        while True:
            number += 1
            version = Version(self.storage, self.name, number)
            try:
                version.directory.mkdir()
            except FileExistsError:
                continue
            return version

    def promote(self, version: Version) -> None:
        """Let the name stand for a version from now on.

        Raises:
            UserError: its bundle is damaged or absent.
        """
        with self._changing():
            read_manifest(version.bundle)
            if version != self.promoted:
                self._record("promote", version.number)

    def rollback(self) -> Version:
        """Let the name stand for what it stood for before; once more goes further back.

        Raises:
            UserError: nothing was promoted before.
        """
        with self._changing():
            version = self.before
            if version is None:
                raise UserError(f"{self.name}: nothing was promoted before, so there is nothing to go back to")
            read_manifest(version.bundle)
            self._record("rollback", version.number)
        return version

    def _standing(self) -> list[int]:
        """The versions that were promoted and not rolled back, the promoted one last."""
        standing: list[int] = []
        for event in self.events:
            if event.action == "rollback" and event.version in standing[:-1]:
                while standing[-1] != event.version:
                    standing.pop()
            else:
                standing.append(event.version)
        return standing or [version.number for version in sorted(self.complete, key=_exported_at)[:1]]

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Change what the name stands for, one command after the other, while nothing is pruned."""
        self.home.mkdir(parents=True, exist_ok=True)
        with in_use(self.storage), locked(self.home / _LOCK):
            yield

    def _record(self, action: Literal["promote", "rollback"], number: int) -> None:
        now, events = datetime.now(UTC).isoformat(timespec="seconds"), self.events
        if not events and (standing := self._standing()):
            events.append(Event(now, "first", standing[0]))
        events.append(Event(now, action, number))
        write_json(self.home / _EVENTS, {"events": [asdict(event) for event in events]})


def _exported_at(version: Version) -> str:
    """When a version became complete; one that cannot be read comes last. (Numbers do not tell: a run that was begun
    first may end last.)"""
    try:
        return peek_manifest(version.bundle).exported_at
    except UserError:
        return "unknown"


def default_storage() -> Path:
    """Where models are looked for by name: ILREC_STORAGE, or `runs` here."""
    return Path(os.environ.get(STORAGE) or "runs").expanduser().absolute()


def find_models(storage: Path) -> list[Model]:
    """The models of a storage that have a complete version, by name."""
    if not storage.is_dir():
        raise UserError(f"{storage}: no such directory; --storage is where models lie (cluster.storage, default: runs)")
    homes = sorted({path.parents[2] for path in _manifests(storage)})
    return [Model(storage, str(home.relative_to(storage))) for home in homes]


def find_bundle(reference: str | Path, storage: Path | None = None) -> Path:
    """The bundle that is meant by a name ("shop": what is promoted), name and version ("shop@2", "shop@latest"), or
    path: of a bundle, of a version, of a model.

    Args:
        storage: where names are looked for; None: `default_storage()`.

    Raises:
        UserError: there is none; says which models there are.
    """
    found = find_version(reference, storage)
    return found.bundle if isinstance(found, Version) else found


def find_version(reference: str | Path, storage: Path | None = None) -> Version | Path:
    """As `find_bundle`: a version, or the path of a bundle that is none."""
    text, storage = str(reference), (storage or default_storage()).absolute()
    path = Path(text).expanduser().absolute()
    name, _, which = text.partition("@")
    looks_like_path = os.sep in text or text.startswith((".", "~"))
    if not looks_like_path or not path.exists():
        model = Model(storage, name)
        if not model.complete and (model.home / "bundle" / MANIFEST).exists() and not which:  # of an earlier release
            return model.home / "bundle"
        if model.versions:
            return model.version(which)
    for bundle in (path, path / "bundle"):
        if (bundle / MANIFEST).exists():
            return bundle
    home = Path(name).expanduser().absolute()
    if (model := Model(home.parent, home.name)).versions:
        return model.version(which)
    if looks_like_path:
        raise UserError(f"{reference}: no bundle (no {MANIFEST}), nor a model's directory")
    known = ", ".join(model.name for model in find_models(storage)) if storage.is_dir() else ""
    raise UserError(
        f"{reference}: no model of this name in {storage}"
        + (f"; there are: {known}" if known else ", which holds none")
        + f". Give a name, name@version, or a path; --storage or {STORAGE} says where names are looked for"
    )


def find_base(weights: dict[str, str], near: Path) -> Path | None:
    """The bundle whose weights have given checksums, wherever it was moved to; None where none is found.

    Looked for in the storage that `near`, a bundle, lies in, beside it, and where names are looked for.
    """
    places: Sequence[Path] = [*near.absolute().parents[:3], default_storage()]
    for place in dict.fromkeys(places):
        for bundle in find_bundles(place):
            if bundle != near and _weights(bundle) == weights:
                return bundle
    return None


def base_of(bundle: Path, name: str) -> str:
    """Where the weights that a bundle's adapter belongs to lie: `name`, or wherever their bundle was moved to.

    Raises:
        UserError: they are a bundle's, and no bundle that is found has them.
    """
    weights = peek_manifest(bundle).base if (bundle / MANIFEST).exists() else {}
    if not weights:
        return name
    found = Path(name) if _weights(Path(name)) == weights else find_base(weights, bundle)
    if found is None:
        raise UserError(
            f"{bundle}: the bundle under its adapter, once {name}, is not there any more, and no other in the storage "
            f"has its weights ({next(iter(weights.values()))[:12]}…); put it back, or train the adapter again"
        )
    read_manifest(found)
    return str(found)


def find_bundles(place: Path) -> list[Path]:
    """All complete bundles below a storage, also those of earlier releases, and below a directory of bundles."""
    found = [*_manifests(place), *place.glob(f"*/bundle/{MANIFEST}"), *place.glob(f"*/{MANIFEST}")]
    return [path.parent for path in found]


def _manifests(storage: Path) -> list[Path]:
    """Of all complete versions; names may have two parts, as those of shared collaborative models have."""
    found = [*storage.glob(f"*/*/bundle/{MANIFEST}"), *storage.glob(f"*/*/*/bundle/{MANIFEST}")]
    return sorted(path for path in found if path.parents[1].name.isdigit())


def _weights(bundle: Path) -> dict[str, str]:
    try:
        manifest: Manifest = peek_manifest(bundle)
    except UserError:
        return {}
    return manifest.weights

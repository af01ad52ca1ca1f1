"""Bundles: a recommender in a directory; a language model's opens with `transformers` and `peft` by themselves.

    config.json, model*.safetensors            the model (or adapter_config.json, adapter_model.safetensors)
    tokenizer*.json, generation_config.json    as `save_pretrained` writes them
    collaborative.json, model.safetensors      in place of those, for a collaborative model
    floor.json, model.safetensors              in place of those, for an ItemKNN or TF-IDF; terms.json: TF-IDF's terms
    catalogue.parquet, titles.marisa           the items and the index of their titles
    trie.safetensors, items.json               language models: spelled identifiers as a radix trie; identifier and
                                               prompt settings
    priors/                                    of models whose search adds them: what they are computed from
    recommender.json                           the manifest: version, search, fingerprint, metrics, checksums
    README.md                                  for people; the one further file without a checksum, so edit it

safetensors, Parquet and JSON only (and marisa's plain trie): nothing in a bundle is ever unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from recommender.config import Score, SearchConfig
from recommender.errors import UserError
from recommender.files import digest, new_directory, sha256

MANIFEST = "recommender.json"
CARD = "README.md"
SCHEMA_VERSION = 1
LANGUAGE_MODEL = "language_model"
FLOORS = ("itemknn", "tfidf")  # the kinds of recommender that every other one has to beat


class Golden(BaseModel):
    """A request that was answered when the bundle was written.

    Attributes:
        history: item indices.
        items, scores: of its top-K.
        search: the settings that it was searched with.
    """

    history: list[int]
    items: list[int]
    scores: list[float]
    search: SearchConfig


class Manifest(BaseModel):
    """What `recommender.json` holds.

    Attributes:
        schema_version: of the bundle's layout.
        name: shown to clients as the model.
        version: of the model; None where the bundle was written to a path of its own.
        made_from: the version or path of the bundle that this one was made from without training, if any.
        exported_at: when it was written, in UTC.
        trained_until: the latest time of an interaction that training saw, as the data give it; "" where they do not.
        recommender: what kind of recommender this is (the experiment's `recommender` section); bundles from before it
            existed hold language models.
        search: how this model's top-K is found.
        temperature: what divided the logits in the distribution that was trained.
        score: over what that distribution is normalised.
        backbone: what was trained (the experiment's `backbone` section).
        base: sha256 of the weights that an adapter belongs to, by file name, where its base is a bundle.
        objective: what it was trained with.
        prompt: the words around a history (the experiment's `prompt` section); for people, `items.json` has it too.
        data_fingerprint: of the prepared dataset.
        metrics: of the selection (validation), by name.
        golden: a request and its answer, for a self-check; None in bundles from before it existed.
        checksums: sha256 of every other file but the README, by name.
    """

    model_config = ConfigDict(extra="allow")

    schema_version: int = SCHEMA_VERSION
    name: str
    version: int | None = None
    made_from: str = ""
    exported_at: str = ""
    trained_until: str = ""
    recommender: dict[str, Any] = {}
    search: SearchConfig = SearchConfig()
    temperature: float = 1.0
    score: Score = "valid"
    backbone: dict[str, Any] = {}
    base: dict[str, str] = {}
    objective: dict[str, Any] = {}
    prompt: dict[str, Any] = {}
    data_fingerprint: str = ""
    metrics: dict[str, float] = {}
    golden: Golden | None = None
    checksums: dict[str, str] = {}

    @property
    def kind(self) -> str:
        """ "language_model", one of FLOORS, or a kind of collaborative model."""
        return str(self.recommender.get("kind", LANGUAGE_MODEL))

    def searched(self, search: SearchConfig | None = None) -> SearchConfig:
        """The settings of a search, or this model's own, with what they leave open as this model has it."""
        search = search or self.search
        own = {"score": search.score or self.score}
        priors = self.search.priors if search.priors is None else search.priors
        return search.model_copy(update={**own, "priors": priors})

    @property
    def checksum(self) -> str:
        """Names the content: of two bundles that have the same one, every file is the same."""
        return digest(self.checksums)

    @property
    def weights(self) -> dict[str, str]:
        """The checksums of the model's weights, an adapter's aside."""
        return {name: value for name, value in self.checksums.items() if re.fullmatch(r"model.*\.safetensors", name)}


def write_bundle(directory: Path, manifest: Manifest, write_files: Callable[[Path], None]) -> None:
    """Write a bundle aside, its manifest last, and rename it into place: it is complete, or it is not there.

    Args:
        directory: must not be there yet.
        write_files: writes everything but the manifest into the directory it is given.

    Raises:
        UserError: `directory` is there.
    """
    check_free(directory)
    with new_directory(directory) as aside:
        write_files(aside)
        (aside / CARD).unlink(missing_ok=True)  # peft brings one
        written = {
            "checksums": {
                path.relative_to(aside).as_posix(): sha256(path) for path in sorted(aside.rglob("*")) if path.is_file()
            },
            "exported_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        complete = manifest.model_copy(update=written)
        (aside / CARD).write_text(_card(complete))
        (aside / MANIFEST).write_text(complete.model_dump_json(indent=2))
        for path in aside.rglob("*"):
            if path.is_file():
                path.chmod(0o644)  # safetensors writes files that only their owner may read


def check_free(directory: Path) -> None:
    """Refuse to write a bundle over something, before the work is done.

    Raises:
        UserError: `directory` is there, and holds something.
    """
    if directory.exists() and (directory.is_file() or any(directory.iterdir())):
        raise UserError(f"{directory}: is there already, and is left as it is; choose another place, or remove it")


def kind_of(directory: Path) -> str:
    """What a bundle holds, read without a look at its other files.

    Raises:
        UserError: no bundle, or a layout of another version.
    """
    return peek_manifest(directory).kind


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a bundle, its files checked against it.

    Raises:
        UserError: no bundle, a layout of another version, a file that is missing or differs from its checksum.
    """
    manifest = peek_manifest(directory)
    for name, expected in manifest.checksums.items():
        file = directory / name
        if not file.exists():
            raise UserError(f"{file}: missing from the bundle; copy the whole directory again")
        if sha256(file) != expected:
            raise UserError(f"{file}: differs from its checksum in {MANIFEST}; damaged or edited, copy or export again")
    return manifest


def peek_manifest(directory: Path) -> Manifest:
    """The manifest of a bundle, read without a look at its other files.

    Raises:
        UserError: no bundle, or a layout of another version.
    """
    path = directory / MANIFEST
    if not path.exists():
        raise UserError(f"{directory}: not a bundle (no {MANIFEST}); `ilrec models list` shows what there is")
    try:
        values = json.loads(path.read_text())
        version = values.get("schema_version")
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{path}: schema version {version}, this release reads version {SCHEMA_VERSION}; "
                "export the bundle again with the release that serves it"
            )
        return Manifest.model_validate(values)
    except (ValueError, AttributeError, ValidationError) as error:
        raise UserError(f"{path}: damaged: {error}") from error


def _card(manifest: Manifest) -> str:
    metrics = "\n".join(f"| {name} | {value:.4f} |" for name, value in manifest.metrics.items()) or "| – | – |"
    if manifest.kind == LANGUAGE_MODEL:
        library, what = "transformers", "A language-model recommender: it names a user's next item."
        made_of = f"Backbone: `{json.dumps(manifest.backbone)}`; objective: `{json.dumps(manifest.objective)}`"
    else:
        library, what = "ilrec", "A recommender that scores every item for a user's history."
        made_of = f"Model: `{json.dumps(manifest.recommender)}`"
    return f"""---
library_name: {library}
tags: [recommendation]
---
# {manifest.name}

{what} {made_of}; data fingerprint `{manifest.data_fingerprint[:12]}`.

| validation metric | value |
|---|---|
{metrics}

Recommend: `ilrec recommend <this directory> --history "first title; second title"`.
Serve: `ilrec serve <this directory>`.
"""

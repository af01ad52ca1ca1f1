"""Files and directories that are complete or absent, whatever ends the process that writes them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recommender.errors import UserError
from recommender.lock import held


def write_text(path: Path, text: str) -> None:
    """Put a text file in place at once: a reader sees the old one or the new one, and a full disk leaves the old."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """As `write_text`."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where there is no such file.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None


def sha256(path: Path) -> str:
    """The checksum of a file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(*values: Any, length: int = 16) -> str:
    """A name for what JSON values describe: equal values have equal names."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Write a directory aside, and put it into place when the block ends well.

    Whatever says that the directory is complete has to be written last, so that completeness does not rest on renaming
    alone: on a storage that cannot rename, only that file counts.

    Yields:
        An empty directory beside `target`, which is gone if the block raises.

    Raises:
        UserError: something has come to `target` meanwhile, or was there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        with held(aside):  # so that it is not taken for one that an interrupted command left
            yield aside
            aside.chmod(0o755)
            try:
                os.rename(aside, target)  # onto nothing, or onto an empty directory
            except OSError as error:
                if target.exists():
                    raise UserError(
                        f"{target}: is there already, and is left as it is; choose another place"
                    ) from error
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)

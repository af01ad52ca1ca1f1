"""Parts that runs share: worlds, datasets, spelled catalogues. Each is named by its content, made once, never changed.
Nothing heavy is imported here.

<storage>/parts/worlds/<name>  datasets/<name>  items/<name>
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recommender.files import new_directory, read_json
from recommender.lock import locked

PARTS = "parts"
SPELLING = "spelling.json"  # of a spelled catalogue: its statistics; with it the part is complete

Say = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """Where what an experiment trains on lies: parts that runs share, which never change.

    Attributes:
        dataset: a prepared dataset.
        spelled: the catalogue, spelled for a language model; None for a collaborative model.
        world: the simulated world that the data come from, if they do.
    """

    dataset: Path
    spelled: Path | None
    world: Path | None = None

    @property
    def parts(self) -> list[Path]:
        """All of them."""
        return [part for part in (self.world, self.dataset, self.spelled) if part is not None]

    @property
    def fingerprint(self) -> str:
        """Of the dataset."""
        return str(read_json(self.dataset / "dataset.json")["fingerprint"])

    @property
    def items(self) -> Path:
        """The spelled catalogue."""
        assert self.spelled is not None, "a collaborative model knows items by their numbers"
        return self.spelled

    def stats(self) -> dict[str, Any]:
        """Of the dataset and of the spelling."""
        spelling = {} if self.spelled is None else read_json(self.spelled / SPELLING)
        return {**read_json(self.dataset / "stats.json"), **spelling}


def make_part(directory: Path, marker: str, write: Callable[[Path], None], say: Say) -> bool:
    """Have a part made, unless it is there already. Of several who want it, one makes it, and the others wait.

    Args:
        directory: where it belongs.
        marker: the file that says that it is complete; `write` writes it last.
        write: makes it in the directory that it is given.

    Returns:
        Whether it was made now.
    """
    if (directory / marker).exists():
        return False
    directory.parent.mkdir(parents=True, exist_ok=True)
    waiting = f"another command is making {directory}; waiting for it"
    with locked(directory.with_name(f".{directory.name}.lock"), lambda: say(waiting)):
        if (directory / marker).exists():
            return False
        with new_directory(directory) as aside:
            write(aside)
    return True

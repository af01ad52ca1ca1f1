"""How a worker's training ended, in the form that Ray Train hands to the driver.

Ray starts workers again when one of them raises. So what a restart would only repeat is returned; all ranks say the
same. Memory that runs out on one rank must be raised, to end the others, which wait for it; a note in the run's
directory then keeps the restarted workers from running into it again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from recommender.errors import UserError
from trainer.loop.preemption import Preempted

_NOTE = ".out-of-memory"


def outcome_of(train: Callable[[], None], log: Path, too_large: str) -> dict[str, Any]:
    """Train, and say how it ended.

    Args:
        log: of the run.
        too_large: what to do where memory is short.

    Returns:
        `error`: what the user has to mend, or None. `preempted`: whether training has to go on elsewhere.
    """
    try:
        train()
    except (UserError, FloatingPointError) as error:
        return {"error": str(error), "preempted": False}
    except Preempted:
        return {"error": None, "preempted": True}
    except torch.OutOfMemoryError as error:
        with suppress(OSError):  # a storage that fails as well is no better reason
            _note(log).write_text(too_large)
        raise RuntimeError(too_large) from error
    return {"error": None, "preempted": False}


def refuse_to_repeat(log: Path) -> None:
    """To be called where workers agree, before anything large is loaded.

    Raises:
        UserError: memory ran out before this restart.
    """
    if _note(log).exists():
        raise UserError(_note(log).read_text())


def forget(log: Path) -> None:
    """A new attempt of the user's, who may have changed something."""
    _note(log).unlink(missing_ok=True)


def _note(log: Path) -> Path:
    return log.parent / _NOTE

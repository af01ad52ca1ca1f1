"""Writing to storages that fail for a while: a full disk may be cleared, a network come back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from safetensors import SafetensorError

Result = TypeVar("Result")

MINUTES, PAUSE = 10, 5.0  # for how long a failing storage is tried again, and how many seconds between


def patiently(write: Callable[[], Result], undo: Callable[[], None], what: str, say: Callable[[str], None]) -> Result:
    """Write, and where that fails try again for ten minutes.

    Args:
        undo: removes what was half written, after each failure: on a full disk others need these bytes.
        what: is written, for the message.
        say: told of the first failure.

    Raises:
        OSError, RuntimeError, SafetensorError: what ended the last try.
    """
    deadline = time.monotonic() + 60 * MINUTES
    said = False
    while True:
        try:
            return write()
        except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: of Ray, the directory is not there
            undo()
            if time.monotonic() > deadline:
                raise
            if not said:
                say(f"{what} cannot be saved, trying again for {MINUTES} minutes: {error}")
                said = True
            time.sleep(PAUSE)

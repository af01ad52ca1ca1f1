"""Locks that processes hold on files; they go with the process, whatever ends it."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, busy: Callable[[], None]) -> Iterator[None]:
    """Hold a file's lock, on this machine and on those that share the file.

    Args:
        path: made if it is missing.
        busy: called where another process holds it. Unless it raises, the lock is then waited for.
    """
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy()
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system that knows no locks
            pass
        yield

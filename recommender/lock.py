"""Locks that processes hold on files; they go with the process, whatever ends it."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"  # of a run's directory
_A_GLANCE = 0.1  # seconds; `is_locked` holds a lock for less


@contextmanager
def locked(path: Path, busy: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a file's lock, on this machine and on those that share the file.

    Args:
        path: made if it is missing.
        busy: called where another process holds it. Unless it raises, the lock is then waited for.
    """
    with path.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_A_GLANCE)
                if not is_locked(path):
                    continue
                busy()
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:  # a file system that knows no locks
                pass
            break
        yield


def is_locked(path: Path) -> bool:
    """Whether a process holds a file's lock. False also where the file system knows no locks."""
    try:
        with path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False

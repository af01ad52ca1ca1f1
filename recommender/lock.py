"""Locks that processes hold on files; they go with the process, whatever ends it."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = ".lock"  # of a run's directory, and of a storage
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
        with _opened(path) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Hold a directory that nobody else holds, as far as the file system can: `is_locked` tells so meanwhile."""
    with _opened(directory) as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


@contextmanager
def in_use(storage: Path) -> Iterator[None]:
    """Work in a storage, as others may at the same time: what lies there is not pruned meanwhile."""
    try:
        lock = (storage / LOCK).open("a+")
    except OSError:  # nothing is there yet, or nothing can be written and so removed
        yield
        return
    with lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield


@contextmanager
def unused(storage: Path) -> Iterator[bool]:
    """Keep others from beginning to work in a storage; who is about to waits for the block's end.

    Yields:
        Whether nobody is at work there. If somebody is, nobody is kept from anything. True also where the file system
        knows no locks.
    """
    with (storage / LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        yield True


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)

"""Directories that are complete or absent."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path


def replace_directory(new: Path, target: Path) -> None:
    """Put `new`, a finished directory on the same file system, in the place of `target`.

    What stood there goes only when the new one stands, and comes back if that fails.
    """
    new.chmod(0o755)
    if not target.exists():
        os.replace(new, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    os.replace(target, old)
    try:
        os.replace(new, target)
    except OSError:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)

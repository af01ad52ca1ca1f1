"""Commands that are killed at random moments lose nothing. `python -m benchmarks.kills` kills many more of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
POINTS = 2


@pytest.fixture(scope="module")
def killed() -> str:
    """What the benchmark says: in a process of its own, as it forks, which must not have threads."""
    command = [sys.executable, "-m", "benchmarks.kills", "--points", str(POINTS)]
    command += ["--only", "prepare,extend,promote,rollback,prune-all,convert"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("command", ["prepare", "extend", "promote", "rollback", "prune-all", "convert"])
def test_nothing_is_lost(killed: str, command: str) -> None:
    assert re.search(rf"^{command}: [1-{POINTS}] kills, 0 violations$", killed, re.MULTILINE)

"""Timing that other processes disturb little: contenders take turns, and ratios are taken within a round."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch


def now(device: str) -> float:
    """Seconds: on a CPU the process's own CPU time, since other processes come and go; on CUDA the clock's."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def in_turns(contenders: Sequence[Callable[[], object]], repeats: int, device: str) -> list[list[float]]:
    """Seconds of each contender in `repeats` rounds, each once a round, after a round that is not timed."""
    seconds: list[list[float]] = [[] for _ in contenders]
    for number in range(repeats + 1):
        for run, own in zip(contenders, seconds, strict=True):
            started = now(device)
            run()
            if number:
                own.append(now(device) - started)
    return seconds


def ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """How many times as long as `base`: the median over the rounds."""
    return float(np.median(np.array(seconds) / np.array(base)))


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """min/median/max."""
    return "/".join(format(float(f(values)), form) for f in (np.min, np.median, np.max))


def milliseconds(seconds: Sequence[float], form: str = ".1f") -> str:
    """min/median/max."""
    return spread([1e3 * each for each in seconds], form)

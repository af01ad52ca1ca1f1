"""`ilrec plan`: what a training needs and whether it fits, as tables."""

from __future__ import annotations

import json
from datetime import timedelta

from rich.console import Console
from rich.table import Table

from recommender.files import read_json
from trainer.experiment import Experiment
from trainer.loop.requirements import Memory, Requirements
from trainer.run import HISTORY

_GB = 2**30


def print_plan(
    needs: Requirements, gpu_memory: float | None, tokens_per_second: float | None, tflops: float | None
) -> None:
    """Print the memory of a worker by ZeRO stage, the work and the time.

    Args:
        gpu_memory: GB that a worker's device has.
        tokens_per_second: of all workers together; None = as an earlier run of this name did, if there is one.
        tflops: of all workers together, in place of it.
    """
    console = Console()
    experiment, shape = needs.experiment, needs.shape
    training, cluster = experiment.training, experiment.cluster
    console.print(
        f"{shape.trained / 1e6:,.1f} M weights trained, {shape.frozen / 1e6:,.1f} M frozen, {training.precision}; "
        f"{cluster.workers} workers; the largest micro-batch has {needs.largest(training.accumulation):,} tokens"
    )
    stages = [needs.memory(zero_stage=stage) for stage in range(4)]
    headers = [f"ZeRO {stage}{' ←' if stage == training.zero_stage else ''}" for stage in range(4)]
    table = Table("GB of a worker at its peak", *headers)
    for name in (*vars(stages[0]), "total"):
        table.add_row(name, *(f"{getattr(memory, name) / _GB:.2f}" for memory in stages))
    console.print(table)
    console.print("On top comes the process: about 1 GB for CUDA's context or for Python and its libraries.")
    if gpu_memory is not None:
        console.print(_verdict(needs, needs.memory(), gpu_memory))
    console.print(
        f"an epoch: {needs.tokens:,} tokens, {needs.steps:,} optimiser steps, {needs.flops / 1e12:,.2f} TFLOP of "
        f"matrix products; {training.epochs} epochs at most"
    )
    rate, source = (tokens_per_second, "given") if tokens_per_second else _measured(experiment)
    if tflops is not None:
        rate, source = tflops * 1e12 * needs.tokens / needs.flops, "given"
    if rate is None:
        console.print("time: give --tokens-per-second or --tflops, or train once: its throughput is read from then on")
    else:
        seconds = needs.tokens / rate
        every = timedelta(seconds=round(seconds * training.epochs))
        console.print(
            f"time: {timedelta(seconds=round(seconds))} an epoch, {every} in all, validation aside, at {rate:,.0f} "
            f"tokens/s ({source})"
        )


def _verdict(needs: Requirements, memory: Memory, gpu_memory: float) -> str:
    limit = (gpu_memory - 1) * _GB
    if memory.total <= limit:
        return f"fits into {gpu_memory:g} GB, with {(limit - memory.total) / _GB:.1f} GB to spare"
    copy = needs.memory(zero_stage=3).validation
    if copy > limit:  # which no number of workers makes smaller
        return (
            f"does not fit into {gpu_memory:g} GB: every GPU holds all weights for a moment, to load them and to "
            f"validate, and they alone take {copy / _GB:.0f} GB; take a smaller backbone or larger GPUs"
        )
    changes = needs.that_fit(limit)
    if changes is None:
        return f"does not fit into {gpu_memory:g} GB: more workers at ZeRO stage 3, a smaller backbone, or LoRA"
    options = " ".join(f"--set training.{name}={json.dumps(value)}" for name, value in changes.items())
    return f"does not fit into {gpu_memory:g} GB as it is; it does with {options}"


def _measured(experiment: Experiment) -> tuple[float | None, str]:
    """Tokens a second of an earlier run of this name."""
    for version in reversed(experiment.model.versions):
        if history := read_json(version.directory / HISTORY):
            return float(history[-1]["tokens_per_second"]), f"measured: {version.directory / HISTORY}"
    return None, ""

"""Checkpoints of a training run that any number of workers under any ZeRO stage can load.

A directory holds, for every trainable parameter by name, its float32 weight and AdamW's two moments, whole and not
sharded as the run was. Parameter i lies in the file of rank i % workers, so that all write at once:

    shard-00000-of-00002.safetensors    weight/NAME, exp_avg/NAME, exp_avg_sq/NAME, all float32, and a checksum
    state.json                          names and shapes, AdamW's step count, the caller's state

Frozen weights are not in it: they come from the backbone. Nothing in it is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch import distributed as dist

from recommender.errors import UserError
from recommender.files import write_json
from trainer.loop.engine import masters
from trainer.loop.patience import patiently
from trainer.loop.tensors import check_tensors, write_tensors

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

SCHEMA_VERSION = 1
STATE_FILE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


def save(engine: DeepSpeedEngine, directory: Path, state: dict[str, Any], say: Callable[[str], None] = print) -> None:
    """Write a checkpoint. Collective, between optimiser steps; `directory` may be another on every node.

    Args:
        directory: created if need be; rank 0 writes `state.json`, last and at once, so that without it the checkpoint
            is incomplete.
        state: whatever else the run needs to go on, as JSON: position in the plan, RNG seeds, metrics.
        say: told where a disk is full; the others then wait for this rank.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    rank, workers = dist.get_rank(), dist.get_world_size()

    mine: dict[str, Tensor] = {}
    parameters = list(_trainable(engine))
    for index, (name, parameter) in enumerate(parameters):
        for key in (None, *MOMENTS):
            value = _gather(engine, parameter, key)
            if index % workers == rank:
                mine[f"{key or 'weight'}/{name}"] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
    write_tensors(mine, directory / shards(workers)[rank], say)

    dist.barrier()
    if rank == 0:
        document = {
            "schema_version": SCHEMA_VERSION,
            "workers": workers,
            "zero_stage": engine.zero_optimization_stage(),
            "optimizer_step": _optimizer_step(engine),
            "parameters": {name: list(_shape(parameter)) for name, parameter in parameters},
            "state": state,
        }
        patiently(lambda: write_json(directory / STATE_FILE, document), lambda: None, STATE_FILE, say)
    dist.barrier()


@torch.no_grad()
def load(engine: DeepSpeedEngine, directory: Path) -> dict[str, Any]:
    """Restore weights, moments and AdamW's step count; return the `state` that was saved. Collective.

    The engine is fresh or used, of any ZeRO stage and number of workers; every rank reads the whole checkpoint.

    Raises:
        UserError: the checkpoint is incomplete, damaged or of another version, or its parameters are not this
            module's.
    """
    directory = Path(directory)
    document = read_state(directory)
    parameters = list(_trainable(engine))
    _check_fit(directory, document["parameters"], {name: list(_shape(parameter)) for name, parameter in parameters})

    names = shards(document["workers"])
    _check_files(directory, names)
    with ExitStack() as files:
        try:
            opened = [files.enter_context(safe_open(directory / name, framework="pt")) for name in names]
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{directory}: a file of this checkpoint is missing or damaged: {error}. {_REMEDY}"
            ) from error
        order = {name: index for index, name in enumerate(document["parameters"])}
        for name, parameter in parameters:
            shard = opened[order[name] % len(opened)]
            weight = shard.get_tensor(f"weight/{name}")
            _scatter(engine, parameter, None, weight)
            for key in MOMENTS:
                _scatter(engine, parameter, key, shard.get_tensor(f"{key}/{name}"))
            _set_weight(engine, parameter, weight)
    for moments in engine.basic_optimizer.state.values():
        moments["step"].fill_(float(document["optimizer_step"]))
    return document["state"]


@torch.no_grad()
def read_weights(directory: Path, model: nn.Module, prefix: str) -> None:
    """Copy a checkpoint's weights into a plain model, in the model's own dtypes; no process group is needed.

    Args:
        directory: complete.
        model: its parameters' names are those of the checkpoint without `prefix`.
        prefix: what the trained module put in front of them.

    Raises:
        UserError: incomplete, or of another model.
    """
    document = read_state(directory)
    _check_files(directory, shards(document["workers"]))
    names = list(document["parameters"])
    for rank, file in enumerate(shards(document["workers"])):
        with safe_open(Path(directory) / file, framework="pt") as shard:
            for name in names[rank :: document["workers"]]:
                try:
                    model.get_parameter(name.removeprefix(prefix)).copy_(shard.get_tensor(f"weight/{name}"))
                except (AttributeError, RuntimeError) as error:
                    raise UserError(f"{directory}: does not fit this backbone: {name}: {error}") from error


def read_state(directory: Path) -> dict[str, Any]:
    """The whole `state.json`: the caller's `state`, and what `save` says about the checkpoint itself.

    Raises:
        UserError: there is none, or it is of another version.
    """
    path = Path(directory) / STATE_FILE
    if not path.is_file():
        raise UserError(f"{directory}: no complete checkpoint, {STATE_FILE} is missing. {_REMEDY}")
    try:
        document = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}. {_REMEDY}") from error
    if not isinstance(document, dict) or document.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"{path}: not a checkpoint of schema version {SCHEMA_VERSION}. Train from the start.")
    return document


def shards(workers: int) -> list[str]:
    """The names of a checkpoint's files of tensors, by rank."""
    return [f"shard-{rank:05d}-of-{workers:05d}.safetensors" for rank in range(workers)]


def _check_files(directory: Path, names: Sequence[str]) -> None:
    for name in names:
        try:
            check_tensors(Path(directory) / name)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{directory}: a file of this checkpoint is missing or damaged: {error}. {_REMEDY}"
            ) from error


_REMEDY = "Resume from an earlier checkpoint or train from the start."


def _check_fit(directory: Path, saved: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
    missing, surplus = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    shapes = [
        f"{name} {saved[name]} → {wanted[name]}" for name in wanted if name in saved and saved[name] != wanted[name]
    ]
    for problem, names in (
        ("the checkpoint lacks trainable parameters of this model", missing),
        ("the checkpoint holds parameters that this model does not train", surplus),
        ("parameters have other shapes in this model", shapes),
    ):
        if names:
            raise UserError(
                f"{directory}: {problem}: {', '.join(names[:3])} ({len(names)} in all). "
                "Resume with the configuration that the run was started with."
            )


# ---- What DeepSpeed's four layouts have in common --------------------------------------------------------------------


def _trainable(engine: DeepSpeedEngine) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad)


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO 3 a parameter itself may be empty


def _master(engine: DeepSpeedEngine, parameter: nn.Parameter) -> Tensor:
    """ZeRO 0: the parameter's own master, which in float32 is the parameter."""
    if not engine.bfloat16_enabled():
        return parameter
    optimizer = engine.optimizer
    for half, full in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for candidate, master in zip(half, full, strict=True):
            if candidate is parameter:
                return master
    raise KeyError("not a trainable parameter of this engine")


def _optimizer_step(engine: DeepSpeedEngine) -> int:
    return int(engine.basic_optimizer.state[masters(engine)[0]]["step"].item())


def _gather(engine: DeepSpeedEngine, parameter: nn.Parameter, key: str | None) -> Tensor:
    """The whole float32 master weight (`key` None) or moment of a parameter. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_optimization_stage() == 0:
        master = _master(engine, parameter)
        return master if key is None else engine.basic_optimizer.state[master][key]
    if key is None:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, key)


def _scatter(engine: DeepSpeedEngine, parameter: nn.Parameter, key: str | None, value: Tensor) -> None:
    """Set this rank's part of the master weight or moment of a parameter from its whole value."""
    from deepspeed.utils import (
        safe_get_local_fp32_param,
        safe_get_local_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
    )

    stage = engine.zero_optimization_stage()
    if stage == 0:
        master = _master(engine, parameter)
        (master if key is None else engine.basic_optimizer.state[master][key]).copy_(value)
    elif stage == 3:
        # DeepSpeed's setter of whole values fails where the size is not a multiple of the ranks: the last part is
        # padded. Its getters return views on the CPU and on the GPU alike.
        part = safe_get_local_fp32_param(parameter) if key is None else safe_get_local_optimizer_state(parameter, key)
        flat = value.flatten()[dist.get_rank() * part.numel() :][: part.numel()]
        part[: flat.numel()].copy_(flat)
    elif key is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, key)


def _set_weight(engine: DeepSpeedEngine, parameter: nn.Parameter, value: Tensor) -> None:
    """Set the weight that the module computes with. Collective under ZeRO 3."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0, enabled=engine.zero_optimization_partition_weights()):
        parameter.copy_(value)

"""Models in memory once, however many adapters lie over them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(path: str, revision: str | None, device: str, dtype: torch.dtype | None) -> PreTrainedModel:
    """A causal language model with weights of its own.

    Args:
        path: a directory or a hub name.
        dtype: of the weights; None = as they were saved.

    Raises:
        OSError, ValueError: what `transformers` says of a model that cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, revision=revision, dtype=dtype or "auto")
    return model.to(device)


class Bases:
    """Loads models whose weights are shared: what is asked for again gets the tensors that are in memory.

    Weights stay for as long as a model with them lives. They are taken for the same while path, revision, device, dtype
    and the files' sizes and times are. Nobody may write to them: adapters compute beside them, and are never merged
    into them. One thread at a time may load.
    """

    def __init__(self) -> None:
        self._models: WeakValueDictionary[tuple[object, ...], PreTrainedModel] = WeakValueDictionary()

    def load(self, path: str, revision: str | None, device: str, dtype: torch.dtype | None) -> PreTrainedModel:
        """As `load_model`, with modules of its own over shared weights: whatever is put around or in place of a module
        concerns nobody else.
        """
        key = (*_source(path, revision), device, dtype)
        model = self._models.get(key)
        if model is None:
            model = self._models[key] = load_model(path, revision, device, dtype)
        return _sharing(model)


def _source(path: str, revision: str | None) -> tuple[object, ...]:
    """A directory and what its files are like, or a name on the hub and its revision."""
    directory = Path(path)
    if not directory.is_dir():
        return path, revision
    found = [(each.name, each.stat()) for each in sorted(directory.iterdir())]
    return directory.resolve(), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)


def _sharing(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules over the same tensors. Parameters are objects of their own: some of PEFT's initialisations
    put other data in place of a parameter's.
    """
    whole: Any = model
    shared: dict[int, torch.Tensor] = {id(buffer): buffer for buffer in whole.buffers()}
    shared |= {id(each): nn.Parameter(each.detach(), requires_grad=False) for each in whole.parameters()}
    twin: Any = copy.deepcopy(whole, shared)
    twin.__dict__["shares_with"] = model  # keeps it for the next one, and is no submodule
    return twin

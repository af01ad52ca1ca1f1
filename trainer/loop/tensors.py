"""Files of tensors that tell whether they are whole: a safetensors file with a checksum of its contents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.loop.patience import patiently

_CHECKSUM = "sha256"  # in the file's metadata


def write_tensors(tensors: Mapping[str, Tensor], path: Path, say: Callable[[str], None]) -> None:
    """Write tensors on the CPU, contiguous, and a checksum of their names and bytes. Patient with a full disk."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        _add(digest, name, tensors[name])
    metadata = {_CHECKSUM: digest.hexdigest()}
    patiently(lambda: save_file(dict(tensors), path, metadata), lambda: path.unlink(missing_ok=True), path.name, say)


def check_tensors(path: Path) -> None:
    """Read a file to its end and compare it with its checksum, if it has one.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is damaged.
    """
    path.open("rb").close()  # what cannot be opened is no damage
    try:
        with safe_open(path, framework="pt") as file:
            expected = (file.metadata() or {}).get(_CHECKSUM)
            if expected is None:
                return  # of an earlier release: its header is all that can be checked
            digest = hashlib.sha256()
            for name in sorted(file.keys()):
                _add(digest, name, file.get_tensor(name))
    except SafetensorError as error:
        raise ValueError(f"{path.name}: {error}") from None
    if digest.hexdigest() != expected:
        raise ValueError(f"{path.name}: its contents differ from its checksum")


def _add(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    digest.update(name.encode())
    digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)

"""What one rank finds wrong ends all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from recommender.errors import UserError

_BYTES = 2048  # of a message


@contextmanager
def agreed(device: torch.device) -> Iterator[None]:
    """Raise on every rank what one of them raises in here; the others would wait for it until a time-out. Collective.

    Raises:
        UserError: of the first rank that found something.
    """
    fault = None
    try:
        yield
    except UserError as error:
        fault = error
    mine = torch.zeros(_BYTES, dtype=torch.uint8)
    text = str(fault or "").encode()[:_BYTES]
    mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else 0
    every = [torch.empty_like(mine, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine.to(device))
    if fault is not None:
        raise fault
    for theirs in every:
        if said := bytes(theirs.tolist()).rstrip(b"\0"):
            raise UserError(said.decode(errors="ignore"))

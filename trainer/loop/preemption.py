"""Notices that a node goes away soon: a spot machine is reclaimed, a pod evicted, a machine drained.

Ray Train watches for them (`ray drain-node`, autoscalers) and tells each worker. The workers save a checkpoint and
leave, and the driver starts them again, on other nodes: nothing is trained twice, and no restart of
`cluster.max_failures` is used up.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from ray.train.v2._internal.execution.context import get_train_context


class Preempted(Exception):
    """Training has to leave its nodes; what it did is saved."""


def noticed(device: torch.device) -> bool:
    """Whether a node of the run goes away; the same answer on all ranks. Collective.

    `ray.train.get_preemption_info` says the same by way of an actor, which takes milliseconds: too long for each step.
    """
    mine = torch.tensor(float(get_train_context().preemption_context.preemption_info is not None), device=device)
    dist.all_reduce(mine, dist.ReduceOp.MAX)
    return bool(mine.item())


def leave_if_noticed(device: torch.device) -> None:
    """To be called when all is saved. Collective.

    Raises:
        Preempted: on all ranks.
    """
    if noticed(device):
        raise Preempted

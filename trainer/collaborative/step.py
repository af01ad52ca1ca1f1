"""An optimiser step of a collaborative model, of which sampled losses read few rows of a large table."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from recommender.collaborative.model import CollaborativeModel
from trainer.collaborative.windows import Epoch, TrainingWindows, pieces

SCORES_AT_ONCE = 1 << 25  # of one forward pass: 128 MB, and as much again for their gradients


def optimiser_step(
    model: CollaborativeModel,
    optimiser: torch.optim.Optimizer,
    windows: TrainingWindows,
    epoch: Epoch,
    mine: np.ndarray,
    negatives: Tensor | None,
    device: torch.device,
) -> tuple[float, float]:
    """Learn from this rank's windows `mine` of a step. Collective.

    Returns:
        The sum of the losses of all ranks' targets, and their number. Where loss or gradients are not finite, the sum
        is not a number, and the weights have not been touched.
    """
    model.train()
    optimiser.zero_grad()
    loss, counted = torch.zeros((), device=device), 0
    width = model.items if negatives is None else len(negatives) + 1
    for rows in pieces(epoch.length[mine], width, SCORES_AT_ONCE):
        piece, number = model.loss_sum(windows.collate(epoch, mine[rows], negatives).to(device))
        piece.backward()
        loss, counted = loss + piece.detach(), counted + number

    parameters = list(model.parameters())
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding) and module.sparse}
    read: dict[Tensor, Tensor] = {}  # of each table the rows that its gradient holds
    gradients = []
    for parameter in parameters:
        if parameter in tables:
            read[parameter], values = row_gradient(parameter)
        else:
            values = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients.append(values)
    reduced = torch.cat([loss.new_tensor([loss, counted]), *(gradient.flatten() for gradient in gradients)])
    dist.all_reduce(reduced)
    total, number_of_targets = reduced[:2].tolist()
    if not reduced.isfinite().all():
        return math.nan, number_of_targets
    means = (reduced[2:] / number_of_targets).split([gradient.numel() for gradient in gradients])
    for parameter, gradient, mean in zip(parameters, gradients, means, strict=True):
        mean = mean.view_as(gradient)
        if parameter in tables:
            mean = torch.sparse_coo_tensor(read[parameter][None], mean, parameter.shape, check_invariants=False)
        parameter.grad = mean
    optimiser.step()
    return total, number_of_targets


def row_gradient(table: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a table that any rank has read, rising, and this rank's gradient of them. Collective."""
    touched = torch.zeros(len(table), dtype=torch.int32, device=table.device)
    if table.grad is not None:
        touched[table.grad._indices()[0]] = 1
    dist.all_reduce(touched)  # a number a row: little beside a vector a row
    rows = touched.nonzero()[:, 0]
    values = table.new_zeros(len(rows), table.shape[1])
    if table.grad is not None:
        values.index_add_(0, torch.searchsorted(rows, table.grad._indices()[0]), table.grad._values())
    return rows, values


class RowAdamW(torch.optim.AdamW):
    """AdamW that, where a gradient is sparse, touches the rows that it holds and no others.

    The moments of the other rows do not decay meanwhile, and their weights stay (as in `torch.optim.SparseAdam`, which
    has no weight decay). A step costs what its rows cost, however long the table is. State lies where AdamW keeps it.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    self._step_rows(parameter, parameter.grad.coalesce(), group)
                    parameter.grad = None
        return super().step(closure)

    def _step_rows(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state |= {"step": torch.tensor(0.0)}
            state |= {moment: torch.zeros_like(parameter) for moment in ("exp_avg", "exp_avg_sq")}
        state["step"] += 1
        steps, (first, second) = state["step"].item(), group["betas"]
        rows, values = gradient.indices()[0], gradient.values()
        mean = state["exp_avg"][rows].lerp_(values, 1 - first)
        square = state["exp_avg_sq"][rows].mul_(second).addcmul_(values, values, value=1 - second)
        state["exp_avg"][rows], state["exp_avg_sq"][rows] = mean, square
        deviation = (square / (1 - second**steps)).sqrt_().add_(group["eps"])
        kept = parameter[rows] * (1 - group["lr"] * group["weight_decay"])
        parameter[rows] = kept.addcdiv_(mean, deviation, value=-group["lr"] / (1 - first**steps))

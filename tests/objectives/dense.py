"""The objectives once more, slow and plain: one position at a time, over just the columns that compete there.

A position is z [V] of the last layer, one [V] for each intermediate layer, the column y of the target, and where there
are any the rewards [V] (−1 for a token that leads to no item). Everything is differentiable in z and the layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from objectives.config import ILRecConfig


def ensemble(layers: Sequence[Tensor], how: str) -> Tensor:
    confidence = {
        "mean": lambda z: z.new_zeros(()),
        "variance": lambda z: ((z - z.sum() / len(z)) ** 2).sum() / len(z),
        "entropy": lambda z: (z.softmax(0) * z.softmax(0).log()).sum(),
        "max_prob": lambda z: z.softmax(0).max(),
    }[how]
    share = torch.stack([confidence(z) for z in layers]).softmax(0)
    return sum(s * z for s, z in zip(share, layers, strict=True))


def negatives(proposal: Tensor, y: int, alpha: float, threshold: str) -> list[int]:
    measure = proposal.softmax(0) if threshold == "probability" else proposal
    return [v for v in torch.nonzero(measure >= alpha * measure[y]).flatten().tolist() if v != y]


def weights(proposal: Tensor, chosen: list[int]) -> Tensor:
    w = torch.zeros_like(proposal)
    if chosen:
        w[chosen] = proposal[chosen].exp() / proposal[chosen].exp().sum()
    return w


def preference(z: Tensor, y: int, w: Tensor, beta: float, penalty: str) -> Tensor:
    penalised = z * (1 + beta * w) if penalty == "scaled" else z + beta * w
    return penalised.logsumexp(0) - z[y]


def distillation(student: Tensor, teacher: Tensor, direction: str) -> Tensor:
    p, q = student.log_softmax(0), teacher.detach().log_softmax(0)
    if direction == "teacher_student":
        p, q = q, p
    return (p.exp() * (p - q)).sum()


def soft_labels(reward: Tensor, y: int, chosen: list[int], temperature: float, support: str) -> Tensor:
    held = [v for v in chosen if support == "H" or reward[v] >= 0] + [y]
    raised = torch.exp(reward[held].clamp(min=0) / temperature)
    q = torch.zeros_like(reward)
    q[held] = raised / raised.sum()
    return q


def collaborative_reward(z: Tensor, q: Tensor) -> Tensor:
    return -(q * z.log_softmax(0)).sum()


def ilrec(
    config: ILRecConfig, z: Tensor, layers: Sequence[Tensor], y: int, reward: Tensor | None = None
) -> dict[str, Tensor]:
    """CPO, the CPD of each layer in turn, CRR, their weighted sum, and what is counted along the way."""
    layers = list(layers)
    proposal = z.detach()
    if config.negatives_from == "intermediate":
        proposal = layers[0].detach()
        if len(layers) > 1:
            with torch.no_grad():
                proposal = ensemble(layers, config.ensemble)
    chosen = negatives(proposal, y, config.alpha, config.threshold)
    w = weights(proposal, chosen)
    terms = {
        "cpo": preference(z, y, w, config.beta, config.penalty),
        "negatives": z.new_tensor(float(len(chosen))),
        "with_negatives": z.new_tensor(float(len(chosen) > 0)),
        "below_zero": z.new_tensor(float((z[chosen] < 0).sum())),
        "penalty": config.beta * (w.sum() if config.penalty == "additive" else (w * z.detach()).sum()),
    }
    loss = terms["cpo"]
    if config.cpd_weight:
        for number, layer in enumerate(layers):
            terms[f"cpd {number}"] = distillation(layer, z, config.cpd_direction)
            loss = loss + config.cpd_weight * terms[f"cpd {number}"]
    if config.crr_weight and reward is not None:
        q = soft_labels(reward, y, chosen, config.crr_temperature, config.crr_support)
        terms["crr"] = collaborative_reward(z, q)
        terms["crr_off_target"] = 1 - q[y]
        terms["crr_log_q_target"] = q[y].log()
        loss = loss + config.crr_weight * terms["crr"]
    return terms | {"loss": loss}


def logits_of(
    model: nn.Module, paths: Sequence[tuple[Sequence[int], Sequence[int]]], layers: Iterable[int]
) -> list[list[list[Tensor]]]:
    """Plain `transformers`, each prompt and response in a row of its own, no masks: rows are padded on the right.

    Returns:
        For each path and each token of its response: the logits that predict it, of the last layer and of `layers`.
    """
    whole = [[*prompt, *response] for prompt, response in paths]
    longest = max(map(len, whole))
    device = next(model.parameters()).device
    rows = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in whole], device=device)
    output = model(rows, output_hidden_states=True)
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    every = [output.logits] + [plain.lm_head(plain.model.norm(output.hidden_states[layer])) for layer in layers]
    return [
        [[each[row, len(prompt) + t - 1] for each in every] for t in range(len(response))]
        for row, (prompt, response) in enumerate(paths)
    ]

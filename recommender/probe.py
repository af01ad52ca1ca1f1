"""The probe: can this backbone run prompt trees?

Sliding windows, linear attention and learned recurrences see more than a token's ancestors, and say nothing. So a
backbone is asked: a small tree row, and the same samples in rows of their own, must give the same hidden states; so
must rows that are packed into one sequence, as searches run them. Where FlexAttention may train it, that must give the
same as SDPA, forward and backward.
"""

from __future__ import annotations

import numpy as np
import torch

from recommender.backbone.backbone import Backbone
from recommender.backbone.tree import Row, Sample, build_row, collate
from recommender.errors import UserError
from recommender.search.prefill import prefill
from recommender.search.prefixes import Prefixes


@torch.inference_mode()
def tree_mismatch(backbone: Backbone, length: int = 64) -> float:
    """Largest relative difference between tree rows and separate rows, on random tokens.

    Args:
        backbone: in any dtype, on any device.
        length: tokens of the longest path; give the longest training row's, since windows only show beyond their size.
    """
    samples = _samples(backbone, length)
    tree = _hidden(backbone, [build_row(samples)])
    alone = _hidden(backbone, [build_row([sample]) for sample in samples])
    return _difference(tree, alone)


@torch.inference_mode()
def packed_mismatch(backbone: Backbone, length: int = 64) -> float:
    """Largest relative difference between packed prompts and prompts that run alone, in their last hidden states.

    Args:
        backbone, length: as above.
    """
    prompts = [sample.prompt for sample in _samples(backbone, length)]
    run = prefill(backbone, prompts, Prefixes(backbone, np.empty(0, np.int32)), headroom=0)
    tokens = [torch.from_numpy(prompts[row]).long()[None].to(backbone.device) for row in run.order.tolist()]
    alone = torch.cat([backbone.hidden(prompt, None, None)[:, -1] for prompt in tokens]).float()
    return _difference(run.hidden.float(), alone)


def flex_mismatch(backbone: Backbone, length: int = 64) -> tuple[float, float]:
    """Relative differences between FlexAttention and SDPA on one tree row, as vectors.

    Args:
        backbone: FlexAttention is allowed; on a device that can train with it.
        length: as above.

    Returns:
        of hidden states, and of the gradient of the first layer's trained weights, which has come through all layers.
    """
    weights = [weight for weight in backbone.layers[0].parameters() if weight.requires_grad]
    training = backbone.model.training
    backbone.model.eval()  # adapters have dropout
    found = []
    for blocks_from in (None, 0):
        hidden = _hidden(backbone, [build_row(_samples(backbone, length))], blocks_from)
        # half of each state: normed ones have all the same square sum, and some the same sum
        gradients = torch.autograd.grad(hidden[:, ::2].sum(), weights) if weights else ()
        found.append((hidden.detach(), torch.cat([hidden.new_zeros(1), *(g.float().flatten() for g in gradients)])))
    backbone.model.train(training)
    sdpa, flex = found
    differences = [float((a - b).norm() / a.norm().clamp_min(1e-12)) for a, b in zip(sdpa, flex, strict=True)]
    return differences[0], differences[1]


def _samples(backbone: Backbone, length: int) -> list[Sample]:
    """Random responses to the beginnings of a random text, the longest path of `length` tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, backbone.vocabulary, (4, max(length, 16))).astype(np.int32)
    trunk = tokens[0]
    samples = []
    for i, cut in enumerate((len(trunk) // 4, len(trunk) // 2, len(trunk) - 8)):
        response = tokens[i + 1, :8]
        samples.append(Sample(trunk[:cut], response, np.zeros(8, np.int32)))
    samples.append(Sample(trunk[:-8], trunk[-8:], np.zeros(8, np.int32)))
    samples.sort(key=lambda s: np.concatenate([s.prompt, s.response]).tolist())  # the order that a row keeps
    return samples


@torch.inference_mode()
def _logits_mismatch(backbone: Backbone) -> float:
    """Relative difference between the prediction layer on last hidden states and the model's own logits."""
    tokens = torch.arange(8, device=backbone.device)[None] % backbone.vocabulary
    own = backbone.model(input_ids=tokens).logits[0].float()
    ours = backbone.logits(backbone.hidden(tokens, None, None)[0]).float()
    return _difference(ours, own)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest one, relative to the largest that is expected."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def _hidden(backbone: Backbone, rows: list[Row], blocks_from: int | None = None) -> torch.Tensor:
    batch = collate(rows, backbone.padding, blocks_from=blocks_from).to(backbone.device)
    hidden = backbone.hidden(batch.input_ids, batch.attention_mask(), batch.position_ids)
    return hidden.flatten(0, 1)[batch.source].float()


def check_tree(backbone: Backbone, length: int) -> None:
    """Refuse a backbone whose prompt trees cannot be trusted.

    Raises:
        UserError: tree rows, or packed ones, disagree with separate rows; or the backbone takes no mask of its own.
    """
    tolerance = _tolerance(backbone)
    try:
        mismatch = tree_mismatch(backbone, length)
        if mismatch <= tolerance:  # what cannot run trees is told so before it meets a cache
            mismatch = packed_mismatch(backbone, length)
        scaled = _logits_mismatch(backbone)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise UserError(f"backbone: {type(backbone.model).__name__} does not take tree masks: {error}") from error
    if not scaled <= tolerance:  # nor NaN
        raise UserError(
            f"backbone: {type(backbone.model).__name__} does more to its logits than its prediction layer does "
            "(scaling, soft-capping), which training and search would leave out; use a Llama, Qwen2/3 or GPT-2 model"
        )
    if not mismatch <= tolerance:
        raise UserError(
            f"backbone: {type(backbone.model).__name__} cannot run prompt trees: on a row of {length} tokens its "
            f"hidden states are off by {mismatch:.1%} (sliding windows and linear attention look past ancestors). "
            "Use a full-attention model (Llama, Qwen2/3, GPT-2, OPT), or a prompt.history that stays inside its window."
        )


def flex_fault(backbone: Backbone, length: int) -> str | None:
    """What is wrong with FlexAttention on this device; None where it may be used, or is not in use."""
    if backbone.blocks_from is None:
        return None
    try:
        hidden, gradient = flex_mismatch(backbone, length)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the compiler, of Triton, of the model: none of them has a base of its own
        return f"FlexAttention does not run here: {error}"
    tolerance = _tolerance(backbone)
    if hidden <= tolerance and gradient <= 4 * tolerance:  # gradients lose more digits on the way
        return None
    return (
        f"FlexAttention differs from SDPA on a row of {length} tokens, by {hidden:.1%} in hidden states and "
        f"{gradient:.1%} in gradients"
    )


def _tolerance(backbone: Backbone) -> float:
    return {torch.float32: 1e-3, torch.float64: 1e-6}.get(backbone.dtype, 5e-2)

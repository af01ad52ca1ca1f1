"""FlexAttention for tree rows: whether a backbone may train with it, and from how many tokens on.

It trains on GPUs only. Whether it then computes what SDPA does is asked by `flex_fault` of `recommender/probe.py`.
"""

from __future__ import annotations

from typing import Any, Literal

from recommender.backbone.backbone import Backbone
from recommender.errors import UserError

# Padded to whole blocks, shorter rows grow by more than they could skip. On paper: no GPU was at hand to measure it.
_LONG = 512
_DROPOUT = ("attention_dropout", "attn_pdrop", "attn_dropout")  # in models' configs


def choose_attention(backbone: Backbone, wanted: Literal["auto", "sdpa", "flex"]) -> None:
    """Let a backbone, on the device that it trains on, compute tree rows with FlexAttention where that is right.

    Args:
        wanted: auto: rows of at least 512 tokens on GPUs, if the model can; flex: all rows that branch; sdpa: none.

    Raises:
        UserError: flex is wanted and cannot be had.
    """
    if wanted == "sdpa":
        return
    reason = against_flex(backbone.decoder, backbone.device.type)
    if reason is None:
        backbone.blocks_from = _LONG if wanted == "auto" else 0
    elif wanted == "flex":
        raise UserError(f"training.attention: flex: {reason}; use auto")


def against_flex(decoder: Any, device: str) -> str | None:
    """Why FlexAttention cannot train a decoder on a type of device; None if it can."""
    model = type(decoder).__name__
    if device != "cuda":
        return "PyTorch's FlexAttention trains on GPUs only"
    if not decoder._supports_flex_attn:
        return f"{model} does not support FlexAttention"
    if any(getattr(decoder.config, name, 0) for name in _DROPOUT):
        return f"{model} drops out attention weights, which FlexAttention cannot"
    return None

"""Which attention computes prompt trees: SDPA under a boolean mask, or FlexAttention, which skips blocks.

The mask of a call decides: under a packed one (searches) SDPA computes block by block, a block mask goes to
FlexAttention, all else to SDPA as `transformers` has it. FlexAttention trains on GPUs only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from recommender.backbone.packing import PackedMask
from recommender.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.nn.attention.flex_attention import BlockMask

    from recommender.backbone.backbone import Backbone

# Padded to whole blocks, shorter rows grow by more than they could skip. On paper: no GPU was at hand to measure it.
_LONG = 512
_DROPOUT = ("attention_dropout", "attn_pdrop", "attn_dropout")  # in models' configs
_NAME = "prompt_trees"
_REMEDY = "use a Llama-, Qwen-, GPT-2- or OPT-like model"


def route_attention(decoder: Any) -> None:
    """Let the mask of each call of a decoder decide on its attention.

    Raises:
        UserError: it has an attention of its own, which cannot be replaced.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    own, model = decoder.config._attn_implementation, type(decoder).__name__
    if own not in ("sdpa", _NAME):
        raise UserError(f"backbone: {model} attends by {own!r} and not by SDPA; {_REMEDY}")
    if not decoder._can_set_attn_implementation():
        raise UserError(f"backbone: {model} has attention classes of its own; {_REMEDY}")
    AttentionInterface.register(_NAME, _by_mask)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    decoder.set_attn_implementation(_NAME)


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


def _by_mask(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if isinstance(attention_mask, PackedMask):
        packing = attention_mask.packing
        if packing is None:
            raise UserError(f"backbone: {type(module).__name__} makes masks of its own; {_REMEDY}")

        def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            return sdpa_attention_forward(module, query, key, value, mask, **rest)[0]

        return packing.attend(sdpa, query, key, value), None

    from torch.nn.attention.flex_attention import BlockMask
    from transformers.integrations.flex_attention import flex_attention_forward

    if isinstance(attention_mask, BlockMask):
        return flex_attention_forward(module, query, key, value, attention_mask, **rest)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **rest)

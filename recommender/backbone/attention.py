"""Which attention computes prompt trees: SDPA under a boolean mask, or FlexAttention, which skips blocks.

The mask of a call decides: under a packed one (searches) SDPA computes block by block, a block mask goes to
FlexAttention, all else to SDPA as `transformers` has it. `recommender/backbone/flex.py` says who gets block masks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from recommender.backbone.packing import PackedMask
from recommender.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.nn.attention.flex_attention import BlockMask

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

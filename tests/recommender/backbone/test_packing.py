"""Packed sequences attend as their rows do one by one."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from recommender.backbone.backbone import Backbone
from recommender.backbone.cache import TreeCache
from recommender.backbone.packing import Block, Packing
from recommender.errors import UserError

VOCABULARY = 50
HEADS, WIDTH = 4, 8


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    found = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None)
    return found.transpose(1, 2)


def test_blocks_attend_as_rows_do_one_by_one() -> None:
    torch.manual_seed(0)
    lengths, slots = [2, 2, 1, 5, 3], 9
    keys, values = torch.rand(2, len(lengths), HEADS, slots, WIDTH)
    query = torch.rand(1, HEADS, sum(lengths), WIDTH)
    masks = [torch.rand(length, slots) < 0.5 for length in lengths]
    expected = []
    for number, (own, mask) in enumerate(zip(query.split(lengths, dim=2), masks, strict=True)):
        mask[:, 0] = True
        expected.append(_sdpa(own, keys[None, number], values[None, number], mask[None, None])[0])

    row = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    place = torch.cat([torch.arange(length) for length in lengths])
    for cuts in ([0, 5], [0, 2, 5], [0, 1, 4, 5], [0, 1, 2, 3, 4, 5]):
        blocks = []
        for begin, end in pairwise(cuts):
            width = max(lengths[begin:end])
            mask = torch.ones(end - begin, 1, width, slots, dtype=torch.bool)
            for number, own_mask in enumerate(masks[begin:end]):
                mask[number, 0, : len(own_mask)] = own_mask
            tokens = slice(sum(lengths[:begin]), sum(lengths[:end]))
            block = Block.of(slice(begin, end), tokens, width, slots, mask, row[tokens] - begin, place[tokens])
            assert (block.place is None) == (len(set(lengths[begin:end])) == 1)
            blocks.append(block)
        found = Packing(row, place, slots, blocks).attend(_sdpa, query, keys, values)
        torch.testing.assert_close(found[0], torch.cat(expected))


def _models() -> dict[str, PreTrainedModel]:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    qwen3 = Qwen3Config(vocab_size=VOCABULARY, intermediate_size=48, num_key_value_heads=2, head_dim=8, **shape)
    opt = OPTConfig(vocab_size=VOCABULARY, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, **shape)
    return {
        "qwen3": Qwen3ForCausalLM(qwen3),
        "opt": OPTForCausalLM(opt),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=HEADS)),
    }


@pytest.mark.parametrize("kind", ["qwen3", "opt", "gpt2"])
@torch.no_grad()
def test_a_model_computes_packed_rows_as_rows_of_their_own(kind: str) -> None:
    """Causal rows of several lengths, run in two halves on a cache."""
    backbone = Backbone(_models()[kind].eval(), tokenizer=None)  # type: ignore[arg-type]
    lengths = [3, 6, 4]
    rows = [torch.randint(1, VOCABULARY, (length,)) for length in lengths]
    expected = [backbone.hidden(row[None], None, None)[0] for row in rows]

    cache, found = TreeCache(backbone.num_layers, len(rows), 6), []
    for begin, end in ((0, 2), (2, 6)):
        halves = [row[begin:end] for row in rows]
        row = torch.cat([torch.full_like(half, number) for number, half in enumerate(halves)])
        place = torch.cat([torch.arange(len(half)) for half in halves])
        width, slot = max(map(len, halves)), begin + place
        mask = torch.arange(begin + width) <= begin + torch.arange(width)[:, None]
        block = Block.of(slice(0, 3), slice(0, len(row)), width, begin + width, mask[None, None], row, place)
        packing = Packing(row, slot, begin + width, [block])
        found.append(backbone.appended(torch.cat(halves), slot, packing, cache).split([len(half) for half in halves]))
    for own, *halves in zip(expected, *found, strict=True):
        torch.testing.assert_close(torch.cat(halves), own, atol=1e-5, rtol=1e-4)


def test_a_model_that_attends_in_its_own_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _models()["gpt2"]
    model.set_attn_implementation("eager")
    with pytest.raises(UserError, match=r"GPT2Model attends by 'eager' and not by SDPA; use a Llama"):
        Backbone(model, tokenizer=None)  # type: ignore[arg-type]
    model = _models()["gpt2"]
    monkeypatch.setattr(type(model.get_decoder()), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(UserError, match=r"GPT2Model has attention classes of its own; use a Llama"):
        Backbone(model, tokenizer=None)  # type: ignore[arg-type]


def test_a_mask_that_lost_its_packing_is_refused() -> None:
    backbone = Backbone(_models()["qwen3"].eval(), tokenizer=None)  # type: ignore[arg-type]
    own = backbone.decoder.forward
    backbone.decoder.forward = lambda attention_mask, **rest: own(attention_mask=attention_mask & True, **rest)
    packing = Packing.of_row(0, 3, None, torch.device("cpu"))
    with pytest.raises(UserError, match="Qwen3Attention makes masks of its own"):
        backbone.appended(torch.tensor([1, 2, 3]), packing.slot, packing, TreeCache(2, 1, 3))


def test_what_is_saved_names_no_attention_of_ours(tmp_path: Path) -> None:
    backbone = Backbone(_models()["gpt2"], tokenizer=None)  # type: ignore[arg-type]
    backbone.model.save_pretrained(tmp_path)
    assert backbone.decoder.config._attn_implementation not in (tmp_path / "config.json").read_text()

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.flex_attention as integration
from torch.nn.attention import flex_attention as flex
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from recommender.backbone.backbone import Backbone, add_lora, train_tokenizer
from recommender.backbone.flex import against_flex, choose_attention
from recommender.backbone.tree import BLOCK, Batch, Row, Sample, ancestor_blocks, ancestor_mask, build_row, collate
from recommender.config import LoraConfig
from recommender.errors import UserError
from recommender.probe import flex_fault, flex_mismatch

VOCABULARY = 300


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention without its compiler. PyTorch has its backward pass on a CPU as well, but does not offer it."""

    def eager(query: Any, key: Any, value: Any, training: bool = False, **rest: Any) -> Any:
        return flex.flex_attention(query, key, value, **rest)

    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(integration, "compile_friendly_flex_attention", eager)


def _row(trunk: int, branches: int, rng: np.random.Generator) -> Row:
    """Branches of up to 150 tokens anywhere on a trunk."""
    tokens = rng.integers(0, VOCABULARY, trunk).astype(np.int32)
    samples = []
    for cut in rng.integers(1, trunk, branches):
        response = rng.integers(0, VOCABULARY, rng.integers(2, 150)).astype(np.int32)
        samples.append(Sample(tokens[:cut], response, np.zeros(len(response), np.int32)))
    return build_row(samples)


def _batch(blocks_from: int | None = 0) -> Batch:
    rng = np.random.default_rng(0)
    return collate([_row(200, 3, rng), _row(40, 2, rng)], padding=0, blocks_from=blocks_from)


def _llama(lora: bool = False, **changes: Any) -> Backbone:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        **changes,
    )
    model: Any = LlamaForCausalLM(config)
    if lora:
        model = add_lora(model, LoraConfig(dropout=0.0))
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # zero at first, which would hide the gradient of A
                torch.nn.init.normal_(weight, std=0.1)
    return Backbone(model, train_tokenizer(["a tent"], VOCABULARY))


@pytest.mark.parametrize("seed", range(5))
def test_blocks_are_those_of_the_whole_mask(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [_row(int(rng.integers(10, 500)), int(rng.integers(2, 9)), rng) for _ in range(3)]
    batch = collate(rows, padding=0, blocks_from=0)
    assert batch.end is not None
    whole, blocks = ancestor_mask(batch.end), ancestor_blocks(batch.end)
    assert blocks.shape == whole.shape
    tiles = whole.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(3, 4).flatten(4)
    every, some = tiles.all(-1), tiles.any(-1)
    assert _dense(blocks.kv_num_blocks, blocks.kv_indices).equal(some & ~every)
    assert _dense(blocks.full_kv_num_blocks, blocks.full_kv_indices).equal(every)
    assert _dense(blocks.q_num_blocks, blocks.q_indices).transpose(2, 3).equal(some & ~every)
    row, place = torch.arange(len(rows))[:, None, None], torch.arange(whole.shape[2])
    inside = blocks.mask_mod(row, torch.tensor(0), place[:, None], place)
    assert inside.equal(whole[:, 0])


def _dense(number: Any, listed: Any) -> torch.Tensor:
    blocks = torch.zeros(listed.shape, dtype=torch.bool)
    chosen = torch.arange(listed.shape[-1]) < number[..., None]
    return blocks.scatter(-1, listed.long(), chosen)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_loss_and_gradients_are_those_of_sdpa(lora: bool, checkpointing: bool) -> None:
    backbone = _llama(lora)
    backbone.blocks_from = 0
    backbone.model.train()
    if checkpointing:
        backbone.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = [weight for weight in backbone.model.parameters() if weight.requires_grad]
    found = []
    for batch in (_batch(None), _batch()):
        hidden = backbone.hidden(batch.input_ids, batch.attention_mask(), batch.position_ids)
        loss = F.cross_entropy(backbone.logits(hidden.flatten(0, 1)[batch.source]), batch.target)
        found.append((loss.detach(), *torch.autograd.grad(loss, weights)))
    assert isinstance(_batch().attention_mask(), flex.BlockMask)
    for sdpa, flexed in zip(*found, strict=True):
        assert float((sdpa - flexed).norm()) <= 1e-5 * float(sdpa.norm()) + 1e-9


@pytest.mark.usefixtures("on_cpu")
def test_what_does_not_come_in_blocks_is_left_to_sdpa() -> None:
    backbone, batch = _llama(), _batch(None)
    bare: Any = _llama().decoder  # of the same weights
    bare.set_attn_implementation("sdpa")
    chain = (batch.input_ids, None, torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids))
    calls: list[tuple[Any, ...]] = [(batch.input_ids, batch.attention_mask(), batch.position_ids), chain]
    names = ("input_ids", "attention_mask", "position_ids")
    before = [bare(**dict(zip(names, call, strict=True)), use_cache=False).last_hidden_state for call in calls]
    backbone.blocks_from = 0
    assert all(a.equal(b) for a, b in zip(before, [backbone.hidden(*call) for call in calls], strict=True))


@pytest.mark.usefixtures("on_cpu")
def test_the_probe_tells_a_flex_attention_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = _llama()
    backbone.blocks_from = 0
    assert flex_fault(backbone, 64) is None
    assert max(flex_mismatch(backbone, 64)) < 1e-5
    own = integration.compile_friendly_flex_attention
    causal = ancestor_blocks(torch.full((1, BLOCK), BLOCK))

    def wrong(*inputs: Any, block_mask: Any, **rest: Any) -> Any:
        return own(*inputs, block_mask=causal, **rest)

    def broken(*inputs: Any, **rest: Any) -> Any:
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", wrong)
    assert "differs from SDPA on a row of 64 tokens" in str(flex_fault(backbone, 64))
    monkeypatch.setattr(integration, "compile_friendly_flex_attention", broken)
    assert flex_fault(backbone, 64) == "FlexAttention does not run here: no such kernel"
    backbone.blocks_from = None
    assert flex_fault(backbone, 64) is None


def test_only_long_rows_that_branch_come_in_blocks() -> None:
    rng = np.random.default_rng(0)
    long, short = _row(600, 3, rng), _row(30, 2, rng)
    path = np.zeros(600, np.int32)
    chain = build_row([Sample(path, path[:1], path[:1])])
    assert collate([long, short], 0, blocks_from=512).blocks
    assert collate([long, short], 0, blocks_from=512).input_ids.shape[1] % BLOCK == 0
    assert not collate([long, short], 0).blocks
    assert not collate([short], 0, blocks_from=512).blocks
    assert not collate([chain], 0, blocks_from=512).blocks


def test_flex_is_for_gpus_and_for_models_that_can() -> None:
    backbone = _llama()
    choose_attention(backbone, "auto")
    assert backbone.blocks_from is None
    with pytest.raises(UserError, match=r"training\.attention: flex: .* on GPUs only"):
        choose_attention(backbone, "flex")
    assert against_flex(backbone.decoder, "cuda") is None
    dropping = _llama(attention_dropout=0.1).decoder
    assert against_flex(dropping, "cuda") == "LlamaModel drops out attention weights, which FlexAttention cannot"
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=4))
    assert against_flex(gpt2.get_decoder(), "cuda") == "GPT2Model does not support FlexAttention"

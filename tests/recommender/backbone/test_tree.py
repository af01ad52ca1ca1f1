from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from recommender.backbone.backbone import Backbone, load_backbone, train_tokenizer
from recommender.backbone.tree import Sample, ancestor_mask, build_row, collate
from recommender.config import PresetBackbone
from recommender.errors import UserError
from recommender.probe import check_tree, packed_mismatch, tree_mismatch

tokens = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=8))
def test_every_sample_can_be_read_off_its_row(pairs: list[tuple[list[int], list[int]]]) -> None:
    samples = [
        Sample(np.array(p, np.int32), np.array(r, np.int32), np.arange(len(r), dtype=np.int32)) for p, r in pairs
    ]
    row = build_row(samples)
    mask = ancestor_mask(torch.from_numpy(row.end.astype(np.int64))[None])[0, 0].numpy()
    paths = {tuple(row.tokens[mask[q]]) for q in range(len(row))}
    prefixes = {tuple((p + r[:-1])[: n + 1]) for p, r in pairs for n in range(len(p + r[:-1]))}
    assert paths == prefixes, "one token for every distinct prefix, each seeing just its own path"
    assert len(row) == len(prefixes)
    assert (row.depth == mask.sum(1) - 1).all()
    supervised = sorted((*row.tokens[mask[s]].tolist(), int(t)) for s, t in zip(row.source, row.target, strict=True))
    assert supervised == sorted((*p, *r[: t + 1]) for p, r in pairs for t in range(len(r)))


def test_collate_pads_and_drops_forced_predictions() -> None:
    rows = [
        build_row([Sample(np.array([1, 2], np.int32), np.array([3, 4], np.int32), np.array([0, -1], np.int32))]),
        build_row([Sample(np.array([1], np.int32), np.array([5], np.int32), np.array([0], np.int32))]),
    ]
    batch = collate(rows, padding=9, multiple=4)
    assert batch.input_ids.tolist() == [[1, 2, 3, 9], [1, 9, 9, 9]]
    assert batch.attention_mask() is None, "rows without branches are plain causal rows"
    assert batch.source.tolist() == [1, 2, 4]
    only = collate(rows, padding=9, branching_only=True, multiple=4)
    assert (only.source.tolist(), only.target.tolist()) == ([1, 4], [3, 5])


def _backbone(model: PreTrainedModel) -> Backbone:
    return Backbone(model.eval(), train_tokenizer(["a tent"], 300))


SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


@pytest.mark.parametrize(
    "model",
    [
        LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)),
        Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2)),
        GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4)),
    ],
    ids=["llama", "qwen2", "gpt2"],
)
def test_backbones_that_can_run_trees_pass_the_probe(model: PreTrainedModel) -> None:
    assert tree_mismatch(_backbone(model), 96) < 1e-5
    assert packed_mismatch(_backbone(model), 96) < 1e-5


def test_a_backbone_that_makes_masks_of_its_own_is_found_out() -> None:
    backbone = _backbone(LlamaForCausalLM(LlamaConfig(**SMALL)))
    own = backbone.decoder.forward

    def changing(attention_mask: torch.Tensor | None, **rest: object) -> object:
        return own(attention_mask=None if attention_mask is None else attention_mask & True, **rest)

    backbone.decoder.forward = changing
    with pytest.raises(UserError, match="LlamaAttention makes masks of its own"):
        check_tree(backbone, 96)


@pytest.mark.parametrize("check", ["tree_mismatch", "packed_mismatch", "_logits_mismatch"])
def test_no_check_passes_by_not_a_number(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"recommender.probe.{check}", lambda *_: float("nan"))
    with pytest.raises(UserError, match=r"prompt trees|logits"):
        check_tree(_backbone(LlamaForCausalLM(LlamaConfig(**SMALL))), 96)


def test_a_sliding_window_is_found_out_beyond_its_size() -> None:
    model = MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=24))
    with pytest.raises(UserError, match=r"prompt trees.*sliding windows"):
        check_tree(_backbone(model), 96)


def test_a_preset_with_a_scale_is_a_llama_that_reads_larger_vectors() -> None:
    tokenizer = train_tokenizer(["a red kettle", "blue lamp"], 300)
    plain, scaled = (load_backbone(PresetBackbone(size="mini", embedding_scale=s), tokenizer) for s in (1.0, 8.0))
    check_tree(scaled, 96)
    scaled.model.load_state_dict(plain.model.state_dict())
    plain.decoder.get_input_embeddings().register_forward_hook(lambda *call: 8 * call[2])
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(scaled.model(tokens).logits, plain.model(tokens).logits)


def test_a_preset_in_bfloat16_turns_by_exact_angles() -> None:
    tokenizer = train_tokenizer(["a red kettle", "blue lamp"], 300)
    exact, rounded = (
        load_backbone(PresetBackbone(), tokenizer, dtype).decoder.rotary_emb.inv_freq
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, exact)

"""Backbones: the causal language model behind a recommender, seen as hidden states and a prediction layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from recommender.backbone.attention import route_attention
from recommender.config import PRESETS, BackboneConfig, LoraConfig, PresetBackbone
from recommender.errors import UserError
from recommender.models import base_of

if TYPE_CHECKING:
    from peft import PeftModel
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from recommender.backbone.cache import TreeCache
    from recommender.backbone.packing import Packing


_ROWS_AT_ONCE = 2**24  # elements of gathered rows of the prediction layer
_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
_LAYERS = ("layers", "h", "blocks")


class Backbone:
    """A causal language model, plain or with LoRA adapters, and its tokenizer.

    Attributes:
        model: the `transformers` or `peft` model; `save_pretrained` works on it.
        tokenizer: its tokenizer.
        num_layers: number of decoder layers, L.
        vocabulary: number of rows of the prediction layer, V.
        context: tokens of the longest path that it can read.
        blocks_from: tokens from which on rows that branch are for FlexAttention, see
            `recommender/backbone/flex.py`; None = never.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase):
        self.model = model
        self.tokenizer = tokenizer
        whole: Any = model
        plain = whole.get_base_model() if hasattr(model, "peft_config") else whole
        self.decoder: Any = plain.get_decoder()
        self.head: nn.Module = plain.get_output_embeddings()
        self.norm = _only(self.decoder, _NORMS, "final norm")
        self.layers: list[nn.Module] = list(_only(self.decoder, _LAYERS, "decoder layers").children())
        self.num_layers = len(self.layers)
        self.vocabulary = int(plain.config.vocab_size)
        self.context = int(plain.config.max_position_embeddings)
        self.blocks_from: int | None = None
        route_attention(self.decoder)

    def to(self, device: torch.device | str) -> None:
        """Move the weights."""
        whole: Any = self.model
        whole.to(device)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def padding(self) -> int:
        """A token that may fill up rows; it is masked, so any will do."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id)

    def hidden(
        self, input_ids: Tensor, attention_mask: Tensor | BlockMask | None, position_ids: Tensor | None
    ) -> Tensor:
        """Last hidden states after the final norm: [B, Q, D].

        Args:
            input_ids: int64 [B, Q].
            attention_mask: bool [B, 1, Q, Q], True where a query may attend; None = plain causal attention; a block
                mask where FlexAttention is allowed.
            position_ids: int64 [B, Q]; None = 0 … Q−1.
        """
        output = self.decoder(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )
        return output.last_hidden_state

    def appended(self, tokens: Tensor, position: Tensor, packing: Packing, cache: TreeCache) -> Tensor:
        """The same of tokens that go on from what is in a cache, and are appended to it: [T, D].

        Args:
            tokens, position: int64 [T].
            packing: whose they are, and what each may attend to.
        """
        cache.write_at(packing)
        output = self.decoder(
            input_ids=tokens[None],
            attention_mask=packing.as_mask(tokens.device),
            position_ids=position[None],
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """The prediction layer on normed hidden states [N, D]: [N, V]."""
        return self.head(hidden)

    def logits_of(self, hidden: Tensor, position: Tensor, token: Tensor) -> Tensor:
        """Single outputs of the prediction layer: float32 [T].

        Args:
            hidden: [N, D], normed.
            position: int64 [T]; which of the hidden states.
            token: int64 [T]; which output of it.
        """
        head: Any = self.head
        at_once = max(1, _ROWS_AT_ONCE // hidden.shape[1])
        parts = [
            (hidden[at].float() * head.weight[of].float()).sum(-1)
            for at, of in zip(position.split(at_once), token.split(at_once), strict=True)
        ]
        logits = torch.cat(parts)
        return logits if head.bias is None else logits + head.bias[token].float()

    def logits_among(self, hidden: Tensor, token: Tensor) -> Tensor:
        """Some outputs of the prediction layer for all hidden states: float32 [N, T].

        Args:
            hidden: [N, D], normed.
            token: int64 [T]; which outputs.
        """
        head: Any = self.head
        bias = None if head.bias is None else head.bias[token].float()
        return nn.functional.linear(hidden.float(), head.weight[token].float(), bias)

    def as_head(self, function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run `function(*inputs)` in place of the prediction layer's own forward, with its weight at hand.

        Under ZeRO-3 a module's weights are whole only while it is called; so whoever wants to use `head.weight` in
        another way than `head` does has to be called as the head.
        """
        own = self.head.__dict__.get("forward")  # of the instance, as hooks of other libraries may set it
        self.head.forward = function
        try:
            return self.head(*inputs)
        finally:
            if own is None:
                del self.head.forward
            else:
                self.head.forward = own

    @contextmanager
    def tapped(self, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Collect the residual stream after the given layers while the model runs.

        Layer l (1 … L−1) is what `transformers` calls `hidden_states[l]`: the output of the l-th decoder layer, without
        the final norm. Yields a dict, layer → [B, Q, D], filled by the forward pass.
        """
        taps: dict[int, Tensor] = {}

        def keep(layer: int) -> RemovableHandle:
            def hook(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
                taps[layer] = output if isinstance(output, Tensor) else output[0]

            return self.layers[layer - 1].register_forward_hook(hook)

        handles = [keep(layer) for layer in layers]
        try:
            yield taps
        finally:
            for handle in handles:
                handle.remove()


def _only(module: nn.Module, names: Sequence[str], what: str) -> nn.Module:
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise UserError(
        f"backbone: no {what} found in {type(module).__name__} (looked for {', '.join(names)}); "
        "use a Llama-, Qwen-, GPT-2- or OPT-like model"
    )


def train_tokenizer(titles: Sequence[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer for a preset, trained on the catalogue's titles. Every text can be spelled."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(titles, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def load_tokenizer(config: BackboneConfig, titles: Sequence[str]) -> PreTrainedTokenizerBase:
    """The backbone's tokenizer; a preset's is trained on `titles`."""
    if isinstance(config, PresetBackbone):
        return train_tokenizer(titles, config.vocabulary)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(config.path, revision=config.revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"backbone.path: no tokenizer can be loaded from {config.path!r}: {shortened(error)}"
        ) from error


def load_backbone(
    config: BackboneConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Backbone:
    """The backbone to train: a preset with fresh weights drawn from `seed`, or a pretrained model; LoRA on top if set.

    Raises:
        UserError: nothing can be loaded from the path, or LoRA's target modules are not in the model.
    """
    if isinstance(config, PresetBackbone):
        model: Any = _preset(config, tokenizer, seed)
        cast(model, dtype)
    else:
        from transformers import AutoModelForCausalLM

        try:
            model = AutoModelForCausalLM.from_pretrained(config.path, revision=config.revision, dtype=dtype)
        except (OSError, ValueError) as error:
            raise UserError(
                f"backbone.path: no model can be loaded from {config.path!r}: {shortened(error)}"
            ) from error
        make_room(model, tokenizer, seed)
    if config.lora is not None:
        model = add_lora(model, config.lora, seed)
    return Backbone(model, tokenizer)


def make_room(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    """Give a model vectors, drawn from `seed` as its own were, for tokens that were added to its tokenizer."""
    if len(tokenizer) > model.config.vocab_size:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the weights another type. Buffers keep theirs: rotary frequencies that are rounded turn by other angles."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


def _preset(config: PresetBackbone, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM

    shape = PRESETS[config.size]
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "intermediate_size": shape.mlp,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.embedding_scale == 1:
            return LlamaForCausalLM(LlamaConfig(**settings))
        settings["embedding_multiplier"] = config.embedding_scale
        settings["attention_multiplier"] = (shape.hidden // shape.heads) ** -0.5  # as a Llama's
        return GraniteForCausalLM(GraniteConfig(**settings, residual_multiplier=1.0, logits_scaling=1.0))


def empty_backbone(config: BackboneConfig, tokenizer: PreTrainedTokenizerBase, start: str | None) -> Backbone:
    """What is trained, without its weights (on PyTorch's meta device): to count them.

    Args:
        start: the bundle whose weights training starts from, if any.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        if start is None and isinstance(config, PresetBackbone):
            model: Any = _preset(config, tokenizer, seed=0)
        elif isinstance(config, PresetBackbone) or start is not None:
            model = AutoModelForCausalLM.from_config(_read_config(str(start), None))
        else:
            model = AutoModelForCausalLM.from_config(_read_config(config.path, config.revision))
        make_room(model, tokenizer, seed=0)
        if config.lora is not None:
            model = add_lora(model, config.lora)
    return Backbone(model, tokenizer)


def count_layers(path: str, revision: str | None) -> int:
    """Decoder layers of a saved model, read from its config alone (an adapter's: from its base model's)."""
    return int(_read_config(path, revision).num_hidden_layers)


def _read_config(path: str, revision: str | None) -> PretrainedConfig:
    from pathlib import Path

    from transformers import AutoConfig

    adapter = Path(path).expanduser() / "adapter_config.json"
    if adapter.exists():
        import json

        path = base_of(adapter.parent, json.loads(adapter.read_text())["base_model_name_or_path"])
    try:
        config: Any = AutoConfig.from_pretrained(path, revision=revision)
        config.num_hidden_layers  # noqa: B018  (of a language model)
        return config
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"backbone: no model config can be read from {path!r}: {shortened(error)}") from error


def add_lora(model: PreTrainedModel, config: LoraConfig, seed: int = 0) -> PeftModel:
    """Freeze the model and add trainable low-rank adapters, drawn from `seed`."""
    import peft

    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    adapters = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # floats work
        lora_dropout=config.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        revision=getattr(model.config, "_commit_hash", None),  # of a hub model: the one that is trained on
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = peft.get_peft_model(model, adapters)
    except ValueError as error:
        raise UserError(f"backbone.lora.target_modules: {shortened(error)}") from error
    whole: Any = adapted
    if type(whole.get_base_model().get_output_embeddings()) is not nn.Linear:  # objectives use its weight as it is
        raise UserError("backbone.lora.target_modules: leave the prediction layer (lm_head) out of it")
    return adapted


def shortened(error: Exception) -> str:
    """A library's error in one line, for a message of our own."""
    return " ".join(str(error).split())[:300]

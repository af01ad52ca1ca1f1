"""Beam search over a catalogue as others do it, token by token: what `benchmarks.search` compares with.

Each takes the prompts of some histories and gives item indices, best first, for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import marisa_trie
import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from recommender.backbone.backbone import Backbone
from recommender.items.trie import RadixTrie

_SURROGATES = 0xD800, 0x800  # where the code points begin that stand for no character, and their number


def hidden_states(
    backbone: Backbone, tokens: Tensor, mask: Tensor | None, position: Tensor | None, cache: DynamicCache | None
) -> Tensor:
    """The decoder as `transformers` is used everywhere: padded rows, its own cache. [B, Q, D]."""
    return backbone.decoder(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=position,
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state


@torch.inference_mode()
def padded_prefill(backbone: Backbone, prompts: Sequence[np.ndarray], cache: DynamicCache | None = None) -> Tensor:
    """Logits after each prompt, [B, V]: right-padded, under the plain causal mask."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=backbone.device)
    padded = np.zeros((len(prompts), max(map(len, prompts))), np.int64)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    hidden = hidden_states(backbone, torch.from_numpy(padded).to(backbone.device), None, None, cache)
    return backbone.logits(hidden[torch.arange(len(prompts), device=backbone.device), lengths - 1])


class GenerateBeams:
    """`generate` with `prefix_allowed_tokens_fn` over a marisa-trie of the identifiers, a character a token.

    It ranks by log-probabilities over the whole vocabulary. What may follow a prefix is looked up once and kept, so
    that repeated searches pay nothing for it, which favours this contender.

    Args:
        trie: of the catalogue.
        beams: their number, and that of the items wanted.
        end: the token that closes every identifier.
    """

    def __init__(self, backbone: Backbone, trie: RadixTrie, beams: int, end: int) -> None:
        self.backbone, self.beams, self.end = backbone, beams, end
        tokens, offsets = trie.identifiers()
        spelled = [_text(tokens[a:b].tolist()) for a, b in pairwise(offsets.tolist())]
        self.longest = max(map(len, spelled))
        self.trie = marisa_trie.Trie(spelled)
        self.item_of = {text: item for item, text in enumerate(spelled)}
        self.known: dict[str, list[int]] = {}

    def search(self, prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
        longest = max(map(len, prompts))
        padded = np.full((len(prompts), longest), self.end, np.int64)
        mask = np.zeros_like(padded)
        for row, prompt in enumerate(prompts):
            padded[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        model: Any = self.backbone.model
        sequences = model.generate(
            input_ids=torch.from_numpy(padded).to(self.backbone.device),
            attention_mask=torch.from_numpy(mask).to(self.backbone.device),
            prefix_allowed_tokens_fn=lambda _, sequence: self._allowed(sequence[longest:].tolist()),
            num_beams=self.beams,
            num_return_sequences=self.beams,
            max_new_tokens=self.longest,
            length_penalty=0.0,  # sums of log-probabilities, not means
            early_stopping=False,
            do_sample=False,
            eos_token_id=self.end,
            pad_token_id=self.end,
        )
        answers = sequences[:, longest:].view(len(prompts), self.beams, -1).tolist()
        return [self._items(answer) for answer in answers]

    def _allowed(self, tokens: list[int]) -> list[int]:
        prefix = _text(tokens)
        if prefix not in self.known:
            following = {key[len(prefix)] for key in self.trie.iterkeys(prefix) if len(key) > len(prefix)}
            self.known[prefix] = sorted(map(_token, following)) or [self.end]  # a beam of no item: `generate` insists
        return self.known[prefix]

    def _items(self, answer: list[list[int]]) -> np.ndarray:
        """The items that sequences spell, each once; where there are few items, beams spell nothing."""
        ended = [sequence[: sequence.index(self.end) + 1] for sequence in answer if self.end in sequence]
        items = [self.item_of[text] for text in map(_text, ended) if text in self.item_of]
        return np.array(list(dict.fromkeys(items)), np.int32)


def _text(tokens: list[int]) -> str:
    first, number = _SURROGATES
    return "".join(chr(token + number * (token >= first)) for token in tokens)


def _token(character: str) -> int:
    first, number = _SURROGATES
    return ord(character) - number * (ord(character) >= first)


class TokenTrie:
    """A catalogue's trie with a node for every distinct prefix, in compressed sparse rows, on a device.

    Nodes are numbered breadth-first from the root, 0; the edges of node v are `begin[v] … begin[v + 1] − 1`, in the
    order of their tokens, and edge e leads to node e + 1.

    Attributes:
        begin: int64 [nodes + 1].
        token: int64 [edges].
        key: int64 [edges], rising; parent and token as one number.
        item: int64 [nodes]; −1 where no identifier ends.
        longest: tokens of the longest identifier.
    """

    def __init__(self, trie: RadixTrie, device: torch.device) -> None:
        lengths = np.diff(trie.leaf_offsets)
        at = np.zeros(len(trie), np.int64)  # the node that each leaf's path has come to
        leaves = np.arange(len(trie))
        tokens, parents, nodes = [], [], 1
        self.longest = int(lengths.max())
        for depth in range(self.longest):
            leaves = leaves[lengths[leaves] > depth]
            token, parent = trie.leaf_tokens[trie.leaf_offsets[leaves] + depth], at[leaves]
            is_new = np.ones(len(leaves), bool)
            is_new[1:] = (parent[1:] != parent[:-1]) | (token[1:] != token[:-1])
            at[leaves] = nodes + np.cumsum(is_new) - 1
            tokens.append(token[is_new].astype(np.int64))
            parents.append(parent[is_new])
            nodes += int(is_new.sum())
        token, parent = np.concatenate(tokens), np.concatenate(parents)
        item = np.full(nodes, -1, np.int64)
        item[at] = trie.item_of_leaf
        self.begin = torch.from_numpy(np.searchsorted(parent, np.arange(nodes + 1))).to(device)
        self.token = torch.from_numpy(token).to(device)
        self.key = torch.from_numpy((parent << 32) | token).to(device)
        self.item = torch.from_numpy(item).to(device)

    def child(self, node: Tensor, token: Tensor) -> Tensor:
        """The node that a token leads to; an arbitrary one where it leads to none."""
        return 1 + torch.searchsorted(self.key, (node << 32) | token).clamp(max=len(self.key) - 1)


class MaskedBeams:
    """Beam search that masks the vocabulary at every step with children gathered from sparse rows.

    This is the method of "Vectorizing the Trie" (STATIC, 2026) but for its dense tables of the first levels: no Python
    a beam, no look-ups on the host. Keys and values are reordered at every step as `generate` does, candidates that
    end are kept by its rule, so that the answers are `generate`'s; the prompt is run once, not once a beam.

    Args:
        trie: of the catalogue.
        beams: their number, and that of the items wanted.
        end: the token that closes every identifier.
        score: "full": log-probabilities over the vocabulary, as `generate`; "valid": over the children at each step.
        temperature: divides the logits.
    """

    def __init__(
        self, backbone: Backbone, trie: TokenTrie, beams: int, end: int, score: str, temperature: float = 1.0
    ) -> None:
        self.backbone, self.trie, self.beams, self.end = backbone, trie, beams, end
        self.score, self.temperature = score, temperature

    @torch.inference_mode()
    def search(self, prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
        rows, beams, device = len(prompts), self.beams, self.backbone.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device).repeat_interleave(beams)[:, None]
        cache = DynamicCache()
        logits = padded_prefill(self.backbone, prompts, cache).repeat_interleave(beams, 0)
        cache.batch_repeat_interleave(beams)
        filled = cache.get_seq_length()
        first_row = beams * torch.arange(rows, device=device)[:, None]

        node = torch.zeros(rows, beams, dtype=torch.int64, device=device)
        score = torch.full((rows, beams), -torch.inf, device=device)
        score[:, 0] = 0.0
        ended_node, ended_score = node, torch.full_like(score, -torch.inf)
        for step in range(self.trie.longest):
            steps = self._masked(logits.view(rows, beams, -1), node)
            total = torch.where(score[..., None] > -torch.inf, score[..., None] + steps, -torch.inf)
            best, at = total.flatten(1).topk(2 * beams)
            beam, token = at // steps.shape[-1], at % steps.shape[-1]
            child, ends = self.trie.child(node.gather(1, beam), token), token == self.end

            ending = torch.where(ends, best, -torch.inf)[:, :beams]  # the others of the best are but a reserve
            ended_score, order = torch.cat([ended_score, ending], 1).topk(beams)
            ended_node = torch.cat([ended_node, child[:, :beams]], 1).gather(1, order)
            score, order = torch.where(ends, -torch.inf, best).topk(beams)
            node, beam, token = (each.gather(1, order) for each in (child, beam, token))
            if bool((score[:, 0] <= ended_score[:, -1]).all()):
                break

            cache.reorder_cache((first_row + beam).flatten())  # type: ignore[arg-type]  # an int64 tensor
            slots = torch.arange(filled + step + 1, device=device)
            mask = ((slots < lengths) | (slots >= filled))[:, None, None]
            hidden = hidden_states(self.backbone, token.view(-1, 1), mask, lengths + step, cache)
            logits = self.backbone.logits(hidden[:, 0])
        items, found = self.trie.item[ended_node].int().cpu().numpy(), (ended_score > -torch.inf).cpu().numpy()
        return [row[kept] for row, kept in zip(items, found, strict=True)]

    def _masked(self, logits: Tensor, node: Tensor) -> Tensor:
        """Log-probabilities of the next tokens [B, W, V], −∞ for all but the children of the beams' nodes [B, W]."""
        logits = logits.float() / self.temperature
        if self.score == "full":
            logits = logits.log_softmax(-1)
        begin = self.trie.begin[node]
        count = self.trie.begin[node + 1] - begin
        place = torch.arange(int(count.max()), device=node.device)
        is_child = place < count[..., None]
        token = self.trie.token[torch.where(is_child, begin[..., None] + place, 0)]
        values = torch.where(is_child, logits.gather(2, token), -torch.inf)
        if self.score == "valid":
            values = values.log_softmax(-1)
        elsewhere = logits.shape[-1]  # a column more, for the places that hold no child
        masked = logits.new_full((*logits.shape[:-1], elsewhere + 1), -torch.inf)
        return masked.scatter_(2, torch.where(is_child, token, elsewhere), values)[..., :elsewhere]

"""Identifiers: how each item is spelled in tokens (BIGRec: by its title)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from recommender.config import IdentifierConfig
from recommender.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Identifiers:
    """The spelled catalogue, ragged: item i is `tokens[offsets[i]:offsets[i+1]]`, its last token the end token.

    Attributes:
        tokens: int32 [T].
        offsets: int64 [items + 1].
        end: the end token. It occurs nowhere else, so that no identifier is a proper prefix of another.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    end: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def spelled(self, item: int) -> np.ndarray:
        """The item's tokens, end token included: int32 [t]."""
        return self.tokens[self.offsets[item] : self.offsets[item + 1]]


def spell_titles(titles: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: IdentifierConfig) -> Identifiers:
    """Spell titles in tokens: each by itself, cut to `config.max_tokens`, distinct, closed by the end token.

    Titles that are spelled alike (equal, or equal once cut) are told apart by " #2", " #3", … in catalogue order.

    Raises:
        UserError: the tokenizer has no end token, or a distinguishing suffix does not fit into `max_tokens`.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("backbone: its tokenizer has no end-of-sequence token, which closes every identifier")
    end = int(tokenizer.eos_token_id)
    texts = [config.template.replace("{title}", title) for title in titles]
    spelled = _encode(texts, tokenizer, end, config.max_tokens)
    _tell_apart(spelled, tokenizer, end, config.max_tokens)
    lengths = np.fromiter((len(s) + 1 for s in spelled), np.int64, len(spelled))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.fromiter((t for s in spelled for t in (*s, end)), np.int32, int(offsets[-1]))
    return Identifiers(tokens, offsets, end)


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, end: int, limit: int) -> list[tuple[int, ...]]:
    # A title may hold the end token's own text ("</s>"), which must not end the identifier: it is spelled in pieces.
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    spelled = [tuple(t for t in ids[: limit + 1] if t != end)[:limit] for ids in encoded]
    unknown = [text for text, s in zip(texts, spelled, strict=True) if not s]
    if unknown:
        raise UserError(f"identifier: {len(unknown)} titles have no tokens under this tokenizer, e.g. {unknown[0]!r}")
    return spelled


def _tell_apart(spelled: list[tuple[int, ...]], tokenizer: PreTrainedTokenizerBase, end: int, limit: int) -> None:
    """Give all but the first of equal spellings a numbered suffix, in place, until all are distinct."""
    taken = set(spelled)
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for item, tokens in enumerate(spelled):
        groups[tokens].append(item)
    for tokens, items in groups.items():
        number = 2
        for item in items[1:]:
            while True:
                suffix = tuple(t for t in tokenizer(f" #{number}", add_special_tokens=False)["input_ids"] if t != end)
                number += 1
                if len(suffix) >= limit:
                    raise UserError(
                        f"identifier.max_tokens is {limit}: too short to tell {len(items)} equal titles apart "
                        f"(their suffix needs {len(suffix)} tokens); raise it"
                    )
                candidate = tokens[: limit - len(suffix)] + suffix
                if candidate not in taken:
                    break
            taken.add(candidate)
            spelled[item] = candidate

"""Identifiers: how each item is spelled in tokens: by its title (BIGRec), or by one token of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from recommender.config import IdentifierConfig
from recommender.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from recommender.items.trie import RadixTrie

_AT_ONCE = 10_000  # titles that are tokenised in one call: a tokenizer's own answers are large


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


def spell_titles(
    titles: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: IdentifierConfig,
    known: RadixTrie | None = None,
) -> Identifiers:
    """Spell titles in tokens: each by itself, cut to `config.max_tokens`, distinct, closed by the end token.

    Titles that are spelled alike (equal, or equal once cut) are told apart by " #2", " #3", … in catalogue order.

    Args:
        known: items that are spelled already; none of the identifiers is one of theirs.

    Raises:
        UserError: the tokenizer has no end token, or a distinguishing suffix does not fit into `max_tokens`.
    """
    end = _end_token(tokenizer)
    texts = [config.template.replace("{title}", title) for title in titles]
    tokens, lengths = _encode(texts, tokenizer, end, config.max_tokens)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    renamed = _told_apart(tokens, offsets, tokenizer, end, config.max_tokens, known)
    pieces, done = [], 0
    for item, spelled in renamed.items():  # in catalogue order
        pieces += [tokens[done : offsets[item]], spelled]
        lengths[item], done = len(spelled), offsets[item + 1]
    return Identifiers(np.concatenate([*pieces, tokens[done:]]), np.concatenate([[0], np.cumsum(lengths)]), end)


def title_losses(titles: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: IdentifierConfig) -> dict[str, int]:
    """What `spell_titles` does to titles.

    Returns:
        cut_titles: those longer than `config.max_tokens`; colliding_titles: those spelled like an earlier one, which
        get a suffix; colliding_once_cut: those of them that are only because of the cut.
    """
    cut, whole, kept = 0, set(), set()
    for begin in range(0, len(titles), _AT_ONCE):
        texts = [config.template.replace("{title}", title) for title in titles[begin : begin + _AT_ONCE]]
        for ids in tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]:
            cut += len(ids) > config.max_tokens
            whole.add(tuple(ids))
            kept.add(tuple(ids[: config.max_tokens]))
    return {
        "cut_titles": cut,
        "colliding_titles": len(titles) - len(kept),
        "colliding_once_cut": len(whole) - len(kept),
    }


def spell_items(item_ids: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Identifiers:
    """Give each item a token of its own, closed by the end token as all identifiers are.

    The tokens are named after the ids, and those that the tokenizer lacks are added to it. So an item has the same one
    wherever training goes on with more data. They are special tokens: no text is ever read as one by chance.

    Raises:
        UserError: the tokenizer has no end token.
    """
    from transformers import AddedToken

    end = _end_token(tokenizer)
    names = [f"<item {item_id}>" for item_id in item_ids]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    tokens = np.full((len(names), 2), end, np.int32)
    tokens[:, 0] = tokenizer.convert_tokens_to_ids(names)
    return Identifiers(tokens.ravel(), np.arange(0, 2 * len(names) + 1, 2), end)


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError("backbone: its tokenizer has no end-of-sequence token, which closes every identifier")
    return int(tokenizer.eos_token_id)


def _encode(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, end: int, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Each text's first `limit` tokens and the end token: int32 [T], and lengths, int64 [texts]."""
    parts, lengths = [], []
    for begin in range(0, len(texts), _AT_ONCE):
        # A title may hold the end token's own text ("</s>"), which must not end an identifier: it is spelled in pieces.
        encoded = tokenizer(texts[begin : begin + _AT_ONCE], add_special_tokens=False, split_special_tokens=True)
        spelled = [[t for t in ids[: limit + 1] if t != end][:limit] for ids in encoded["input_ids"]]
        unknown = [text for text, ids in zip(texts[begin:], spelled, strict=False) if not ids]
        if unknown:
            raise UserError(f"identifier: titles have no tokens under this tokenizer, e.g. {unknown[0]!r}")
        parts.append(np.fromiter((t for ids in spelled for t in (*ids, end)), np.int32))
        lengths += [len(ids) + 1 for ids in spelled]
    return np.concatenate(parts), np.array(lengths, np.int64)


def _told_apart(
    tokens: np.ndarray,
    offsets: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    end: int,
    limit: int,
    known: RadixTrie | None,
) -> dict[int, np.ndarray]:
    """Spellings with a numbered suffix, by item, for all but the first of equal ones, so that all are distinct."""
    taken: set[bytes] = set()
    repeated: list[int] = []

    def is_known(spelled: np.ndarray) -> bool:
        return known is not None and known.item_spelled(spelled) is not None

    for item, (start, stop) in enumerate(pairwise(offsets.tolist())):
        key = tokens[start:stop].tobytes()
        if key in taken or is_known(tokens[start:stop]):
            repeated.append(item)
        taken.add(key)

    renamed: dict[int, np.ndarray] = {}
    numbers: dict[bytes, int] = {}  # the next suffix of a spelling
    for item in repeated:
        spelled = tokens[offsets[item] : offsets[item + 1]]
        number = numbers.get(spelled.tobytes(), 2)
        while True:
            suffix = [t for t in tokenizer(f" #{number}", add_special_tokens=False)["input_ids"] if t != end]
            number += 1
            if len(suffix) >= limit:
                raise UserError(
                    f"identifier.max_tokens is {limit}: too short to tell equal titles apart (their suffix needs "
                    f"{len(suffix)} tokens); raise it"
                )
            candidate = np.array([*spelled[:-1][: limit - len(suffix)], *suffix, end], np.int32)
            if candidate.tobytes() not in taken and not is_known(candidate):
                break
        numbers[spelled.tobytes()] = number
        taken.add(candidate.tobytes())
        renamed[item] = candidate
    return renamed

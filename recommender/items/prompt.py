"""Prompts: one function turns a history into tokens, for training, evaluation and serving alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from recommender.config import PromptConfig
from recommender.errors import UserError
from recommender.items.identifiers import Identifiers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for the history while a chat template is applied


class Prompt:
    """prefix + (separator + item) for each item of the history + suffix, tokenised piece by piece.

    Pieces are tokenised one by one because a BPE merge across an item's border would spell an item differently from
    place to place: rows could not share prefixes and histories would not match responses.

    Args:
        config: the texts and the history's length.
        tokenizer: of the backbone.
        identifiers: the spelled items; in a history they stand without their end token.
    """

    def __init__(self, config: PromptConfig, tokenizer: PreTrainedTokenizerBase, identifiers: Identifiers):
        self.config = config
        self.identifiers = identifiers
        prefix, separator, suffix = config.texts()
        begin = tokenizer.bos_token or ""
        if config.chat:
            prefix, suffix = _in_chat(prefix, suffix, tokenizer)
            begin = ""  # the chat template brings its own
        self.prefix = self._encode(begin + prefix, tokenizer)
        self.separator = self._encode(separator, tokenizer)
        self.suffix = self._encode(suffix, tokenizer)
        if not len(self.prefix) and not len(self.suffix):
            raise UserError("prompt: prefix and suffix are both empty; a prompt without history would have no tokens")

    def _encode(self, text: str, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        text = text.replace("{end}", str(tokenizer.convert_ids_to_tokens(self.identifiers.end)))
        return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"] if text else [], np.int32)

    def trunk(self, history: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The prompt of `history` (item indices, none dropped) without its suffix, and where it may be cut.

        Returns:
            int32 [t] and int64 [items + 1]: the first `cuts[n]` tokens, then the suffix, are the prompt of the first n
            items.
        """
        pieces = [self.prefix]
        for item in history:
            pieces.append(np.concatenate([self.separator, self.identifiers.spelled(item)[:-1]]))
        return np.concatenate(pieces), np.cumsum([len(piece) for piece in pieces])

    def length(self, history: Sequence[int] | np.ndarray) -> int:
        """How many tokens `encode` gives, without spelling them."""
        read = np.asarray(history[-self.config.history :], np.int64)
        spelled = int((self.identifiers.offsets[read + 1] - self.identifiers.offsets[read]).sum())
        return len(self.prefix) + spelled + len(read) * (len(self.separator) - 1) + len(self.suffix)

    def encode(self, history: Sequence[int] | np.ndarray) -> np.ndarray:
        """Tokens of the prompt for the last `config.history` items of `history` (item indices): int32 [t]."""
        return np.concatenate([self.trunk(history[-self.config.history :])[0], self.suffix])


def _in_chat(prefix: str, suffix: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    if not tokenizer.chat_template:
        raise UserError("prompt.chat is on, but the backbone's tokenizer has no chat template; set prompt.chat: false")
    message = [{"role": "user", "content": prefix + _MARK + suffix}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, mark, after = str(text).partition(_MARK)
    if not mark:
        raise UserError("prompt.chat: the backbone's chat template drops or alters the message; set prompt.chat: false")
    return before, after

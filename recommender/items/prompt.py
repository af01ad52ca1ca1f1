"""Prompts: one function turns a history into tokens, for training, evaluation and serving alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from recommender.catalogue.catalogue import Catalogue
from recommender.config import TEMPLATES, CustomClass, PromptConfig, PromptTemplate
from recommender.custom import made
from recommender.errors import UserError
from recommender.items.identifiers import Identifiers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for the history while a chat template is applied


class Wording:
    """The words of a prompt of your own. Subclass it, and write what you need of:

        class Branded(Wording):
            def texts(self, catalogue: Catalogue) -> PromptTemplate:
                return PromptTemplate(f"A customer bought, of {len(catalogue)} products:", "\n- ", "\nNext:\n- ")

            def about(self, catalogue: Catalogue, item: int) -> str:
                return f" by {catalogue.columns['brand'][item]}"

    The experiment names it, `prompt: {template: {class: my.prompts:Branded, options: {…}}}`; it is made with the
    options. A bundle records both, and not the code: the module has to be there wherever the bundle is opened.
    """

    def texts(self, catalogue: Catalogue) -> PromptTemplate:
        """What opens the prompt, precedes each item and closes it; "{end}" is the end token."""
        return TEMPLATES["compact"]

    def about(self, catalogue: Catalogue, item: int) -> str:
        """What follows an item's title in a history; "" for nothing.

        Args:
            item: its index.
        """
        return ""


class Prompt:
    """prefix + (separator + item) for each item of the history + suffix, tokenised piece by piece.

    Pieces are tokenised one by one because a BPE merge across an item's border would spell an item differently from
    place to place: rows could not share prefixes and histories would not match responses.

    Args:
        config: the texts and the history's length.
        tokenizer: of the backbone.
        identifiers: the spelled items; in a history they stand without their end token.
        catalogue: what a `Wording` reads.

    Attributes:
        prefix, separator, suffix: int32, their tokens.
        piece_lengths: int64 [items]; tokens of each item in a history, its separator included.
    """

    def __init__(
        self,
        config: PromptConfig,
        tokenizer: PreTrainedTokenizerBase,
        identifiers: Identifiers,
        catalogue: Catalogue | None = None,
    ):
        self.config = config
        self.identifiers = identifiers
        self._about: list[np.ndarray] | None = None
        if isinstance(config.template, CustomClass):
            assert catalogue is not None, "a wording reads the catalogue"
            template, about = _worded(config.template, catalogue)
            if any(about):
                self._about = [_spelled(text, tokenizer, identifiers.end) for text in about]
        else:
            template = TEMPLATES[config.template]
        prefix, separator, suffix = config.texts(template)
        begin = tokenizer.bos_token or ""
        if config.chat:
            prefix, suffix = _in_chat(prefix, suffix, tokenizer)
            begin = ""  # the chat template brings its own
        self.prefix = self._encode(begin + prefix, tokenizer)
        self.separator = self._encode(separator, tokenizer)
        self.suffix = self._encode(suffix, tokenizer)
        if not len(self.prefix) and not len(self.suffix):
            raise UserError("prompt: prefix and suffix are both empty; a prompt without history would have no tokens")
        self.piece_lengths = np.diff(identifiers.offsets) - 1 + len(self.separator)
        if self._about is not None:
            self.piece_lengths += [len(tokens) for tokens in self._about]

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
            about = () if self._about is None else (self._about[item],)
            pieces.append(np.concatenate([self.separator, self.identifiers.spelled(item)[:-1], *about]))
        return np.concatenate(pieces), np.cumsum([len(piece) for piece in pieces])

    def length(self, history: Sequence[int] | np.ndarray) -> int:
        """How many tokens `encode` gives, without spelling them."""
        read = np.asarray(history[-self.config.history :], np.int64)
        return len(self.prefix) + int(self.piece_lengths[read].sum()) + len(self.suffix)

    def encode(self, history: Sequence[int] | np.ndarray) -> np.ndarray:
        """Tokens of the prompt for the last `config.history` items of `history` (item indices): int32 [t]."""
        return np.concatenate([self.trunk(history[-self.config.history :])[0], self.suffix])


def _worded(template: CustomClass, catalogue: Catalogue) -> tuple[PromptTemplate, list[str]]:
    """The texts of a prompt of the user's, and what it says about each item."""
    field = "prompt.template"
    wording = made(template, Wording, field)
    try:
        texts = PromptTemplate(*map(str, wording.texts(catalogue)))
        return texts, [str(wording.about(catalogue, item)) for item in range(len(catalogue))]
    except Exception as error:  # of the user's code
        raise UserError(f"{field}: {template.path} failed: {type(error).__name__}: {error}") from error


def _spelled(text: str, tokenizer: PreTrainedTokenizerBase, end: int) -> np.ndarray:
    """As titles are: what reads like the end token is no end."""
    tokens = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] if text else []
    return np.array([token for token in tokens if token != end], np.int32)


def _in_chat(prefix: str, suffix: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    if not tokenizer.chat_template:
        raise UserError("prompt.chat is on, but the backbone's tokenizer has no chat template; set prompt.chat: false")
    message = [{"role": "user", "content": prefix + _MARK + suffix}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, mark, after = str(text).partition(_MARK)
    if not mark:
        raise UserError("prompt.chat: the backbone's chat template drops or alters the message; set prompt.chat: false")
    return before, after

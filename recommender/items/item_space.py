"""The item space: everything of a recommender but its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel

from recommender.catalogue.catalogue import Catalogue
from recommender.config import IdentifierConfig, PromptConfig
from recommender.errors import UserError
from recommender.items.identifiers import Identifiers, spell_items, spell_titles
from recommender.items.prompt import Prompt
from recommender.items.trie import RadixTrie

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILE = "items.json"


class _Spelling(BaseModel):
    identifier: IdentifierConfig
    prompt: PromptConfig


class ItemSpace:
    """Catalogue, tokenizer, identifiers, trie and prompt, which only make sense together.

    Attributes:
        catalogue: the items.
        tokenizer: the backbone's.
        identifiers: the spelled items.
        trie: over all identifiers.
        prompt: turns histories into tokens.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        tokenizer: PreTrainedTokenizerBase,
        identifiers: Identifiers,
        trie: RadixTrie,
        identifier_config: IdentifierConfig,
        prompt_config: PromptConfig,
    ):
        self.catalogue = catalogue
        self.tokenizer = tokenizer
        self.identifiers = identifiers
        self.trie = trie
        self.identifier_config = identifier_config
        self.prompt = Prompt(prompt_config, tokenizer, identifiers, catalogue)

    @classmethod
    def build(
        cls,
        catalogue: Catalogue,
        tokenizer: PreTrainedTokenizerBase,
        identifier_config: IdentifierConfig,
        prompt_config: PromptConfig,
    ) -> ItemSpace:
        """Spell every item of the catalogue and build the trie over the spellings.

        Args:
            tokenizer: of the backbone; gets the items' tokens where they have some of their own.
        """
        if identifier_config.kind == "item":
            identifiers = spell_items(catalogue.item_ids, tokenizer)
        else:
            identifiers = spell_titles(catalogue.titles, tokenizer, identifier_config)
        trie = RadixTrie.build(identifiers.tokens, identifiers.offsets)
        return cls(catalogue, tokenizer, identifiers, trie, identifier_config, prompt_config)

    def extended(self, further: Catalogue) -> ItemSpace:
        """With further items behind those that it has, whose identifiers stay as they are.

        Raises:
            UserError: an item id of `further` is known already, its titles cannot be spelled, or items have tokens of
                their own, of which new ones have none.
        """
        if self.identifier_config.kind == "item":
            raise UserError(
                "identifier.kind: item: the model has a token for each item that it was trained on, and none for new "
                "ones; train on data that hold them (init_from keeps what it knows), or a model with kind: title"
            )
        catalogue = self.catalogue.extended(further)
        new = spell_titles(further.titles, self.tokenizer, self.identifier_config, self.trie)
        tokens = np.concatenate([self.identifiers.tokens, new.tokens])
        offsets = np.concatenate([self.identifiers.offsets, self.identifiers.offsets[-1] + new.offsets[1:]])
        return ItemSpace(
            catalogue,
            self.tokenizer,
            Identifiers(tokens, offsets, new.end),
            self.trie.extended(new.tokens, new.offsets),
            self.identifier_config,
            self.prompt.config,
        )

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.catalogue.save(directory)
        self.tokenizer.save_pretrained(directory)
        self.trie.save(directory / "trie.safetensors")
        spelling = _Spelling(identifier=self.identifier_config, prompt=self.prompt.config)
        (directory / _FILE).write_text(spelling.model_dump_json(indent=2))

    @classmethod
    def load(cls, directory: Path) -> ItemSpace:
        from transformers import AutoTokenizer

        if not (directory / _FILE).exists():
            raise UserError(f"{directory}: no {_FILE}; not a bundle or prepared item space (see `ilrec prepare`)")
        spelling = _Spelling.model_validate_json((directory / _FILE).read_text())
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        trie = RadixTrie.load(directory / "trie.safetensors")
        tokens, offsets = trie.identifiers()
        identifiers = Identifiers(tokens, offsets, int(tokenizer.eos_token_id))
        return cls(Catalogue.load(directory), tokenizer, identifiers, trie, spelling.identifier, spelling.prompt)

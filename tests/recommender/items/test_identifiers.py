from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from recommender.backbone.backbone import train_tokenizer
from recommender.catalogue.catalogue import Catalogue
from recommender.config import IdentifierConfig, PromptConfig
from recommender.errors import UserError
from recommender.items.identifiers import Identifiers, spell_items, spell_titles, title_losses
from recommender.items.prompt import Prompt
from recommender.items.trie import RadixTrie

TITLES = ["Blue Tent", "Blue Tent", "Red Tent for two", "Lamp", "Red Tent for three", "Blue Tent"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(TITLES, 320)


def _all(identifiers: Identifiers) -> list[tuple[int, ...]]:
    return [tuple(identifiers.spelled(item).tolist()) for item in range(len(identifiers))]


def test_spellings_are_distinct_and_close_with_the_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    spelled = _all(spell_titles(TITLES, tokenizer, IdentifierConfig()))
    assert len(set(spelled)) == len(TITLES)
    assert all(s[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in s[:-1] for s in spelled)
    assert tokenizer.decode(spelled[0][:-1]).strip() == "Blue Tent"
    assert tokenizer.decode(spelled[1][:-1]).strip() == "Blue Tent #2"
    assert tokenizer.decode(spelled[5][:-1]).strip() == "Blue Tent #3"


@settings(max_examples=30, deadline=None)
@given(titles=st.lists(st.text(min_size=0, max_size=12), min_size=1, max_size=12), limit=st.integers(5, 12))
def test_any_titles_can_be_spelled(titles: list[str], limit: int) -> None:
    tokenizer = train_tokenizer(TITLES, 320)
    catalogue = Catalogue([str(i) for i in range(len(titles))], titles)
    identifiers = spell_titles(catalogue.titles, tokenizer, IdentifierConfig(max_tokens=limit))
    assert len(set(_all(identifiers))) == len(titles)
    assert np.diff(identifiers.offsets).max() <= limit + 1


def test_cut_and_colliding_titles_are_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    assert title_losses(TITLES, tokenizer, IdentifierConfig()) == {
        "cut_titles": 0,
        "colliding_titles": 2,  # the second and third Blue Tent
        "colliding_once_cut": 0,
    }
    titles = [*TITLES, "Red Tent for three Red Tents", "Red Tent for three Lamps"]
    spelled = [tokenizer(title, add_special_tokens=False)["input_ids"] for title in titles]
    config = IdentifierConfig(max_tokens=len(spelled[4]))
    found = title_losses(titles, tokenizer, config)
    assert found == {"cut_titles": 2, "colliding_titles": 4, "colliding_once_cut": 2}
    cut = [tuple(tokens[: config.max_tokens]) for tokens in spelled]
    made = _all(spell_titles(titles, tokenizer, config))
    suffixed = [own[:-1] != plain for own, plain in zip(made, cut, strict=True)]
    assert sum(suffixed) == found["colliding_titles"]


def test_new_titles_are_told_apart_from_known_ones(tokenizer: PreTrainedTokenizerBase) -> None:
    config = IdentifierConfig()
    first = spell_titles(TITLES, tokenizer, config)
    known = RadixTrie.build(first.tokens, first.offsets)
    new = spell_titles(["Lamp", "Blue Tent", "Blue Tent", "Green Lamp"], tokenizer, config, known)
    texts = [tokenizer.decode(spelled[:-1]).strip() for spelled in _all(new)]
    assert texts == ["Lamp #2", "Blue Tent #4", "Blue Tent #5", "Green Lamp"]


def test_a_title_that_spells_the_end_token_does_not_end_early(tokenizer: PreTrainedTokenizerBase) -> None:
    spelled = _all(spell_titles(["Lamp</s>shade", "Lamp"], tokenizer, IdentifierConfig()))
    assert all(s.count(tokenizer.eos_token_id) == 1 for s in spelled)


def test_too_short_to_tell_apart_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="max_tokens"):
        spell_titles(TITLES, tokenizer, IdentifierConfig(max_tokens=1))


def test_an_item_has_one_token_of_its_own_that_no_text_is_read_as() -> None:
    tokenizer = train_tokenizer([], 4096)
    letters = len(tokenizer)
    ids = ["B1", "a b", "é</s>", "B10"]
    spelled = _all(spell_items(ids, tokenizer))
    assert spelled == [(letters + item, tokenizer.eos_token_id) for item in range(4)]
    assert [tokenizer.decode([first]) for first, _ in spelled] == [f"<item {item_id}>" for item_id in ids]
    read = tokenizer("<item B1> and <item B10>", split_special_tokens=True)["input_ids"]
    assert max(read) < letters, "a text that looks like an item"


def test_an_item_keeps_its_token_when_there_are_more() -> None:
    tokenizer = train_tokenizer([], 4096)
    before = _all(spell_items(["x", "y"], tokenizer))
    after = _all(spell_items(["new", "y", "x"], tokenizer))
    assert after[1:] == before[::-1]
    assert after[0][0] == len(tokenizer) - 1


def test_prompt_pieces_do_not_merge_and_prefixes_are_shared(tokenizer: PreTrainedTokenizerBase) -> None:
    identifiers = spell_titles(TITLES, tokenizer, IdentifierConfig())
    config = PromptConfig(prefix="Bought:", separator=", ", suffix=" Next:", history=3)
    prompt = Prompt(config, tokenizer, identifiers)
    history = [0, 2, 3, 4]
    trunk, cuts = prompt.trunk(history[-3:])
    for n in range(4):
        expected = np.concatenate([trunk[: cuts[n]], prompt.suffix])
        if n:
            assert (prompt.encode(history[-3:][:n]) == expected).all()
    assert (prompt.encode(history) == np.concatenate([trunk, prompt.suffix])).all(), "only the last 3 items are read"
    tokens = prompt.encode([2]).tolist()
    spelled = identifiers.spelled(2)[:-1].tolist()
    at = len(prompt.prefix) + len(prompt.separator)
    assert tokens[at : at + len(spelled)] == spelled


def test_chat_template_wraps_the_history(tokenizer: PreTrainedTokenizerBase) -> None:
    chatty = train_tokenizer(TITLES, 320)
    identifiers = spell_titles(TITLES, chatty, IdentifierConfig())
    config = PromptConfig(prefix="Bought:", separator=" ", suffix=".", chat=True)
    with pytest.raises(UserError, match="chat template"):
        Prompt(config, chatty, identifiers)
    chatty.chat_template = (
        "{% for m in messages %}[U]{{ m['content'] }}[/U]{% endfor %}{% if add_generation_prompt %}[A]{% endif %}"
    )
    text = chatty.decode(Prompt(config, chatty, identifiers).encode([3]))
    assert text.replace(" ", "") == "[U]Bought:Lamp.[/U][A]"

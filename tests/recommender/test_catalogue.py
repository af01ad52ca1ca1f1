from __future__ import annotations

from pathlib import Path

import pytest

from recommender.catalogue.catalogue import Catalogue, normalise_title
from recommender.errors import UserError


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("Pok&eacute;mon &amp;amp; friends", "Pokémon & friends"),
        ("  two\t words\n", "two words"),
        ("ﬁne Ｗide", "fine Wide"),
        ("bell\x07rings", "bell rings"),
        ("\u00a0", ""),
    ],
)
def test_titles_are_normalised(raw: str, expected: str) -> None:
    assert normalise_title(raw) == expected


def test_items_are_found_by_id_then_by_title() -> None:
    catalogue = Catalogue(["7", "8", "9"], ["Tent", "7", "tent"])
    assert catalogue.index_of("7") == 0, "an id goes before a title"
    assert catalogue.index_of("TENT") == 0, "the first of equal titles"
    assert catalogue.index_of("9") == 2
    assert catalogue.index_of("boat") is None


def test_an_empty_title_falls_back_to_the_id() -> None:
    assert Catalogue(["a1"], [" &nbsp; "]).titles == ["Item a1"]


def test_unknown_items_are_named_with_a_suggestion() -> None:
    catalogue = Catalogue(["1", "2"], ["Trail Running Shoes", "Tent"])
    with pytest.raises(UserError, match=r"history: 1 of 2 .*'Trail Runing Shoe'.*Trail Running Shoes"):
        catalogue.indices_of(["Tent", "Trail Runing Shoe"])


def test_ids_must_differ() -> None:
    with pytest.raises(UserError, match="twice"):
        Catalogue(["1", "1"], ["a", "b"])


def test_saved_and_loaded(tmp_path: Path) -> None:
    Catalogue(["1", "2"], ["Tent &amp; pegs", ""]).save(tmp_path)
    loaded = Catalogue.load(tmp_path)
    assert (loaded.item_ids, loaded.titles) == (["1", "2"], ["Tent & pegs", "Item 2"])
    assert loaded.index_of("tent & PEGS") == 0

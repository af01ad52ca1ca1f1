from __future__ import annotations

import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recommender.items.trie import RadixTrie

END = 0


def ragged(identifiers: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.concatenate([[0], np.cumsum([len(identifier) for identifier in identifiers])]).astype(np.int64)
    return np.array([token for identifier in identifiers for token in identifier], np.int32), offsets


def build(identifiers: list[list[int]]) -> RadixTrie:
    return RadixTrie.build(*ragged(identifiers))


# Short alphabets, so that titles share prefixes; an optional common opening, so that the root may have one child.
titles = st.lists(st.lists(st.integers(1, 3), min_size=0, max_size=6), min_size=1, max_size=30, unique_by=tuple)
catalogues = st.tuples(titles, st.lists(st.integers(4, 5), max_size=3)).map(
    lambda drawn: [[*drawn[1], *title, END] for title in drawn[0]]
)


@given(catalogues)
@settings(max_examples=150, deadline=None)
def test_walking_the_tokens_reaches_every_item(identifiers: list[list[int]]) -> None:
    trie = build(identifiers)
    for item, identifier in enumerate(identifiers):
        node, spelled = 0, []
        while trie.child_count[node]:
            children = range(trie.first_child[node], trie.first_child[node] + trie.child_count[node])
            matching = [c for c in children if trie.first_token[c] == identifier[len(spelled)]]
            assert len(matching) == 1
            node = matching[0]
            spelled += trie.chain(node).tolist()
        assert spelled == identifier
        assert trie.hi[node] - trie.lo[node] == 1
        assert trie.item_of_leaf[trie.lo[node]] == item
        assert trie.leaf_of_item[item] == trie.lo[node]
        assert trie.identifier(item).tolist() == identifier


@given(catalogues, st.integers(0, 30))
@settings(max_examples=150, deadline=None)
def test_a_trie_that_was_extended_is_the_trie_of_all(identifiers: list[list[int]], known: int) -> None:
    known = min(max(known, 1), len(identifiers))
    extended = build(identifiers[:known]).extended(*ragged(identifiers[known:]))
    whole = build(identifiers)
    for field in fields(RadixTrie):
        np.testing.assert_array_equal(getattr(extended, field.name), getattr(whole, field.name), field.name)
    assert [extended.item_spelled(np.array(each)) for each in identifiers] == list(range(len(identifiers)))
    assert extended.item_spelled(np.array([1, 2, 3, 9, END])) is None


def test_a_trie_is_not_extended_by_an_identifier_that_it_has() -> None:
    with pytest.raises(ValueError, match=r"item 2: its identifier equals that of item 0"):
        build([[1, END], [2, END]]).extended(*ragged([[1, END]]))


@given(catalogues)
@settings(max_examples=150, deadline=None)
def test_nodes_are_the_places_where_identifiers_part(identifiers: list[list[int]]) -> None:
    trie = build(identifiers)
    prefixes = {tuple(identifier[:length]) for identifier in identifiers for length in range(len(identifier) + 1)}
    continuations = {p: sorted({q[-1] for q in prefixes if q[:-1] == p and q}) for p in prefixes}
    parting = {p for p in prefixes if len(continuations[p]) != 1 or not p}

    spelled = [()] * trie.nodes
    for node in range(1, trie.nodes):
        assert trie.parent[node] < node
        spelled[node] = (*spelled[trie.parent[node]], *trie.chain(node).tolist())
        assert trie.depth[node] == len(spelled[node])
        assert trie.first_token[node] == trie.chain(node)[0]
    assert len(set(spelled)) == trie.nodes
    assert set(spelled) == parting

    for node in range(trie.nodes):
        children = np.arange(trie.first_child[node], trie.first_child[node] + trie.child_count[node])
        assert trie.first_token[children].tolist() == continuations[spelled[node]]
        assert (trie.parent[children] == node).all()
        under = [
            i for i, identifier in enumerate(identifiers) if tuple(identifier[: trie.depth[node]]) == spelled[node]
        ]
        assert sorted(trie.item_of_leaf[trie.lo[node] : trie.hi[node]]) == under
        assert trie.first_item[node] == min(under)
        if len(children):  # the children's leaves partition the node's
            assert trie.lo[children].tolist() == [trie.lo[node], *trie.hi[children[:-1]]]
            assert trie.hi[children[-1]] == trie.hi[node]


@given(catalogues)
@settings(max_examples=100, deadline=None)
def test_prediction_nodes_equal_brute_force(identifiers: list[list[int]]) -> None:
    trie = build(identifiers)
    prefixes = {tuple(identifier[:length]) for identifier in identifiers for length in range(len(identifier) + 1)}
    nodes = iter(trie.prediction_nodes())
    for identifier in identifiers:
        for position in range(len(identifier)):
            valid = sorted(p[-1] for p in prefixes if p and p[:-1] == tuple(identifier[:position]))
            node = next(nodes)
            if len(valid) == 1:
                assert node == -1
            else:
                children = slice(trie.first_child[node], trie.first_child[node] + trie.child_count[node])
                assert trie.first_token[children].tolist() == valid
                assert trie.depth[node] == position
    assert next(nodes, None) is None


@given(catalogues)
@settings(max_examples=20, deadline=None)
def test_save_and_load(tmp_path_factory: pytest.TempPathFactory, identifiers: list[list[int]]) -> None:
    path = Path(tmp_path_factory.mktemp("trie")) / "trie.safetensors"
    trie = build(identifiers)
    trie.save(path)
    loaded = RadixTrie.load(path)
    for name, array in vars(RadixTrie.build(*ragged(identifiers))).items():
        np.testing.assert_array_equal(getattr(loaded, name), array)
        assert getattr(loaded, name).dtype == array.dtype


def test_tensors_hold_the_chains() -> None:
    trie = build([[5, 1, 2, END], [5, 1, 3, END], [5, 4, END]])
    tensors = trie.to("cpu")
    for node in range(trie.nodes):
        start, length = tensors.chain_start[node], tensors.chain_length[node]
        assert tensors.leaf_tokens[start : start + length].tolist() == trie.chain(node).tolist()
    assert tensors.first_item.tolist() == trie.first_item.tolist()


def test_one_item() -> None:
    trie = build([[7, 8, END]])
    assert trie.nodes == 2
    assert trie.chain(1).tolist() == [7, 8, END]
    assert trie.prediction_nodes().tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("identifiers", "message"),
    [
        ([], "at least one item"),
        ([[1, END], [2, END], [1, END]], "item 0: its identifier equals that of item 2"),
        ([[1, 2, END], [3, END], [1, 2]], "item 2: its identifier is a prefix of that of item 0"),
        ([[1, END], []], "item 1: its identifier is empty"),
        ([[1, END], [-2, END]], "item 1: its identifier holds a negative token"),
    ],
)
def test_refuses(identifiers: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(identifiers)


def test_a_hundred_thousand_items() -> None:
    generator = np.random.default_rng(0)
    items, length = 100_000, 20
    tokens = generator.zipf(1.3, (items, length)).clip(max=4000)
    tokens[:, -4:-1] = np.stack([np.arange(items) // 50**digit % 50 for digit in range(3)], 1) + 1
    tokens[:, -1] = END
    tokens = np.unique(tokens, axis=0)
    offsets = np.arange(len(tokens) + 1, dtype=np.int64) * length
    started = time.perf_counter()
    trie = RadixTrie.build(tokens.ravel(), offsets)
    nodes = trie.prediction_nodes()
    assert time.perf_counter() - started < 5
    assert trie.nodes <= 2 * len(tokens)
    branching = trie.child_count >= 2
    assert (nodes >= 0).sum() == (trie.hi - trie.lo)[branching].sum()

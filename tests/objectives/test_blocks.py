"""Blocks against the continuations of each prefix, found by looking through all identifiers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from objectives.blocks import Block, child_blocks, vocabulary_blocks
from tests.objectives.catalogues import END, Catalogue

WIDE = 32


catalogues = st.builds(
    Catalogue,
    st.lists(st.sampled_from([1, 2, 3, 9, 33, 80]), min_size=1, max_size=4),
    st.integers(1, 150),
    st.integers(0, 2),
    st.integers(0, 10**6),
)


def columns(block: Block, row: int) -> tuple[list[int], int]:
    """What competes in one prediction of a block, and the place of its target among that."""
    assert block.tokens is not None
    tokens = block.tokens if block.tokens.dim() == 1 else block.tokens[row]
    kept = list(range(len(tokens))) if block.valid is None else block.valid[row].nonzero().flatten().tolist()
    return [int(tokens[column]) for column in kept], kept.index(int(block.target[row]))


def check(blocks: list[Block], catalogue: Catalogue, at: np.ndarray) -> None:
    """`blocks` hold the predictions `at` of a catalogue, each once, with exactly the columns that compete."""
    seen = []
    for block in blocks:
        assert block.tokens is not None
        assert len(block.at) == len(block.target) == len(block.node)
        if block.tokens.dim() == 2:
            assert len(block.tokens) == len(block.at)
            if block.valid is not None:
                assert block.valid.shape == block.tokens.shape
        for row, prediction in enumerate(block.at.tolist()):
            seen.append(prediction)
            where = at[prediction]
            tokens, place = columns(block, row)
            assert tokens == catalogue.competing[where]
            assert tokens[place] == catalogue.tokens[where]
            assert block.node[row] == catalogue.node[where]
    assert sorted(seen) == list(range(len(at)))


def blocks_of(catalogue: Catalogue, at: np.ndarray) -> list[Block]:
    node, target = (torch.from_numpy(x[at].astype(np.int64)) for x in (catalogue.node, catalogue.tokens))
    return child_blocks(catalogue.trie, node, target)


@given(catalogues, st.integers(0, 40), st.integers(0, 10**6))
@settings(max_examples=120, deadline=None)
def test_every_prediction_competes_once_with_exactly_its_nodes_children(
    catalogue: Catalogue, predictions: int, seed: int
) -> None:
    branching = catalogue.branching()
    at = np.random.default_rng(seed).choice(branching, predictions) if len(branching) else branching
    blocks = blocks_of(catalogue, at)
    check(blocks, catalogue, at)
    for block in blocks:
        for piece in (1, 3, 1000):
            pieces = list(block.pieces(piece))
            assert len(pieces) == max(1, -(-len(block.at) // piece))
            assert all(len(part.at) <= piece for part in pieces)
            assert torch.equal(torch.cat([part.at for part in pieces]), block.at)
    check([part for block in blocks for part in block.pieces(3)], catalogue, at)


@given(catalogues)
@settings(max_examples=40, deadline=None)
def test_wide_nodes_share_their_columns_and_narrow_ones_waste_little(catalogue: Catalogue) -> None:
    at = catalogue.branching()
    for block in blocks_of(catalogue, at):
        assert block.tokens is not None
        width, rows = block.tokens.shape[-1], len(block.at)
        if block.tokens.dim() == 1:
            assert len(block.node.unique()) <= 1
            assert block.valid is None
            assert width > WIDE or not rows
        else:
            counts = catalogue.trie.child_count[block.node.numpy()]
            assert width <= WIDE
            assert (2 * counts >= width).all(), "at most every second column is padding"
            assert block.valid is None or not block.valid.all(), "no mask where all columns count"


def test_wide_and_narrow_nodes_are_both_met() -> None:
    """One catalogue with both kinds, whose parts the tests above would otherwise draw by luck."""
    catalogue = Catalogue([80, 3, 40], 400, 0, 1)
    at = catalogue.branching()
    kinds = {block.tokens.dim() for block in blocks_of(catalogue, at) if block.tokens is not None}
    assert kinds == {1, 2}
    check(blocks_of(catalogue, at), catalogue, at)


@pytest.mark.parametrize("opening", [0, 1])
@pytest.mark.parametrize("size", [32, 33])
def test_the_widest_narrow_node_and_the_narrowest_wide_one(size: int, opening: int) -> None:
    """Also below a root with one child."""
    catalogue = Catalogue([size], 2000, opening, 0)
    at = catalogue.branching()
    assert len(at) == size
    (block,) = blocks_of(catalogue, at)
    assert block.tokens is not None
    assert block.tokens.dim() == (1 if size > WIDE else 2)
    assert block.valid is None
    check([block], catalogue, at)


def test_a_single_item_has_nothing_to_compete_for() -> None:
    catalogue = Catalogue([1, 1], 1, 1, 0)
    assert len(catalogue.identifiers) == 1
    assert not len(catalogue.branching())
    assert (catalogue.node == -1).all()
    (block,) = blocks_of(catalogue, catalogue.branching())
    assert block.tokens is not None
    assert len(block.tokens) == 1, "a column, so that reductions over columns stay defined"
    assert [len(piece.at) for piece in block.pieces(4)] == [0]


def test_a_target_off_the_trie_is_an_error_that_names_it() -> None:
    catalogue = Catalogue([40, 3], 200, 0, 2)
    node = int(catalogue.trie.first_child[0])
    for wrong_node, wrong_token in ((0, 499), (node, 499), (0, END), (int(catalogue.trie.nodes - 1), END)):
        nodes, target = torch.tensor([0, wrong_node]), torch.tensor([1, wrong_token])
        with pytest.raises(ValueError, match=f"target token {wrong_token} is no child of trie node {wrong_node}"):
            child_blocks(catalogue.trie, nodes, target)


def test_over_the_vocabulary_there_is_one_block_of_all_predictions() -> None:
    nodes, target = torch.tensor([0, -1, 4]), torch.tensor([7, 0, 9])
    (block,) = vocabulary_blocks(nodes, target)
    assert block.at.tolist() == [0, 1, 2]
    assert block.tokens is None
    assert block.valid is None
    assert torch.equal(block.target, target)
    assert torch.equal(block.node, nodes)
    first, second = block.pieces(2)
    assert (first.target.tolist(), second.target.tolist()) == ([7, 0], [9])


def test_moving_a_block_keeps_what_it_holds() -> None:
    catalogue = Catalogue([80, 3], 300, 0, 1)
    at = catalogue.branching()
    moved = [block.to("cpu") for block in blocks_of(catalogue, at)]
    check(moved, catalogue, at)

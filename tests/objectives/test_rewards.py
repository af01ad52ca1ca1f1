"""Token rewards against brute force: for each child of a prefix, sums of a float64 softmax over the items below it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from objectives.blocks import child_blocks, vocabulary_blocks
from objectives.rewards import Histories, RewardSource
from tests.objectives.catalogues import Catalogue, Stub

VOCABULARY = 97


class Case:
    """Rows of random histories whose samples are predicted token by token, forced tokens included, in random order."""

    def __init__(self, catalogue: Catalogue, scale: float, rows: Sequence[int] = (3, 1, 5), seed: int = 0):
        rng = np.random.default_rng(seed)
        self.catalogue, self.model = catalogue, Stub(len(catalogue), scale)
        sequences = [rng.integers(0, len(catalogue), 9) for _ in rows]
        lengths = [np.sort(rng.choice(9, count, replace=False)) for count in rows]
        self.histories = Histories(sequences, lengths, [s[n] for s, n in zip(sequences, lengths, strict=True)])
        self.seen = [s[:n] for s, ns in zip(sequences, lengths, strict=True) for n in ns]
        self.targets = np.concatenate(self.histories.targets)
        parts = [(i, t) for i, item in enumerate(self.targets) for t in range(len(catalogue.identifiers[item]))]
        self.parts = [parts[i] for i in rng.permutation(len(parts))]
        self.sample = np.array([i for i, _ in self.parts])
        self.node = np.array([catalogue.nodes_of(self.targets[i])[t] for i, t in self.parts])
        self.token = np.array([catalogue.identifiers[self.targets[i]][t] for i, t in self.parts])

    def source(self, items: int | None = None, memory_mb: int = 256) -> RewardSource:
        return RewardSource(self.model, self.catalogue.trie, items, memory_mb)  # type: ignore[arg-type]

    def scores(self, sample: int) -> Tensor:
        return self.model.scores(self.model.embed(self.seen[sample])[None])[0].detach().double()

    def mass(self, prediction: int) -> float:
        """Of the prefix of one prediction."""
        sample, t = self.parts[prediction]
        prefix = tuple(self.catalogue.identifiers[self.targets[sample]][:t])
        return float(self.scores(sample).softmax(0)[self.catalogue.items_under[prefix]].sum())

    def expected(self, prediction: int, of: set[int] | None = None) -> dict[int, float]:
        """r_v of each token v that competes in one prediction; R over the items `of` only, where given."""
        sample, t = self.parts[prediction]
        prefix = tuple(self.catalogue.identifiers[self.targets[sample]][:t])
        return self.catalogue.shares(prefix, self.scores(sample), of)

    def found(self, source: RewardSource) -> list[dict[int, float]]:
        """Of each prediction, the children's rewards by token; nothing where the target is forced."""
        rewards = source.rewards(self.histories, self.sample, self.node)
        assert rewards.values.dtype == torch.float32
        assert rewards.start.shape == (len(self.parts),)
        trie, found, taken = self.catalogue.trie, [], 0
        for prediction, node in enumerate(self.node):
            count = int(trie.child_count[node]) if node >= 0 else 0
            start, first = int(rewards.start[prediction]), int(trie.first_child[node])
            values = rewards.values[start : start + count].tolist()
            found.append(dict(zip(trie.first_token[first : first + count].tolist(), values, strict=True)))
            taken += count
        assert taken == len(rewards.values), "nothing but children, each once"
        return found


def worst(case: Case, found: list[dict[int, float]], of: list[set[int]] | None = None) -> float:
    """The largest error; each branching prediction has exactly its children."""
    errors = []
    for prediction, rewards in enumerate(found):
        if case.node[prediction] < 0:
            assert rewards == {}
            continue
        expected = case.expected(prediction, None if of is None else of[case.sample[prediction]])
        assert rewards.keys() == expected.keys()
        assert sum(rewards.values()) == pytest.approx(1, abs=1e-5)
        assert all(0 <= reward <= 1 for reward in rewards.values())  # never NaN
        errors += [abs(rewards[token] - expected[token]) for token in expected]
    return max(errors)


CATALOGUES = {
    "wide": ([50, 3, 40], 300, 0),
    "narrow": ([3, 2, 3, 2], 60, 0),
    "open alike": ([40, 2, 2], 120, 2),
}
OVER = pytest.mark.parametrize("shape", CATALOGUES.values(), ids=CATALOGUES.keys())


@pytest.mark.parametrize("memory_mb", [256, 0], ids=["at once", "sample by sample"])
@OVER
def test_rewards_are_shares_of_the_items_below(shape: tuple[list[int], int, int], memory_mb: int) -> None:
    case = Case(Catalogue(*shape, seed=0), 3.0)
    found = case.found(case.source(memory_mb=memory_mb))
    assert worst(case, found) < 1e-6
    assert any(0.05 < reward < 0.95 for rewards in found for reward in rewards.values())


def test_samples_in_pieces_of_several() -> None:
    """1 MiB is enough for five samples of this catalogue, and there are nine."""
    case = Case(Catalogue([90, 90, 90], 9000, 0, 0), 3.0)
    assert 2**20 // (32 * len(case.catalogue)) == 5
    assert worst(case, case.found(case.source(memory_mb=1))) < 1e-6


@OVER
def test_where_a_prefix_has_next_to_no_mass_its_items_are_summed_by_themselves(
    shape: tuple[list[int], int, int],
) -> None:
    """Scores of ±60: differences of a cumulative sum would be rounding errors, or 0/0."""
    case = Case(Catalogue(*shape, seed=1), 60.0, rows=(4, 4, 4, 4))
    masses = [case.mass(p) for p in range(len(case.parts)) if case.node[p] >= 0]
    assert min(masses) < 1e-20
    assert sum(mass < 1e-9 for mass in masses) > 5
    for memory_mb in (256, 0):
        assert worst(case, case.found(case.source(memory_mb=memory_mb))) < 2e-6  # float32 knows log R = −120 to 4e-6


@pytest.mark.parametrize("scale", [10.0, 14.0, 20.0])
def test_the_two_ways_to_sum_meet_without_a_seam(scale: float) -> None:
    """Masses on both sides of 1e-9, where one way gives place to the other."""
    case = Case(Catalogue([50, 3, 40], 300, 0, 2), scale, rows=(8,) * 8)
    masses = np.array([case.mass(p) for p in range(len(case.parts))])
    assert ((masses > 1e-11) & (masses < 1e-9)).any()
    assert ((masses > 1e-9) & (masses < 1e-7)).any()
    assert worst(case, case.found(case.source())) < 1e-6


def _top(case: Case, items: int) -> list[set[int]]:
    """For each sample, its target and the other items that score highest."""
    best = [case.scores(sample).argsort(descending=True).tolist() for sample in range(len(case.targets))]
    return [
        {int(target), *[item for item in ranked if item != target][:items]}
        for ranked, target in zip(best, case.targets, strict=True)
    ]


@pytest.mark.parametrize("memory_mb", [256, 0], ids=["at once", "sample by sample"])
@pytest.mark.parametrize("scale", [3.0, 60.0])
@pytest.mark.parametrize("items", [1, 10, 10_000])
@OVER
def test_rewards_from_the_best_items_and_the_target_only(
    shape: tuple[list[int], int, int], items: int, scale: float, memory_mb: int
) -> None:
    case = Case(Catalogue(*shape, seed=3), scale)
    of = _top(case, min(items, len(case.catalogue)))
    found = case.found(case.source(items, memory_mb))
    assert worst(case, found, of) < 2e-6
    if items < 100:
        assert any(reward == 0 for rewards in found for reward in rewards.values())


def test_a_batch_without_predictions_has_no_rewards() -> None:
    case = Case(Catalogue([40, 3], 90, 0, 0), 3.0)
    nothing = np.empty(0, np.int64)
    rewards = case.source().rewards(Histories([], [], []), nothing, nothing)
    assert len(rewards.values) == len(rewards.start) == 0
    none = torch.zeros(0, dtype=torch.int64)
    (whole,) = vocabulary_blocks(none, none)
    assert rewards.of(whole, VOCABULARY).shape == (0, VOCABULARY)
    (children,) = child_blocks(case.catalogue.trie, none, none)
    assert rewards.of(children, 1).shape == (0, 1)


def test_a_batch_of_forced_predictions_has_rewards_for_targets_only() -> None:
    case = Case(Catalogue([40, 3], 90, 0, 0), 3.0)
    forced = np.flatnonzero(case.node < 0)
    assert len(forced) > 1
    rewards = case.source().rewards(case.histories, case.sample[forced], case.node[forced])
    assert not len(rewards.values)
    node, token = torch.from_numpy(case.node[forced]).long(), torch.from_numpy(case.token[forced])
    (block,) = vocabulary_blocks(node, token)
    expected = torch.nn.functional.one_hot(token, VOCABULARY) * 2.0 - 1
    assert torch.equal(rewards.of(block, VOCABULARY), expected)


@pytest.mark.parametrize("positions", [1, 4, 1000])
@OVER
def test_rewards_over_the_vocabulary_are_minus_one_where_no_item_follows(
    shape: tuple[list[int], int, int], positions: int
) -> None:
    case = Case(Catalogue(*shape, seed=5), 3.0)
    rewards = case.source().rewards(case.histories, case.sample, case.node)
    assert (case.node < 0).any()
    (block,) = vocabulary_blocks(torch.from_numpy(case.node).long(), torch.from_numpy(case.token))
    for piece in block.pieces(positions):
        found = rewards.of(piece, VOCABULARY)
        assert found.dtype == torch.float32
        for row, prediction in enumerate(piece.at.tolist()):
            known = {int(case.token[prediction]): 1.0}
            if case.node[prediction] >= 0:
                known = case.expected(prediction)
            expected = [known.get(token, -1.0) for token in range(VOCABULARY)]
            assert found[row].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("positions", [1, 4, 1000])
@OVER
def test_rewards_over_children_are_in_the_columns_of_their_blocks(
    shape: tuple[list[int], int, int], positions: int
) -> None:
    case = Case(Catalogue(*shape, seed=6), 3.0)
    some = np.flatnonzero(case.node >= 0)
    rewards = case.source().rewards(case.histories, case.sample[some], case.node[some])
    blocks = child_blocks(
        case.catalogue.trie, torch.from_numpy(case.node[some]).long(), torch.from_numpy(case.token[some])
    )
    seen = []
    for piece in (piece for block in blocks for piece in block.pieces(positions)):
        assert piece.tokens is not None
        columns = piece.tokens.expand(len(piece.at), -1)
        found = rewards.of(piece, columns.shape[1])
        assert found.shape == columns.shape
        for row, prediction in enumerate(piece.at.tolist()):
            seen.append(prediction)
            expected = case.expected(some[prediction])
            valid = torch.ones(columns.shape[1], dtype=torch.bool) if piece.valid is None else piece.valid[row]
            by_token = dict(zip(columns[row, valid].tolist(), found[row, valid].tolist(), strict=True))
            assert by_token == pytest.approx(expected, abs=1e-6)
            assert (found[row, ~valid] == -1).all()
    assert sorted(seen) == list(range(len(some)))

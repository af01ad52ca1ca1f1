"""Orders, cores and splits against brute force over lists of tuples."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.data.cleaning import Sequences, first_of_duplicates, in_order, k_core
from trainer.data.readers import Interactions, Windows
from trainer.data.splits import Targets, chronological, every_position, from_windows, leave_one_out

SEEDS = range(8)
Row = tuple[int, int, int]


def random_rows(seed: int, n: int = 120, users: int = 9, items: int = 7, times: int = 12) -> list[Row]:
    rng = np.random.default_rng(seed)
    # A cubed draw: some users have many rows, some one or two; few distinct times, so that ties are common.
    who = (rng.random(n) ** 3 * users).astype(int)
    return list(
        zip(who.tolist(), rng.integers(items, size=n).tolist(), rng.integers(times, size=n).tolist(), strict=True)
    )


def interactions_of(rows: list[Row]) -> Interactions:
    names = list(dict.fromkeys(user for user, _, _ in rows))
    return Interactions(
        [str(name) for name in names],
        np.array([names.index(user) for user, _, _ in rows]),
        np.array([item for _, item, _ in rows]),
        np.array([time for _, _, time in rows]),
    )


def brute_sequences(rows: list[Row]) -> dict[str, list[tuple[int, int]]]:
    """user → [(time, item)], users by first appearance, `sorted` being stable."""
    users = list(dict.fromkeys(user for user, _, _ in rows))
    return {str(u): sorted(((t, i) for v, i, t in rows if v == u), key=lambda pair: pair[0]) for u in users}


def as_lists(sequences: Sequences) -> dict[str, list[int]]:
    cuts = sequences.offsets[1:-1]
    return dict(zip(sequences.users, (part.tolist() for part in np.split(sequences.items, cuts)), strict=True))


def windows_of(sequences: Sequences, targets: Targets) -> list[tuple[str, int]]:
    return [(sequences.users[s], p) for s, p in zip(targets.sequence.tolist(), targets.position.tolist(), strict=True)]


@pytest.mark.parametrize("seed", SEEDS)
def test_duplicates_keep_the_first_of_equal_rows(seed: int) -> None:
    rows = random_rows(seed)
    expected = [row not in rows[:number] for number, row in enumerate(rows)]
    assert not all(expected)
    assert first_of_duplicates(interactions_of(rows)).tolist() == expected


def test_rows_without_times_are_no_duplicates() -> None:
    rows = Interactions(["a"], np.array([0, 0]), np.array([3, 3]), None)
    assert first_of_duplicates(rows).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("min_user", "min_item"), [(3, 0), (0, 15), (4, 16), (10, 19), (200, 0)])
def test_k_core_drops_until_nothing_changes(seed: int, min_user: int, min_item: int) -> None:
    rows = random_rows(seed)
    left = list(enumerate(rows))
    while True:
        stays = [
            (number, row)
            for number, row in left
            if sum(other[0] == row[0] for _, other in left) >= min_user
            and sum(other[1] == row[1] for _, other in left) >= min_item
        ]
        if len(stays) == len(left):
            break
        left = stays
    user, item, _ = (np.array(column) for column in zip(*rows, strict=True))
    assert np.flatnonzero(k_core(user, item, min_user, min_item)).tolist() == [number for number, _ in left]


@pytest.mark.parametrize("seed", SEEDS)
def test_sequences_are_in_order_and_ties_keep_the_order_of_rows(seed: int) -> None:
    rows = random_rows(seed)
    sequences = in_order(interactions_of(rows))
    expected = brute_sequences(rows)
    assert as_lists(sequences) == {user: [item for _, item in pairs] for user, pairs in expected.items()}
    assert sequences.times.tolist() == [time for pairs in expected.values() for time, _ in pairs]


def test_sequences_without_times_keep_the_order_of_rows() -> None:
    sequences = in_order(Interactions(["a", "b"], np.array([0, 1, 0, 0]), np.array([5, 6, 4, 5]), None))
    assert as_lists(sequences) == {"a": [5, 4, 5], "b": [6]}
    assert sequences.times.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("seed", SEEDS)
def test_leave_one_out(seed: int) -> None:
    rows = random_rows(seed, n=40)
    sequences = in_order(interactions_of(rows))
    expected: dict[str, list[tuple[str, int]]] = {"train": [], "validation": [], "test": []}
    for user, pairs in brute_sequences(rows).items():
        n = len(pairs)
        if n < 3:
            expected["train"] += [(user, p) for p in range(1, n)]
        else:
            expected["train"] += [(user, p) for p in range(1, n - 2)]
            expected["validation"].append((user, n - 2))
            expected["test"].append((user, n - 1))
    found = leave_one_out(sequences)
    assert {split: windows_of(sequences, targets) for split, targets in found.items()} == expected


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("max_window", [2, 4, 11])
def test_chronological(seed: int, max_window: int) -> None:
    rows = random_rows(seed)
    sequences = in_order(interactions_of(rows))
    windows = []
    for user, pairs in brute_sequences(rows).items():
        n = len(pairs)
        if n <= max_window:
            windows += [(pairs[-1][0], user, n - 1)] if n > 1 else []
        else:
            windows += [(pairs[p][0], user, p) for p in range(max_window - 1, n)]
    windows.sort(key=lambda window: window[0])
    flat = [(user, position) for _, user, position in windows]
    a, b = int(0.8 * len(flat)), int(0.9 * len(flat))
    found = {split: windows_of(sequences, t) for split, t in chronological(sequences, max_window).items()}
    assert found == {"train": flat[:a], "validation": flat[a:b], "test": flat[b:]}


@pytest.mark.parametrize("seed", SEEDS)
def test_every_position_reaches_the_last_training_target_and_no_held_out_one(seed: int) -> None:
    sequences = in_order(interactions_of(random_rows(seed)))
    rng = np.random.default_rng(seed)
    anything = [(s, p) for s, n in enumerate(sequences.lengths.tolist()) for p in range(1, n)]
    split = rng.choice(3, size=len(anything), p=[0.3, 0.1, 0.6])
    parts = [[pair for pair, of in zip(anything, split, strict=True) if of == number] for number in range(3)]
    targets = {
        name: Targets(np.array([s for s, _ in part], np.int32), np.array([p for _, p in part], np.int32))
        for name, part in zip(("train", "validation", "test"), parts, strict=True)
    }
    last = {s: max(p for t, p in parts[0] if t == s) for s, _ in parts[0]}
    held_out = set(parts[1] + parts[2])
    expected = [(s, p) for s, p in anything if p <= last.get(s, -1) and (s, p) not in held_out]
    found = every_position(sequences, targets)
    train = found["train"]
    assert list(zip(train.sequence.tolist(), train.position.tolist(), strict=True)) == expected
    assert found["validation"] is targets["validation"]


def windows(*rows: tuple[str, list[int], int], time: list[int] | None = None) -> Windows:
    return Windows(
        [user for user, _, _ in rows],
        [history for _, history, _ in rows],
        np.array([target for _, _, target in rows], np.int64),
        None if time is None else np.array(time),
        None,
    )


def test_windows_of_a_user_are_joined() -> None:
    sequences, targets = from_windows(
        {
            "train": windows(("b", [1, 2], 3), ("a", [7], 8), ("b", [1, 2, 3], 4)),
            "validation": windows(("b", [2, 3, 4], 5)),
            "test": windows(("a", [9], 1), ("b", [3, 4, 5], 5), ("c", [4], 4)),
        }
    )
    # The history of the second window of `a` does not end what came before: a second sequence of `a`.
    assert sequences.users == ["b", "a", "a", "c"]
    assert sequences.items.tolist() == [1, 2, 3, 4, 5, 5, 7, 8, 9, 1, 4, 4]
    assert sequences.offsets.tolist() == [0, 6, 8, 10, 12]
    assert sequences.times.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 0, 1, 0, 1]
    assert targets["train"].sequence.tolist() == [0, 1, 0]
    assert targets["train"].position.tolist() == [2, 1, 3]
    assert (targets["test"].sequence.tolist(), targets["test"].position.tolist()) == ([2, 0, 3], [1, 5, 1])


def test_windows_are_joined_by_time_across_splits() -> None:
    """A file out of order, and a held-out window before a training one."""
    sequences, targets = from_windows(
        {
            "train": windows(("a", [1, 2, 3, 4], 5), ("a", [1], 2), time=[40, 10]),
            "validation": windows(("a", [1, 2], 3), time=[20]),
            "test": windows(("a", [1, 2, 3], 4), time=[30]),
        }
    )
    assert sequences.items.tolist() == [1, 2, 3, 4, 5]
    assert sequences.times.tolist() == [10, 10, 20, 30, 40]
    assert targets["train"].position.tolist() == [4, 1]
    assert every_position(sequences, targets)["train"].position.tolist() == [1, 4]


def test_a_repeated_window_is_a_sequence_of_its_own() -> None:
    sequences, targets = from_windows(
        {"train": windows(("a", [1, 2], 3), ("a", [1, 2], 3)), "validation": windows(), "test": windows()}
    )
    assert sequences.items.tolist() == [1, 2, 3, 1, 2, 3]
    assert targets["train"].sequence.tolist() == [0, 1]

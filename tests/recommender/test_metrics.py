from __future__ import annotations

import numpy as np
import pytest

from recommender.metrics import bootstrap_interval, metric_values, popularity_ranks


def test_metrics_of_known_ranks() -> None:
    values = metric_values(np.array([1, 2, 11, 0]), [1, 10])
    assert values["HR@1"].tolist() == [1, 0, 0, 0]
    assert values["HR@10"].tolist() == [1, 1, 0, 0]
    assert values["NDCG@10"] == pytest.approx([1, 1 / np.log2(3), 0, 0])


@pytest.mark.parametrize("of_a_user", [1, 4])
def test_interval_covers_the_mean_as_often_as_it_says(of_a_user: int) -> None:
    rng = np.random.default_rng(0)
    users = np.repeat([f"u{number}" for number in range(300)], of_a_user)
    inside = 0
    for seed in range(200):  # all targets of a user are hit, or none
        values = np.repeat((rng.random(300) < 0.3).astype(float), of_a_user)
        low, high = bootstrap_interval(values, users, 400, seed)
        inside += low <= 0.3 <= high
    assert 180 <= inside <= 199
    assert bootstrap_interval(np.zeros(10), np.arange(10)) == (0.0, 0.0)


def test_interval_of_users_with_different_numbers_of_targets() -> None:
    rng = np.random.default_rng(2)
    users = rng.integers(0, 40, 200)
    values = rng.random(200)
    low, high = bootstrap_interval(values, users, 20_000)
    by_user = [values[users == user] for user in np.unique(users)]
    draws = [np.concatenate([by_user[i] for i in rng.integers(0, len(by_user), len(by_user))]) for _ in range(4000)]
    expected = np.percentile([draw.mean() for draw in draws], [2.5, 97.5])
    assert [low, high] == pytest.approx(expected, abs=0.005)


def test_popularity_ranks_equal_brute_force() -> None:
    rng = np.random.default_rng(1)
    popularity = rng.integers(0, 5, 30)
    targets = rng.integers(0, 30, 50)
    seen = [rng.integers(0, 30, 6) for _ in targets]
    seen = [s[s != t] for s, t in zip(seen, targets, strict=True)]
    order = sorted(range(30), key=lambda i: (-popularity[i], i))
    assert popularity_ranks(popularity, targets, None).tolist() == [order.index(t) + 1 for t in targets]
    expected = [[i for i in order if i not in s].index(t) + 1 for t, s in zip(targets, seen, strict=True)]
    assert popularity_ranks(popularity, targets, seen).tolist() == expected
    seen[3] = np.append(seen[3], targets[3])  # what may not be listed is not in the list
    expected[3] = 0
    assert popularity_ranks(popularity, targets, seen).tolist() == expected

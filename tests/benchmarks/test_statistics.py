"""The hierarchical bootstrap against plain loops, and on data whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.statistics import paired_difference

USERS = np.arange(400)


def method(rng: np.random.Generator, of_user: np.ndarray, effect: float = 0.0, seeds: int = 3) -> np.ndarray:
    """Values [seeds, users]: what the method does for each user in general, what a seed changes, and chance."""
    in_general = of_user + effect + rng.normal(0, 0.1, of_user.shape)
    of_seed = rng.normal(0, 0.003, (seeds, 1))
    return in_general + of_seed + rng.normal(0, 0.15, (seeds, len(of_user)))


def brute_force(first: np.ndarray, second: np.ndarray, users: np.ndarray, resamples: int) -> np.ndarray:
    """Resampled differences, one draw after the other."""
    rng = np.random.default_rng(5)
    labels = np.unique(users)
    differences = []
    for _ in range(resamples):
        chosen = np.concatenate([np.flatnonzero(users == user) for user in rng.choice(labels, len(labels))])
        of_first, of_second = (rng.choice(len(values), len(values)) for values in (first, second))
        differences.append(first[of_first][:, chosen].mean() - second[of_second][:, chosen].mean())
    return np.array(differences)


def test_it_agrees_with_resampling_by_hand() -> None:
    """Users with one to four targets each, and unequal numbers of seeds."""
    rng = np.random.default_rng(0)
    users = np.array([f"u{number}" for number in np.repeat(np.arange(60), rng.integers(1, 5, 60))])
    first, second = rng.random((3, len(users))), rng.random((2, len(users))) ** 2
    found = paired_difference(first, second, users, 4000)
    by_hand = brute_force(first, second, users, 4000)
    assert found.mean == pytest.approx(first.mean() - second.mean())
    assert found.standard_error == pytest.approx(by_hand.std(), rel=0.06)
    assert found.interval == pytest.approx(np.percentile(by_hand, [2.5, 97.5]), abs=0.15 * by_hand.std())


def test_targets_of_a_user_stay_together() -> None:
    """Ten copies of each target by the same user say nothing new."""
    rng = np.random.default_rng(1)
    first, second = rng.random((2, 2, 100))
    once = paired_difference(first, second, np.arange(100))
    copied = paired_difference(first.repeat(10, axis=1), second.repeat(10, axis=1), np.arange(100).repeat(10))
    assert copied.interval == pytest.approx(once.interval)
    assert copied.standard_error == pytest.approx(once.standard_error)


def test_a_known_effect_is_found_and_no_effect_is_not() -> None:
    rng = np.random.default_rng(2)
    found, wrong = 0, 0
    for seed in range(100):
        of_user = rng.normal(0.3, 0.3, len(USERS))  # easy and hard users: pairing takes this out
        first, second = method(rng, of_user), method(rng, of_user)
        null = paired_difference(first, second, USERS, 300, seed)
        effect = paired_difference(first + 0.05, second, USERS, 300, seed)
        found += effect.interval[0] > 0
        wrong += not null.interval[0] <= 0 <= null.interval[1]
    assert found >= 95
    assert wrong <= 11  # 5 expected; more than 11 happen once in a hundred times


def test_an_effect_of_the_detectable_size_is_found_four_times_out_of_five() -> None:
    rng = np.random.default_rng(3)
    of_user = rng.normal(0.3, 0.3, len(USERS))
    detectable = np.mean(
        [paired_difference(method(rng, of_user), method(rng, of_user), USERS, 300).detectable for _ in range(20)]
    )
    found = 0
    for seed in range(150):
        first, second = method(rng, of_user, effect=float(detectable)), method(rng, of_user)
        found += paired_difference(first, second, USERS, 300, seed).interval[0] > 0
    assert 0.7 <= found / 150 <= 0.97  # rather more than .8: intervals are wide rather than narrow


def test_more_seeds_and_more_users_are_narrower() -> None:
    rng = np.random.default_rng(4)
    of_user = rng.normal(0.3, 0.3, 1600)
    first, second = method(rng, of_user, seeds=8), method(rng, of_user, seeds=8)
    few = paired_difference(first[:2, :400], second[:2, :400], np.arange(400))
    more_seeds = paired_difference(first[:, :400], second[:, :400], np.arange(400))
    more_users = paired_difference(first[:2], second[:2], np.arange(1600))
    assert more_seeds.standard_error < few.standard_error
    assert more_users.standard_error < 0.7 * few.standard_error
    assert few.detectable == 2.8 * few.standard_error


def test_seeds_that_differ_widen_the_interval() -> None:
    values = np.random.default_rng(6).random(400)
    steady = paired_difference(np.stack([values] * 3), np.stack([values] * 3), USERS)
    assert steady.interval == pytest.approx((0, 0))
    unsteady = paired_difference(np.stack([values - 0.1, values, values + 0.1]), np.stack([values] * 3), USERS)
    assert unsteady.mean == pytest.approx(0)
    assert unsteady.standard_error == pytest.approx(np.std([-0.1, 0, 0.1]) / np.sqrt(3), rel=0.1)


def test_the_same_seed_gives_the_same_interval() -> None:
    first, second = np.random.default_rng(7).random((2, 3, 50))
    assert paired_difference(first, second, np.arange(50)) == paired_difference(first, second, np.arange(50))

"""The simulated world against brute force, and its oracle against the probabilities that it claims to know."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from recommender.errors import UserError
from trainer.world import simulator
from trainer.world.config import WorldConfig
from trainer.world.simulator import World, build_world, draw_choices, known_metrics, next_item, simulate

FILES = ("items.jsonl.gz", "interactions.csv.gz", "oracle.json", "world.json")


def small(**fields: Any) -> WorldConfig:
    return WorldConfig(**{"items": 300, "users": 250, "kinds": 12, "brands": 15, "uses": 4, **fields})


def draw(config: WorldConfig) -> tuple[World, list[np.ndarray], np.ndarray]:
    world = build_world(config)
    return world, *draw_choices(config, world)


def read_items(directory: Path) -> list[dict[str, str]]:
    with gzip.open(directory / "items.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def read_interactions(directory: Path) -> list[dict[str, str]]:
    with gzip.open(directory / "interactions.csv.gz", "rt", newline="") as file:
        return list(csv.DictReader(file))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# ---- files


def test_the_seed_is_all_that_decides(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        simulate(small(seed=seed), tmp_path / name)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert sorted(a) == sorted(FILES)
    assert a == b
    assert all(a[name][4:8] == bytes(4) for name in FILES[:2])  # gzip's own timestamp
    assert all(a[name] != c[name] for name in FILES)


def test_what_is_written_is_a_log_of_distinct_choices(tmp_path: Path) -> None:
    config = small(users=50, items=100, max_length=20, mean_length=8)
    metrics = simulate(config, tmp_path / "world")
    known = [row["item_id"] for row in read_items(tmp_path / "world")]
    assert len(known) == len(set(known)) == 100
    by_user: dict[str, list[dict[str, str]]] = {}
    for row in read_interactions(tmp_path / "world"):
        by_user.setdefault(row["user_id"], []).append(row)
    assert len(by_user) == 50
    for rows in by_user.values():
        bought = [row["item_id"] for row in rows]
        times = [int(row["timestamp"]) for row in rows]
        assert config.min_length <= len(rows) <= config.max_length
        assert len(set(bought)) == len(bought)
        assert set(bought) <= set(known)
        assert times == sorted(set(times))
    assert json.loads((tmp_path / "world" / "oracle.json").read_text()) == metrics


def test_the_summary_counts_what_is_there(tmp_path: Path) -> None:
    simulate(small(), tmp_path / "world")
    described = json.loads((tmp_path / "world" / "world.json").read_text())
    assert WorldConfig(**described["config"]) == small()
    counts = Counter(row["item_id"] for row in read_interactions(tmp_path / "world"))
    all_counts = np.array([*counts.values(), *[0] * (300 - len(counts))])
    differences = np.abs(all_counts[:, None] - all_counts[None, :]).mean()
    assert described["summary"]["interactions"] == all_counts.sum()
    assert described["summary"]["items_bought"] == len(counts)
    assert described["summary"]["gini"] == pytest.approx(differences / (2 * all_counts.mean()))
    assert described["summary"]["zipf_exponent"] > 0.2


def test_titles_say_brand_kind_and_use(tmp_path: Path) -> None:
    simulate(small(items=2000), tmp_path / "world")
    items = read_items(tmp_path / "world")
    for item in items:
        brand, kind, use = (item["title"].index(item[name]) for name in ("brand", "kind", "use"))
        assert brand < kind < use
    assert len({item["title"] for item in items}) > 0.95 * len(items)


def test_a_world_that_is_there_is_kept(tmp_path: Path) -> None:
    first = simulate(small(), tmp_path / "world")
    before = {name: (tmp_path / "world" / name).stat().st_mtime_ns for name in FILES}
    assert simulate(small(), tmp_path / "world") == first
    assert {name: (tmp_path / "world" / name).stat().st_mtime_ns for name in FILES} == before
    with pytest.raises(UserError, match="holds a world of another config, and is left as it is"):
        simulate(small(seed=1), tmp_path / "world")
    assert {name: (tmp_path / "world" / name).stat().st_mtime_ns for name in FILES} == before
    assert simulate(small(seed=1), tmp_path / "other") != first


@pytest.mark.parametrize("world_json", [None, "{", "[]", "{}"])
def test_other_peoples_files_are_not_replaced(tmp_path: Path, world_json: str | None) -> None:
    (tmp_path / "thesis.txt").write_text("ten years")
    if world_json is not None:
        (tmp_path / "world.json").write_text(world_json)
    for out_dir in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(UserError, match="holds no simulated world"):
            simulate(small(), out_dir)
    assert (tmp_path / "thesis.txt").read_text() == "ten years"


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(simulator, "_write", fail)
    with pytest.raises(OSError, match="disk full"):
        simulate(small(), tmp_path / "world")
    assert list(tmp_path.iterdir()) == []


# ---- probabilities


def test_next_item_is_the_documented_product() -> None:
    config = small(items=60, kinds=5, brands=6, uses=3, max_length=30)
    world = build_world(config)
    rng = np.random.default_rng(0)
    p_kind = rng.dirichlet(np.ones(5), 4)
    brand, use = rng.integers(0, 6, 4), rng.integers(0, 3, 4)
    expected = np.zeros((4, 60))
    for u in range(4):
        liking = [
            world.weight[i]
            * (config.brand_loyalty if world.brand[i] == brand[u] else 1)
            * (config.use_loyalty if world.use[i] == use[u] else 1)
            for i in range(60)
        ]
        for i in range(60):
            of_kind = sum(liking[j] for j in range(60) if world.kind[j] == world.kind[i])
            expected[u, i] = p_kind[u, world.kind[i]] * liking[i] / of_kind
    np.testing.assert_allclose(next_item(config, world, p_kind, brand, use), expected, rtol=1e-5)
    np.testing.assert_allclose(expected.sum(1), 1)


def test_popularity_is_zipf_within_and_across_kinds() -> None:
    config = small(zipf=0.8)
    world = build_world(config)

    def assert_zipf(weights: np.ndarray) -> None:
        falling = np.sort(weights)[::-1]
        np.testing.assert_allclose(falling / falling[0], np.arange(1, len(weights) + 1) ** -0.8)
        assert weights.sum() == pytest.approx(1)

    assert_zipf(world.kind_popularity)
    for kind in range(config.kinds):
        assert_zipf(world.weight[world.kind == kind])


def test_choices_without_habits_and_tastes_follow_popularity() -> None:
    config = small(
        users=20_000, habit=0, taste=0, brand_loyalty=1, use_loyalty=1, min_length=4, mean_length=4, max_length=4
    )
    world, bought, _ = draw(config)
    first = np.bincount([sequence[0] for sequence in bought], minlength=config.items)
    expected = config.users * world.weight * world.kind_popularity[world.kind]
    # Pearson's chi-square per degree of freedom: 1 ± a few sqrt(2 / items).
    assert ((first - expected) ** 2 / expected).mean() == pytest.approx(1, abs=5 * np.sqrt(2 / config.items))


def test_habits_tastes_and_loyalties_show_in_the_choices() -> None:
    lengths = {"users": 400, "items": 1000, "mean_length": 20, "min_length": 20, "max_length": 20}

    def commonest(values: np.ndarray, how_many: int = 1) -> float:
        return sum(count for _, count in Counter(values.tolist()).most_common(how_many)) / len(values)

    world, bought, _ = draw(small(habit=0.97, taste=0, **lengths))
    follows = [world.habit[world.kind[s[:-1]], world.kind[s[1:]]] > 0 for s in bought]
    assert np.mean(follows) == pytest.approx(0.97, abs=0.02)

    for drift, low, high in ((0, 0.95, 1), (1, 0, 0.7)):
        world, bought, _ = draw(small(habit=0, taste=0.97, tastes=2, drift=drift, **lengths))
        assert low <= np.mean([commonest(world.kind[s], 2) for s in bought]) <= high

    loyal, same_use = [], []
    for loyalty in (1, 1000):
        world, bought, _ = draw(small(brand_loyalty=loyalty, use_loyalty=loyalty, drift=0, **lengths))
        loyal.append(np.mean([commonest(world.brand[s]) for s in bought]))
        same_use.append(np.mean([commonest(world.use[s]) for s in bought]))
    assert loyal[1] > loyal[0] + 0.1  # not more: a brand makes only a third of the kinds
    assert same_use[1] > same_use[0] + 0.3


# ---- the oracle


def test_the_oracle_ranks_by_the_true_probabilities_and_these_are_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(users=3000, max_length=30)
    world = build_world(config)
    drawn: list[np.ndarray] = []  # step → float32 [users who still choose, items]

    def recorded(*arguments: Any) -> np.ndarray:
        drawn.append(next_item(*arguments).copy())
        return next_item(*arguments)

    monkeypatch.setattr(simulator, "next_item", recorded)
    bought, ranks = draw_choices(config, world, block=config.users)
    longest_first = sorted(range(config.users), key=lambda user: -len(bought[user]))

    gain = np.where(np.arange(config.items) < 10, 1 / np.log2(np.arange(config.items) + 2), 0)
    own, own_mean, own_variance, hit_mean, ndcg_mean, ndcg_variance = (np.zeros((config.users, 2)) for _ in range(6))
    for row, user in enumerate(longest_first):
        sequence = bought[user]
        for column in (0, 1):
            t = len(sequence) - 2 + column
            p = drawn[t][row].astype(np.float64)
            p[sequence[:t]] = 0
            order = np.argsort(-p, kind="stable")
            assert ranks[user, column] == 1 + order.tolist().index(sequence[t])
            p /= p.sum()
            falling = p[order]
            own[user, column] = p[sequence[t]]
            own_mean[user, column] = (p**2).sum()
            own_variance[user, column] = (p**3).sum() - (p**2).sum() ** 2
            hit_mean[user, column] = falling[:10].sum()
            ndcg_mean[user, column] = falling @ gain
            ndcg_variance[user, column] = falling @ gain**2 - (falling @ gain) ** 2

    def assert_expected(realised: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> None:
        assert abs((realised - mean).sum()) < 4 * np.sqrt(variance.sum())

    hits = ranks <= 10
    assert_expected(own, own_mean, own_variance)
    assert_expected(hits, hit_mean, hit_mean * (1 - hit_mean))
    assert_expected(np.where(hits, 1 / np.log2(ranks + 1), 0), ndcg_mean, ndcg_variance)
    metrics = known_metrics(config, bought, ranks)
    for column, split in enumerate(("validation", "test")):
        assert metrics[split]["oracle"]["HR@10"] == pytest.approx(hits[:, column].mean())


def test_baselines_are_counted_on_what_training_sees() -> None:
    config = small(users=3, min_length=4, mean_length=4)
    bought = [np.array([7, 8, 9, 1]), np.array([7, 9, 2, 8]), np.array([9, 7, 8, 299])]
    # Training saw 7 three times, 9 twice, 8 once; the rest follow in catalogue order. A user's own items leave it.
    metrics = known_metrics(config, bought, np.array([[1, 1], [2, 3], [11, 21]]))
    assert metrics["validation"]["most_popular"]["HR@1"] == pytest.approx(2 / 3)  # 9 and 8, but 2 is behind 8, 0 and 1
    assert metrics["validation"]["most_popular"]["NDCG@5"] == pytest.approx((2 + 1 / np.log2(5)) / 3)
    assert metrics["test"]["most_popular"]["HR@1"] == pytest.approx(1 / 3)  # 8; item 1 is behind 0, item 299 is last
    assert metrics["test"]["most_popular"]["HR@5"] == pytest.approx(2 / 3)
    assert [metrics["test"]["oracle"][f"HR@{k}"] for k in (1, 5, 10, 20)] == pytest.approx([1 / 3, 2 / 3, 2 / 3, 2 / 3])


def test_random_order_hits_in_proportion() -> None:
    config = small(min_length=4, mean_length=4, max_length=4)
    _, bought, ranks = draw(config)
    metrics = known_metrics(config, bought, ranks)
    assert metrics["validation"]["random"]["HR@10"] == pytest.approx(10 / 298)
    assert metrics["test"]["random"]["NDCG@5"] == pytest.approx(sum(1 / np.log2(r + 1) for r in range(1, 6)) / 297)


def test_nothing_is_bought_twice_when_habit_or_taste_has_run_out() -> None:
    limits = {"items": 100, "kinds": 10, "mean_length": 30, "max_length": 50}
    for fields in ({"habit": 0.999, "taste": 0, "followers": 1}, {"habit": 0, "taste": 0.999, "tastes": 1, "drift": 0}):
        _, bought, _ = draw(small(**limits, **fields))
        assert all(len(set(sequence.tolist())) == len(sequence) for sequence in bought)


@pytest.mark.parametrize("seed", [101, 202])
def test_a_default_world_is_of_use_and_can_be_learnt(seed: int) -> None:
    config = WorldConfig(seed=seed, users=2500)
    assert config.items >= 5000
    world, bought, ranks = draw(config)
    metrics = known_metrics(config, bought, ranks)["test"]
    oracle, popular = metrics["oracle"]["HR@10"], metrics["most_popular"]["HR@10"]
    assert 0.3 < oracle < 0.6
    assert popular > 0.02
    counted = counting_hit_rate(world, bought, users=800)
    assert counted > 0.6 * oracle
    assert counted > 3 * popular


def counting_hit_rate(world: World, bought: list[np.ndarray], users: int) -> float:
    """Test HR@10 of plain counting: what follows each kind, and the kinds, brands and uses of the user's own history.

    It reads the attributes that titles spell and the interactions that training sees, none of the hidden state.
    """
    kinds, popularity = world.kind.max() + 1, np.full(len(world.kind), 0.5)
    follows = np.zeros((kinds, kinds))
    for sequence in bought:
        np.add.at(popularity, sequence[:-2], 1)
        np.add.at(follows, (world.kind[sequence[:-3]], world.kind[sequence[1:-2]]), 1)
    popular_kinds = np.bincount(world.kind, popularity) / popularity.sum()
    follows = (follows + popular_kinds) / (follows.sum(1, keepdims=True) + 1)

    def share(of: np.ndarray, history: np.ndarray) -> np.ndarray:
        return np.bincount(of[history], minlength=of.max() + 1) / len(history)

    hits = 0
    for sequence in bought[:users]:
        history, target = sequence[:-1], sequence[-1]
        p_kind = 0.7 * follows[world.kind[history[-1]]] + 0.25 * share(world.kind, history) + 0.05 * popular_kinds
        liking = (
            popularity
            * (share(world.brand, history) + 0.03)[world.brand]
            * (share(world.use, history) + 0.03)[world.use]
        )
        score = liking * (p_kind / np.bincount(world.kind, liking))[world.kind]
        score[history] = -1
        hits += (score > score[target]).sum() < 10
    return hits / users


# ---- parameters


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"habit": 0.8, "taste": 0.3}, r"habit \+ taste"),
        ({"habit": 0.8, "taste": 0.2}, "below 1"),
        ({"habit": -0.1}, "habit"),
        ({"drift": 1.5}, "drift"),
        ({"brand_loyalty": 0.5}, "brand_loyalty"),
        ({"uses": 0}, "uses"),
        ({"uses": 11}, "uses"),
        ({"min_length": 2}, "min_length"),
        ({"min_length": 20, "mean_length": 10}, "min_length"),
        ({"mean_length": 70}, "max_length"),
        ({"items": 100}, "max_length 60 leaves too little to choose from 100 items"),
        ({"kinds": 5, "followers": 6}, "followers"),
        ({"kinds": 5, "tastes": 6}, "tastes"),
        ({"kinds": 50, "items": 45, "max_length": 20}, "kinds"),
        ({"brand_loyalty": float("inf")}, "brand_loyalty"),
        ({"zipf": -1}, "zipf"),
        ({"user": 5}, "user"),
    ],
)
def test_impossible_worlds_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        WorldConfig(**fields)


def test_every_parameter_is_described() -> None:
    assert all(field.description for field in WorldConfig.model_fields.values())

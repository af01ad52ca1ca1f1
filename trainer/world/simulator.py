"""A simulated world with known truth: the data that tests and the demo run on, and the oracle they are held against.

Items. Item i has a kind κ, a brand b and a use; together with an adjective and a colour they make its title. Its
popularity within its kind is Zipf: w_i ∝ rank^−s; kinds are Zipf too: π_κ.

Users. User u has a brand, a use that never changes, and a few liked kinds θ_u. With probability `drift` before each
choice one liked kind, and with the same probability the brand, is drawn anew.

Choices. After an item of kind κ' the next one is drawn from

    p(κ)     = habit · H[κ', κ] + taste · θ_u(κ) + (1 − habit − taste) · π_κ
    p(i | κ) ∝ w_i · brand_loyalty^[b_i = b_u] · use_loyalty^[use_i = use_u]        over items of kind κ
    p(i)     ∝ p(κ_i) · p(i | κ_i)                                                  over items not bought before

H is sparse: each kind has a few followers (after a tent, a sleeping bag). The oracle knows everything, the user's
hidden state included, and ranks by p(i); nobody can do better in expectation. A recommender sees titles and histories.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from recommender.errors import UserError
from recommender.files import new_directory
from recommender.metrics import metric_values, popularity_ranks
from trainer.world.config import WorldConfig

CUTOFFS = (1, 5, 10, 20)
WORLD = "world.json"  # with it a world is complete

Metrics = dict[str, dict[str, dict[str, float]]]

_KINDS = [
    *("Tent", "Sleeping Bag", "Backpack", "Headlamp", "Camp Stove", "Hiking Boots", "Water Bottle", "Trekking Poles"),
    *("Rain Jacket", "Compass", "Coffee Grinder", "Espresso Machine", "Kettle", "Tea Pot", "Mug", "Frying Pan"),
    *("Stock Pot", "Chef Knife", "Cutting Board", "Blender", "Notebook", "Fountain Pen", "Desk Lamp", "Office Chair"),
    *("Stapler", "Paper Shredder", "Label Printer", "Whiteboard", "Monitor Stand", "Keyboard", "Guitar", "Ukulele"),
    *("Drum Sticks", "Microphone", "Keyboard Bench", "Music Stand", "Violin Bow", "Capo", "Guitar Strings", "Tuner"),
    *("Yoga Mat", "Dumbbell Set", "Jump Rope", "Foam Roller", "Running Shoes", "Heart Rate Monitor", "Swim Goggles"),
    *("Bike Helmet", "Bike Light", "Bike Pump", "Building Blocks", "Puzzle", "Board Game", "Plush Bear", "Toy Train"),
    *("Kite", "Paint Set", "Clay Kit", "Doll House", "Science Kit"),
]
_USES = ["Kids", "Women", "Men", "Travel", "Home", "Beginners", "Professionals", "Seniors", "Schools", "Teams"]
_ADJECTIVES = [
    *("Classic", "Compact", "Deluxe", "Eco", "Essential", "Light", "Premium", "Prime", "Robust", "Smart", "Soft"),
    *("Sturdy", "Ultra", "Urban", "Vintage"),
]
_COLOURS = [
    *("Black", "White", "Red", "Blue", "Green", "Yellow", "Orange", "Purple", "Grey", "Brown", "Silver", "Gold"),
    *("Teal", "Navy", "Olive", "Coral"),
]
_SYLLABLES = [
    *("al", "bor", "cas", "den", "el", "fin", "gar", "hol", "is", "jor", "kel", "lum", "mar", "nor", "os", "pel"),
    *("quin", "ras", "sol", "tor", "ul", "vek", "wes", "yar", "zen"),
]


@dataclass(frozen=True)
class World:
    """Items and habits.

    Attributes:
        kind, brand, use: int [items].
        weight: float64 [items]; popularity within the kind, sums to 1 in each.
        kind_popularity: float64 [kinds], π.
        habit: float64 [kinds, kinds], H; rows sum to 1.
        titles, brand_names, kind_names: words.
    """

    kind: np.ndarray
    brand: np.ndarray
    use: np.ndarray
    weight: np.ndarray
    kind_popularity: np.ndarray
    habit: np.ndarray
    titles: list[str]
    brand_names: list[str]
    kind_names: list[str]

    def brand_popularity(self) -> np.ndarray:
        """Share of choices that each brand would get if nobody were loyal: float64 [brands]."""
        share = np.bincount(self.brand, self.weight * self.kind_popularity[self.kind], minlength=len(self.brand_names))
        return share / share.sum()


def simulate(config: WorldConfig, out_dir: Path, say: Callable[[str], None] = print) -> Metrics:
    """Write a world: `items.jsonl.gz`, `interactions.csv.gz`, `world.json`, `oracle.json`; complete or absent.

    A world of the same config is left as it is.

    Returns:
        split ("validation", "test") → system ("oracle", "most_popular", "random") → metric → value: leave-one-out, the
        last item of a user is test, the one before validation, and bought items are not ranked.

    Raises:
        UserError: `out_dir` is there and holds something else, a world of another config for example.
    """
    described = config.model_dump()
    if (there := _present(out_dir)) is not None:
        if there != described:
            raise UserError(f"{out_dir} holds a world of another config, and is left as it is; name another directory")
        say(f"world: {out_dir} is there already")
        metrics: Metrics = json.loads((out_dir / "oracle.json").read_text())
        return metrics
    world = build_world(config)
    bought, ranks = draw_choices(config, world)
    metrics = known_metrics(config, bought, ranks)
    with new_directory(out_dir) as aside:
        _write(world, bought, aside)
        (aside / "oracle.json").write_text(json.dumps(metrics, indent=2))
        summary = _summary(config, world, bought, metrics)
        (aside / WORLD).write_text(json.dumps({"config": described, "summary": summary}, indent=2))
    oracle, popular = metrics["test"]["oracle"]["HR@10"], metrics["test"]["most_popular"]["HR@10"]
    say(
        f"world: {config.items} items, {config.users} users, {sum(map(len, bought))} interactions; "
        f"test HR@10: oracle {oracle:.3f}, most popular {popular:.3f}"
    )
    return metrics


def _present(out_dir: Path) -> dict[str, object] | None:
    """Config of the world in `out_dir`; None where nothing is there."""
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return None
    try:
        config: dict[str, object] = json.loads((out_dir / WORLD).read_text())["config"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{out_dir} is there and holds no simulated world; name another directory") from None
    return config


def build_world(config: WorldConfig) -> World:
    """Draw items and habits."""
    rng = np.random.default_rng([config.seed, 1])
    kind_popularity = _zipf(config.kinds, config.zipf, rng)
    # Every kind gets some items, popular kinds more; each brand makes about a third of the kinds.
    kind = np.concatenate(
        [np.arange(config.kinds), rng.choice(config.kinds, config.items, p=0.5 * kind_popularity + 0.5 / config.kinds)]
    )[: config.items]
    makes = rng.random((config.kinds, config.brands)) < 1 / 3
    makes[np.arange(config.kinds), rng.integers(0, config.brands, config.kinds)] = True
    size = _zipf(config.brands, config.zipf / 2, rng)
    chance = makes * size
    cumulative = (chance / chance.sum(1, keepdims=True)).cumsum(1)
    brand = (rng.random((config.items, 1)) > cumulative[kind]).sum(1).clip(0, config.brands - 1)
    use = rng.integers(0, config.uses, config.items)
    weight = np.empty(config.items)
    for k in range(config.kinds):
        members = np.flatnonzero(kind == k)
        weight[members] = _zipf(len(members), config.zipf, rng)
    habit = np.zeros((config.kinds, config.kinds))
    for k in range(config.kinds):
        followers = rng.choice(config.kinds, config.followers, replace=False)
        habit[k, followers] = rng.dirichlet(np.full(config.followers, 3.0))
    kind_names = [_kind_name(k) for k in range(config.kinds)]
    brand_names = _brand_names(config.brands, rng)
    words = zip(
        rng.integers(0, len(_ADJECTIVES), config.items), rng.integers(0, len(_COLOURS), config.items), strict=True
    )
    titles = [
        f"{brand_names[b]} {_ADJECTIVES[a]} {kind_names[k]} for {_USES[u]}, {_COLOURS[c]}"
        for b, k, u, (a, c) in zip(brand, kind, use, words, strict=True)
    ]
    return World(kind, brand, use, weight, kind_popularity, habit, titles, brand_names, kind_names)


def _zipf(count: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """Zipf weights in random order: float64 [count], sum 1."""
    weights = (1.0 + np.arange(count)) ** -exponent
    return rng.permutation(weights / weights.sum())


def _kind_name(kind: int) -> str:
    lap, at = divmod(kind, len(_KINDS))
    return f"{_KINDS[at]} Case {lap}" if lap else _KINDS[at]


def _brand_names(count: int, rng: np.random.Generator) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        syllables = rng.choice(_SYLLABLES, 2 + (len(names) >= 200))
        names["".join(syllables).capitalize()] = None
    return list(names)


def draw_choices(config: WorldConfig, world: World, block: int = 256) -> tuple[list[np.ndarray], np.ndarray]:
    """Draw every user's sequence.

    Returns:
        item indices per user, and the oracle's rank of each user's last two items (validation, test): int64 [users, 2].
    """
    rng = np.random.default_rng([config.seed, 2])
    extra = config.mean_length - config.min_length
    lengths = config.min_length + (rng.geometric(1 / (extra + 1), config.users) - 1 if extra else 0)
    lengths = np.minimum(np.broadcast_to(lengths, config.users), config.max_length)
    order = np.argsort(-lengths, kind="stable")  # users of a block end at about the same time
    bought: list[np.ndarray] = [np.empty(0, np.int64)] * config.users
    ranks = np.zeros((config.users, 2), np.int64)
    for begin in range(0, config.users, block):
        users = order[begin : begin + block]
        for user, sequence, rank in zip(users, *_draw_block(config, world, lengths[users], rng), strict=True):
            bought[user], ranks[user] = sequence, rank
    return bought, ranks


def _draw_block(
    config: WorldConfig, world: World, lengths: np.ndarray, rng: np.random.Generator
) -> tuple[list[np.ndarray], np.ndarray]:
    """Sequences of a block of users, lengths falling, and the oracle's ranks of their last two items."""
    count, steps = len(lengths), int(lengths[0])
    brand = _draw_from(world.brand_popularity(), count, rng)
    use = rng.integers(0, config.uses, count)
    liked = _draw_from(world.kind_popularity, (count, config.tastes), rng)
    items = np.full((count, steps), -1, np.int64)
    ranks = np.zeros((count, 2), np.int64)
    available = np.ones((count, config.items), bool)
    for t in range(steps):
        active = int((lengths > t).sum())
        rows = np.arange(active)
        moves = rng.random(active) < config.drift
        liked[rows[moves], rng.integers(0, config.tastes, active)[moves]] = _draw_from(
            world.kind_popularity, active, rng
        )[moves]
        moves = rng.random(active) < config.drift
        brand[:active] = np.where(moves, _draw_from(world.brand_popularity(), active, rng), brand[:active])

        taste = np.zeros((active, config.kinds))
        np.add.at(taste, (rows[:, None], liked[:active]), 1 / config.tastes)
        habit = world.habit[world.kind[items[:active, t - 1]]] if t else taste
        rest = 1 - config.habit - config.taste
        p_kind = config.habit * habit + config.taste * taste + rest * world.kind_popularity
        p = next_item(config, world, p_kind, brand[:active], use[:active])
        p *= available[:active]
        cumulative = p.cumsum(1, dtype=np.float64)
        draw = rng.random(active) * cumulative[:, -1]
        chosen = np.minimum((cumulative <= draw[:, None]).sum(1), config.items - 1)
        left = lengths[:active] - t  # 2: this is the validation item, 1: the test item
        for held in (2, 1):
            at = rows[left == held]
            own = p[at, chosen[at]][:, None]
            before = np.arange(config.items)[None, :] < chosen[at][:, None]
            ranks[at, 2 - held] = 1 + (p[at] > own).sum(1) + ((p[at] == own) & before).sum(1)
        items[rows, t] = chosen
        available[rows, chosen] = False
    return [row[:length] for row, length in zip(items, lengths, strict=True)], ranks


def next_item(config: WorldConfig, world: World, p_kind: np.ndarray, brand: np.ndarray, use: np.ndarray) -> np.ndarray:
    """p(i) before bought items are taken out: float32 [users, items].

    Args:
        p_kind: float64 [users, kinds].
        brand, use: int [users]; the users' own.
    """
    liking = world.weight.astype(np.float32) * np.where(
        world.brand == brand[:, None], np.float32(config.brand_loyalty), np.float32(1)
    )
    liking *= np.where(world.use == use[:, None], np.float32(config.use_loyalty), np.float32(1))
    by_kind = np.argsort(world.kind, kind="stable")
    starts = np.searchsorted(world.kind[by_kind], np.arange(config.kinds))
    totals = np.add.reduceat(liking[:, by_kind], starts, axis=1)
    return liking * (p_kind / totals).astype(np.float32)[:, world.kind]


def _draw_from(p: np.ndarray, shape: int | tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    return rng.choice(len(p), shape, p=p)


def known_metrics(config: WorldConfig, bought: list[np.ndarray], oracle_ranks: np.ndarray) -> Metrics:
    """HR and NDCG of the oracle, of most-popular (counted on what training sees) and of a random order, by split.

    Those of the random order are expectations: each rank is equally likely.
    """
    training = np.concatenate([sequence[:-2] for sequence in bought])
    popularity = np.bincount(training, minlength=config.items)
    metrics: Metrics = {}
    for split, column in (("validation", 0), ("test", 1)):
        at = [len(sequence) - 2 + column for sequence in bought]
        targets = np.array([sequence[t] for sequence, t in zip(bought, at, strict=True)])
        seen = [sequence[:t] for sequence, t in zip(bought, at, strict=True)]
        left = config.items - np.array(at)
        oracle = metric_values(oracle_ranks[:, column], CUTOFFS)
        popular = metric_values(popularity_ranks(popularity, targets, seen), CUTOFFS)
        by_rank = metric_values(np.arange(1, CUTOFFS[-1] + 1), CUTOFFS)
        metrics[split] = {
            "oracle": {name: float(values.mean()) for name, values in oracle.items()},
            "most_popular": {name: float(values.mean()) for name, values in popular.items()},
            "random": {name: float((values.sum() / left).mean()) for name, values in by_rank.items()},
        }
    return metrics


def _summary(config: WorldConfig, world: World, bought: list[np.ndarray], metrics: Metrics) -> dict[str, float]:
    """Sizes, how unequal popularity is, and the figures that say whether the world is of use."""
    counts = np.sort(np.bincount(np.concatenate(bought), minlength=config.items))[::-1]
    rank = np.arange(1, config.items + 1)
    head = slice(0, max(2, config.items // 10))  # counts of the tail are too small to lie on a line
    interactions = int(counts.sum())
    return {
        "users": config.users,
        "items": config.items,
        "items_bought": int((counts > 0).sum()),
        "interactions": interactions,
        "distinct_titles": len(set(world.titles)),
        "gini": float(1 + 1 / config.items - 2 * (rank * counts).sum() / (config.items * interactions)),
        "zipf_exponent": -float(np.polyfit(np.log(rank[head]), np.log(np.maximum(counts[head], 1)), 1)[0]),
        "oracle HR@10": metrics["test"]["oracle"]["HR@10"],
        "most_popular HR@10": metrics["test"]["most_popular"]["HR@10"],
    }


def _write(world: World, bought: list[np.ndarray], directory: Path) -> None:
    with gzip.GzipFile(directory / "items.jsonl.gz", "wb", mtime=0) as file:
        for item, title in enumerate(world.titles):
            row = {
                "item_id": f"i{item}",
                "title": title,
                "brand": world.brand_names[world.brand[item]],
                "kind": world.kind_names[world.kind[item]],
                "use": _USES[world.use[item]],
            }
            file.write((json.dumps(row) + "\n").encode())
    lengths = [len(sequence) for sequence in bought]
    users = np.repeat(np.arange(len(bought)), lengths)
    # One choice a day, users starting on different days.
    times = 1_600_000_000 + 86_400 * (users % 365 + np.concatenate([np.arange(n) for n in lengths]))
    table = pa.table(
        {
            "user_id": [f"u{u}" for u in users],
            "item_id": [f"i{i}" for i in np.concatenate(bought)],
            "timestamp": times,
        }
    )
    with gzip.GzipFile(directory / "interactions.csv.gz", "wb", mtime=0) as file:
        pa_csv.write_csv(table, file)

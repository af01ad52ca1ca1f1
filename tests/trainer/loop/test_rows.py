"""Rows that share prefixes give the loss and the gradients of one sample a row, under both history rules."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from objectives.config import ILRecConfig, LMLConfig, MSLConfig, ObjectiveConfig
from objectives.objective import build_objective
from recommender.backbone.backbone import load_backbone, train_tokenizer
from recommender.backbone.tree import Row, Sample, build_row, collate
from recommender.catalogue.catalogue import Catalogue
from recommender.config import IdentifierConfig, PresetBackbone, PromptConfig
from recommender.items.item_space import ItemSpace
from trainer.config import TrainingConfig
from trainer.loop.module import TrainedModel
from trainer.loop.rows import TrainingRows, window_starts

HISTORY, STRIDE = 6, 3
TITLES = [
    f"{colour} {thing}" for colour in ("Red", "Blue", "Green") for thing in ("Tent", "Lamp", "Tea Pot", "Tea Cup")
]
PROMPTS = {
    "compact": PromptConfig(history=HISTORY),
    "spelled out": PromptConfig(prefix="Bought:", separator=", ", suffix=". Next:", history=HISTORY),
}
COUNTED_PROMPTS = PROMPTS | {
    "template": PromptConfig(template="products", history=HISTORY),
    "suffix goes on": PromptConfig(prefix="Bought:", separator=";", suffix=";Next:", history=HISTORY),
    "suffix goes on like an item": PromptConfig(prefix="Bought:", separator=";", suffix="; Red T", history=HISTORY),
    "separator goes on": PromptConfig(prefix="Bought:", separator="; then:", suffix=";", history=HISTORY),
    "separator goes on like an item": PromptConfig(prefix="Bought:", separator="; Blue", suffix=";", history=HISTORY),
    "no separator": PromptConfig(prefix="Bought:", separator="", suffix=" Next:", history=HISTORY),
    "no suffix": PromptConfig(prefix="Bought:", separator="Red T", suffix="", history=HISTORY),
    "neither": PromptConfig(prefix="Bought:", separator="", suffix="", history=HISTORY),
}


def _dataset() -> SimpleNamespace:
    rng = np.random.default_rng(0)
    lengths = [2, 5, 9, 17]
    positions = [np.arange(1, n) for n in lengths]
    targets = SimpleNamespace(
        sequence=np.repeat(np.arange(4), [n - 1 for n in lengths]).astype(np.int32),
        position=np.concatenate(positions).astype(np.int32),
    )
    items = rng.integers(0, len(TITLES), sum(lengths)).astype(np.int32)
    return SimpleNamespace(
        flat_items=items, offsets=np.concatenate([[0], np.cumsum(lengths)]), targets={"train": targets}
    )


def _space(prompt: PromptConfig) -> ItemSpace:
    catalogue = Catalogue([str(i) for i in range(len(TITLES))], TITLES)
    return ItemSpace.build(catalogue, train_tokenizer(TITLES, 300), IdentifierConfig(), prompt)


def _item_space() -> ItemSpace:
    catalogue = Catalogue([str(i) for i in range(len(TITLES))], TITLES)
    prompt = PromptConfig(template="items", history=HISTORY)
    return ItemSpace.build(catalogue, train_tokenizer([], 300), IdentifierConfig(kind="item"), prompt)


def _start(position: int, rule: str) -> int:
    """The history rule, once more and slowly: the first window start that leaves at most H items."""
    if rule == "sliding":
        return max(0, position - HISTORY)
    return next(start for start in range(0, position + 1, STRIDE) if position - start <= HISTORY)


@pytest.mark.parametrize("rule", ["sliding", "anchored"])
def test_window_starts(rule: str) -> None:
    positions = np.arange(1, 40)
    expected = [_start(int(p), rule) for p in positions]
    assert window_starts(positions, HISTORY, rule, STRIDE).tolist() == expected


def _rows_one_by_one(dataset: SimpleNamespace, space: ItemSpace, rule: str) -> list[Row]:
    """Every row, from the samples whose histories start at the same item of the same sequence."""
    nodes, offsets = space.trie.prediction_nodes(), space.identifiers.offsets
    samples: dict[tuple[int, int], list[Sample]] = {}
    train = dataset.targets["train"]
    for sequence, position in sorted(zip(train.sequence.tolist(), train.position.tolist(), strict=True)):
        items, start = dataset.flat_items[dataset.offsets[sequence] :], _start(position, rule)
        target = items[position]
        sample = Sample(
            space.prompt.encode(items[start:position]),
            space.identifiers.spelled(target),
            nodes[offsets[target] : offsets[target + 1]],
        )
        samples.setdefault((sequence, start), []).append(sample)
    return [build_row(samples[key]) for key in sorted(samples)]


@pytest.mark.parametrize("branching_only", [False, True])
@pytest.mark.parametrize("rule", ["sliding", "anchored"])
@pytest.mark.parametrize("prompt", COUNTED_PROMPTS.values(), ids=COUNTED_PROMPTS.keys())
def test_counts_are_those_of_the_rows(prompt: PromptConfig, rule: str, branching_only: bool) -> None:
    dataset, space = _dataset(), _space(prompt)
    training = TrainingConfig(windows=rule, stride=STRIDE if rule == "anchored" else None)
    rows = TrainingRows(dataset, space, training, branching_only)
    expected = _rows_one_by_one(dataset, space, rule)
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert all((vars(row)[name] == array).all() for name, array in vars(other).items())
    assert rows.lengths.tolist() == [len(row) for row in expected]
    assert rows.counted.tolist() == [(row.nodes >= (0 if branching_only else -1)).sum() for row in expected]
    assert len(rows.targets) == len(dataset.targets["train"].position)
    assert rows.sample_lengths.max() == max(row.depth.max() + 1 for row in expected)


@pytest.mark.parametrize("rule", ["sliding", "anchored"])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize(
    "objective",
    [
        LMLConfig(),
        MSLConfig(temperature=2.0),
        MSLConfig(temperature="adaptive"),
        ILRecConfig(vocabulary="valid", k=2),
        ILRecConfig(k=1),
    ],
    ids=["lml", "msl", "ats", "ilrec-valid", "ilrec"],
)
def test_trees_equal_one_sample_a_row(rule: str, prompt: PromptConfig, objective: ObjectiveConfig) -> None:
    dataset, space = _dataset(), _space(prompt)
    loss_of = build_objective(objective, 4, space.trie)
    training = TrainingConfig(windows=rule, stride=STRIDE if rule == "anchored" else None)
    trees = TrainingRows(dataset, space, training, loss_of.branching_only)

    nodes, offsets = space.trie.prediction_nodes(), space.identifiers.offsets
    alone: list[Row] = []
    train = dataset.targets["train"]
    for sequence, position in zip(train.sequence, train.position, strict=True):
        items = dataset.flat_items[dataset.offsets[sequence] :]
        history, target = items[_start(int(position), rule) : position], items[position]
        sample = Sample(
            space.prompt.encode(history),
            space.identifiers.spelled(target),
            nodes[offsets[target] : offsets[target + 1]],
        )
        alone.append(build_row([sample]))

    assert len(trees.targets) == len(alone)
    assert sorted(trees.sample_lengths) == sorted(map(len, alone))
    assert trees.lengths.sum() < (0.6 if rule == "anchored" else 0.75) * sum(map(len, alone))
    results = []
    for rows in (list(trees), alone):
        backbone = load_backbone(PresetBackbone(), space.tokenizer, seed=3)
        module = TrainedModel(backbone, loss_of, space.trie, logits_memory_mb=1)
        total = 0.0
        for begin in range(0, len(rows), 5):
            batch = collate(rows[begin : begin + 5], backbone.padding, loss_of.branching_only)
            loss = module(module.micro_batch(batch))
            loss.backward()
            total += loss.item()
        results.append((total, {name: p.grad for name, p in module.named_parameters()}))
    (tree_loss, tree_gradients), (loss, gradients) = results
    assert tree_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(tree_gradients[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("rule", ["sliding", "anchored"])
def test_items_of_one_token_make_rows_without_anything_between(rule: str) -> None:
    dataset, space = _dataset(), _item_space()
    rows = TrainingRows(dataset, space, TrainingConfig(windows=rule), branching_only=True)
    assert rows.lengths.tolist() == [len(row) for row in rows]
    first = space.identifiers.tokens[::2]
    for row in rows:
        assert row.tokens[0] == space.identifiers.end
        opens = row.nodes == 0  # the end token, which is forced, is the other prediction of a sample
        assert (row.nodes[~opens] == -1).all()
        assert (row.source[opens] >= 1).all(), "the last item of a history predicts the next"
        if rule == "anchored":
            source, target = row.source[opens], row.target[opens]
            assert (row.tokens[source[:-1] + 1] == target[:-1]).all()
    items = first[dataset.flat_items[dataset.offsets[1] : dataset.offsets[2]]].tolist()
    assert [1, *items] in [row.tokens.tolist() for row in rows], "the sequence of five items, in one row"


def test_held_out_targets_are_in_no_row() -> None:
    dataset, space = _dataset(), _space(PROMPTS["compact"])
    train = dataset.targets["train"]
    keep = train.position < np.diff(dataset.offsets)[train.sequence] - 2
    dataset.targets["train"] = SimpleNamespace(sequence=train.sequence[keep], position=train.position[keep])
    rows = list(TrainingRows(dataset, space, TrainingConfig(), branching_only=False))
    held_out = [dataset.flat_items[end - 2 : end] for end in dataset.offsets[1:]]
    dataset.flat_items = dataset.flat_items.copy()
    for end in dataset.offsets[1:]:
        dataset.flat_items[end - 2 : end] = 0
    changed = TrainingRows(dataset, space, TrainingConfig(), branching_only=False)
    assert any((pair != 0).any() for pair in held_out)
    assert all(
        (a.tokens == b.tokens).all() and (a.target == b.target).all() for a, b in zip(rows, changed, strict=True)
    )

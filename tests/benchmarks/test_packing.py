from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import packing
from recommender.backbone.backbone import Backbone, load_backbone
from recommender.config import PromptConfig
from recommender.items.item_space import ItemSpace
from trainer.config import TrainingConfig
from trainer.data.dataset import Dataset
from trainer.experiment import Experiment
from trainer.loop.rows import TrainingRows
from trainer.parts import Prepared

PROMPTS = [
    PromptConfig(history=8),
    PromptConfig(template="products", history=8),
    PromptConfig(prefix="Bought:", separator=" ;", suffix="\nNext:", history=3),
]
TRAINING = TrainingConfig(batch_tokens=700)


@pytest.fixture(scope="module")
def dataset(tiny_prepared: Prepared) -> Dataset:
    return packing.sample_of_users(Dataset.load(tiny_prepared.dataset), 20)


def spelled(prepared: Prepared, prompt: PromptConfig) -> ItemSpace:
    space = ItemSpace.load(prepared.items)
    return ItemSpace.build(space.catalogue, space.tokenizer, space.identifier_config, prompt)


def test_a_sample_of_users_has_all_their_targets(dataset: Dataset, tiny_prepared: Prepared) -> None:
    whole, few = Dataset.load(tiny_prepared.dataset).targets["train"], dataset.targets["train"]
    chosen = np.unique(few.sequence)
    assert len(chosen) == 20
    assert len(few) == np.isin(whole.sequence, chosen).sum()


@pytest.mark.parametrize("prompt", PROMPTS, ids=["compact", "products", "own"])
def test_plain_rows_are_prompts_and_responses(dataset: Dataset, tiny_prepared: Prepared, prompt: PromptConfig) -> None:
    space = spelled(tiny_prepared, prompt)
    rows = packing.PlainRows(TrainingRows(dataset, space, packing.under(TRAINING, "sliding"), branching_only=False))
    found = sorted((features["input_ids"], features["labels"]) for features in map(packing.features, rows))
    expected = []
    train = dataset.targets["train"]
    for sequence, position in zip(train.sequence, train.position, strict=True):
        asked = space.prompt.encode(dataset.history(sequence, position, prompt.history)).tolist()
        answer = space.identifiers.spelled(dataset.flat_items[dataset.offsets[sequence] + position]).tolist()
        expected.append((asked + answer, [-100] * len(asked) + answer))
    assert found == sorted(expected)


def test_padding() -> None:
    lengths = np.array([3, 9, 16, 17])
    assert packing.padded([np.array([0, 1]), np.array([2]), np.array([3])], lengths) == 2 * 16 + 16 + 24
    planned, random = packing.padding(np.array([8] * 50 + [64] * 50), 320)
    assert planned < random


@pytest.mark.parametrize("prompt", PROMPTS[:2], ids=["compact", "products"])
def test_all_contenders_have_the_same_targets_and_the_same_first_loss(
    dataset: Dataset, tiny_prepared: Prepared, tiny_experiment: Experiment, prompt: PromptConfig
) -> None:
    space = spelled(tiny_prepared, prompt)
    backbone = load_backbone(tiny_experiment.backbone, space.tokenizer, seed=1)
    copied = Backbone(load_backbone(tiny_experiment.backbone, space.tokenizer, seed=1).model, space.tokenizer)
    module = packing.build_module(backbone, space, TRAINING)
    for rule in packing.RULES:
        work = packing.make_work(dataset, space, TRAINING, rule)
        assert len(work.plain_steps) == len(work.tree_steps)
        assert sum(step.counted for step in work.plain_steps) == sum(step.counted for step in work.tree_steps)
        trainer = packing.build_trainer(copied.model, space, work, TRAINING)
        batches = packing.trainer_batches(trainer, work.batch)
        assert len(batches) == len(work.tree_steps)
        assert sorted(np.concatenate(batches)) == list(range(len(work.plain)))
        losses = packing.first_losses(work, module, trainer)
        assert losses["tree"] == pytest.approx(losses["plain"], rel=1e-5)
        assert losses["tree"] == pytest.approx(losses["plain, Trainer"], rel=1e-5)


def test_without_its_mask_a_batch_has_the_same_tokens(
    dataset: Dataset, tiny_prepared: Prepared, tiny_experiment: Experiment
) -> None:
    from trainer.loop.worker import micro_batch

    space = spelled(tiny_prepared, PROMPTS[1])
    backbone = load_backbone(tiny_experiment.backbone, space.tokenizer)
    module = packing.build_module(backbone, space, TRAINING)
    work = packing.make_work(dataset, space, TRAINING, "anchored")
    masked = micro_batch(module, work.tree, work.tree_steps[0].rows)
    causal = packing.without_mask(masked)
    assert masked.batch.attention_mask() is not None
    assert causal.batch.attention_mask() is None
    assert torch.equal(causal.batch.input_ids, masked.batch.input_ids)
    packing.forward_and_backward(module, causal)

"""From files to what training reads: a dataset, and the item space that spells its catalogue."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from recommender.backbone.backbone import load_tokenizer
from recommender.catalogue.catalogue import Catalogue
from recommender.files import replace_directory
from recommender.items.item_space import ItemSpace
from recommender.recommender import language_model_manifest
from trainer.config import LanguageModelConfig
from trainer.data.config import DataConfig, InteractionsData
from trainer.data.dataset import Dataset, prepare_dataset
from trainer.experiment import Experiment
from trainer.run import check_claim
from trainer.world.simulator import simulate

Say = Callable[[str], None]


def prepare(experiment: Experiment, say: Say = print, fresh: bool = False) -> Path:
    """Simulate if asked to, read and split the data, spell the catalogue.

    Args:
        fresh: replace what was prepared even where a run of another config was trained on it.

    Returns:
        `<run>/prepared`, with `dataset/` and, for a language model, `items/`. Each is complete or absent.

    Raises:
        UserError: a mistake in the data, or the run's directory belongs to another config.
    """
    if not fresh:
        check_claim(experiment)
    prepared = experiment.run_dir / "prepared"
    prepared.mkdir(parents=True, exist_ok=True)
    dataset = prepare_dataset(source_of(experiment, say), prepared / "dataset", progress=say)
    if not len(dataset.targets["validation"].position):
        say("note: there is no validation target, and `ilrec train` needs some to choose the best epoch; add data")
    if not isinstance(experiment.recommender, LanguageModelConfig):
        return prepared  # a collaborative model knows items by their numbers
    space = item_space(experiment, dataset)
    dataset.add_stats(spelling_stats(space))
    aside = Path(tempfile.mkdtemp(prefix=".items-", dir=prepared))
    try:
        space.save(aside)
        replace_directory(aside, prepared / "items")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    say(f"spelled {len(space.catalogue)} items in {np.diff(space.identifiers.offsets).mean():.1f} tokens each")
    return prepared


def source_of(experiment: Experiment, say: Say) -> DataConfig:
    """The experiment's data; a simulated world is generated first, unless it is there already."""
    if experiment.data is not None:
        return experiment.data
    assert experiment.world is not None
    world = experiment.run_dir / "world"
    simulate(experiment.world, world, say)
    return InteractionsData(
        format="interactions", interactions=str(world / "interactions.csv.gz"), items=str(world / "items.jsonl.gz")
    )


def item_space(experiment: Experiment, dataset: Dataset) -> ItemSpace:
    """Spell the dataset's catalogue with the tokenizer of the backbone, or of the bundle that training starts from."""
    catalogue = Catalogue(dataset.item_ids, dataset.titles, dataset.items_table)
    if experiment.init_from is not None:
        bundle = Path(experiment.init_from)
        language_model_manifest(bundle)
        tokenizer = ItemSpace.load(bundle).tokenizer
    else:
        tokenizer = load_tokenizer(experiment.backbone, catalogue.titles)
    return ItemSpace.build(catalogue, tokenizer, experiment.identifier, experiment.prompt)


def spelling_stats(space: ItemSpace) -> dict[str, float]:
    """Tokens per item, and the average number of valid tokens per response position (MSL, Table 4), over all items."""
    nodes = space.trie.prediction_nodes()
    valid = np.where(nodes >= 0, space.trie.child_count[nodes], 1)
    return {
        "tokens_per_item": float(np.diff(space.identifiers.offsets).mean()),
        "valid_tokens_per_position": float(valid.mean()),
        "branching_positions": float((nodes >= 0).mean()),
        "root_children": int(space.trie.child_count[0]),
    }

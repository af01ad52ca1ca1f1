"""From files to what training reads: a dataset, and the item space that spells its catalogue."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recommender.backbone.backbone import load_tokenizer
from recommender.bundle import peek_manifest
from recommender.catalogue.catalogue import Catalogue
from recommender.config import PresetBackbone
from recommender.files import digest, read_json, sha256, write_json
from recommender.items.identifiers import title_losses
from recommender.items.item_space import ItemSpace
from recommender.recommender import language_model_manifest
from trainer.config import LanguageModelConfig
from trainer.data.config import DataConfig, InteractionsData
from trainer.data.dataset import prepare_dataset
from trainer.experiment import Experiment
from trainer.parts import SPELLING, Prepared, Say, make_part
from trainer.world.simulator import WORLD, simulate

_SPELLING_VERSION = 2
_WORTH_A_WORD = 0.01  # a share from which on something is worth a hint


def prepare(experiment: Experiment, say: Say = print) -> Prepared:
    """Simulate if asked to, read and split the data, spell the catalogue; what was made before is found again.

    Raises:
        UserError: a mistake in the data.
    """
    world = None if experiment.world is None else world_of(experiment)
    dataset = prepare_dataset(source_of(experiment, say), experiment.parts / "datasets", progress=say)
    if not len(dataset.targets["validation"].position):
        say("note: there is no validation target, and `ilrec train` needs some to choose the best epoch; add data")
    for line in remarks(dataset.stats, experiment.evaluation.exclude_seen):
        say(line)
    if not isinstance(experiment.recommender, LanguageModelConfig):
        return Prepared(dataset.path, None, world)
    catalogue = Catalogue(dataset.item_ids, dataset.titles, dataset.items_table)
    made_of = [experiment.identifier.model_dump(mode="json"), experiment.prompt.model_dump(mode="json")]
    name = digest(_SPELLING_VERSION, dataset.fingerprint, *made_of, _tokenizer_name(experiment, catalogue))
    directory = experiment.parts / "items" / name

    def write(aside: Path) -> None:
        space = item_space(experiment, catalogue)
        space.save(aside)
        write_json(aside / SPELLING, spelling_stats(space))

    make_part(directory, SPELLING, write, say)
    say(spelled(len(catalogue), read_json(directory / SPELLING), experiment.identifier.max_tokens))
    return Prepared(dataset.path, directory, world)


def remarks(stats: Mapping[str, Any], exclude_seen: bool) -> Iterator[str]:
    """What a dataset's statistics say of its held-out targets: which are hard to reach, and what stands before them."""
    for step in stats["steps"]:
        if "histories" in step:
            longest = max((of["longest_history"] for of in stats["held_out"].values()), default=0)
            yield (
                f"histories of held-out targets: {step['histories']} (data.histories), up to {longest:,} items; a "
                f"published window has {step['longest_window']:,} at most"
            )
    shares = {name: {split: of[name] for split, of in stats["held_out"].items()} for name in ("unseen", "seen")}
    if unseen := shares["unseen"]:
        hint = "; only what the titles say can name them" if max(unseen.values()) > _WORTH_A_WORD else ""
        yield f"targets unseen in training: {_of_splits(unseen)}{hint}"
    if seen := shares["seen"]:
        hint = ""
        if max(seen.values()) > _WORTH_A_WORD:
            hint = "; evaluation.exclude_seen would make them unreachable, and is off"
            if exclude_seen:
                hint = "; evaluation.exclude_seen makes them unreachable: turn it off, unless nothing should repeat"
        yield f"targets in their own history: {_of_splits(seen)}{hint}"


def _of_splits(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{share:.1%} of {split}" for split, share in shares.items())


def spelled(items: int, stats: Mapping[str, Any], max_tokens: int) -> str:
    """What the spelling's statistics say of the titles: how many lose words, or are spelled as another one's."""
    cut, alike, once_cut = stats["cut_titles"], stats["colliding_titles"], stats["colliding_once_cut"]
    said = f"items: {items:,} are spelled in {stats['tokens_per_item']:.1f} tokens each"
    if cut:
        said += f"; {cut:,} titles ({cut / items:.1%}) are cut at {max_tokens} tokens"
    if alike:
        said += f"; {alike:,} ({alike / items:.1%}) are spelled like an earlier one and get a suffix"
    if once_cut:
        said += f", {once_cut:,} of them only once cut"
    if once_cut > _WORTH_A_WORD * items:
        said += ": raise identifier.max_tokens"
    return said


def source_of(experiment: Experiment, say: Say) -> DataConfig:
    """The experiment's data; a simulated world is generated first, unless it is there already."""
    if experiment.data is not None:
        return experiment.data
    config = experiment.world
    assert config is not None
    world = world_of(experiment)

    def write(aside: Path) -> None:
        simulate(config, aside, say)

    make_part(world, WORLD, write, say)
    return InteractionsData(
        format="interactions", interactions=str(world / "interactions.csv.gz"), items=str(world / "items.jsonl.gz")
    )


def world_of(experiment: Experiment) -> Path:
    """Where the experiment's simulated world lies."""
    assert experiment.world is not None
    return experiment.parts / "worlds" / digest(experiment.world.model_dump(mode="json"))


def item_space(experiment: Experiment, catalogue: Catalogue) -> ItemSpace:
    """Spell a catalogue with the tokenizer of the backbone, or of the bundle that training starts from."""
    if experiment.init_from is not None:
        bundle = Path(experiment.init_from)
        language_model_manifest(bundle)
        tokenizer = ItemSpace.load(bundle).tokenizer
    else:
        spelled = catalogue.titles if experiment.identifier.kind == "title" else []
        tokenizer = load_tokenizer(experiment.backbone, spelled)
    return ItemSpace.build(catalogue, tokenizer, experiment.identifier, experiment.prompt)


def _tokenizer_name(experiment: Experiment, catalogue: Catalogue) -> Any:
    """What tells the tokenizer from others: where it comes from, or its content."""
    if experiment.init_from is not None:
        return {"bundle": peek_manifest(Path(experiment.init_from)).checksum}
    if isinstance(experiment.backbone, PresetBackbone):
        return {"vocabulary": experiment.backbone.vocabulary}  # trained on the dataset's titles
    with tempfile.TemporaryDirectory() as directory:
        load_tokenizer(experiment.backbone, catalogue.titles).save_pretrained(directory)
        return {path.name: sha256(path) for path in sorted(Path(directory).iterdir())}


def spelling_stats(space: ItemSpace) -> dict[str, float]:
    """Tokens per item, the average number of valid tokens per response position (MSL, Table 4), over all items, and
    what cutting does to titles."""
    nodes = space.trie.prediction_nodes()
    valid = np.where(nodes >= 0, space.trie.child_count[nodes], 1)
    titles = space.catalogue.titles if space.identifier_config.kind == "title" else []
    losses = title_losses(titles, space.tokenizer, space.identifier_config)
    return {
        "tokens_per_item": float(np.diff(space.identifiers.offsets).mean()),
        "valid_tokens_per_position": float(valid.mean()),
        "branching_positions": float((nodes >= 0).mean()),
        "root_children": int(space.trie.child_count[0]),
        **losses,
    }

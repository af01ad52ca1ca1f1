"""The prepared directory: complete or absent, the same when nothing changed, and the published splits of real data."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from recommender.errors import UserError
from trainer.data import dataset as module
from trainer.data.config import InteractionsData, WindowsData
from trainer.data.dataset import Dataset, prepare_dataset
from trainer.prepare import remarks

REAL = Path(__file__).parents[3].parent / "shared" / "data"
SPLITS = ("train", "validation", "test")


def real(name: str) -> Path:
    if not (REAL / name).is_dir():
        pytest.skip(f"no real data: {REAL / name} is absent")
    return REAL / name


def silent(line: str) -> None:
    pass


@pytest.fixture
def config(tmp_path: Path) -> InteractionsData:
    items, interactions = tmp_path / "items.csv", tmp_path / "interactions.csv"
    items.write_text("item_id,title,brand\na,Lamp,X\nb,Lamp,Y\nc,Big desk,X\nd,,Z\n")
    rows = ["u,a,3", "u,b,1", "u,c,2", "u,c,2", "u,a,4", "v,a,1", "v,b,2", "w,b,9"]
    interactions.write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    return InteractionsData(interactions=str(interactions), items=str(items))


def test_what_is_written_is_what_is_loaded(tmp_path: Path, config: InteractionsData) -> None:
    made = prepare_dataset(config, tmp_path / "out", silent)
    dataset = Dataset.load(made.path)
    assert made.path.parent == tmp_path / "out"
    assert sorted(p.name for p in made.path.iterdir()) == [
        "dataset.json",
        "items.parquet",
        "sequences.parquet",
        "stats.json",
        "targets.parquet",
    ]
    assert dataset.fingerprint == made.fingerprint
    assert dataset.items_table.column_names == ["item_id", "title", "brand"]
    assert (dataset.item_ids, dataset.titles) == (["a", "b", "c", "d"], ["Lamp", "Lamp", "Big desk", ""])
    assert dataset.users == ["u", "v", "w"]
    assert dataset.flat_items.tolist() == [1, 2, 0, 0, 0, 1, 1]
    assert dataset.offsets.tolist() == [0, 4, 6, 7]
    assert pq.read_table(made.path / "sequences.parquet")["timestamps"].to_pylist() == [
        [1, 2, 3, 4],
        [1, 2],
        [9],
    ]
    pairs = {s: list(zip(t.sequence.tolist(), t.position.tolist(), strict=True)) for s, t in dataset.targets.items()}
    assert pairs == {"train": [(0, 1), (1, 1)], "validation": [(0, 2)], "test": [(0, 3)]}
    assert all(targets.candidates is None for targets in dataset.targets.values())
    assert (dataset.flat_items.dtype, dataset.offsets.dtype) == (np.int32, np.int64)
    assert dataset.targets["train"].position.dtype == dataset.targets["train"].sequence.dtype == np.int32
    assert dataset.history(0, 3, 2).tolist() == [2, 0]
    assert dataset.history(0, 2, 10).tolist() == [1, 2]
    # u: b c (the target c is seen, the held-out a and a are not); v: a b; w has no target.
    assert dataset.popularity().tolist() == [1, 2, 1, 0]


def test_stats(tmp_path: Path, config: InteractionsData) -> None:
    made = prepare_dataset(config, tmp_path / "out", silent)
    stats = made.stats
    assert stats == json.loads((made.path / "stats.json").read_text())
    counts = {"users": 3, "items": 4, "interactions": 7, "sequences": 3, "train": 2, "validation": 1, "test": 1}
    assert {key: stats[key] for key in counts} == counts
    assert stats["density"] == 7 / 12
    assert stats["sequence_length"] == pytest.approx({"min": 1, "median": 2, "mean": 7 / 3, "p95": 3.8, "max": 4})
    assert (stats["title_words"]["max"], stats["title_chars"]["mean"]) == (2, 4.0)
    assert (stats["duplicate_titles"], stats["empty_titles"], stats["items_without_interactions"]) == (1, 1, 1)
    assert [step["step"] for step in stats["steps"]] == ["read", "duplicates dropped", "leave_one_out"]
    assert [step.get("interactions") for step in stats["steps"]] == [8, 7, None]
    assert stats["steps"][-1]["users_for_training_only"] == 2
    # u did b c a a: `a` is a training target of nobody, and v did it; the last one stands in its own history.
    assert stats["held_out"] == {
        "validation": {"unseen": 0.0, "seen": 0.0, "longest_history": 2},
        "test": {"unseen": 0.0, "seen": 1.0, "longest_history": 3},
    }


def test_the_core_cuts_the_catalogue_only_by_items(tmp_path: Path, config: InteractionsData) -> None:
    by_item = prepare_dataset(config.model_copy(update={"min_item_interactions": 2}), tmp_path / "i", silent)
    assert by_item.item_ids == ["a", "b"]
    assert by_item.items_table["brand"].to_pylist() == ["X", "Y"]
    assert by_item.flat_items.tolist() == [1, 0, 0, 0, 1, 1]
    by_user = prepare_dataset(config.model_copy(update={"min_user_interactions": 2}), tmp_path / "u", silent)
    assert (by_user.item_ids, by_user.users) == (["a", "b", "c", "d"], ["u", "v"])
    with pytest.raises(UserError, match="none is left"):
        prepare_dataset(config.model_copy(update={"min_user_interactions": 9}), tmp_path / "n", silent)
    kept = prepare_dataset(config.model_copy(update={"duplicates": "keep"}), tmp_path / "k", silent)
    assert kept.stats["interactions"] == 8


def test_an_unchanged_dataset_is_found_again_and_a_changed_one_made_beside_it(
    tmp_path: Path, config: InteractionsData
) -> None:
    out, said = tmp_path / "out", list[str]()
    first = prepare_dataset(config, out, silent)
    made = {path: path.stat().st_mtime_ns for path in first.path.iterdir()}
    assert prepare_dataset(config, out, said.append).path == first.path
    assert any("has been prepared from the same files and settings" in line for line in said)
    by_time = config.model_copy(update={"protocol": "chronological"})
    chronological = prepare_dataset(by_time, out, silent)
    assert chronological.fingerprint != first.fingerprint
    assert json.loads((chronological.path / "dataset.json").read_text())["protocol"] == "chronological"
    with open(config.items, "a") as file:
        file.write("e,Chair,X\n")
    grown = prepare_dataset(by_time, out, silent)
    assert grown.item_ids == ["a", "b", "c", "d", "e"]
    assert len({first.path, chronological.path, grown.path}) == 3
    assert {path: path.stat().st_mtime_ns for path in first.path.iterdir()} == made
    assert Dataset.load(first.path).item_ids == ["a", "b", "c", "d"]


@pytest.mark.parametrize("name", ["sequences.parquet", "dataset.json"])
def test_an_interrupted_prepare_leaves_nothing_and_goes_on(
    tmp_path: Path, config: InteractionsData, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    out = tmp_path / "out"
    write_table, write_json = module.pq.write_table, module._write_json

    def interrupt(first: object, second: object) -> None:
        if name in (Path(str(first)).name, Path(str(second)).name):
            raise KeyboardInterrupt
        (write_json if name == "dataset.json" and str(first).endswith(".json") else write_table)(first, second)

    monkeypatch.setattr(module.pq, "write_table", interrupt)
    monkeypatch.setattr(module, "_write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(config, out, silent)
    monkeypatch.undo()
    assert [path for path in out.iterdir() if path.is_dir()] == []
    assert prepare_dataset(config, out, silent).stats["train"] == 2


def test_what_is_no_dataset_is_refused(tmp_path: Path, config: InteractionsData) -> None:
    with pytest.raises(UserError, match="no prepared dataset"):
        Dataset.load(tmp_path / "nowhere")
    made = prepare_dataset(config, tmp_path / "out", silent).path
    (made / "targets.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"damaged .*remove this directory"):
        Dataset.load(made)
    about = json.loads((made / "dataset.json").read_text())
    (made / "dataset.json").write_text(json.dumps(about | {"schema_version": 99}))
    with pytest.raises(UserError, match="version 99"):
        Dataset.load(made)
    shutil.rmtree(made)
    assert prepare_dataset(config, tmp_path / "out", silent).stats["train"] == 2


def test_nothing_to_train_on_is_an_error(tmp_path: Path, config: InteractionsData) -> None:
    Path(config.interactions).write_text("user_id,item_id,timestamp\nu,a,1\nv,b,1\n")
    with pytest.raises(UserError, match="no training target"):
        prepare_dataset(config, tmp_path / "out", silent)


def test_published_histories_are_those_of_the_rows(tmp_path: Path, config: InteractionsData) -> None:
    """The windows are joined either way; held-out targets are given all of it, or what stands in their own row."""
    files = {split: tmp_path / f"{split}.csv" for split in SPLITS}
    files["train"].write_text("user_id,history_item_ids,target_item_id\nu,a b,c\n")
    files["validation"].write_text("user_id,history_item_ids,target_item_id\nu,b c,d\n")
    files["test"].write_text("user_id,history_item_ids,target_item_id\nu,d,a\n")
    windows = WindowsData(format="windows", items=config.items, **{split: str(files[split]) for split in SPLITS})
    joined = prepare_dataset(windows, tmp_path / "out", silent)
    published = prepare_dataset(windows.model_copy(update={"histories": "published"}), tmp_path / "out", silent)
    assert joined.fingerprint != published.fingerprint
    assert (joined.flat_items.tolist(), joined.offsets.tolist()) == (published.flat_items.tolist(), [0, 5])
    for dataset, before in ((joined, {"validation": [0, 1, 2], "test": [0, 1, 2, 3]}), (published, {})):
        expected = before or {"validation": [1, 2], "test": [3]}
        for split in SPLITS[1:]:
            assert [history.tolist() for history in dataset.histories(split)] == [expected[split]]
        assert dataset.histories("train")[0].tolist() == [0, 1]
    assert joined.stats["held_out"]["test"] == {"unseen": 0.0, "seen": 1.0, "longest_history": 4}
    assert published.stats["held_out"]["test"] == {"unseen": 0.0, "seen": 0.0, "longest_history": 1}
    assert joined.stats["held_out"]["validation"]["unseen"] == 1.0
    said = list(remarks(joined.stats, exclude_seen=True))
    assert said[0].startswith("histories of held-out targets: joined (data.histories), up to 4 items; a published")
    assert said[0].endswith("window has 2 at most")
    assert said[1].startswith("targets unseen in training: 100.0% of validation, 0.0% of test; only what the titles")
    assert "100.0% of test; evaluation.exclude_seen makes them unreachable: turn it off" in said[2]
    assert list(remarks(published.stats, exclude_seen=True))[2].endswith("0.0% of validation, 0.0% of test")


def test_candidates_survive(tmp_path: Path, config: InteractionsData) -> None:
    files = {split: tmp_path / f"{split}.csv" for split in SPLITS}
    files["train"].write_text("user_id,history_item_ids,target_item_id\nu,a,b\n")
    for split, rows in (("validation", "u,a b,c,c d\n"), ("test", "v,c,d,d\nu,a b c,a,a b d\n")):
        files[split].write_text("user_id,history_item_ids,target_item_id,candidate_item_ids\n" + rows)
    windows = WindowsData(
        format="windows",
        items=config.items,
        train=str(files["train"]),
        validation=str(files["validation"]),
        test=str(files["test"]),
    )
    dataset = prepare_dataset(windows, tmp_path / "out", silent)
    assert dataset.targets["train"].candidates is None
    found = dataset.targets["test"].candidates
    assert found is not None
    assert [c.tolist() for c in found] == [[3], [0, 1, 3]]
    assert dataset.targets["test"].sequence.tolist() == [1, 0]
    assert dataset.popularity().tolist() == [1, 1, 0, 0]


# -- Real data --------------------------------------------------------------------------------------------------------

Window = tuple[str, tuple[str, ...], str]


def published(path: Path) -> list[Window]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return [
            (row["user_id"], tuple(row["history_item_ids"].split()), row["target_item_id"])
            for row in csv.DictReader(file)
        ]


def windows_of(dataset: Dataset, split: str, limit: int = 10) -> list[Window]:
    targets = dataset.targets[split]
    return [
        (
            dataset.users[s],
            tuple(dataset.item_ids[i] for i in dataset.history(s, p, limit)),
            dataset.item_ids[dataset.flat_items[dataset.offsets[s] + p]],
        )
        for s, p in zip(targets.sequence.tolist(), targets.position.tolist(), strict=True)
    ]


def counts(dataset: Dataset) -> dict[str, int]:
    return {key: dataset.stats[key] for key in ("users", "items", "interactions", *SPLITS)}


def test_office_windows_are_the_published_ones_in_their_order(tmp_path: Path) -> None:
    folder = real("msl_office")
    files = {"train": "train.csv.gz", "validation": "valid.csv.gz", "test": "test.csv.gz", "items": "items.jsonl.gz"}
    config = WindowsData.model_validate({"format": "windows"} | {key: str(folder / f) for key, f in files.items()})
    dataset = prepare_dataset(config, tmp_path / "out", silent)
    assert counts(dataset) == {
        "users": 4895,
        "items": 2414,
        "interactions": 53149,
        "train": 15400,
        "validation": 1925,
        "test": 1925,
    }
    for split in SPLITS:
        assert windows_of(dataset, split) == published(folder / files[split])
    longer = prepare_dataset(config.model_copy(update={"train_targets": "every_position"}), tmp_path / "every", silent)
    held_out = {(s, p) for split in SPLITS[1:] for s, p in pairs(longer, split)}
    assert pairs(dataset, "train") < pairs(longer, "train")
    assert not pairs(longer, "train") & held_out
    assert longer.popularity().tolist() == dataset.popularity().tolist()


def pairs(dataset: Dataset, split: str) -> set[tuple[int, int]]:
    targets = dataset.targets[split]
    return set(zip(targets.sequence.tolist(), targets.position.tolist(), strict=True))


def test_toy_chronological_is_the_published_split(tmp_path: Path) -> None:
    folder = real("msl_toy")
    config = InteractionsData(
        interactions=str(folder / "interactions.csv.gz"),
        items=str(folder / "items.jsonl.gz"),
        protocol="chronological",
    )
    dataset = prepare_dataset(config, tmp_path / "out", silent)
    assert counts(dataset) == {
        "users": 19124,
        "items": 11758,
        "interactions": 165247,
        "train": 38344,
        "validation": 4793,
        "test": 4794,
    }
    files = {"train": "train.csv.gz", "validation": "valid.csv.gz", "test": "test.csv.gz"}
    theirs = {split: Counter(published(folder / files[split])) for split in SPLITS}
    ours = {split: Counter(windows_of(dataset, split)) for split in SPLITS}
    assert sum(ours.values(), Counter()) == sum(theirs.values(), Counter())
    # Where a cut falls among windows of one day, which of them lie before it is a matter of tie order.
    for split in SPLITS:
        assert (ours[split] - theirs[split]).total() <= 60, split


def test_games_leave_one_out(tmp_path: Path) -> None:
    folder = real("lcrec_games")
    config = InteractionsData(interactions=str(folder / "interactions.csv.gz"), items=str(folder / "items.jsonl.gz"))
    dataset = prepare_dataset(config, tmp_path / "out", silent)
    assert counts(dataset) == {
        "users": 50546,
        "items": 16859,
        "interactions": 452989,
        "train": 452989 - 3 * 50546,
        "validation": 50546,
        "test": 50546,
    }
    assert dataset.popularity().sum() == 452989 - 2 * 50546
    assert "sid" in dataset.items_table.column_names

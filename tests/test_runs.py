"""`ilrec runs` on a storage with runs of all kinds, made by hand."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deploy.convert import convert
from deploy.runs import age_shown, bytes_shown, print_comparison, prune
from recommender.bundle import Manifest, read_manifest, write_bundle
from recommender.errors import UserError
from recommender.lock import LOCK, locked
from recommender.models import Model, find_bundle
from tests.test_cli import HEAVY, ilrec, imported
from trainer.reporting.runs import Run, find_runs, prunable, remove
from trainer.run import record, refuse_earlier_release

LANGUAGE_MODEL = {"recommender.kind": "language_model", "objective.kind": "msl", "training.epochs": 2}
SASREC = {"recommender.kind": "sasrec", "recommender.dim": 8}


def epochs(*values: float) -> list[dict[str, float]]:
    return [{"epoch": n, "step": 10 * n, "validation_NDCG@10": value} for n, value in enumerate(values, 1)]


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def checkpoint(run: Path, number: int, history: list[Any], collaborative: bool = False) -> None:
    state = {"step": 10 * number, "epochs": history}
    name = f"epoch-{number:05d}" if collaborative else f"step-{10 * number:08d}"
    write(run / "ray" / name / "state.json", state if collaborative else {"workers": 2, "state": state})


def begin(
    storage: Path, name: str, fields: dict[str, Any], made_by: str = "train", parts: tuple[str, ...] = ()
) -> Path:
    version = Model(storage, name).begin()
    record(version, made_by, fields, parts=parts)
    return version.directory


def finish(run: Path, history: list[Any], base: dict[str, str] | None = None, **recommender: Any) -> None:
    def weights(directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(str(run).encode())

    write(run / "training.json", history)
    write_bundle(run / "bundle", Manifest(name=run.parent.name, base=base or {}, recommender=recommender), weights)


def evaluate(run: Path, ranks: list[int], users: str = "abcd", name: str = "test-1", at: str = "1") -> None:
    model = {"NDCG@10": 0.5, "HR@10": 0.75}
    report = {"metrics": {"model": model, "most_popular": model}, "evaluated_at": at}
    write(run / "evaluation" / name / "report.json", report)
    table = {"user_id": list(users), "target_item_id": ["x"] * 4, "rank": ranks}
    pq.write_table(pa.table(table), run / "evaluation" / name / "targets.parquet")


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """A finished language model and SASRec, a sweep, a run that trains, one of an earlier release, what is no run."""
    history = epochs(0.1, 0.3)
    lm = begin(tmp_path, "lm", LANGUAGE_MODEL, parts=("parts/datasets/a",))
    for number in (1, 2):
        checkpoint(lm, number, history[:number])
    finish(lm, history)
    evaluate(lm, [1, 1, 2, 0])
    sasrec = begin(tmp_path, "sasrec", SASREC)
    checkpoint(sasrec, 2, history, collaborative=True)
    finish(sasrec, history, kind="sasrec")
    evaluate(sasrec, [1, 2, 0, 0])
    shared = begin(tmp_path, "collaborative/sasrec-abc", SASREC)
    checkpoint(shared, 1, history[:1], collaborative=True)
    finish(shared, history[:1], kind="sasrec")
    sweep = begin(tmp_path, "sweep", LANGUAGE_MODEL, "tune")
    checkpoint(sweep / "tune" / "ray" / "trial", 2, history)
    finish(sweep, history)
    going = begin(tmp_path, "lm", LANGUAGE_MODEL | {"training.epochs": 3})
    checkpoint(going, 1, history[:1])
    for part in ("datasets/a", "datasets/b", "items/c"):
        (tmp_path / "parts" / part).mkdir(parents=True)
        (tmp_path / "parts" / part / "file").write_text("x")
        os.utime(tmp_path / "parts" / part, (1e9, 1e9))
    write(tmp_path / "old" / "prepared" / "dataset" / "stats.json", {})
    (tmp_path / "foreign").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    broken = begin(tmp_path, "broken", SASREC)
    (broken / "version.json").write_text("{")
    odd = begin(tmp_path, "odd", SASREC)
    write(odd / "version.json", ["no", "fields"])
    cut = begin(tmp_path, "cut", SASREC)
    write(cut / "evaluation" / "test-1" / "report.json", {"metrics": {}})
    Model(tmp_path, "begun").begin()
    (lm / "gone").symlink_to(tmp_path / "nowhere")
    return tmp_path


def by_name(storage: Path) -> dict[str, Run]:
    return {run.name: run for run in find_runs(storage)[0]}


def test_each_version_is_told_by_its_files(storage: Path) -> None:
    found = {name: (run.kind, run.objective, run.state, run.validation) for name, run in by_name(storage).items()}
    assert found == {
        "lm@1": ("language model", "msl", "finished", 0.3),
        "lm@2": ("language model", "msl", "stopped at step 10", 0.1),
        "sasrec@1": ("collaborative", "sasrec", "finished", 0.3),
        "collaborative/sasrec-abc@1": ("collaborative", "sasrec", "finished", 0.1),
        "sweep@1": ("sweep", "msl", "finished", 0.3),
    }
    assert by_name(storage)["lm@1"].test["NDCG@10"] == 0.5
    assert by_name(storage)["sweep@1"].test == {}


def test_what_is_no_run_is_left_aside_with_a_note(storage: Path) -> None:
    notes = {Path(note.partition(":")[0]).relative_to(storage).parts[0]: note for note in find_runs(storage)[1]}
    assert set(notes) == {"foreign", "broken", "odd", "cut", "old", "begun"}
    assert "it holds no run" in notes["foreign"]
    assert "cannot be read" in notes["broken"]
    assert "`ilrec runs convert` makes it version 1" in notes["old"]


def test_a_run_that_goes_on_is_not_finished(storage: Path) -> None:
    shutil.rmtree(storage / "sweep" / "1" / "bundle")
    with locked(storage / "lm" / LOCK), locked(storage / "sweep" / LOCK):
        runs = by_name(storage)
    assert [runs[name].state for name in ("lm@1", "lm@2", "sweep@1")] == ["finished", "training at step 10", "tuning"]
    assert by_name(storage)["sweep@1"].state == "stopped"


def test_list_prints_a_row_each_in_80_columns(storage: Path) -> None:
    text = ilrec("runs", "list", "--storage", str(storage), columns=80)
    assert not HEAVY & imported(text)
    rows = " ".join(text.split())
    for words in ("lm@1* LM msl finished 0.3000 0.5000", "lm@2 LM msl stopped at step 0.1000 –"):
        assert words in rows
    assert f"note: {storage}/foreign: left aside" in text
    assert "no such directory" in ilrec("runs", "list", "--storage", str(storage / "nowhere"), status=2)
    assert all(len(line) <= 80 for line in text.splitlines() if not line.startswith(("note", "imported")))


def test_compare_prints_what_differs(storage: Path) -> None:
    text = ilrec("runs", "compare", "lm@1", "sasrec", "--storage", str(storage))
    rows = " ".join(text.replace("│", " ").split())
    assert "recommender.kind language_model sasrec" in rows
    assert "recommender.dim – 8" in rows
    assert "test HR@10 0.7500 0.7500" in rows
    gain = (1 - 1 / 1.5849625 + 1 / 1.5849625) / 4  # of the second and the third target
    assert f"test NDCG@10 {gain:+.4f}, 95 % interval" in text


def test_compare_says_what_is_missing(storage: Path) -> None:
    said: list[str] = []
    print_comparison(storage, ["lm@1", "lm"], said.append)
    assert "lm@1 minus lm@2: not both were evaluated on the test targets" in said[0]
    evaluate(storage / "sasrec" / "1", [1, 1, 1, 1], users="abce", name="test-2", at="2")
    print_comparison(storage, ["lm@1", "sasrec"], said.append)
    assert "did not rank the same targets" in said[1]
    with pytest.raises(UserError, match=r"ml: no run of this name in .*; there are: .*lm@1, lm@2, sasrec@1"):
        print_comparison(storage, ["lm@1", "ml"], said.append)
    with pytest.raises(UserError, match="left aside"):
        print_comparison(storage, ["lm@1", "broken"], said.append)
    with pytest.raises(UserError, match="name two runs"):
        print_comparison(storage, ["lm@1"], said.append)


def files(storage: Path) -> set[str]:
    return {str(path.relative_to(storage)) for path in storage.rglob("*") if path.is_file() and path.name[0] != "."}


def pruned(
    storage: Path, answer: bool = True, keep: int | None = None, parts: bool = False
) -> tuple[set[str], list[str]]:
    """What is gone, and what was said."""
    before = files(storage)
    said: list[str] = []
    prune(storage, keep, parts, False, lambda question: answer, said.append)
    return before - files(storage), said


def test_prune_takes_checkpoints_of_finished_runs_only(storage: Path) -> None:
    gone, _ = pruned(storage)
    assert gone == {
        "lm/1/ray/step-00000010/state.json",
        "lm/1/ray/step-00000020/state.json",
        "sasrec/1/ray/epoch-00002/state.json",
        "collaborative/sasrec-abc/1/ray/epoch-00001/state.json",
        "sweep/1/tune/ray/trial/ray/step-00000020/state.json",
    }
    assert by_name(storage)["lm@1"].state == "finished"
    gone, said = pruned(storage)
    assert not gone
    assert "nothing to prune" in said[-1]


def test_prune_asks_first(storage: Path) -> None:
    gone, said = pruned(storage, answer=False)
    assert not gone
    assert said[-1] == "nothing was removed"
    assert "removed" in ilrec("runs", "prune", "--storage", str(storage), "--yes")
    assert not (storage / "lm" / "1" / "ray").exists()


def test_prune_keeps_what_a_damaged_bundle_or_a_job_may_need(storage: Path) -> None:
    (storage / "lm" / "1" / "bundle" / "model.safetensors").write_bytes(b"cut")
    with locked(storage / "sweep" / LOCK):
        gone, said = pruned(storage)
    assert not any(path.startswith(("lm/", "sweep/")) for path in gone)
    assert any("lm@1 keeps its checkpoints" in line and "differs from its checksum" in line for line in said)
    assert any("sweep: a command is training it" in line for line in said)


def test_prune_takes_old_versions_but_none_that_is_needed(storage: Path) -> None:
    model, history = Model(storage, "sasrec"), epochs(0.2)
    for _ in range(5):
        finish(begin(storage, "sasrec", SASREC), history, kind="sasrec")
    model.promote(model.version("2"))
    model.promote(model.version("3"))
    finish(begin(storage, "adapter", SASREC), history, base=read_manifest(model.version("4").bundle).weights)
    gone, _ = pruned(storage, keep=1)
    left = [version.number for version in model.complete]
    assert left == [2, 3, 4, 6]  # a rollback's, the promoted, an adapter's base, the latest
    assert not any(path.startswith(("lm/1/bundle", "sweep/1/bundle")) for path in gone)
    assert model.rollback().number == 2


def test_prune_takes_parts_only_if_asked_and_not_those_in_use(storage: Path) -> None:
    young = storage / "parts" / "items" / "young"
    young.mkdir()
    (young / "file").write_text("x")
    assert not any(path.startswith("parts") for path in pruned(storage)[0])
    gone, _ = pruned(storage, parts=True)
    assert gone == {"parts/datasets/b/file", "parts/items/c/file"}


def test_prune_takes_what_interrupted_commands_left(storage: Path) -> None:
    run = storage / "lm" / "2"
    old, young, half_removed = run / ".bundle-old", run / ".bundle-young", run / ".ray-pruned"
    for place in (old, young, half_removed, storage / "parts" / "items" / ".c-x"):
        write(place / "file", "x")
        if place != young and place != half_removed:
            os.utime(place, (1e9, 1e9))
    pruned(storage)
    assert not old.exists()
    assert not half_removed.exists()
    assert not (storage / "parts" / "items" / ".c-x").exists()
    assert young.exists()


def test_what_is_removed_is_gone_at_once(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the midst of a removal, nothing half is left where it was, and the next one ends it."""

    def killed(path: Path, **_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove(storage / "lm" / "1")
    monkeypatch.undo()
    assert [version.number for version in Model(storage, "lm").versions] == [2]
    assert any(path.endswith("-pruned") for path, _ in [(str(path), what) for path, what in prunable(storage)[0]])


def old_run(storage: Path, name: str) -> Path:
    """As releases before versions wrote one."""
    run = storage / name
    write(run / "experiment.json", LANGUAGE_MODEL)
    checkpoint(run, 2, epochs(0.1, 0.3))
    finish(run, epochs(0.1, 0.3))
    for file, content in (("test.json", '{"metrics": {"model": {"NDCG@10": 0.5}}}'), ("test.parquet", "rows")):
        (run / "evaluation").mkdir(exist_ok=True)
        (run / "evaluation" / file).write_text(content)
    write(run / "prepared" / "dataset" / "stats.json", {})
    return run


def test_old_runs_become_version_1(tmp_path: Path) -> None:
    run = old_run(tmp_path, "shop")
    bundle = read_manifest(run / "bundle")
    assert find_bundle("shop", tmp_path) == run / "bundle"  # it opens as it is
    with pytest.raises(UserError, match=r"`ilrec runs convert --storage .*loses nothing"):
        refuse_earlier_release(run)
    before = files(tmp_path)
    said: list[str] = []
    convert(tmp_path, False, lambda question: False, said.append)
    assert files(tmp_path) == before
    assert said[-1] == "nothing was changed"
    convert(tmp_path, False, lambda question: True, said.append)
    assert find_bundle("shop", tmp_path) == run / "1" / "bundle"
    assert read_manifest(run / "1" / "bundle") == bundle
    found = by_name(tmp_path)["shop@1"]
    assert (found.state, found.validation, found.test) == ("finished", 0.3, {"NDCG@10": 0.5})
    assert len(files(tmp_path)) == len(before) + 1  # version.json
    refuse_earlier_release(run)
    convert(tmp_path, False, pytest.fail, said.append)
    assert "nothing to convert" in said[-1]


@pytest.mark.parametrize("renames", range(7))
def test_an_interrupted_conversion_goes_on(tmp_path: Path, renames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run, done, rename = old_run(tmp_path, "shop"), 0, os.rename
    bundle = read_manifest(run / "bundle")

    def killed(source: Path, target: Path) -> None:
        nonlocal done
        if done == renames:
            raise KeyboardInterrupt
        done += 1
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path, True, pytest.fail, lambda text: None)
    monkeypatch.undo()
    assert read_manifest(find_bundle("shop", tmp_path)) == bundle
    convert(tmp_path, True, pytest.fail, lambda text: None)
    found = by_name(tmp_path)["shop@1"]
    assert (found.state, found.fields["objective.kind"], found.test) == ("finished", "msl", {"NDCG@10": 0.5})


def test_sizes_and_ages_have_units() -> None:
    assert [bytes_shown(n) for n in (0, 999, 12_345, 3e9, 4e15)] == ["0 B", "999 B", "12.3 kB", "3 GB", "4e+03 TB"]
    assert [age_shown(n) for n in (5, 90, 7200, 200_000)] == ["5 s", "2 min", "2 h", "2 d"]

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

from deploy.runs import age_shown, bytes_shown, print_comparison, prune
from recommender.bundle import Manifest, write_bundle
from recommender.errors import UserError
from tests.test_cli import HEAVY, ilrec, imported
from trainer.lock import LOCK, locked
from trainer.reporting.runs import Run, find_runs, named_run

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


def finish(run: Path, history: list[Any], **recommender: Any) -> None:
    def weights(directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(b"weights")

    write_bundle(run / "bundle", Manifest(name=run.name, recommender=recommender), weights)
    write(run / "training.json", history)


def evaluate(run: Path, ranks: list[int], users: str = "abcd") -> None:
    model = {"NDCG@10": 0.5, "HR@10": 0.75}
    write(run / "evaluation" / "test.json", {"metrics": {"model": model, "most_popular": model}})
    table = {"user_id": list(users), "target_item_id": ["x"] * 4, "rank": ranks}
    pq.write_table(pa.table(table), run / "evaluation" / "test.parquet")


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """A finished language model and SASRec, a sweep, a run that trains, one that is prepared, and what is no run."""
    history = epochs(0.1, 0.3)
    write(tmp_path / "lm" / "experiment.json", LANGUAGE_MODEL)
    for number in (1, 2):
        checkpoint(tmp_path / "lm", number, history[:number])
    finish(tmp_path / "lm", history)
    evaluate(tmp_path / "lm", [1, 1, 2, 0])
    write(tmp_path / "sasrec" / "experiment.json", SASREC)
    checkpoint(tmp_path / "sasrec", 2, history, collaborative=True)
    finish(tmp_path / "sasrec", history, kind="sasrec")
    evaluate(tmp_path / "sasrec", [1, 2, 0, 0])
    shared = tmp_path / "collaborative" / "sasrec-abc"
    checkpoint(shared, 1, history[:1], collaborative=True)
    finish(shared, history[:1], kind="sasrec")
    write(tmp_path / "sweep" / "tune" / "experiment.json", LANGUAGE_MODEL)
    checkpoint(tmp_path / "sweep" / "tune" / "ray" / "trial", 2, history)
    finish(tmp_path / "sweep", history)
    write(tmp_path / "going" / "experiment.json", LANGUAGE_MODEL | {"training.epochs": 3})
    checkpoint(tmp_path / "going", 1, history[:1])
    write(tmp_path / "new" / "prepared" / "dataset" / "stats.json", {})
    (tmp_path / "foreign").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "experiment.json").write_text("{")
    write(tmp_path / "odd" / "experiment.json", ["no", "fields"])
    write(tmp_path / "cut" / "experiment.json", SASREC)
    write(tmp_path / "cut" / "evaluation" / "test.json", {"metrics": {}})
    (tmp_path / "new" / "gone").symlink_to(tmp_path / "nowhere")
    return tmp_path


def by_name(storage: Path) -> dict[str, Run]:
    return {run.name: run for run in find_runs(storage)[0]}


def test_each_run_is_told_by_its_files(storage: Path) -> None:
    found = {name: (run.kind, run.objective, run.state, run.validation) for name, run in by_name(storage).items()}
    assert found == {
        "lm": ("language model", "msl", "finished", 0.3),
        "sasrec": ("collaborative", "sasrec", "finished", 0.3),
        "collaborative/sasrec-abc": ("collaborative", "sasrec", "finished", 0.1),
        "sweep": ("sweep", "msl", "finished", 0.3),
        "going": ("language model", "msl", "stopped at step 10", 0.1),
        "new": (None, None, "prepared", None),
    }
    assert by_name(storage)["lm"].test["NDCG@10"] == 0.5
    assert by_name(storage)["sweep"].test == {}


def test_what_is_no_run_is_left_aside_with_a_note(storage: Path) -> None:
    notes = {Path(note.partition(":")[0]).name: note for note in find_runs(storage)[1]}
    assert set(notes) == {"foreign", "broken", "odd", "cut"}
    assert "it holds no run" in notes["foreign"]
    assert "cannot be read" in notes["broken"]


def test_a_run_that_goes_on_is_not_finished(storage: Path) -> None:
    checkpoint(storage / "sasrec", 3, epochs(0.1, 0.3, 0.4), collaborative=True)
    shutil.rmtree(storage / "sweep" / "bundle")
    with locked(storage / "sasrec" / LOCK), locked(storage / "sweep" / LOCK):
        runs = by_name(storage)
    assert (runs["sasrec"].state, runs["sasrec"].validation) == ("training at step 30", 0.4)
    assert runs["sweep"].state == "tuning"
    runs = by_name(storage)
    assert (runs["sasrec"].state, runs["sweep"].state) == ("stopped at step 30", "stopped")


def test_list_prints_a_row_each(storage: Path) -> None:
    text = ilrec("runs", "list", "--storage", str(storage))
    assert not HEAVY & imported(text)
    for words in ("lm language model msl finished 0.3000 0.5000", "going language model msl stopped at step 10"):
        assert words in " ".join(text.replace("│", " ").split())
    assert f"note: {storage}/foreign: left aside" in text
    assert "no such directory" in ilrec("runs", "list", "--storage", str(storage / "nowhere"), status=2)


def test_compare_prints_what_differs(storage: Path) -> None:
    text = ilrec("runs", "compare", "lm", str(storage / "sasrec"), "--storage", str(storage))
    rows = " ".join(text.replace("│", " ").split())
    assert "recommender.kind language_model sasrec" in rows
    assert "recommender.dim – 8" in rows
    assert "test HR@10 0.7500 0.7500" in rows
    gain = (1 - 1 / 1.5849625 + 1 / 1.5849625) / 4  # of the second and the third target
    assert f"test NDCG@10 {gain:+.4f}, 95 % interval" in text


def test_compare_says_what_is_missing(storage: Path) -> None:
    said: list[str] = []
    print_comparison(storage, ["lm", "going"], said.append)
    assert "lm minus going: not both have evaluation/test.parquet" in said[0]
    evaluate(storage / "sasrec", [1, 1, 1, 1], users="abce")
    print_comparison(storage, ["lm", "sasrec"], said.append)
    assert "did not rank the same targets" in said[1]
    with pytest.raises(UserError, match=r"ml: no run of this name in .*; there are: .*going, lm, new"):
        print_comparison(storage, ["lm", "ml"], said.append)
    with pytest.raises(UserError, match="left aside"):
        print_comparison(storage, ["lm", "broken"], said.append)
    with pytest.raises(UserError, match="name two runs"):
        print_comparison(storage, ["lm"], said.append)


def files(storage: Path) -> set[str]:
    return {str(path.relative_to(storage)) for path in storage.rglob("*") if path.is_file()}


def pruned(storage: Path, answer: bool = True) -> tuple[set[str], list[str]]:
    """What is gone, and what was said."""
    before = files(storage)
    said: list[str] = []
    prune(storage, False, lambda question: answer, said.append)
    return before - files(storage), said


def test_prune_takes_checkpoints_of_finished_runs_only(storage: Path) -> None:
    gone, _ = pruned(storage)
    assert gone == {
        "lm/ray/step-00000010/state.json",
        "lm/ray/step-00000020/state.json",
        "sasrec/ray/epoch-00002/state.json",
        "collaborative/sasrec-abc/ray/epoch-00001/state.json",
        "sweep/tune/ray/trial/ray/step-00000020/state.json",
    }
    assert (storage / "lm" / "ray").is_dir()  # the run's directory stays taken
    assert by_name(storage)["lm"].state == "finished"
    gone, said = pruned(storage)
    assert not gone
    assert "nothing to prune" in said[-1]


def test_prune_asks_first(storage: Path) -> None:
    gone, said = pruned(storage, answer=False)
    assert not gone
    assert said[-1] == "nothing was removed"
    assert "removed" in ilrec("runs", "prune", "--storage", str(storage), "--yes")
    assert not any((storage / "lm" / "ray").iterdir())


def test_prune_keeps_what_a_damaged_bundle_or_a_job_may_need(storage: Path) -> None:
    (storage / "lm" / "bundle" / "model.safetensors").write_bytes(b"cut")
    log = storage / "sasrec" / "train.log"
    log.touch()
    os.utime(log, (log.stat().st_mtime + 60,) * 2)
    with locked(storage / "sweep" / LOCK):
        gone, said = pruned(storage)
    assert not any(path.startswith(("lm/", "sasrec/", "sweep/")) for path in gone)
    assert any("lm keeps its checkpoints" in line and "differs from its checksum" in line for line in said)
    assert any("sasrec keeps its checkpoints" in line and "may be training" in line for line in said)
    assert any("sweep keeps its checkpoints" in line and "a command is training there" in line for line in said)


def test_prune_takes_what_interrupted_writes_left(storage: Path) -> None:
    run = storage / "new"
    (run / "prepared" / "items").mkdir()
    old = run / "prepared" / ".items-old-abc"
    places = [
        old,
        run / "prepared" / ".items-young",
        run / "prepared" / ".dataset-lost",
        run / ".bundle-lone",
        run / ".mine",
    ]
    for place in places:
        write(place / "file", "x")
    for place in places[:1] + places[3:]:
        os.utime(place, (1e9, 1e9))
    assert pruned(storage)[0] >= {"new/prepared/.items-old-abc/file"}
    assert not old.exists()
    assert all(place.exists() for place in places[1:])  # young, or of what is not there itself, or not ours


def test_a_run_is_found_by_name_before_path(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = storage / "elsewhere"
    shutil.copytree(storage / "sasrec", elsewhere / "lm")
    monkeypatch.chdir(elsewhere)
    assert named_run(storage, "lm").objective == "msl"
    assert named_run(storage / "nowhere", "lm").objective == "sasrec"


def test_sizes_and_ages_have_units() -> None:
    assert [bytes_shown(n) for n in (0, 999, 12_345, 3e9, 4e15)] == ["0 B", "999 B", "12.3 kB", "3 GB", "4e+03 TB"]
    assert [age_shown(n) for n in (5, 90, 7200, 200_000)] == ["5 s", "2 min", "2 h", "2 d"]

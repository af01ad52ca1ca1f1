"""`ilrec runs` on a storage with runs of all kinds, made by hand."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deploy.convert import convert
from deploy.models import print_model, print_models
from deploy.runs import age_shown, bytes_shown, print_comparison, print_runs, prune
from recommender.bundle import Manifest, read_manifest, write_bundle
from recommender.errors import UserError
from recommender.lock import LOCK, held, in_use, locked
from recommender.models import Model, find_bundle
from tests.test_cli import HEAVY, ilrec, imported
from trainer.reporting.runs import Run, find_runs, prunable, remove
from trainer.run import experiment_of, record, refuse_earlier_release

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


def evaluate(
    run: Path, ranks: list[int], users: str = "abcd", name: str = "test-1", at: str = "1", **columns: list[int]
) -> None:
    model = {"NDCG@10": 0.5, "HR@10": 0.75}
    report = {"metrics": {"model": model, "most_popular": model}, "evaluated_at": at}
    write(run / "evaluation" / name / "report.json", report)
    table = {"user_id": list(users), "target_item_id": ["x"] * 4, "rank": ranks, **columns}
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


def test_compare_parts_the_targets_and_has_the_floors_beside(
    storage: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    print_comparison(storage, ["lm@1", "sasrec"], lambda text: None)
    assert "NDCG@10 of" not in capsys.readouterr().out  # evaluations of earlier releases
    parted = {"target_popularity": [0, 1, 3, 9], "history_length": [2] * 4, "itemknn_rank": [0, 1, 1, 0]}
    evaluate(storage / "lm" / "1", [1, 1, 2, 0], name="test-2", at="2", **parted)
    tfidf = {"most_popular_rank": [9, 0, 0, 1], "tfidf_rank": [1, 0, 0, 0]}
    evaluate(storage / "sasrec" / "1", [1, 2, 0, 0], name="test-2", at="2", **parted, **tfidf)
    print_comparison(storage, ["lm@1", "sasrec"], lambda text: None)

    def printed() -> str:
        return " ".join(capsys.readouterr().out.replace("│", " ").replace("┃", " ").split())

    rows = printed()
    assert "test NDCG@10 of … targets lm@1 sasrec@1 most-popular ItemKNN TF-IDF" in rows
    assert "all targets 4 0.6577 0.4077 0.3253 0.5000 0.2500" in rows
    assert "unseen in training 1 1.0000 1.0000 0.3010 0.0000 1.0000" in rows
    assert "head: 9 times in training 1 0.0000 0.0000 1.0000 0.0000 0.0000" in rows
    evaluate(storage / "sasrec" / "1", [1, 1, 1, 1], users="abce", name="test-3", at="3", **parted)
    print_comparison(storage, ["lm@1", "sasrec"], lambda text: None)
    assert "test NDCG@10 of … targets lm@1 ItemKNN" in printed()


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
    gone, said = pruned(storage, parts=True)
    assert not gone
    assert any("all parts stay: which of them broken@1 needs cannot be read" in line for line in said)
    shutil.rmtree(storage / "broken")
    shutil.rmtree(storage / "odd")
    gone, _ = pruned(storage, parts=True)
    assert gone == {"parts/datasets/b/file", "parts/items/c/file"}


def test_prune_takes_what_interrupted_commands_left(storage: Path) -> None:
    run = storage / "lm" / "2"
    gone = [run / ".bundle-aaaaaaa1", storage / "parts" / "items" / ".c-aaaaaaa2", run / ".ray-pruned"]
    young, written, foreign = run / ".bundle-aaaaaaa3", run / ".bundle-aaaaaaa4", run / ".ipynb_checkpoints"
    for place in (*gone, young, written, foreign):
        write(place / "file", "x")
        if place not in (young, run / ".ray-pruned"):
            os.utime(place, (1e9, 1e9))
    partial = run / ".version.json.partial-12"
    partial.write_text("{")
    os.utime(partial, (1e9, 1e9))
    with held(written):
        pruned(storage)
    assert not any(place.exists() for place in (*gone, partial))
    assert all(place.exists() for place in (young, written, foreign))


def test_prune_takes_versions_that_were_never_made(storage: Path) -> None:
    never = Model(storage, "lm").begin().directory  # killed before its record was written
    write(never / "config.yaml", {})
    (never / ".version.json.partial-12").write_text("{")
    derived = Model(storage, "lm").begin()  # killed before its bundle was
    record(derived, "extend", {}, made_from="lm@1")
    os.utime(derived.directory, (1e9, 1e9))
    assert by_name(storage)["lm@4"].state == "never finished"
    pruned(storage)
    assert [version.number for version in Model(storage, "lm").versions] == [1, 2]


def test_prune_spares_what_others_start_from(storage: Path) -> None:
    """An adapter whose model is being trained, one without a record, and a run that is not finished need old ones."""
    model = Model(storage, "sasrec")
    for _ in range(5):
        finish(begin(storage, "sasrec", SASREC), epochs(0.2), kind="sasrec")
    manifests = {version.number: read_manifest(version.bundle) for version in model.complete}
    finish(begin(storage, "adapter", SASREC), epochs(0.1), base=manifests[2].weights)
    finish(storage / "bare" / "1", epochs(0.1), base=manifests[3].weights)
    begin(storage, "going", LANGUAGE_MODEL | {"init_from": manifests[4].checksum})
    begin(storage, "rewarded", LANGUAGE_MODEL | {"rewards": manifests[5].checksums})
    with locked(storage / "adapter" / LOCK):
        pruned(storage, keep=1)
    assert [version.number for version in model.complete] == [1, 2, 3, 4, 5, 6]
    finish(storage / "going" / "1", epochs(0.1))
    pruned(storage, keep=1)
    assert [version.number for version in model.complete] == [1, 2, 3, 5, 6]


def test_prune_takes_no_version_or_part_while_a_command_is_at_work(storage: Path) -> None:
    shutil.rmtree(storage / "broken")
    shutil.rmtree(storage / "odd")
    for _ in range(3):
        finish(begin(storage, "sasrec", SASREC), epochs(0.2), kind="sasrec")
    with in_use(storage):
        gone, said = pruned(storage, keep=1, parts=True)
    assert all("/ray/" in path for path in gone)
    assert any("a command is at work in this storage" in line for line in said)


def test_what_comes_to_be_needed_until_the_answer_stays(storage: Path) -> None:
    shutil.rmtree(storage / "broken")
    shutil.rmtree(storage / "odd")
    model = Model(storage, "sasrec")
    said: list[str] = []
    for _ in range(3):
        finish(begin(storage, "sasrec", SASREC), epochs(0.2), kind="sasrec")

    def promote_and_train(question: str) -> bool:
        model.promote(model.version("2"))
        begin(storage, "new", LANGUAGE_MODEL, parts=("parts/datasets/b",))
        return True

    prune(storage, 1, True, False, promote_and_train, said.append)
    assert [version.number for version in model.complete] == [1, 2, 4]  # a rollback's, the promoted, the latest
    assert (storage / "parts" / "datasets" / "b").exists()
    assert not (storage / "parts" / "items" / "c").exists()
    assert any("sasrec/2 stays, it is needed now" in line for line in said)


@pytest.mark.skipif(not os.geteuid(), reason="root may write everywhere")
def test_prune_leaves_what_others_own(storage: Path) -> None:
    (storage / "lm" / "1" / "ray").chmod(0o500)
    gone, said = pruned(storage)
    (storage / "lm" / "1" / "ray").chmod(0o700)
    assert not any(path.startswith("lm/1/") for path in gone)
    assert any("is not yours to remove" in line for line in said)


def test_prune_leaves_links(storage: Path) -> None:
    shutil.move(storage / "lm" / "1" / "ray", storage.parent / f"{storage.name}-elsewhere")
    (storage / "lm" / "1" / "ray").symlink_to(storage.parent / f"{storage.name}-elsewhere")
    _, said = pruned(storage)
    assert (storage / "lm" / "1" / "ray" / "step-00000010").exists()
    assert any("lm/1/ray: is not yours to remove, or a link" in line for line in said)


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


def test_what_is_being_trained_is_not_converted(tmp_path: Path) -> None:
    run, said = old_run(tmp_path, "shop"), list[str]()
    before = files(tmp_path)
    with locked(run / LOCK):
        convert(tmp_path, True, pytest.fail, said.append)
    assert files(tmp_path) == before
    assert any("shop: a command is training it, so it stays as it is" in line for line in said)


@pytest.mark.parametrize("renames", range(4))
def test_an_interrupted_conversion_of_an_unfinished_run_goes_on(
    tmp_path: Path, renames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, done, rename = old_run(tmp_path, "shop"), 0, os.rename
    for left in ("bundle", "evaluation", "prepared"):
        shutil.rmtree(run / left)

    def killed(source: Path, target: Path) -> None:
        nonlocal done
        if done == renames:
            raise KeyboardInterrupt
        done += 1
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed)
    with suppress(KeyboardInterrupt):
        convert(tmp_path, True, pytest.fail, lambda text: None)
    monkeypatch.undo()
    convert(tmp_path, True, pytest.fail, lambda text: None)
    assert {path.name for path in run.iterdir()} - {LOCK} == {"1"}
    assert by_name(tmp_path)["shop@1"].state == "stopped at step 20"


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


def test_a_converted_run_knows_its_experiment(tmp_path: Path) -> None:
    run = old_run(tmp_path, "shop")
    old_run(tmp_path, "base")
    fields = {"world.items": 200, "data": None, "training.epochs": 2, "init_from": "/moved/base/bundle"}
    write(run / "experiment.json", LANGUAGE_MODEL | fields | {"data fingerprint": "abc"})
    convert(tmp_path, True, pytest.fail, lambda text: None)
    experiment = experiment_of(find_bundle("shop", tmp_path)).located()
    assert experiment.world is not None
    assert (experiment.world.items, experiment.training.epochs, experiment.storage) == (200, 2, tmp_path)
    assert experiment.init_from == str(tmp_path / "base" / "1" / "bundle")
    with pytest.raises(UserError, match="give the experiment as well"):
        experiment_of(find_bundle("base", tmp_path))  # of which nothing tells what its data were


def test_tables_fit_80_columns_with_long_names(
    storage: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "office-products-qwen3-0.6b-ilrec-lora-r16-seed-0-2026-11-27"
    for _ in range(12):
        finish(begin(storage, name, LANGUAGE_MODEL), epochs(0.2))
    write(begin(storage, "sweep-" + name, LANGUAGE_MODEL, "tune") / "tune" / "x.json", {})
    derived = Model(storage, name).begin()
    record(derived, "extend", {}, made_from=f"{name}@12")
    finish(derived.directory, epochs(0.2))
    print_runs(storage, lambda text: None)
    print_models(storage)
    print_model(storage, name, lambda text: None)
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines())
    assert "…" not in printed

"""Collaborative models trained as users train them: three launches of Ray Train, the rest in this process."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from recommender import golden
from recommender.bundle import Manifest
from recommender.catalogue.catalogue import Catalogue
from recommender.collaborative.config import (
    BERT4RecConfig,
    BPRConfig,
    CaserConfig,
    CollaborativeConfig,
    ContentConfig,
    ESASRecConfig,
    GRU4RecConfig,
    SASRecConfig,
)
from recommender.collaborative.recommender import CollaborativeRecommender, build_model, load_model
from recommender.errors import UserError
from recommender.metrics import metric_values, popularity_ranks
from tests.versions import directory_of
from trainer.collaborative import fit as collaborative
from trainer.collaborative import worker as collaborative_worker
from trainer.collaborative.fit import ensure_collaborative
from trainer.collaborative.step import RowAdamW
from trainer.collaborative.windows import TrainingWindows, pieces
from trainer.config import CollaborativeBundle
from trainer.data.dataset import Dataset
from trainer.data.splits import Targets
from trainer.evaluation.evaluation import evaluate
from trainer.evaluation.ranking import held_out
from trainer.experiment import Experiment, load_experiment
from trainer.fit import train
from trainer.loop import preemption
from trainer.parts import Prepared
from trainer.prepare import prepare

EPOCHS = 3
STEPS = 4  # an epoch
SHAPE: dict[str, Any] = {"dim": 16, "max_length": 6, "batch": 16, "dropout": 0.0, "learning_rate": 3e-3, "epochs": 1}
CONFIGS: dict[str, CollaborativeConfig] = {
    "sasrec": SASRecConfig(**SHAPE),
    "esasrec": ESASRecConfig(**SHAPE, loss="gbce", negatives=20, content=ContentConfig(dimensions=8, own=1.0)),
    "gru4rec": GRU4RecConfig(**SHAPE, negatives=20),
    "bert4rec": BERT4RecConfig(**SHAPE),
    "caser": CaserConfig(**SHAPE, window=3),
    "bpr": BPRConfig(**SHAPE, negatives=8),
}
WHOLE = SASRecConfig(**{**SHAPE, "dropout": 0.2, "epochs": EPOCHS})


def quiet(text: str) -> None:
    pass


def training(experiment: Experiment, config: CollaborativeConfig, **changes: Any) -> Experiment:
    return experiment.model_copy(update={"recommender": config, **changes})


def farthest(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Largest difference of any weight or moment."""
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


def tensors(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "training.safetensors")


def curve(directory: Path) -> list[dict[str, float]]:
    """The metrics of all epochs, without those that clocks make."""
    epochs = json.loads((directory / "state.json").read_text())["epochs"]
    return [{name: value for name, value in epoch.items() if "second" not in name} for epoch in epochs]


# ---- What runs on the workers ----------------------------------------------------------------------------------------


def run_case(experiment: str, prepared: str, directory: str) -> dict[str, Any]:
    """Train, but report to a directory instead of to Ray."""
    import torch.distributed as dist

    def report(model: Any, optimiser: Any, state: dict[str, Any], log: Path) -> None:
        if dist.get_rank() == 0:
            at = Path(directory) / f"epoch-{len(state['epochs'])}"
            at.mkdir(parents=True)
            collaborative_worker.save(at, model, optimiser, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collaborative_worker, "report", report)
        return collaborative_worker.train_worker(
            {"experiment": experiment, "prepared": prepared, "log": f"{directory}.log"}
        )


def many_cases(config: dict[str, Any], cases: list[dict[str, str]]) -> dict[str, Any]:
    """Run all cases, then the experiment of the launch itself."""
    for case in cases:
        assert run_case(**case)["error"] is None
    return collaborative_worker.train_worker(config)


def dying_worker(config: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train, but the process of rank 1 ends without a word after some steps."""
    import torch.distributed as dist

    step, done = collaborative_worker.optimiser_step, 0

    def mortal(*arguments: Any) -> tuple[float, float]:
        nonlocal done
        answer = step(*arguments)
        done += 1
        if dist.get_rank() == 1 and done == steps:
            os._exit(1)
        return answer

    collaborative_worker.optimiser_step = mortal
    return collaborative_worker.train_worker(config)


@contextmanager
def alone() -> Iterator[None]:
    """This process is the only worker."""
    import ray.train
    import ray.train.torch
    import torch.distributed as dist

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_rank", lambda: 0)
        patch.setattr(dist, "get_world_size", lambda: 1)
        patch.setattr(dist, "all_reduce", lambda tensor: None)
        patch.setattr(dist, "all_gather", lambda every, mine: every[0].copy_(mine))
        patch.setattr(ray.train, "get_checkpoint", lambda: None)
        patch.setattr(preemption, "noticed", lambda device: False)
        patch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
        yield


def run_alone(experiment: Experiment, prepared: Prepared, directory: Path) -> dict[str, Any]:
    with alone():
        return run_case(experiment.model_dump_json(), prepared, str(directory))


# ---- The launches ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experiment(tiny_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    storage = str(tmp_path_factory.mktemp("collaborative"))
    cluster = tiny_experiment.cluster.model_copy(update={"storage": storage, "max_failures": 0})
    return tiny_experiment.model_copy(update={"cluster": cluster, "collaborative": WHOLE})


def with_worker(worker: Callable[..., Any], function: Callable[[], Any]) -> Any:
    """Call a function that trains, with another function on the workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collaborative, "train_worker", worker)
        return function()


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, experiment: Experiment, tiny_prepared: Prepared) -> Experiment:
    """Two workers train an epoch of each model, then one model as `ilrec train` does."""
    run = training(experiment, WHOLE, name="undisturbed")
    cases = [
        {
            "experiment": training(experiment, config).model_dump_json(),
            "prepared": tiny_prepared,
            "directory": str(run.storage / "two" / kind),
        }
        for kind, config in CONFIGS.items()
    ]
    (run.storage / "two").mkdir()
    version = with_worker(partial(many_cases, cases=cases), lambda: train(run, tiny_prepared, quiet))
    assert version.directory == directory_of(run)
    return run


@pytest.fixture(scope="module")
def ensured(ray_cluster: None, experiment: Experiment, tiny_prepared: Prepared) -> tuple[Path, list[str]]:
    """The same model for an objective: killed in its third epoch, asked for again. The bundle and what was said."""
    run = experiment.model_copy(update={"name": "language-model"})
    with pytest.raises(Exception, match="failed"):
        with_worker(partial(dying_worker, steps=2 * STEPS + 1), lambda: ensure_collaborative(run, tiny_prepared, quiet))
    said: list[str] = []
    return ensure_collaborative(run, tiny_prepared, said.append), said


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*_: Any) -> None:
        pytest.fail("workers were started")

    monkeypatch.setattr(collaborative, "torch_trainer", launch)


# ---- What they must show ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_one_worker_and_two_learn_the_same(
    undisturbed: Experiment, experiment: Experiment, tiny_prepared: Prepared, tmp_path: Path, kind: str
) -> None:
    config = CONFIGS[kind]
    assert run_alone(training(experiment, config), tiny_prepared, tmp_path / "one")["error"] is None
    one, two = tmp_path / "one" / "epoch-1", undisturbed.storage / "two" / kind / "epoch-1"
    assert farthest(tensors(one), tensors(two)) < 1e-5
    assert curve(one)[0] == pytest.approx(curve(two)[0], abs=1e-5)
    torch.manual_seed(config.seed)
    fresh = build_model(config, 200).state_dict()
    moved = {name: (tensors(one)[f"weight/{name}"] - value).abs().max().item() for name, value in fresh.items()}
    assert min(moved.values()) > 1e-4, moved


def test_interrupted_and_resumed_equals_undisturbed(undisturbed: Experiment, ensured: tuple[Path, list[str]]) -> None:
    bundle, said = ensured
    resumed = [line for line in said if "resumed after epoch" in line]  # 2, or 1 where Ray had not noted the second yet
    assert len(resumed) == 1, said
    last = [of / "ray" / f"epoch-{EPOCHS:05d}" for of in (directory_of(undisturbed), bundle.parent)]
    assert farthest(*map(tensors, last)) == 0
    assert curve(last[0]) == curve(last[1])
    assert [epoch["step"] for epoch in curve(last[0])] == [STEPS, 2 * STEPS, 3 * STEPS]


def test_the_best_epoch_is_exported_and_evaluates_as_it_was_selected(
    undisturbed: Experiment, tiny_prepared: Prepared
) -> None:
    run = undisturbed
    history = json.loads((directory_of(run) / "training.json").read_text())
    best = max(history, key=lambda epoch: epoch["validation_NDCG@10"])
    recommender = CollaborativeRecommender.load(directory_of(run) / "bundle")
    manifest = recommender.manifest
    golden.check(recommender)
    assert recommender.catalogue.popularity is not None
    assert recommender.catalogue.popularity.tolist() == Dataset.load(tiny_prepared.dataset).popularity().tolist()
    assert manifest.metrics["validation_NDCG@10"] == best["validation_NDCG@10"]
    assert manifest.recommender == WHOLE.model_dump(mode="json")
    bundle = directory_of(run) / "bundle"
    report, _ = evaluate(bundle, tiny_prepared.dataset, "validation", run.evaluation, run.cluster, quiet)
    for name in ("HR@10", "NDCG@10"):
        assert manifest.metrics[f"validation_{name}"] == pytest.approx(report.metrics["model"][name], abs=1e-12)
    assert (report.exact_rate, report.invalid_rate, report.expansions) == (1, 0, 0)
    assert history[-1]["loss"] < history[0]["loss"] - 0.01


@pytest.mark.usefixtures("no_launch")
def test_what_is_there_is_reused(
    ensured: tuple[Path, list[str]], experiment: Experiment, tiny_prepared: Prepared
) -> None:
    bundle, _ = ensured
    other = experiment.model_copy(update={"name": "another", "training": experiment.training})
    assert ensure_collaborative(other, tiny_prepared, quiet) == bundle
    given = other.model_copy(update={"collaborative": CollaborativeBundle(path=str(bundle))})
    assert ensure_collaborative(given, tiny_prepared, quiet) == bundle
    assert bundle.parents[2].name == "collaborative"
    evaluation = experiment.evaluation.model_copy(update={"exclude_seen": False})
    selected_otherwise = other.model_copy(update={"evaluation": evaluation})
    with pytest.raises(pytest.fail.Exception, match="workers were started"):
        ensure_collaborative(selected_otherwise, tiny_prepared, quiet)


@pytest.mark.usefixtures("no_launch")
def test_another_config_is_another_version(undisturbed: Experiment, tiny_prepared: Prepared) -> None:
    said: list[str] = []
    for number, update in enumerate(({"dim": 32}, {"epochs": 9}), 2):
        changed = training(undisturbed, WHOLE.model_copy(update=update))
        with pytest.raises(pytest.fail.Exception, match="workers were started"):
            train(changed, tiny_prepared, said.append)
        assert changed.model.versions[-1].number == number
    assert "  since undisturbed@1: recommender.dim: 16 → 32" in said
    with pytest.raises(pytest.fail.Exception, match="workers were started"):  # what was begun goes on
        train(changed, tiny_prepared, said.append)
    assert said[-1] == "undisturbed@3 was begun before and goes on"
    assert undisturbed.model.promoted == undisturbed.model.versions[0]
    train(training(undisturbed, WHOLE.model_copy(update={"patience": 9})), tiny_prepared, quiet)  # may change
    for begun in undisturbed.model.versions[1:]:  # other tests look at the latest
        shutil.rmtree(begun.directory)


def test_bundles_that_cannot_help_are_refused(
    experiment: Experiment, tiny_prepared: Prepared, tiny_bundle: Path, tmp_path: Path
) -> None:
    def given(bundle: Path) -> Experiment:
        return experiment.model_copy(update={"collaborative": CollaborativeBundle(path=str(bundle))})

    with pytest.raises(UserError, match=r"holds a language model; give the bundle of a collaborative one"):
        ensure_collaborative(given(tiny_bundle), tiny_prepared, quiet)
    with pytest.raises(UserError, match="not a bundle"):
        ensure_collaborative(given(tmp_path / "nowhere"), tiny_prepared, quiet)
    with pytest.raises(UserError, match="null"):
        ensure_collaborative(experiment.model_copy(update={"collaborative": None}), tiny_prepared, quiet)
    ids = Dataset.load(tiny_prepared.dataset).item_ids
    catalogue = Catalogue([*ids[1:], ids[0]], ["title"] * len(ids))  # the same items in another order
    manifest = Manifest(name="other", recommender={"kind": "sasrec"})
    model = build_model(CONFIGS["sasrec"], len(ids))
    CollaborativeRecommender(catalogue, model, manifest).save(tmp_path / "other")
    with pytest.raises(UserError, match=r"was trained on another catalogue than .*give one of these data, or a config"):
        ensure_collaborative(given(tmp_path / "other"), tiny_prepared, quiet)
    same = Catalogue(ids, ["title"] * len(ids))
    CollaborativeRecommender(same, model, manifest).save(tmp_path / "split")  # it may know what is held out here
    with pytest.raises(UserError, match=r"was fitted on other data or another split than"):
        ensure_collaborative(given(tmp_path / "split"), tiny_prepared, quiet)


def test_preparing_for_a_collaborative_model_spells_nothing(experiment: Experiment) -> None:
    prepared = prepare(training(experiment, WHOLE, name="unspelled"), quiet)
    assert prepared.spelled is None
    assert not (experiment.parts / "items").exists()


def test_a_step_on_rows_is_adamw_s_for_them_and_leaves_the_others() -> None:
    """Rows that every step reads go as under AdamW."""
    table, dense = (torch.nn.Parameter(torch.arange(15.0).view(5, 3) / 10) for _ in range(2))
    before = table.detach().clone()
    optimiser, reference = (
        kind([p], 0.1, weight_decay=0.3) for kind, p in ((RowAdamW, table), (torch.optim.AdamW, dense))
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        values = torch.randn(2, 3, generator=generator)
        table.grad = torch.sparse_coo_tensor(torch.tensor([[3, 1]]), values, (5, 3), check_invariants=False)
        dense.grad = table.grad.to_dense()
        optimiser.step()
        reference.step()
    torch.testing.assert_close(table[[1, 3]], dense[[1, 3]])
    assert torch.equal(table[[0, 2, 4]], before[[0, 2, 4]])
    assert optimiser.state[table]["step"] == 4
    torch.testing.assert_close(optimiser.state[table]["exp_avg_sq"], reference.state[dense]["exp_avg_sq"])


def test_early_stopping_stops(experiment: Experiment, tiny_prepared: Prepared, tmp_path: Path) -> None:
    config = WHOLE.model_copy(update={"learning_rate": 1e-12, "patience": 2, "epochs": 9})
    run_alone(training(experiment, config), tiny_prepared, tmp_path / "stale")
    assert len(list((tmp_path / "stale").iterdir())) == 3


def test_a_loss_that_is_not_finite_stops_the_run(
    experiment: Experiment, tiny_prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, made = collaborative_worker.build_model, []

    def broken(*arguments: Any) -> Any:
        made.append(step(*arguments))
        loss_sum = made[0].loss_sum
        made[0].loss_sum = lambda batch: (loss_sum(batch)[0] * torch.inf, 1)
        return made[0]

    monkeypatch.setattr(collaborative_worker, "build_model", broken)
    answer = run_alone(training(experiment, WHOLE), tiny_prepared, tmp_path / "broken")
    assert "the loss of step 0 is not finite" in answer["error"]
    assert "learning_rate" in answer["error"]
    assert all(parameter.isfinite().all() for parameter in made[0].parameters())


def test_misspelt_fields_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("name: e\nworld: {}\n")
    for setting, message in [
        ("recommender.kind=sasrek", "recommender: .*'sasrec'"),
        ("collaborative.kind=bert", "collaborative: .*'bundle'"),
    ]:
        with pytest.raises(UserError, match=message):
            load_experiment(path, [setting])
    with pytest.raises(UserError, match=r"recommender\.caser\.windw: unknown field; did you mean 'window'\?"):
        load_experiment(path, ["recommender.kind=caser", "recommender.windw=3"])
    with pytest.raises(UserError, match=r"say which kind: .*sasrec.* or .*bpr"):
        load_experiment(path, ["recommender.dim=3"])
    assert load_experiment(path, ["collaborative=null"]).collaborative is None


# ---- What training may see -------------------------------------------------------------------------------------------


def numbered(lengths: list[int], held_out_from: list[int], skipped: Collection[int] = ()) -> Dataset:
    """Sequences in which every interaction is an item of its own, its flat index.

    Args:
        held_out_from: the position of each sequence from which on nothing is for training.
        skipped: flat indices before that which are no training targets.
    """
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    pairs = [(s, p) for s, end in enumerate(held_out_from) for p in range(1, end) if offsets[s] + p not in skipped]
    sequence, position = np.array(pairs, np.int32).T
    items = np.arange(offsets[-1], dtype=np.int32)
    table = pa.table({"item_id": [str(i) for i in items], "title": [f"title {i}" for i in items]})
    targets = {"train": Targets(sequence, position)}
    return Dataset(Path(), table, [f"u{s}" for s in range(len(lengths))], items, offsets, targets, {}, "")


def test_every_training_target_is_learnt_once_from_what_precedes_it() -> None:
    lengths, ends, skipped = [2, 3, 9, 40, 25, 7, 6], [2, 1, 7, 38, 25, 5, 6], {20, 21, 22, 30, 83}
    dataset = numbered(lengths, ends, skipped)
    train = dataset.targets["train"]
    expected = set((dataset.offsets[train.sequence] + train.position).tolist())
    may_be_read = {i for s, end in enumerate(ends) for i in range(dataset.offsets[s], dataset.offsets[s] + end)}
    windows = TrainingWindows(dataset, max_length=5, batch=4, seed=3)
    assert windows.targets == len(expected)
    cuts = set()
    for number in range(6):
        epoch = windows.epoch(number)
        learnt: list[int] = []
        for step in epoch.steps:
            batch = windows.collate(epoch, step, None)
            assert len(step) <= 6
            for items, length, wanted in zip(batch.items, batch.lengths, batch.targets, strict=True):
                inside = items[:length].tolist()
                assert 2 <= length <= 6
                assert inside == list(range(inside[0], inside[0] + len(inside)))
                assert len(np.unique(np.searchsorted(dataset.offsets, inside, side="right"))) == 1
                assert set(inside) <= may_be_read
                assert not wanted[0]
                assert not wanted[length:].any()
                learnt += items[wanted].tolist()
                cuts.add((inside[0], len(inside)))
        assert sorted(learnt) == sorted(expected)
    assert len(cuts) > len(epoch.start)  # epochs cut differently


def test_epochs_are_drawn_from_the_seed() -> None:
    dataset = numbered([30, 30, 8], [28, 28, 6])
    one, same, other = (TrainingWindows(dataset, 5, 4, seed).epoch(1) for seed in (0, 0, 1))
    for field in ("start", "length", "draws"):
        np.testing.assert_array_equal(getattr(one, field), getattr(same, field))
    assert not np.array_equal(one.draws, other.draws)
    next_one = TrainingWindows(dataset, 5, 4, 0).epoch(2)
    assert not np.array_equal(one.draws, next_one.draws)
    assert sorted(np.concatenate(one.steps).tolist()) == list(range(len(one.start)))


def test_pieces_hold_every_row_once_and_few_scores() -> None:
    length = np.random.default_rng(0).integers(2, 50, 100)
    dealt = list(pieces(length, width=10, most=1000))
    assert sorted(np.concatenate(dealt).tolist()) == list(range(100))
    assert all(length[rows].max() * len(rows) * 10 <= 1000 for rows in dealt)
    assert all(length[rows].max() < 2 * length[rows].min() for rows in dealt)
    assert [rows.tolist() for rows in pieces(np.array([9]), 10, 1)] == [[0]]  # one row always runs


@pytest.mark.parametrize("kind", CONFIGS)
def test_held_out_items_never_reach_a_model(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Items that occur in held-out positions alone are neither read nor predicted."""
    prepared = prepare(training(experiment, WHOLE, name="unspelled"), quiet)
    dataset = Dataset.load(prepared.dataset)
    train = dataset.targets["train"]
    last = np.zeros(len(dataset.users), np.int64)
    np.maximum.at(last, train.sequence, train.position)
    place = np.arange(len(dataset.flat_items)) - np.repeat(dataset.offsets[:-1], np.diff(dataset.offsets))
    may_be_read = set(dataset.flat_items[place <= np.repeat(last, np.diff(dataset.offsets))].tolist())
    assert len(may_be_read) < 200
    seen: set[int] = set()
    build = collaborative_worker.build_model

    def spied(*arguments: Any) -> Any:
        model = build(*arguments)
        loss_sum = model.loss_sum

        def spy(batch: Any) -> Any:
            inside = torch.arange(batch.items.shape[1]) < batch.lengths[:, None]
            seen.update(batch.items[inside].tolist())
            return loss_sum(batch)

        model.loss_sum = spy
        return model

    monkeypatch.setattr(collaborative_worker, "build_model", spied)
    run_alone(training(experiment, CONFIGS[kind]), prepared, tmp_path / "spied")
    assert seen == may_be_read


# ---- That they learn -------------------------------------------------------------------------------------------------

LEARNING = {"learning_rate": 1e-2, "epochs": 18, "patience": 18, "batch": 8}


def walks(directory: Path) -> Path:
    """150 users, each of whom walks round one of six circles of ten items."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(150):
        circle, at = int(rng.integers(6)), int(rng.integers(10))
        rows += [f"u{user},{circle * 10 + (at + time) % 10},{time}" for time in range(int(rng.integers(6, 13)))]
    directory.mkdir()
    (directory / "interactions.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    (directory / "items.csv").write_text("item_id,title\n" + "".join(f"{i},item {i}\n" for i in range(60)))
    return directory


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Path]:
    base = walks(tmp_path_factory.mktemp("walks") / "data")
    data = {"format": "interactions", "interactions": f"{base}/interactions.csv", "items": f"{base}/items.csv"}
    run = Experiment.model_validate({"name": "walks", "data": data, "cluster": {"storage": f"{base}/runs"}})
    return run, prepare(training(run, WHOLE), quiet)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_model_beats_most_popular(walked: tuple[Experiment, Path], tmp_path: Path, kind: str) -> None:
    """All find the circle, whose ten items fill the list; those that know the order find the next item in it."""
    run, prepared = walked
    config = CONFIGS[kind].model_copy(update=LEARNING)
    assert run_alone(training(run, config), prepared, tmp_path / kind)["error"] is None
    found = curve(tmp_path / kind / "epoch-18")[-1]
    dataset = Dataset.load(prepared.dataset)
    targets = held_out(dataset, "validation").targets
    popular = metric_values(popularity_ranks(dataset.popularity(), targets, None), [10])
    assert found["validation_HR@10"] > 0.95
    assert popular["HR@10"].mean() < 0.3
    assert found["validation_NDCG@10"] > (0.4 if kind == "bpr" else 0.7)


def test_unseen_items_are_scored_by_their_texts(tmp_path: Path) -> None:
    """Six items that nobody has met, each titled like the items of one circle, and a bundle without texts."""
    base = walks(tmp_path / "data")
    titles = [f"{['red', 'green', 'blue', 'white', 'black', 'grey'][i // 10]} number{i % 10}" for i in range(60)]
    titles += [f"{colour} unheard" for colour in ["red", "green", "blue", "white", "black", "grey"]]
    (base / "items.csv").write_text("item_id,title\n" + "".join(f"{i},{t}\n" for i, t in enumerate(titles)))
    data = {"format": "interactions", "interactions": f"{base}/interactions.csv", "items": f"{base}/items.csv"}
    config = ESASRecConfig(**{**SHAPE, **LEARNING}, negatives=30, content=ContentConfig(dimensions=16))
    run = Experiment.model_validate({"name": "walks", "data": data, "cluster": {"storage": f"{base}/runs"}})
    run = training(run, config)
    dataset = Dataset.load((prepared := prepare(run, quiet)).dataset)
    assert run_alone(run, prepared, tmp_path / "epochs")["error"] is None
    model = collaborative_worker.fresh_model(config, dataset)
    collaborative_worker.load(tmp_path / "epochs" / "epoch-18", model)
    model.fold_texts()
    histories = [np.array([10 * circle + place for place in (1, 2, 3, 4)]) for circle in range(6)]
    scores = model.eval().scores(model.embed(histories))
    assert scores[:, 60:].argmax(1).tolist() == list(range(6))
    assert (scores[:, :60].argmax(1) // 10).tolist() == list(range(6))


def test_the_model_of_a_run_is_loaded_by_others(undisturbed: Experiment) -> None:
    model = load_model(directory_of(undisturbed) / "bundle")
    assert not model.training
    assert model.embed([np.array([1, 2])]).shape == (1, 16)

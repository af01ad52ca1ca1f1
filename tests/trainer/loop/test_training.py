"""Training as users run it, on Ray Train with DeepSpeed: four launches, and the cases that fit into each of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from objectives.config import CustomConfig, ILRecConfig, MSLConfig
from recommender import golden
from recommender.bundle import read_manifest
from recommender.config import LoraConfig
from recommender.errors import UserError
from recommender.models import Version
from recommender.recommender import Recommender
from tests.brute_force import BruteForce
from tests.event_files import points
from tests.versions import directory_of
from trainer import fit
from trainer.data.config import InteractionsData
from trainer.data.dataset import Dataset
from trainer.evaluation.evaluation import Report, evaluate
from trainer.evaluation.ranking import held_out
from trainer.evaluation.saved import Saved
from trainer.experiment import Experiment
from trainer.loop.checkpoint import read_state
from trainer.loop.launch import Trained
from trainer.parts import Prepared
from trainer.prepare import prepare
from trainer.run import prepared_of
from trainer.world.simulator import simulate

STEPS = 18  # three epochs of six
MID_EPOCH = 4
FOCAL = CustomConfig.model_validate({"class": "tests.custom_classes:Focal", "options": {"gamma": 0.0}})


def changed(experiment: Experiment, **sections: Any) -> Experiment:
    """A copy; a dict changes fields of its section, anything else replaces the field."""
    update = {
        name: getattr(experiment, name).model_copy(update=value) if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return experiment.model_copy(update=update)


def quiet(text: str) -> None:
    pass


def weights(directory: Path) -> dict[str, Tensor]:
    """Everything that a checkpoint holds: weights and moments by name."""
    found: dict[str, Tensor] = {}
    for shard in directory.glob("*.safetensors"):
        found.update(load_file(shard))
    return found


def farthest(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Largest difference of any weight or moment."""
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


def curve(directory: Path) -> list[dict[str, float]]:
    """The metrics of all epochs, without those that clocks make."""
    return [
        {name: value for name, value in epoch.items() if "second" not in name}
        for epoch in read_state(directory)["state"]["epochs"]
    ]


def assert_same_curve(left: list[dict[str, float]], right: list[dict[str, float]]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


# ---- What runs on the workers ----------------------------------------------------------------------------------------


def dying_worker(config: dict[str, Any], deaths: list[tuple[int, int]], marks: str) -> dict[str, Any]:
    """Train, but in its n-th life a rank's process ends without a word in the middle of a step: deaths[n] = (rank,
    steps that this life has done by then)."""
    import ray.train
    from torch import distributed as dist

    from trainer.loop import worker

    mark = Path(marks) / f"rank-{dist.get_rank()}"
    life = int(mark.read_text()) if mark.exists() else 0
    mark.write_text(str(life + 1))
    (Path(marks) / f"resumed-{life}").write_text(str(ray.train.get_checkpoint() is not None))
    step, done = worker.optimiser_step, 0

    def mortal(*arguments: Any) -> dict[str, float]:
        nonlocal done
        sums = step(*arguments)
        done += 1
        if life < len(deaths) and deaths[life] == (dist.get_rank(), done):
            os._exit(1)
        return sums

    worker.optimiser_step = mortal
    return worker.train_worker(config)


def run_case(experiment: str, prepared: str, directory: str, resume_from: str | None = None) -> dict[str, Any]:
    """Train inside a launch that trains several times: reports go to `directory`, not to Ray."""
    import ray.train

    from trainer.loop import checkpoint, worker

    original = worker.report, ray.train.get_checkpoint, worker.optimiser_step
    losses: list[float] = []

    def report(engine: Any, state: dict[str, Any], log: Path) -> None:
        checkpoint.save(engine, Path(directory) / f"step-{state['step']}", state)

    def optimiser_step(*arguments: Any) -> dict[str, float]:
        sums = original[2](*arguments)
        losses.append(sums["loss"])
        return sums

    worker.report, worker.optimiser_step = report, optimiser_step  # type: ignore[assignment]
    ray.train.get_checkpoint = lambda: ray.train.Checkpoint.from_directory(resume_from) if resume_from else None
    try:
        answer = worker.train_worker(
            {"experiment": experiment, "prepared": prepared, "log": f"{directory}.log", "collaborative": None}
        )
    finally:
        worker.report, ray.train.get_checkpoint, worker.optimiser_step = original
    return {**answer, "losses": losses}


def many_cases(config: dict[str, Any], cases: dict[str, dict[str, Any]], answers: str) -> dict[str, Any]:
    """Run all cases, then the experiment of the launch itself, in whose fourth step rank 1 has an infinite loss."""
    from torch import distributed as dist

    from trainer.loop import worker

    found = {name: run_case(**case) for name, case in cases.items()}
    Path(answers).write_text(json.dumps(found))
    build, step, steps = worker.build_objective, worker.optimiser_step, 0

    def counted_step(*arguments: Any) -> dict[str, float]:
        nonlocal steps
        steps += 1
        return step(*arguments)

    def build_broken(*arguments: Any) -> Any:
        objective = build(*arguments)
        losses = objective.losses

        def broken(*arguments: Any) -> dict[str, Tensor]:
            values = losses(*arguments)
            return values | {"loss": values["loss"] * (float("inf") if steps == 4 and dist.get_rank() == 1 else 1.0)}

        objective.losses = broken
        return objective

    worker.build_objective, worker.optimiser_step = build_broken, counted_step
    return worker.train_worker(config)


# ---- The launches ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experiment(tiny_experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    storage = str(tmp_path_factory.mktemp("training"))
    return changed(tiny_experiment, objective=MSLConfig(), cluster={"storage": storage})


def train_with(worker: Callable[..., Any], experiment: Experiment, prepared: Prepared) -> Version:
    """`fit.train` with another function on the workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "torch_trainer", partial(fit.torch_trainer, worker=worker))
        return fit.train(experiment, prepared, quiet)


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, experiment: Experiment, tiny_prepared: Prepared) -> Experiment:
    """Two workers, ZeRO 2."""
    run = changed(experiment, name="undisturbed")
    fit.train(run, tiny_prepared, quiet)
    return run


@pytest.fixture(scope="module")
def disturbed(ray_cluster: None, experiment: Experiment, tiny_prepared: Prepared) -> tuple[Experiment, Path]:
    """Killed in the first epoch, restarted by Ray, killed in the second, then gone on with one worker and ZeRO 3."""
    run = changed(experiment, name="disturbed", cluster={"max_failures": 1})
    marks = run.storage / "marks"
    marks.mkdir(parents=True)
    with pytest.raises(UserError, match=r"training failed on worker \d, and .* restarts are used up"):
        train_with(partial(dying_worker, deaths=[(1, 5), (0, 6)], marks=str(marks)), run, tiny_prepared)
    assert "Training failed due to worker errors" in (directory_of(run) / "failure.txt").read_text()
    run = changed(run, cluster={"workers": 1}, training={"zero_stage": 3})
    train_with(partial(dying_worker, deaths=[], marks=str(marks)), run, tiny_prepared)
    return run, marks


@pytest.fixture(scope="module")
def repeated(disturbed: tuple[Experiment, Path], tiny_prepared: Prepared) -> tuple[Experiment, str, str]:
    """The finished run once more, its bundle lost; what the run's log said before, and what it says now."""
    run, _ = disturbed
    log = directory_of(run) / "train.log"
    before = log.read_text()
    shutil.rmtree(directory_of(run) / "bundle")
    fit.train(run, tiny_prepared, quiet)
    assert [version.number for version in run.model.versions] == [1]
    return run, before, log.read_text()


def last(run: Experiment, step: int = STEPS) -> Path:
    return directory_of(run) / "ray" / f"step-{step:08d}"


@pytest.fixture(scope="module")
def new_interactions(experiment: Experiment, tiny_prepared: Prepared) -> InteractionsData:
    """Other users of the same items, bought later."""
    assert experiment.world is not None
    world = experiment.storage / "new"
    simulate(experiment.world.model_copy(update={"users": 40}), world, quiet)
    return InteractionsData(
        format="interactions", interactions=str(world / "interactions.csv.gz"), items=str(world / "items.jsonl.gz")
    )


@pytest.fixture(scope="module")
def cases(
    undisturbed: Experiment, experiment: Experiment, tiny_prepared: Prepared, new_interactions: InteractionsData
) -> dict[str, Any]:
    """Many small runs in one launch of two workers; the launch's own experiment is one that breaks."""
    bundle = str(directory_of(undisturbed) / "bundle")
    directory = experiment.storage / "cases"
    directory.mkdir()
    hidden = ILRecConfig(vocabulary="valid")
    noisy = changed(experiment, objective=hidden, training={"dropout": 0.2, "epochs": 1})
    half = changed(noisy, training={"precision": "bfloat16", "epochs": 2})
    more = changed(experiment, name="more", data=new_interactions, world=None, init_from=bundle)
    stale = changed(more, training={"learning_rate": 1e-12, "weight_decay": 0.0, "epochs": 5, "patience": 1})
    lora = changed(
        experiment,
        init_from=bundle,
        backbone={"lora": LoraConfig(rank=4, dropout=0.1)},  # of which every rank draws its own
        training={"epochs": 1, "learning_rate": 1e-2},
    )
    grown = prepare(more, quiet)

    def case(
        name: str, run: Experiment, prepared: Prepared = tiny_prepared, resume: str | None = None
    ) -> dict[str, Any]:
        return {
            "experiment": run.model_dump_json(),
            "prepared": prepared,
            "directory": str(directory / name),
            "resume_from": resume,
        }

    runs = {
        "accumulation": case("accumulation", changed(experiment, training={"accumulation": 2, "zero_stage": 0})),
        "dropout": case("dropout", noisy),
        "recomputed": case("recomputed", changed(noisy, training={"gradient_checkpointing": True, "zero_stage": 1})),
        "bfloat16": case("bfloat16", half),
        "bfloat16 resumed": case("resumed", half, resume=str(directory / "bfloat16" / f"step-{MID_EPOCH}")),
        "stale": case("stale", stale, grown),
        "more": case("more", changed(more, training={"epochs": 1}), grown),
        "scratch": case("scratch", changed(more, init_from=None, training={"epochs": 1}), grown),
        "lora": case("lora", lora),
        "focal": case("focal", changed(experiment, objective=FOCAL, training={"epochs": 1})),
        "zero 3": case("zero3", changed(experiment, training={"zero_stage": 3})),
        "lora, zero 3": case("lora3", changed(lora, training={"zero_stage": 3})),
    }
    broken = changed(experiment, name="broken")
    answers = directory / "answers.json"
    with pytest.raises(UserError) as refusal:
        train_with(partial(many_cases, cases=runs, answers=str(answers)), broken, tiny_prepared)
    return {
        **json.loads(answers.read_text()),
        "directory": directory,
        "refusal": str(refusal.value),
        "broken": broken,
        "lora experiment": lora,
    }


@pytest.fixture(scope="module")
def evaluated(undisturbed: Experiment, tiny_prepared: Prepared) -> tuple[Report, Saved]:
    run = undisturbed
    bundle = directory_of(run) / "bundle"
    return evaluate(bundle, tiny_prepared.dataset, "validation", run.evaluation, run.cluster, quiet)


@pytest.fixture(scope="module")
def report(evaluated: tuple[Report, Saved]) -> Report:
    return evaluated[0]


# ---- What they must show ---------------------------------------------------------------------------------------------


def test_killed_twice_and_resumed_elsewhere_equals_undisturbed(
    undisturbed: Experiment, disturbed: tuple[Experiment, Path]
) -> None:
    run, marks = disturbed
    assert (marks / "rank-1").read_text() == "2"  # lives of rank 1; the third launch has no such rank
    assert (marks / "rank-0").read_text() == "3"
    assert [(marks / f"resumed-{life}").read_text() for life in range(3)] == ["False", "True", "True"]
    assert read_state(last(run))["workers"] == 1
    assert read_state(last(run))["zero_stage"] == 3
    assert farthest(weights(last(run)), weights(last(undisturbed))) < 1e-5
    assert_same_curve(curve(last(run)), curve(last(undisturbed)))
    assert len(curve(last(run))) == 3


def test_curves_have_each_epoch_once(disturbed: tuple[Experiment, Path]) -> None:
    run, _ = disturbed
    history = json.loads((directory_of(run) / "training.json").read_text())
    drawn = points(directory_of(run) / "tensorboard")
    for name in ("loss", "validation_NDCG@10"):
        expected = [(epoch["step"], pytest.approx(epoch[name])) for epoch in history]
        assert drawn[f"epoch/{name.replace('@', '_')}"] == expected


def test_a_finished_run_is_exported_again_but_not_trained(
    undisturbed: Experiment, repeated: tuple[Experiment, str, str]
) -> None:
    run, before, now = repeated
    said = now.removeprefix(before)
    assert f"resumed at step {STEPS} of {STEPS}" in said
    assert "loss" not in said
    assert farthest(*(load_file(directory_of(of) / "bundle" / "model.safetensors") for of in (run, undisturbed))) < 1e-5


def test_training_learns_and_moves_weights(undisturbed: Experiment, tiny_bundle: Path) -> None:
    losses = [epoch["loss"] for epoch in curve(last(undisturbed))]
    assert losses[2] < losses[0] - 0.1


def test_accumulation_changes_nothing(undisturbed: Experiment, cases: dict[str, Any]) -> None:
    at = cases["directory"] / "accumulation" / f"step-{STEPS}"
    assert farthest(weights(at), weights(last(undisturbed))) < 3e-5  # 18 steps of Adam
    assert_same_curve(curve(at), curve(last(undisturbed)))


def test_zero_3_trains_validates_and_saves_the_same(undisturbed: Experiment, cases: dict[str, Any]) -> None:
    at = cases["directory"] / "zero3" / f"step-{STEPS}"
    assert farthest(weights(at), weights(last(undisturbed))) < 1e-4
    assert_same_curve(curve(at), curve(last(undisturbed)))


def test_dropout_is_drawn_alike_when_activations_are_recomputed(cases: dict[str, Any]) -> None:
    plain, recomputed = (weights(cases["directory"] / name / "step-6") for name in ("dropout", "recomputed"))
    assert farthest(plain, recomputed) < 1e-5
    assert cases["dropout"]["losses"] == pytest.approx(cases["recomputed"]["losses"], abs=1e-5)


def test_a_resumed_run_draws_the_same_dropout_in_bfloat16(cases: dict[str, Any]) -> None:
    whole, resumed = cases["bfloat16"], cases["bfloat16 resumed"]
    assert len(whole["losses"]) == 12
    assert len(resumed["losses"]) == 12 - MID_EPOCH
    assert resumed["losses"] == whole["losses"][MID_EPOCH:]
    at = [cases["directory"] / name / "step-12" for name in ("bfloat16", "resumed")]
    assert farthest(*map(weights, at)) == 0
    assert_same_curve(*map(curve, at))
    assert np.isfinite(whole["losses"]).all()
    assert np.mean(whole["losses"][6:]) < np.mean(whole["losses"][:6])


def test_the_best_checkpoint_is_exported(undisturbed: Experiment, report: Report) -> None:
    run = undisturbed
    history = json.loads((directory_of(run) / "training.json").read_text())
    assert [epoch["epoch"] for epoch in history] == [1, 2, 3]
    best = max(history, key=lambda epoch: epoch["validation_NDCG@10"])
    recommender = Recommender.load(directory_of(run) / "bundle")
    manifest = recommender.manifest
    golden.check(recommender)
    assert recommender.catalogue.popularity is not None
    assert recommender.catalogue.popularity.sum() > 0
    assert best["epoch"] != 3  # else this test would not tell the best from the last
    assert manifest.metrics["validation_NDCG@10"] == best["validation_NDCG@10"]
    assert f"Marked: epoch {best['epoch']}," in (directory_of(run) / "report.html").read_text()
    exported = load_file(directory_of(run) / "bundle" / "model.safetensors")
    saved = weights(last(run, best["step"]))
    names = [name for name in saved if name.startswith("weight/")]
    assert all(torch.equal(exported[name.removeprefix("weight/model.")], saved[name]) for name in names)
    assert len(names) == len(exported)


def test_validation_metrics_are_those_of_the_bundle(undisturbed: Experiment, report: Report) -> None:
    manifest = Recommender.load(directory_of(undisturbed) / "bundle").manifest
    assert report.targets == 60
    assert report.invalid_rate == 0
    assert report.exact_rate == 1
    for name in ("HR@10", "NDCG@10"):
        assert manifest.metrics[f"validation_{name}"] == pytest.approx(report.metrics["model"][name], abs=1e-12)


def test_ranks_are_those_of_brute_force(
    undisturbed: Experiment, evaluated: tuple[Report, Saved], tiny_prepared: Prepared
) -> None:
    import pyarrow.parquet as pq

    ranks = pq.read_table(evaluated[1].per_target)["rank"].to_pylist()
    force = BruteForce(directory_of(undisturbed) / "bundle")
    split = held_out(Dataset.load(tiny_prepared.dataset), "validation")
    found = sorted(np.flatnonzero(ranks).tolist())[:3] + sorted(np.flatnonzero(np.equal(ranks, 0)).tolist())[:2]
    assert len(found) == 5
    for at in found:
        expected = force.rank(split.histories[at], split.targets[at], set(split.histories[at].tolist()))
        assert ranks[at] == (expected if expected <= 20 else 0)


def test_an_objective_of_the_users_trains(cases: dict[str, Any]) -> None:
    """At γ = 0 the focal loss is masked softmax."""
    focal = cases["focal"]
    assert focal["error"] is None
    assert focal["losses"][0] == pytest.approx(cases["zero 3"]["losses"][0], rel=1e-4)
    [epoch] = curve(cases["directory"] / "focal" / "step-6")
    assert epoch["log_p"] == pytest.approx(-epoch["loss"], rel=1e-6)


def test_early_stopping_stops(cases: dict[str, Any]) -> None:
    assert cases["stale"]["error"] is None
    epochs = sorted(cases["directory"].glob("stale/step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    history = curve(epochs[-1])
    assert [epoch["epoch"] for epoch in history] == [1, 2]  # of five
    assert history[0]["validation_NDCG@10"] == history[1]["validation_NDCG@10"]


def test_training_starts_from_the_bundle_s_weights(undisturbed: Experiment, cases: dict[str, Any]) -> None:
    bundle = load_file(directory_of(undisturbed) / "bundle" / "model.safetensors")
    at = max(cases["directory"].glob("stale/step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    kept = {n.removeprefix("weight/model."): w for n, w in weights(at).items() if n.startswith("weight/")}
    assert farthest(kept, bundle) < 1e-6
    assert cases["more"]["losses"][0] == cases["stale"]["losses"][0] < cases["scratch"]["losses"][0] - 0.05


@pytest.mark.parametrize("name", ["lora", "lora3"])
def test_adapters_train_and_are_exported(cases: dict[str, Any], tiny_prepared: Prepared, name: str) -> None:
    import ray.train

    run = changed(cases["lora experiment"], name=name)
    at = cases["directory"] / name / "step-6"
    names = [tensor for tensor in weights(at) if tensor.startswith("weight/")]
    assert names
    assert all("lora_" in tensor for tensor in names)
    history, version = curve(at), run.model.begin()
    trained = Trained(ray.train.Checkpoint.from_directory(str(at)), history[-1], history)
    fit.export(run, version, tiny_prepared, trained)
    bundle = version.bundle
    assert not (bundle / "model.safetensors").exists()
    split = held_out(Dataset.load(tiny_prepared.dataset), "validation")
    recommender = Recommender.load(bundle)
    force, base = BruteForce(bundle), BruteForce(Path(str(run.init_from)))
    items = split.histories[0]
    answer = recommender.recommend([items], 5)[0]
    scores = force.scores(items)
    np.testing.assert_allclose(answer.scores, scores[answer.items], atol=1e-4)
    assert np.abs(scores - base.scores(items)).max() > 1e-2


def test_adapters_learn_alike_under_zero_2_and_3(cases: dict[str, Any]) -> None:
    at = [cases["directory"] / name / "step-6" for name in ("lora", "lora3")]
    assert farthest(*map(weights, at)) < 1e-3  # Adam turns rounding of tiny gradients into steps of 1e-2
    assert_same_curve(*map(curve, at))


def test_a_finished_run_is_not_touched(
    undisturbed: Experiment, tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "connect", lambda: pytest.fail("Ray was started"))
    before = {path: path.stat().st_mtime_ns for path in directory_of(undisturbed).rglob("*")}
    said: list[str] = []
    version = fit.train(undisturbed, tiny_prepared, said.append)
    assert version.bundle == directory_of(undisturbed) / "bundle"
    assert "undisturbed@1 is trained already" in said[-1]
    assert {path: path.stat().st_mtime_ns for path in directory_of(undisturbed).rglob("*")} == before


def test_a_bundle_tells_what_it_is(undisturbed: Experiment, tiny_prepared: Prepared) -> None:
    manifest = read_manifest(directory_of(undisturbed) / "bundle")
    assert (manifest.name, manifest.version) == ("undisturbed", 1)
    assert manifest.exported_at > "2026"
    dataset = Dataset.load(tiny_prepared.dataset)
    until = datetime.fromisoformat(manifest.trained_until).timestamp()
    assert until == dataset.times[dataset.seen_in_training].max() < dataset.times.max()  # what came last is held out
    assert manifest.data_fingerprint == tiny_prepared.fingerprint
    assert prepared_of(directory_of(undisturbed) / "bundle") == tiny_prepared


def test_a_loss_that_is_not_finite_stops_the_run_with_the_reason(cases: dict[str, Any]) -> None:
    assert "the loss of step 3 is not finite" in cases["refusal"]
    assert "Lower training.learning_rate" in cases["refusal"]
    log = (directory_of(cases["broken"]) / "train.log").read_text()
    assert log.count("steps an epoch") == 1  # not tried again
    assert "resumed" not in log
    checkpoints = directory_of(cases["broken"]) / "ray"
    assert [path.name for path in checkpoints.glob("step-*")] == ["step-00000002"]


# ---- What is refused before any worker starts ------------------------------------------------------------------------


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*_: Any, **__: Any) -> None:
        pytest.fail("workers were started")

    monkeypatch.setattr(fit, "torch_trainer", launch)


@pytest.mark.usefixtures("ray_cluster", "no_launch")
def test_layers_outside_the_backbone_are_refused(experiment: Experiment, tiny_prepared: Prepared) -> None:
    outside = ILRecConfig(layers=(3, 4))
    run = experiment.model_copy(update={"name": "refused", "objective": outside})
    with pytest.raises(UserError, match=r"layers \[4\] are not intermediate layers of a backbone with 4 layers"):
        fit.train(run, tiny_prepared, quiet)
    with pytest.raises(UserError, match=r"layers \[4\] are not intermediate layers"):
        Experiment.model_validate(run.model_dump())  # a preset's are known when the config is read


@pytest.mark.usefixtures("ray_cluster", "no_launch")
def test_more_workers_than_cpus_are_refused(experiment: Experiment, tiny_prepared: Prepared) -> None:
    run = changed(experiment, name="refused", cluster={"workers": 64})
    with pytest.raises(UserError, match=r"64 workers x 1 CPU need 64, the Ray cluster has 4; lower cluster\.workers"):
        fit.train(run, tiny_prepared, quiet)


def test_init_from_nothing_is_refused(experiment: Experiment, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"init_from: .*nowhere: no bundle"):
        changed(experiment, name="refused", init_from=str(tmp_path / "nowhere")).located()

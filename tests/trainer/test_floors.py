"""The floors as users get them: fitted as a run, beside a model, in a verdict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from recommender.bundle import Manifest
from recommender.errors import UserError
from recommender.floors.config import FloorConfig, ItemKNNConfig, TfidfConfig
from recommender.floors.recommender import FloorRecommender
from recommender.metrics import metric_values
from trainer.collaborative.fit import ensure_collaborative
from trainer.config import CollaborativeBundle, EvaluationConfig
from trainer.data.dataset import Dataset
from trainer.evaluation.floors import choose, kept_floors
from trainer.evaluation.ranking import held_out, ranks_of
from trainer.evaluation.standing import NAMES, on_validation, standing
from trainer.experiment import Experiment
from trainer.fit import train
from trainer.parts import Prepared
from trainer.reporting.runs import read_run
from tune.space import check_sweep

CONFIGS: list[FloorConfig] = [ItemKNNConfig(), TfidfConfig()]


def quiet(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def dataset(tiny_prepared: Prepared) -> Dataset:
    return Dataset.load(tiny_prepared.dataset)


def test_training_interactions_end_at_the_last_training_target(dataset: Dataset) -> None:
    sequence, items = dataset.training_interactions()
    for user in range(len(dataset.users)):
        own = dataset.flat_items[dataset.offsets[user] : dataset.offsets[user + 1]]
        assert items[sequence == user].tolist() == own[:-2].tolist()  # leave one out: validation and test
    assert dataset.popularity().sum() == len(items)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("exclude_seen", [False, True])
def test_the_best_setting_is_chosen_by_the_ranks_that_evaluation_counts(
    dataset: Dataset, config: FloorConfig, exclude_seen: bool
) -> None:
    evaluation = EvaluationConfig(exclude_seen=exclude_seen, batch=16)
    said: list[str] = []
    recommender, tried = choose(config, dataset, evaluation, "floor", said.append)
    assert len(tried) == len(said) == len(list(config.settings())) * len(config.decay)
    best = max(epoch["validation_NDCG@10"] for epoch in tried)
    assert recommender.manifest.metrics["validation_NDCG@10"] == best
    split = held_out(dataset, "validation", evaluation.validation_targets)
    ranks = ranks_of(recommender, split, 10, exclude_seen, 16).ranks
    assert metric_values(ranks, [10])["NDCG@10"].mean() == pytest.approx(best)
    again, same = choose(config, dataset, evaluation, "floor", quiet)
    assert again.manifest == recommender.manifest
    assert [epoch["validation_NDCG@10"] for epoch in same] == [epoch["validation_NDCG@10"] for epoch in tried]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_floor_is_a_run_without_ray(
    monkeypatch: pytest.MonkeyPatch, tiny_experiment: Experiment, tiny_prepared: Prepared, config: FloorConfig
) -> None:
    monkeypatch.setattr("trainer.fit.connect", lambda: pytest.fail("Ray was started"))
    run = tiny_experiment.model_copy(update={"name": f"floor-{config.kind}", "recommender": config})
    version = train(run, tiny_prepared, quiet)
    recommender = FloorRecommender.load(version.bundle)
    assert recommender.catalogue.popularity is not None
    assert recommender.manifest.recommender["kind"] == config.kind
    assert recommender.manifest.version == 1
    assert recommender.manifest.data_fingerprint == tiny_prepared.fingerprint
    found = read_run(version)
    assert (found.state, found.objective) == ("finished", config.kind)
    assert found.validation == recommender.manifest.metrics["validation_NDCG@10"]
    assert config.kind in (version.directory / "report.html").read_text()
    assert train(run, tiny_prepared, quiet) == version  # finished: not repeated
    other = run.model_copy(update={"recommender": config.model_copy(update={"decay": (0.3,)})})
    assert train(other, tiny_prepared, quiet).number == 2


def test_a_floor_cannot_be_swept(tiny_experiment: Experiment) -> None:
    values = tiny_experiment.model_dump(mode="json") | {
        "recommender": {"kind": "itemknn"},
        "sweep": {"parameters": {"recommender.window": {"kind": "choice", "values": [3, 10]}}, "trials": 2},
    }
    with pytest.raises(UserError, match=r"recommender\.kind: itemknn chooses its settings by itself"):
        check_sweep(Experiment.model_validate(values))


def shown(model: float, **floors: float) -> dict[str, dict[str, float]]:
    return {system: {"NDCG@10": value} for system, value in {"model": model, **floors}.items()}


def test_the_verdict_is_about_the_best_floor() -> None:
    metrics = shown(0.05, most_popular=0.01, itemknn=0.06, tfidf=0.08)
    intervals = {"most_popular": (0.03, 0.05), "itemknn": (-0.02, 0.0), "tfidf": (-0.04, -0.02)}
    differences = {floor: {"NDCG@10": interval} for floor, interval in intervals.items()}
    said = standing(metrics, differences)
    assert said.startswith("below TF-IDF by 0.0300 NDCG@10 (0.0500 to 0.0800, 95 % interval [-0.0400, -0.0200]): it")
    assert standing(metrics, {}).startswith("below TF-IDF by 0.0300 NDCG@10 (0.0500 to 0.0800): ")
    equal = standing(shown(0.05, most_popular=0.01, itemknn=0.049), {"itemknn": {"NDCG@10": (-0.01, 0.02)}})
    assert equal.startswith("not better than ItemKNN: +0.0010 NDCG@10")
    above = standing(shown(0.09, most_popular=0.01, itemknn=0.06), {})
    assert above == "above every floor; ItemKNN, the best of them, by 0.0300 NDCG@10 (0.0900 to 0.0600)"
    others = {system: {"NDCG@5": values["NDCG@10"]} for system, values in metrics.items()}
    assert "by 0.0300 NDCG@5" in standing(others, {})


def test_the_verdict_on_validation_names_the_floors_that_were_chosen_there(dataset: Dataset, tmp_path: Path) -> None:
    evaluation = EvaluationConfig(exclude_seen=True, batch=16)
    floors = kept_floors(dataset, evaluation, tmp_path, quiet)
    best = max(floors.values(), key=lambda floor: floor.manifest.metrics["validation_NDCG@10"])
    value = best.manifest.metrics["validation_NDCG@10"]
    model = Manifest(name="m", metrics={"validation_NDCG@10": value / 2})
    said = standing(on_validation(model, dataset, evaluation, tmp_path, quiet), {})
    assert said.startswith(f"below {NAMES[best.manifest.kind]} by {value / 2:.4f} NDCG@10")
    alone = evaluation.model_copy(update={"floors": ()})
    perfect = Manifest(name="m", metrics={"validation_NDCG@10": 1.0})
    said = standing(on_validation(perfect, dataset, alone, tmp_path, quiet), {})
    assert said.startswith("above every floor; most-popular")


def test_a_floor_that_the_data_cannot_have_is_left_out_and_said(dataset: Dataset, tmp_path: Path) -> None:
    table = dataset.items_table
    blank = table.set_column(table.column_names.index("title"), "title", pa.array([""] * len(table)))
    said: list[str] = []
    floors = kept_floors(replace(dataset, items_table=blank), EvaluationConfig(batch=16), tmp_path, said.append)
    assert list(floors) == ["itemknn"]
    assert any("no tfidf beside the model: recommender.columns" in line for line in said)


def test_rewards_are_not_taken_from_a_floor(
    tiny_experiment: Experiment, tiny_prepared: Prepared, tmp_path: Path
) -> None:
    recommender, _ = choose(ItemKNNConfig(), Dataset.load(tiny_prepared.dataset), EvaluationConfig(), "knn", quiet)
    recommender.save(tmp_path / "knn")
    given = tiny_experiment.model_copy(update={"collaborative": CollaborativeBundle(path=str(tmp_path / "knn"))})
    with pytest.raises(UserError, match="holds itemknn; give the bundle of a collaborative one"):
        ensure_collaborative(given, tiny_prepared, quiet)

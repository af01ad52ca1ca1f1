"""Evaluation against brute force: ranks, means, what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recommender.errors import UserError
from recommender.loading import load_recommender
from recommender.metrics import metric_values
from recommender.recommender import Recommendation, Recommender
from tests.brute_force import BruteForce
from trainer.config import ClusterConfig, EvaluationConfig
from trainer.data.dataset import Dataset
from trainer.evaluation.evaluation import Report, _RankingWorker, compare, evaluate
from trainer.evaluation.floors import kept_floors
from trainer.evaluation.ranking import HeldOut, held_out, ranks_of
from trainer.evaluation.saved import Saved, latest
from trainer.parts import Prepared

K = 20
BRUTE = range(4)  # targets that are ranked by brute force


@pytest.fixture(scope="module")
def dataset(tiny_prepared: Prepared) -> Dataset:
    return Dataset.load(tiny_prepared.dataset)


@pytest.fixture(scope="module")
def recommender(tiny_bundle: Path) -> Recommender:
    return Recommender.load(tiny_bundle)


@pytest.fixture(scope="module")
def force(tiny_bundle: Path) -> BruteForce:
    return BruteForce(tiny_bundle)


CONFIG = EvaluationConfig(batch=7, bootstrap=100, exclude_seen=True, both_policies=True, category="kind")
CLUSTER = ClusterConfig(workers=2)


@pytest.fixture(scope="module")
def evaluated(ray_cluster: None, tiny_bundle: Path, tiny_prepared: Prepared, floors: Path) -> tuple[Report, Saved]:
    """The test split on two workers in batches of 7, under both policies, all floors beside."""
    return evaluate(tiny_bundle, tiny_prepared.dataset, "test", CONFIG, CLUSTER, lambda text: None, floors_dir=floors)


@pytest.fixture(scope="module")
def floors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("floors")


@pytest.fixture(scope="module")
def report(evaluated: tuple[Report, Saved]) -> Report:
    return evaluated[0]


@pytest.fixture(scope="module")
def saved(evaluated: tuple[Report, Saved]) -> Saved:
    return evaluated[1]


def test_the_same_evaluation_is_not_made_again_and_another_lies_beside(
    report: Report, saved: Saved, tiny_bundle: Path, tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.evaluation.evaluation._rank", lambda *_: pytest.fail("ranked"))
    said: list[str] = []
    again, where = evaluate(tiny_bundle, tiny_prepared.dataset, "test", CONFIG, CLUSTER, said.append)
    assert (where.directory, again.metrics, again.targets) == (saved.directory, report.metrics, report.targets)
    assert "evaluated before" in said[-1]
    assert latest(tiny_bundle.parent) == saved
    seen = CONFIG.model_copy(update={"exclude_seen": False})
    with pytest.raises(pytest.fail.Exception, match="ranked"):
        evaluate(tiny_bundle, tiny_prepared.dataset, "test", seen, CLUSTER, said.append)
    assert saved.report["metrics"] == report.metrics


def test_held_out_targets_are_those_of_the_protocol(dataset: Dataset) -> None:
    """Leave one out: the last item of each user is the test target, the one before it validation."""
    test, validation = held_out(dataset, "test"), held_out(dataset, "validation")
    assert len(test) == len(validation) == len(dataset.users)
    for user in range(len(dataset.users)):
        items = dataset.flat_items[dataset.offsets[user] : dataset.offsets[user + 1]].tolist()
        assert [*test.histories[user].tolist(), test.targets[user]] == items
        assert [*validation.histories[user].tolist(), validation.targets[user]] == items[:-1]


def test_a_sample_of_targets_is_seeded_and_keeps_their_order(dataset: Dataset) -> None:
    few, again, other = (held_out(dataset, "test", 10, seed) for seed in (0, 0, 1))
    assert few.numbers.tolist() == again.numbers.tolist() == sorted(set(few.numbers.tolist()))
    assert len(few) == 10
    assert few.numbers.tolist() != other.numbers.tolist()
    whole = held_out(dataset, "test")
    assert few.targets.tolist() == whole.targets[few.numbers].tolist()
    assert [h.tolist() for h in few.histories] == [whole.histories[n].tolist() for n in few.numbers]


@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_weights_have_the_precision_that_is_asked_for(
    tiny_bundle: Path, tiny_prepared: Prepared, monkeypatch: pytest.MonkeyPatch, precision: str | None
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    worker = _RankingWorker(str(tiny_bundle), str(tiny_prepared.dataset), "test", 8, "cpu", precision, None)
    assert isinstance(worker._recommender, Recommender)
    assert worker._recommender.backbone.dtype == (torch.bfloat16 if precision else torch.float32)
    assert worker.rank(np.arange(8), 10, True, 8).invalid == 0


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_ranks_are_those_of_brute_force(
    recommender: Recommender, force: BruteForce, dataset: Dataset, exclude_seen: bool
) -> None:
    split = held_out(dataset, "test").take(np.array(BRUTE))
    # The model's random weights rank true targets anywhere; so also ask for items that lie in the lists.
    liked = [int(np.argsort(-force.scores(history))[9]) for history in split.histories]
    both = HeldOut(
        np.concatenate([split.numbers] * 2), split.histories * 2, np.concatenate([split.targets, np.array(liked)])
    )
    ranking = ranks_of(recommender, both, K, exclude_seen, batch=5)
    assert ranking.exact.all()
    assert ranking.invalid == 0
    assert (ranking.expansions > 0).all()
    for at, (history, target) in enumerate(zip(both.histories, both.targets, strict=True)):
        seen = set(history.tolist()) if exclude_seen else set()
        rank = force.rank(history, target, seen)
        expected = rank if rank <= K and target not in seen else 0
        assert ranking.ranks[at] == expected
    assert (ranking.ranks > 0).sum() >= len(liked) - 2


def test_ranks_do_not_depend_on_batches(recommender: Recommender, dataset: Dataset) -> None:
    split = held_out(dataset, "test")
    one, many = (ranks_of(recommender, split, K, True, batch) for batch in (1, 60))
    assert one.ranks.tolist() == many.ranks.tolist()


class Careless:
    """Lists whatever it is told to."""

    def __init__(self, lists: list[list[int]]) -> None:
        self.catalogue = range(10)
        self.lists = lists

    def recommend(
        self, histories: Sequence[Sequence[int]], k: int, exclude: Sequence[Collection[int]] | None
    ) -> list[Recommendation]:
        return [Recommendation(items, [0.0] * len(items), False, 1) for items in self.lists]


def test_invalid_items_are_counted() -> None:
    lists = [[1, 2, 3], [1, 1, 1], [10, -1, 4], [7, 8, 9]]
    split = HeldOut(np.arange(4), [np.array([7, 8])] * 4, np.array([3, 1, 5, 9]))
    careless = Careless(lists)
    assert ranks_of(careless, split, 3, True, 4).invalid == 0 + 2 + 2 + 2  # type: ignore[arg-type]
    ranking = ranks_of(careless, split, 3, False, 4)  # type: ignore[arg-type]
    assert ranking.invalid == 0 + 2 + 2 + 0
    assert ranking.ranks.tolist() == [3, 1, 0, 3]
    assert not ranking.exact.any()


def test_report_files_and_brute_force_agree(
    report: Report, saved: Saved, dataset: Dataset, recommender: Recommender, force: BruteForce
) -> None:
    table = pq.read_table(saved.per_target)
    assert table["user_id"].to_pylist() == dataset.users
    split = held_out(dataset, "test")
    assert table["target_item_id"].to_pylist() == [dataset.item_ids[t] for t in split.targets]
    ranks = table["rank"].to_pylist()
    assert ranks == ranks_of(recommender, split, K, True, 16).ranks.tolist()
    for at in BRUTE:
        rank = force.rank(split.histories[at], split.targets[at], set(split.histories[at].tolist()))
        assert ranks[at] == (rank if rank <= K else 0)
    found = json.loads((saved.directory / "report.json").read_text())
    for system, column in (("model", ranks), ("most_popular", table["most_popular_rank"].to_pylist())):
        for cutoff in (1, 5, 10, 20):
            hits = [1 <= rank <= cutoff for rank in column]
            gains = [hit / math.log2(rank + 1) if hit else 0.0 for hit, rank in zip(hits, column, strict=True)]
            for name, values in ((f"HR@{cutoff}", hits), (f"NDCG@{cutoff}", gains)):
                mean = sum(values) / len(values)
                assert report.metrics[system][name] == found["metrics"][system][name] == pytest.approx(mean)
                low, high = report.intervals[system][name]
                assert low <= mean <= high
    assert report.targets == found["targets"] == len(dataset.users)
    assert report.invalid_rate == 0
    assert report.exact_rate == 1
    assert report.expansions > 0


def test_most_popular_is_counted_on_what_training_sees(report: Report, saved: Saved, dataset: Dataset) -> None:
    """Each user's items but the last two; bought items are not ranked; ties in catalogue order."""
    split = held_out(dataset, "test")
    counts = np.zeros(len(dataset.item_ids), int)
    for history in split.histories:
        np.add.at(counts, history[:-1], 1)
    ranks = pq.read_table(saved.per_target)["most_popular_rank"].to_pylist()
    for history, target, rank in zip(split.histories, split.targets, ranks, strict=True):
        left = [i for i in range(len(counts)) if i not in set(history.tolist())]
        assert rank == 1 + sorted(left, key=lambda i: (-counts[i], i)).index(target)


def test_differences_to_the_floors_are_paired(report: Report) -> None:
    assert list(report.differences) == ["most_popular", "itemknn", "tfidf"]
    for floor, differences in report.differences.items():
        for name, (low, high) in differences.items():
            mean = report.metrics["model"][name] - report.metrics[floor][name]
            assert low <= mean <= high


def test_floors_are_ranked_like_the_model(report: Report, saved: Saved, floors: Path, dataset: Dataset) -> None:
    """Each floor's ranks, under both policies, and their means; kept floors are used again."""
    table = pq.read_table(saved.per_target)
    split = held_out(dataset, "test")
    for kind in ("itemknn", "tfidf"):
        [bundle] = floors.glob(f"{kind}-*")
        floor = load_recommender(bundle)
        for column, policy, left_out in (
            (f"{kind}_rank", "seen left out", True),
            (f"{kind}_rank_seen_allowed", "seen allowed", False),
        ):
            ranks = ranks_of(floor, split, K, left_out, 16).ranks
            assert table[column].to_pylist() == ranks.tolist()
            mean = metric_values(ranks, [10])["NDCG@10"].mean()
            assert report.policies[policy][kind]["NDCG@10"] == pytest.approx(mean)
        assert report.metrics[kind]["NDCG@10"] == report.policies["seen left out"][kind]["NDCG@10"]
    changed = {path: path.stat().st_mtime_ns for path in floors.rglob("*.safetensors")}
    config = EvaluationConfig(batch=7, bootstrap=100, exclude_seen=True)
    kept_floors(dataset, config, floors, lambda text: pytest.fail(text))
    assert changed == {path: path.stat().st_mtime_ns for path in floors.rglob("*.safetensors")}


def test_both_policies_of_the_model(report: Report, saved: Saved, dataset: Dataset, recommender: Recommender) -> None:
    table = pq.read_table(saved.per_target)
    split = held_out(dataset, "test")
    assert table["rank_seen_allowed"].to_pylist() == ranks_of(recommender, split, K, False, 16).ranks.tolist()
    assert report.policies["seen left out"]["model"]["NDCG@10"] == report.metrics["model"]["NDCG@10"]


def test_segments_and_lists_are_saved(report: Report, saved: Saved, dataset: Dataset) -> None:
    assert saved.report["segments"] == report.segments
    for labels in report.segments.values():
        assert sum(of["model"]["targets"] for of in labels.values()) == report.targets
        for system in ("model", "most_popular", "itemknn", "tfidf"):
            parts = [of[system]["targets"] * of[system]["NDCG@10"] for of in labels.values()]
            assert sum(parts) / report.targets == pytest.approx(report.metrics[system]["NDCG@10"])
    assert set(report.lists) == {"model", "itemknn", "tfidf"}
    assert {"ARP", "coverage", "gini", "unseen", "ORRatio", "MGU", "DGU"} <= set(report.lists["model"])
    table = pq.read_table(saved.per_target)
    assert table["known_user"].to_pylist() == [True] * len(dataset.users)
    unseen = np.mean([count == 0 for count in table["target_popularity"].to_pylist()])
    assert report.reachable["unseen"] == pytest.approx(unseen)


@pytest.mark.usefixtures("ray_cluster")
def test_an_unknown_category_is_refused(tiny_bundle: Path, tiny_prepared: Prepared, tmp_path: Path) -> None:
    config = EvaluationConfig(category="colour")
    with pytest.raises(UserError, match=r"evaluation\.category: the items have no column 'colour'; there are: item_id"):
        evaluate(tiny_bundle, tiny_prepared.dataset, "test", config, ClusterConfig(), lambda text: None)


def test_compare(report: Report, saved: Saved, tmp_path: Path) -> None:
    mine = saved.per_target
    same = compare(mine, mine)
    assert same["difference"] == 0
    assert same["interval"] == (0, 0)
    table = pq.read_table(mine)
    perfect = table.set_column(table.column_names.index("rank"), "rank", pa.array(np.ones(len(table), np.int64)))
    pq.write_table(perfect, tmp_path / "perfect.parquet")
    found = compare(tmp_path / "perfect.parquet", mine)
    assert found["first"] == 1
    assert found["second"] == pytest.approx(report.metrics["model"]["NDCG@10"])
    assert found["difference"] == pytest.approx(1 - report.metrics["model"]["NDCG@10"])
    low, high = found["interval"]
    assert 0 < low <= found["difference"] <= high <= 1
    hits = compare(tmp_path / "perfect.parquet", mine, "HR@5")
    assert hits["second"] == pytest.approx(report.metrics["model"]["HR@5"])


def test_compare_refuses_other_targets(report: Report, saved: Saved, tmp_path: Path) -> None:
    table = pq.read_table(saved.per_target)
    pq.write_table(table.slice(1), tmp_path / "fewer.parquet")
    pq.write_table(table.take(list(range(len(table)))[::-1]), tmp_path / "turned.parquet")
    for name in ("fewer", "turned"):
        with pytest.raises(UserError, match="did not rank the same targets; evaluate both on the same split"):
            compare(saved.per_target, tmp_path / f"{name}.parquet")


def with_candidates(prepared: Prepared, directory: Path) -> Dataset:
    """The tiny dataset, where each second test target has five candidates: itself and what lies around it."""
    path = shutil.copytree(prepared.dataset, directory / "dataset")
    table, items = pq.read_table(path / "targets.parquet"), len(Dataset.load(path).item_ids)
    targets = Dataset.load(path).held_out_items("test").tolist()
    lists = [[(item + step) % items for step in (2, 1, 0, -1, -2)] if n % 2 else None for n, item in enumerate(targets)]
    before = len(table) - len(targets)
    assert table["split"].to_pylist()[before:] == ["test"] * len(targets)
    column = pa.array([None] * before + lists, pa.list_(pa.int32()))
    pq.write_table(table.append_column("candidates", column), path / "targets.parquet")
    return Dataset.load(path)


@pytest.mark.usefixtures("ray_cluster")
def test_candidates_are_ranked_by_the_model_and_the_floors(
    tiny_bundle: Path, tiny_prepared: Prepared, force: BruteForce, floors: Path, tmp_path: Path
) -> None:
    dataset = with_candidates(tiny_prepared, tmp_path)
    (tmp_path / "bundle").symlink_to(tiny_bundle)
    arguments = (dataset.path, "test", CONFIG.model_copy(update={"both_policies": False}), CLUSTER, lambda text: None)
    found, where = evaluate(tmp_path / "bundle", *arguments, floors_dir=floors)
    split, table = held_out(dataset, "test"), pq.read_table(where.per_target)
    assert split.candidates is not None
    given = list(range(1, len(split), 2))
    assert (found.candidates["targets"], found.candidates["items"]) == (len(given), 5)
    assert list(found.candidates["systems"]) == ["model", "most_popular", "itemknn", "tfidf"]
    assert where.report["candidates"] == found.candidates
    for system, figures in found.candidates["systems"].items():
        hits = table["candidate_hit" if system == "model" else f"{system}_candidate_hit"].to_pylist()
        assert hits[::2] == [None] * len(hits[::2])
        assert figures == {"HR@1": pytest.approx(np.mean(hits[1::2])), "valid": 1.0}
    for at in given[:4]:
        scores = force.scores(split.histories[at])
        best = max(split.candidates[at].tolist(), key=lambda item: scores[item])
        assert table["candidate_hit"][at].as_py() == (best == split.targets[at])
    popular = [max(sorted(split.candidates[at].tolist()), key=lambda i: dataset.popularity()[i]) for at in given]
    assert found.candidates["systems"]["most_popular"]["HR@1"] == np.mean(popular == split.targets[given])


def test_compare_refuses_what_is_no_evaluation(report: Report, saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.parquet"):
        compare(saved.per_target, tmp_path / "nothing.parquet")
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(UserError, match=r"text\.parquet"):
        compare(saved.per_target, tmp_path / "text.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(UserError, match=r"other\.parquet"):
        compare(saved.per_target, tmp_path / "other.parquet")


@pytest.mark.usefixtures("ray_cluster")
def test_a_bundle_of_another_catalogue_is_refused(
    tiny_bundle: Path, tiny_prepared: Prepared, tmp_path: Path, dataset: Dataset
) -> None:
    other = shutil.copytree(tiny_prepared.dataset, tmp_path / "dataset")
    table = pq.read_table(other / "items.parquet")
    ids = pa.array([f"x{i}" for i in range(len(table))])
    pq.write_table(table.set_column(table.column_names.index("item_id"), "item_id", ids), other / "items.parquet")
    arguments = ("test", EvaluationConfig(), ClusterConfig(workers=1), lambda text: None)
    with pytest.raises(UserError, match="its catalogue is not the one of"):
        evaluate(tiny_bundle, other, *arguments)
    with pytest.raises(UserError, match="not a bundle"):
        evaluate(tmp_path / "nowhere", other, *arguments)
    assert not (tmp_path / "out").exists()

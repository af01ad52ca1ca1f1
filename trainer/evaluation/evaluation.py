"""`ilrec evaluate`: full ranking of held-out targets, spread over Ray workers, with the floors beside it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from recommender.bundle import LANGUAGE_MODEL, Manifest, read_manifest
from recommender.catalogue.catalogue import Catalogue
from recommender.config import SearchConfig
from recommender.errors import UserError
from recommender.files import digest, new_directory, read_json, write_json
from recommender.loading import load_recommender
from recommender.metrics import bootstrap_interval, metric_values
from trainer.cluster import check_resources, connect
from trainer.config import ClusterConfig, EvaluationConfig
from trainer.data.dataset import Dataset
from trainer.evaluation.breakdown import breakdown, categories_of, per_target, rank_floors
from trainer.evaluation.ranking import HeldOut, Progress, Ranking, held_out, ranks_of
from trainer.evaluation.saved import EVALUATION, REPORT, TARGETS, Saved
from trainer.parts import Say


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
        split: "validation" or "test".
        targets: how many were ranked.
        metrics: system ("model", "most_popular", "itemknn", "tfidf") → metric name → mean.
        intervals: the same, → 95 % interval, from a bootstrap over users.
        differences: floor → metric name → paired 95 % interval of model − floor.
        invalid_rate: share of listed items that do not exist, repeat or were excluded; must be 0.
        exact_rate: share of answers proven to be the true top-K.
        expansions: mean number of trie nodes expanded for an answer.
        seconds: wall time of the ranking.
        evaluated_at: when, in UTC.
        floor_seconds: wall time of each floor's ranking, with seen items allowed and left out.
        segments, lists, reachable, policies, candidates: see `trainer/evaluation/breakdown.py`.
    """

    split: str
    targets: int
    metrics: dict[str, dict[str, float]]
    intervals: dict[str, dict[str, tuple[float, float]]]
    differences: dict[str, dict[str, tuple[float, float]]]
    invalid_rate: float
    exact_rate: float
    expansions: float
    seconds: float
    evaluated_at: str
    floor_seconds: dict[str, float]
    segments: dict[str, Any]
    lists: dict[str, dict[str, float]]
    reachable: dict[str, float]
    policies: dict[str, dict[str, dict[str, float]]]
    candidates: dict[str, Any] = field(default_factory=dict)


def evaluate(
    bundle: Path,
    dataset_dir: Path,
    split: str,
    config: EvaluationConfig,
    cluster: ClusterConfig,
    say: Say,
    search: SearchConfig | None = None,
    floors_dir: Path | None = None,
) -> tuple[Report, Saved]:
    """Rank every target of a split with a bundle and save the outcome beside it, see `trainer/evaluation/saved.py`.

    What was evaluated before with the same settings is not ranked again.

    Args:
        search: in place of the bundle's own search settings.
        floors_dir: where ItemKNN and TF-IDF are kept; None: most-popular alone stands beside the model.

    Raises:
        UserError: the bundle does not fit the dataset's catalogue, the split is empty, the cluster is too small, or
            there is no column `evaluation.category`.
    """
    dataset = Dataset.load(dataset_dir)
    limit = config.test_targets if split == "test" else config.validation_targets
    targets = held_out(dataset, split, limit)
    if not len(targets):
        raise UserError(f"{dataset_dir}: the {split} split has no targets")
    manifest = read_manifest(bundle)
    if dataset.item_ids != Catalogue.load(bundle).item_ids:
        raise UserError(
            f"{bundle}: its catalogue is not the one of {dataset_dir}; prepare the data that it was made for"
        )
    if manifest.searched(search) == manifest.searched():
        search = None
    config = config.model_copy(update={"floors": tuple(kind for kind in config.floors if kind != manifest.kind)})
    named = _settings(manifest, dataset, limit, config, search, targets.candidates is not None)
    saved = Saved(bundle.parent / EVALUATION / f"{split}-{named}")
    if (found := read_json(saved.directory / REPORT)) is not None:
        say(f"evaluated before with these settings: {saved.directory}")
        return Report(**found), saved
    if manifest.data_fingerprint != dataset.fingerprint:
        say(f"note: {bundle} was trained on other data than {dataset_dir}; it may have seen these targets")
    if config.category is not None:
        categories_of(dataset, config.category)  # before the ranking, which takes long
    connect()
    k = max(10, *config.cutoffs)
    started = time.monotonic()
    ranking = _rank(bundle, dataset_dir, split, limit, len(targets), k, config, cluster, say, search)
    seconds = time.monotonic() - started
    other = None
    if config.both_policies or manifest.kind != LANGUAGE_MODEL:
        flipped = config.model_copy(update={"exclude_seen": not config.exclude_seen})
        other = _rank(bundle, dataset_dir, split, limit, len(targets), k, flipped, cluster, say, search).ranks

    floors = rank_floors(dataset, targets, k, config, floors_dir, say)
    values = {"model": metric_values(ranking.ranks, config.cutoffs)} | {
        floor: metric_values(ranks[config.exclude_seen], config.cutoffs) for floor, ranks in floors.ranks.items()
    }
    users = np.array(dataset.users)[dataset.targets[split].sequence[targets.numbers]]
    report = Report(
        split=split,
        targets=len(targets),
        metrics={system: {name: float(v.mean()) for name, v in of.items()} for system, of in values.items()},
        intervals={
            system: {name: bootstrap_interval(v, users, config.bootstrap) for name, v in of.items()}
            for system, of in values.items()
        },
        differences={
            floor: {
                name: bootstrap_interval(v - values[floor][name], users, config.bootstrap)
                for name, v in values["model"].items()
            }
            for floor in floors.ranks
        },
        invalid_rate=ranking.invalid / (len(targets) * k),
        exact_rate=float(ranking.exact.mean()),
        expansions=float(ranking.expansions.mean()),
        seconds=seconds,
        evaluated_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        floor_seconds=floors.seconds,
        **breakdown(dataset, split, targets, ranking, floors, other, config),
    )
    columns = per_target(dataset, split, targets, ranking, floors, other, config.exclude_seen)
    with new_directory(saved.directory) as aside:
        _write_per_target(dataset, users, targets, ranking, columns, aside / TARGETS)
        write_json(aside / REPORT, vars(report))
    return report, saved


def _settings(
    manifest: Manifest,
    dataset: Dataset,
    limit: int | None,
    config: EvaluationConfig,
    search: SearchConfig | None,
    has_candidates: bool,
) -> str:
    """A name for all that decides an evaluation's outcome. (Earlier releases did not rank candidates.)"""
    decisive = config.model_dump(mode="json", exclude={"test_targets", "validation_targets", "batch"})
    searched = None if search is None else search.model_dump(mode="json")
    ranked = ["candidates"] if has_candidates else []
    return digest(manifest.checksum, dataset.fingerprint, limit, decisive, searched, *ranked, length=8)


def _rank(
    bundle: Path,
    dataset_dir: Path,
    split: str,
    limit: int | None,
    total: int,
    k: int,
    config: EvaluationConfig,
    cluster: ClusterConfig,
    say: Say,
    search: SearchConfig | None,
) -> Ranking:
    """Deal the targets to Ray actors in chunks, longest histories first, and put the answers back in order."""
    workers = min(cluster.workers, math.ceil(total / config.batch))
    check_resources(cluster, workers)
    options: dict[str, Any] = {
        "num_cpus": cluster.cpus_per_worker,
        "num_gpus": cluster.gpus_per_worker,
        "max_restarts": cluster.max_failures,
        "max_task_retries": cluster.max_failures,  # what a lost worker was ranking is ranked again
    }
    environment = {"OMP_NUM_THREADS": str(max(1, int(cluster.cpus_per_worker)))}
    actor = ray.remote(_RankingWorker).options(**options, runtime_env={"env_vars": environment})
    device = "cuda" if cluster.gpus_per_worker else "cpu"
    arguments = (str(bundle.absolute()), str(dataset_dir.absolute()), split, limit, device, config.precision, search)
    actors: list[Any] = [actor.remote(*arguments) for _ in range(workers)]
    targets = held_out(Dataset.load(dataset_dir), split, limit)
    order = np.argsort([-len(history) for history in targets.histories], kind="stable")
    chunks: Iterator[np.ndarray] = iter(np.array_split(order, max(workers, math.ceil(total / (4 * config.batch)))))
    ranks, exact = np.zeros(total, np.int64), np.zeros(total, bool)
    expansions, invalid, done = np.zeros(total, np.int64), 0, 0
    items = np.full((total, k), -1, np.int32)
    chosen = None if targets.candidates is None else np.full(total, -1, np.int64)
    running = {}
    progress = Progress(f"{split}: ranked", total, say)

    def dispatch(worker: Any) -> None:
        if (at := next(chunks, None)) is not None:
            running[worker.rank.remote(at, k, config.exclude_seen, config.batch)] = (worker, at)

    for worker in actors:
        dispatch(worker)
    while running:
        (ready, *_), _ = ray.wait(list(running))
        worker, at = running.pop(ready)
        try:
            answer: Ranking = ray.get(ready)
        except ray.exceptions.RayActorError as error:
            raise UserError(
                "a ranking worker was lost, and cluster.max_failures restarts are used up: "
                f"{str(error).splitlines()[0]} Lower evaluation.batch if it was memory, then run this again"
            ) from error
        dispatch(worker)
        ranks[at], exact[at], expansions[at], items[at] = answer.ranks, answer.exact, answer.expansions, answer.items
        if chosen is not None and answer.chosen is not None:
            chosen[at] = answer.chosen
        invalid += answer.invalid
        done += len(at)
        progress(done)
    for worker in actors:
        ray.kill(worker)
    return Ranking(ranks, exact, expansions, items, invalid, chosen)


class _RankingWorker:
    """A Ray actor that holds the recommender and the held-out targets."""

    def __init__(
        self,
        bundle: str,
        dataset_dir: str,
        split: str,
        limit: int | None,
        device: str,
        precision: str | None,
        search: SearchConfig | None,
    ):
        import os

        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        dtype = None if precision is None else getattr(torch, precision)
        self._recommender = load_recommender(bundle, device, dtype, search)
        self._targets = held_out(Dataset.load(dataset_dir), split, limit)

    def rank(self, at: np.ndarray, k: int, exclude_seen: bool, batch: int) -> Ranking:
        return ranks_of(self._recommender, self._targets.take(at), k, exclude_seen, batch)


def _write_per_target(
    dataset: Dataset, users: np.ndarray, targets: HeldOut, ranking: Ranking, columns: dict[str, Any], path: Path
) -> None:
    listed = (ranking.items >= 0) & (ranking.items < len(dataset.item_ids))
    offsets = np.concatenate([[0], np.cumsum(listed.sum(1))]).astype(np.int32)
    items = pa.array(dataset.item_ids).take(pa.array(ranking.items[listed]))
    table = pa.table(
        {
            "user_id": users,
            "target_item_id": [dataset.item_ids[i] for i in targets.targets],
            "rank": ranking.ranks,
            "exact": ranking.exact,
            "expansions": ranking.expansions,
            **columns,
            "history_length": [len(history) for history in targets.histories],
            "target_popularity": dataset.popularity()[targets.targets],
            "recommended": pa.ListArray.from_arrays(offsets, items),
        }
    )
    pq.write_table(table, path)


def read_per_target(path: Path) -> pa.Table:
    """What `compare` needs of a per-target file.

    Raises:
        UserError: it is none.
    """
    try:
        return pq.read_table(path, columns=["user_id", "target_item_id", "rank"])
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"{path}: not the per-target file of an evaluation (evaluation/<split>-…/targets.parquet): {reason}"
        ) from None


def compare(first: Path, second: Path, metric: str = "NDCG@10", resamples: int = 10_000) -> dict[str, Any]:
    """Paired bootstrap over users of the difference of two evaluations of the same targets (per-target files).

    Returns:
        means of both, their difference and its 95 % interval.

    Raises:
        UserError: the two did not rank the same targets, or one of them cannot be read.
    """
    tables = [read_per_target(path) for path in (first, second)]
    for column in ("user_id", "target_item_id"):
        if not tables[0][column].equals(tables[1][column]):
            raise UserError(f"{first} and {second} did not rank the same targets; evaluate both on the same split")
    cutoff = int(metric.partition("@")[2])
    a, b = (metric_values(table["rank"].to_numpy(), [cutoff])[metric] for table in tables)
    return {
        "metric": metric,
        "first": float(a.mean()),
        "second": float(b.mean()),
        "difference": float((a - b).mean()),
        "interval": bootstrap_interval(a - b, tables[0]["user_id"].to_numpy(), resamples),
    }

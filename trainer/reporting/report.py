"""A run as one HTML page: how training went, what the model is worth, on which data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from recommender.collaborative.config import CollaborativeModelConfig
from recommender.files import read_json, write_text
from recommender.metrics import bootstrap_interval, metric_values
from recommender.segments import segments as parted
from trainer.config import LanguageModelConfig
from trainer.data.dataset import Dataset
from trainer.data.splits import SPLITS
from trainer.evaluation.ranking import held_out
from trainer.evaluation.saved import latest
from trainer.evaluation.standing import NAMES, standing
from trainer.experiment import Experiment
from trainer.loop.storage import SELECTION
from trainer.loop.worker import learning_rate
from trainer.parts import Prepared
from trainer.reporting import figures
from trainer.run import HISTORY

REPORT = "report.html"
_SEGMENTED = "NDCG@10"
_SAMPLES, _SHOWN_HISTORY, _SHOWN_ITEMS = 6, 8, 5

# What epochs report: title and explanation. What is not listed here is drawn under its own name.
_LOSSES = {
    "loss": ("Loss", "what is minimised, mean over the positions"),
    "cpo": ("CPO", "cross-entropy with the negatives penalised"),
    "cpd": ("CPD", "divergence of each layer from the last one"),
    "crr": ("CRR", "cross-entropy with the rewards' soft labels"),
    "negatives": ("Negatives", "|V_N|: how many a position has"),
    "with_negatives": ("With negatives", "share of the positions that have any"),
    "penalty": ("Penalty", "mean that CPO adds to a negative's logit"),
    "below_zero": ("Below zero", "share of the negatives whose logit is negative"),
    "crr_off_target": ("Off the target", "mass that CRR's rewards move to other tokens"),
    "crr_log_q_target": ("log q(target)", "of the target in CRR's soft labels"),
    "temperature": ("Temperature τ", "mean over the epoch's positions"),
}
_VALIDATION = {
    "validation_NDCG@10": ("Validation NDCG@10", "what the epoch is chosen by"),
    "validation_HR@10": ("Validation HR@10", "share of the targets among the first ten"),
    "validation_exact": ("Exact lists", "share proven to be the true top 10"),
}
_SPEED = {
    "tokens_per_second": ("Throughput", "tokens a second, all workers together"),
    "train_seconds": ("Training", "seconds an epoch"),
    "validation_seconds": ("Validation", "seconds an epoch"),
}


def write_report(experiment: Experiment, run: Path, prepared: Prepared) -> Path:
    """Draw what lies in a version's directory, so far: its history, the data's statistics, the latest test evaluation.

    Returns:
        `<run>/report.html`.
    """
    history: list[dict[str, float]] = read_json(run / HISTORY) or []
    saved = latest(run)
    test = None if saved is None else saved.report
    targets = None if saved is None else pq.read_table(saved.per_target)
    body = [f"<h1>{escape(experiment.name)}</h1>", f"<p>{escape(headline(experiment, history, test))}</p>"]
    if test:
        body += ["<h2>Test</h2>", *test_section(test)]
    if targets is not None and "target_popularity" in targets.column_names:
        body += [f"<h2>Who is served well</h2><p>Test {_SEGMENTED} by kind of target.</p>", *segments(targets)]
    if history:
        best = best_epoch(history)["epoch"]
        body += [f"<h2>Validation</h2><p>Marked: epoch {best}, whose weights are the bundle.</p>"]
        body += panels(history, _VALIDATION, best)
        body += ["<h2>Training</h2>", *panels(history, _training(history), schedule=rates(experiment, history))]
        body += ["<h2>Speed</h2>", *panels(history, _SPEED, base=0.0)]
    if targets is not None and "recommended" in targets.column_names:
        dataset = Dataset.load(prepared.dataset)
        body += ["<h2>Some of its lists</h2>", *samples(dataset, targets, experiment.evaluation.test_targets)]
    body += ["<h2>Data</h2>", data_section(prepared.stats())]
    config = yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    body += ["<h2>Where things lie</h2>", f"<p>{escape(str(run))}</p>", files_section(run)]
    body += [f"<h2>Config</h2><details><summary>all fields</summary><pre>{escape(config)}</pre></details>"]
    path = run / REPORT
    write_text(path, figures.page(experiment.name, body))
    return path


def best_epoch(history: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """The epoch whose weights are the bundle's."""
    return max(history, key=lambda epoch: epoch[SELECTION])


def headline(experiment: Experiment, history: Sequence[Mapping[str, float]], test: dict[str, Any] | None) -> str:
    """The run in a sentence or two."""
    recommender = experiment.recommender
    if isinstance(recommender, LanguageModelConfig):
        said = [f"A language model trained with {experiment.objective.kind}."]
    elif isinstance(recommender, CollaborativeModelConfig):
        said = [f"A collaborative model, {recommender.kind}."]
    else:
        said = [
            f"A floor, {recommender.kind}, fitted without training; each setting that was tried counts as an epoch."
        ]
    if history:
        best = best_epoch(history)
        said.append(f"Epoch {best['epoch']} of {len(history)} is the best: validation NDCG@10 {best[SELECTION]:.4f}.")
    if test and (value := test["metrics"]["model"].get("NDCG@10")) is not None:
        said.append(f"Test NDCG@10 {value:.4f}; {standing(test['metrics'], test.get('differences', {}))}.")
    return " ".join(said)


def test_section(test: Mapping[str, Any]) -> Iterator[str]:
    """The metrics with their intervals, those of the floors beside them."""
    yield (
        f"<p>{test['targets']:,} targets, each ranked among the whole catalogue; bars are 95 % intervals. "
        f"{test['exact_rate']:.1%} of the lists are proven to be the true top-K, {test['invalid_rate']:.1%} of what "
        "they list is invalid.</p>"
    )
    systems = {system: NAMES[system] for system in test["metrics"]}
    if chosen := test.get("candidates"):
        of = ", ".join(f"{systems[system]} {found['HR@1']:.4f}" for system, found in chosen["systems"].items())
        yield (
            f"<p>HR@1 of {chosen['items']:g} candidates, {chosen['targets']:,} targets: {of}. Nothing but the "
            "candidates is scored, so the valid ratio is 1.</p>"
        )
    yield figures.intervals(
        {
            name: {
                title: (test["metrics"][system][name], *test["intervals"][system][name])
                for system, title in systems.items()
            }
            for name in test["metrics"]["model"]
        }
    )


def segments(targets: pa.Table) -> Iterator[str]:
    """The metric by how often the target occurs in training, and by the length of its history."""
    cutoff = int(_SEGMENTED.partition("@")[2])
    columns = {"model": "rank"} | {NAMES[floor]: f"{floor}_rank" for floor in NAMES}
    values = {
        system: metric_values(targets[column].to_numpy(), [cutoff])[_SEGMENTED]
        for system, column in columns.items()
        if column in targets.column_names
    }
    known = targets["known_user"].to_numpy() if "known_user" in targets.column_names else None
    found = parted(targets["target_popularity"].to_numpy(), targets["history_length"].to_numpy(), known)
    users = targets["user_id"].to_numpy()
    yield (
        "<p>Targets that training has seen, in thirds: those of rarely bought items (tail) to those of the most "
        "popular (head).</p>"
    )
    yield figures.intervals(_by_segment(values, users, found["popularity"]))
    yield "<p>All targets, in thirds by the number of items before them.</p>"
    yield figures.intervals(_by_segment(values, users, found["history"]))
    if len(found.get("user", {})) > 1:
        yield "<p>New users, and those whom training has seen.</p>"
        yield figures.intervals(_by_segment(values, users, found["user"]))


def _by_segment(
    values: Mapping[str, np.ndarray], users: np.ndarray, masks: Mapping[str, np.ndarray]
) -> dict[str, dict[str, tuple[float, float, float]]]:
    return {
        f"{label} ({mask.sum():,} targets)": {
            system: (float(of[mask].mean()), *bootstrap_interval(of[mask], users[mask]))
            for system, of in values.items()
        }
        for label, mask in masks.items()
    }


def panels(
    history: Sequence[Mapping[str, float]],
    titles: Mapping[str, tuple[str, str]],
    chosen: float | None = None,
    base: float | None = None,
    schedule: Sequence[tuple[float, float]] = (),
) -> Iterator[str]:
    """A small figure for each quantity that the epochs report.

    Args:
        titles: name → title, explanation; a name of which epochs report `<name>_<number>` is drawn with a curve each.
        chosen: the epoch that is marked.
        base: see `figures.lines`.
        schedule: (step, learning rate), drawn last if there is any.
    """
    yield '<div class="panels">'
    for name, (title, note) in titles.items():
        if curves := _curves(history, name):
            yield figures.lines(title, note, curves, chosen=chosen, base=base)
    if schedule:
        yield figures.lines("Learning rate", "as scheduled", {"rate": schedule}, unit="step", dots=False)
    yield "</div>"


def _curves(history: Sequence[Mapping[str, float]], name: str) -> dict[str, list[tuple[float, float]]]:
    pattern = re.compile(rf"{re.escape(name)}(_\d+)?")
    names = sorted({each for epoch in history for each in epoch if pattern.fullmatch(each)}, key=_by_number)
    return {
        (each if each == name else f"layer {each.removeprefix(f'{name}_')}"): [
            (epoch["epoch"], float(epoch[each])) for epoch in history if each in epoch
        ]
        for each in names
    }


def _by_number(name: str) -> int:
    return int(re.sub(r"\D", "", name) or 0)


def _training(history: Sequence[Mapping[str, float]]) -> dict[str, tuple[str, str]]:
    """Titles of what the objective reports: those known, then others by name."""
    known = {"epoch", "step", *_VALIDATION, *_SPEED}
    names = dict.fromkeys(re.sub(r"_\d+$", "", name) for epoch in history for name in epoch if name not in known)
    return {name: _LOSSES[name] for name in _LOSSES if name in names} | {
        name: (name, "") for name in names if name not in _LOSSES
    }


def rates(experiment: Experiment, history: Sequence[Mapping[str, float]]) -> list[tuple[float, float]]:
    """(step, learning rate) until the run's end, at most 200 of them; none for a collaborative model, whose rate does
    not change."""
    if not isinstance(experiment.recommender, LanguageModelConfig):
        return []
    done = int(history[-1]["step"])
    total = round(done / history[-1]["epoch"] * experiment.training.epochs)
    steps = np.unique(np.linspace(0, done - 1, min(done, 200)).astype(int)).tolist()
    return [(step + 1, learning_rate(experiment.training, step, total)) for step in steps]


def samples(dataset: Dataset, targets: pa.Table, limit: int | None) -> Iterator[str]:
    """Some histories, evenly spread over the test targets, with what was recommended; targets in bold."""
    split = held_out(dataset, "test", limit)
    if [dataset.item_ids[item] for item in split.targets] != targets["target_item_id"].to_pylist():
        yield "<p>The dataset has changed since the evaluation; evaluate again.</p>"
        return
    title_of = dict(zip(dataset.item_ids, dataset.titles, strict=True))
    yield "<p>Taken evenly from the test targets, good and bad. The target is bold.</p><table class=lists>"
    yield "<tr><th>history, oldest first<th>recommended<th>target"
    for at in np.unique(np.linspace(0, len(targets) - 1, _SAMPLES).astype(int)).tolist():
        row = {name: targets[name][at].as_py() for name in ("target_item_id", "recommended", "rank")}
        history = [dataset.titles[item] for item in split.histories[at]]
        before = ["…"] if len(history) > _SHOWN_HISTORY else []
        listed = [
            f"<b>{escape(title_of[item])}</b>" if item == row["target_item_id"] else escape(title_of[item])
            for item in row["recommended"][:_SHOWN_ITEMS]
        ]
        place = f"rank {row['rank']}" if row["rank"] else f"not among {len(row['recommended'])}"
        yield (
            f"<tr><td>{'<br>'.join(map(escape, before + history[-_SHOWN_HISTORY:]))}"
            f"<td>{'<br>'.join(listed)}<td>{escape(title_of[row['target_item_id']])} ({place})"
        )
    yield "</table>"


def data_section(stats: Mapping[str, Any]) -> str:
    """What the dataset is made of."""
    length = stats["sequence_length"]
    rows = [
        ["users", f"{stats['users']:,}"],
        ["items", f"{stats['items']:,}, {stats['items_without_interactions']:,} of them without interactions"],
        ["interactions", f"{stats['interactions']:,} (density {stats['density']:.3%})"],
        ["targets", ", ".join(f"{stats[split]:,} {split}" for split in SPLITS)],
        *(
            [f"{split} targets", f"{of['unseen']:.1%} unseen in training, {of['seen']:.1%} in their own history"]
            for split, of in stats.get("held_out", {}).items()
        ),
        ["sequence length", f"median {length['median']:g}, 95 % at most {length['p95']:g}, longest {length['max']:,}"],
        ["titles", f"{stats['duplicate_titles']:,} occur more than once, {stats['empty_titles']:,} are empty"],
    ]
    if "tokens_per_item" in stats:
        spelled = (
            f"{stats['tokens_per_item']:.1f} tokens an item, {stats['valid_tokens_per_position']:.1f} valid tokens"
        )
        rows.append(["spelling", f"{spelled} a position"])
    if "cut_titles" in stats:
        alike = f"{stats['colliding_titles']:,} are spelled like another one ({stats['colliding_once_cut']:,} once cut)"
        rows.append(["cut titles", f"{stats['cut_titles']:,}; {alike}"])
    return figures.table([], rows)


def files_section(run: Path) -> str:
    """What lies in the run's directory, with links."""
    what = {
        "bundle": "the best epoch: ilrec serve, ilrec recommend",
        "config.yaml": "all fields of the experiment",
        "training.json": "what each epoch reported",
        "train.log": "progress",
        "tensorboard": "curves within the epochs: tensorboard --logdir",
        "evaluation": "metrics, and a row a target",
        "ray": "checkpoints",
    }
    rows = [f'<tr><td><a href="{name}">{name}</a><td>{text}' for name, text in what.items() if (run / name).exists()]
    return "<table>" + "\n".join(rows) + "</table>"

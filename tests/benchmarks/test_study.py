"""The protocol of a study, with trainings and evaluations that only pretend."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from benchmarks.config import StudyConfig, as_override, load_study
from benchmarks.runs import Study
from benchmarks.statistics import paired_difference
from benchmarks.study import conduct
from recommender.bundle import Manifest
from recommender.errors import UserError
from recommender.metrics import metric_values
from tests.versions import directory_of
from trainer.experiment import load_experiment

STUDIES = sorted((Path(__file__).parents[2] / "benchmarks" / "studies").glob("*.yaml"))
TARGETS = 300

STUDY: dict[str, Any] = {
    "base": "configs/demo.yaml",
    "set": {"world.users": TARGETS},
    "seeds": [0, 1],
    "reference": "lml",
    "methods": {
        "lml": {
            "set": {"objective": {"kind": "lml"}},
            "trials": [{"training.learning_rate": 0.001}, {"training.learning_rate": 0.002}],
        },
        "ilrec": {
            "set": {"objective": {"kind": "ilrec", "crr_weight": 0.01}},
            "trials": [{"objective.beta": 0.1}, {"objective.beta": 0.2}],
        },
        "no-cpd": {"of": "ilrec", "set": {"objective.cpd_weight": 0.0}},
        "sasrec": {
            "set": {"recommender": {"kind": "sasrec"}},
            "trials": [{"recommender.dropout": 0.2}, {"recommender.dropout": 0.4}],
        },
    },
}
# Validation by method and trial: the second trial of ilrec and the first of the others win.
VALIDATION = {"lml-1": 0.3, "lml-2": 0.2, "ilrec-1": 0.4, "ilrec-2": 0.5, "sasrec-1": 0.25, "sasrec-2": 0.25}
FLOOR_RANKS = {"most_popular": [1] * 30 + [0] * 270, "itemknn": [2] * 150 + [0] * 150}  # of 300 targets
SKILL = {"lml": 0.3, "ilrec": 0.5, "no-cpd": 0.4, "sasrec": 0.2}  # share of the targets that are found


class Ended:
    """A process that has ended."""

    def __init__(self, status: int):
        self._status = status

    def poll(self) -> int:
        return self._status


class Pretence:
    """Leaves the files that `ilrec train` and `ilrec evaluate` leave.

    Attributes:
        commands: what was run, as (verb, run name).
        broken: names of runs that fail.
    """

    def __init__(self) -> None:
        self.commands: list[tuple[str, str]] = []
        self.broken: set[str] = set()

    def __call__(self, arguments: Sequence[str], log: Path) -> Ended:
        verb, base, *overrides = arguments
        experiment = load_experiment(base, [text for text in overrides if text != "--set"])
        name = experiment.name
        self.commands.append((verb, name))
        with log.open("a") as file:
            file.write(f"this is the log of {verb}\n")
        if name in self.broken:
            return Ended(2)
        method, trial, seed = name.removeprefix("toy-").rsplit("-", 2)
        if verb == "train":
            run = experiment.model.begin().directory
            (run / "bundle").mkdir(parents=True)
            metrics = {"validation_NDCG@10": VALIDATION.get(f"{method}-{trial}", 0.1)}
            (run / "bundle" / "recommender.json").write_text(Manifest(name=name, metrics=metrics).model_dump_json())
            (run / "training.json").write_text(json.dumps([{"train_seconds": 40.0, "validation_seconds": 2.0}] * 2))
        else:
            run = directory_of(experiment)
            assert (run / "bundle").exists()
            (run / "evaluation" / "test-1").mkdir(parents=True)
            rng = np.random.default_rng([len(method), int(seed[1:])])
            ranks = np.where(rng.random(TARGETS) < SKILL[method], rng.integers(1, 11, TARGETS), 0)
            targets = {"user_id": [f"u{n}" for n in range(TARGETS)], "target_item_id": ["i1"] * TARGETS}
            beside = {f"{floor}_rank": FLOOR_RANKS[floor] for floor in FLOOR_RANKS if floor != method}
            table = pa.table({**targets, "rank": ranks, **beside})
            pq.write_table(table, run / "evaluation" / "test-1" / "targets.parquet")
            values = {metric: float(each.mean()) for metric, each in metric_values(ranks, [1, 5, 10, 20]).items()}
            report = {"metrics": {"model": values, "most_popular": values}, "exact_rate": 1.0, "invalid_rate": 0.0}
            (run / "evaluation" / "test-1" / "report.json").write_text(json.dumps(report))
        return Ended(0)


@pytest.fixture
def pretence() -> Pretence:
    return Pretence()


@pytest.fixture
def say() -> list[str]:
    return []


@pytest.fixture
def study(tmp_path: Path) -> Callable[..., Study]:
    """A study under `tmp_path`, its config changed by a function; anew at each call, as by another command."""

    def make(change: Callable[[dict[str, Any]], object] = lambda values: None) -> Study:
        values = json.loads(json.dumps(STUDY))
        change(values)
        return Study(StudyConfig.model_validate(values), "toy", tmp_path)

    return make


def test_the_protocol(study: Callable[..., Study], pretence: Pretence, say: list[str]) -> None:
    assert conduct(study(), pretence, 1, say.append) == []
    verbs = [verb for verb, _ in pretence.commands]
    assert verbs == ["train"] * (6 + 3 + 2) + ["evaluate"] * 8
    trained = [name for verb, name in pretence.commands if verb == "train"]
    tuning = [f"toy-{method}-{trial}-s0" for method in ("lml", "ilrec", "sasrec") for trial in (1, 2)]
    assert trained[:6] == tuning
    assert sorted(trained[6:]) == [
        "toy-ilrec-2-s1",
        "toy-lml-1-s1",
        "toy-no-cpd-2-s0",  # an ablation takes over the trial, and is itself trained with every seed
        "toy-no-cpd-2-s1",
        "toy-sasrec-1-s1",  # of equals the first
    ]
    tested = [name for verb, name in pretence.commands if verb == "evaluate"]
    assert set(tested) == set(trained[6:]) | {"toy-lml-1-s0", "toy-ilrec-2-s0", "toy-sasrec-1-s0"}
    assert max(Counter(tested).values()) == 1


def test_what_is_done_is_not_repeated(study: Callable[..., Study], pretence: Pretence, say: list[str]) -> None:
    conduct(study(), pretence, 1, say.append)
    report = (study().directory / "report.json").read_text()
    again = Pretence()
    assert conduct(study(), again, 1, say.append) == []
    assert again.commands == []
    assert (study().directory / "report.json").read_text() == report


def test_a_half_written_run_is_not_done(study: Callable[..., Study], pretence: Pretence, say: list[str]) -> None:
    conduct(study(), pretence, 1, say.append)
    run = study().directory / "toy-lml-1-s1" / "1"
    (run / "training.json").unlink()
    shutil.rmtree(run / "bundle")
    shutil.rmtree(run / "evaluation")
    again = Pretence()
    conduct(study(), again, 1, say.append)
    assert again.commands == [("train", "toy-lml-1-s1"), ("evaluate", "toy-lml-1-s1")]


def test_runs_are_what_the_study_says(study: Callable[..., Study]) -> None:
    made = study()
    first = made.trials("ilrec")[1].experiment
    assert first.objective.model_dump()["beta"] == 0.2
    assert first.world is not None
    assert first.world.users == TARGETS
    derived = made.trials("no-cpd")
    assert [run.name for run in derived] == ["toy-ilrec-1-s0", "toy-ilrec-2-s0"]
    settings = made.config.settings("no-cpd", 2)
    assert settings["objective.beta"] == 0.2
    assert settings["objective.cpd_weight"] == 0.0
    overrides = [as_override(path, value) for path, value in settings.items()]
    assert load_experiment("configs/demo.yaml", overrides).objective.model_dump()["cpd_weight"] == 0


def test_each_kind_has_its_seed(study: Callable[..., Study], pretence: Pretence, say: list[str]) -> None:
    made = study()
    conduct(made, pretence, 1, say.append)
    language_model, collaborative = made.finals("lml")[1], made.finals("sasrec")[1]
    assert language_model.experiment.training.seed == 1
    assert collaborative.experiment.recommender.model_dump()["seed"] == 1
    assert collaborative.experiment.training.seed == 0


def test_a_failed_run_is_shown_and_the_others_go_on(
    study: Callable[..., Study], pretence: Pretence, say: list[str]
) -> None:
    pretence.broken = {"toy-ilrec-1-s0", "toy-lml-1-s1"}
    assert conduct(study(), pretence, 2, say.append) == ["toy-ilrec-1-s0", "toy-lml-1-s1"]
    text = "\n".join(say)
    assert "train toy-ilrec-1-s0: FAILED with status 2" in text
    assert "    this is the log of train" in text
    report = json.loads((study().directory / "report.json").read_text())
    assert list(report["methods"]) == ["sasrec"]
    assert report["unfinished"] == ["lml", "ilrec", "no-cpd"]
    assert "difference" not in report["methods"]["sasrec"]

    mended = Pretence()
    assert conduct(study(), mended, 2, say.append) == []
    trained = [name for verb, name in mended.commands if verb == "train"]
    assert trained[0] == "toy-ilrec-1-s0"
    assert sorted(trained[1:]) == ["toy-ilrec-2-s1", "toy-lml-1-s1", "toy-no-cpd-2-s0", "toy-no-cpd-2-s1"]


def test_jobs_run_at_once(study: Callable[..., Study], say: list[str]) -> None:
    """Each process ends after three looks at it; never more than two have not ended."""
    pretence, alive, most = Pretence(), Counter[str](), 0

    class Slow(Ended):
        looks = 0

        def poll(self) -> int | None:  # type: ignore[override]
            nonlocal most
            self.looks += 1
            if self.looks == 3:
                alive["now"] -= 1
            return 0 if self.looks >= 3 else None

    def start(arguments: Sequence[str], log: Path) -> Slow:
        nonlocal most
        pretence(arguments, log)
        alive["now"] += 1
        most = max(most, alive["now"])
        return Slow(0)

    assert conduct(study(), start, 2, say.append) == []
    assert most == 2
    assert len(pretence.commands) == 11 + 8


def test_progress_tells_what_is_left(study: Callable[..., Study], pretence: Pretence, say: list[str]) -> None:
    conduct(study(), pretence, 1, say.append)
    finished = [line for line in say if " left" in line]
    assert len(finished) == 19
    assert finished[0].startswith("train toy-lml-1-s0: validation NDCG@10 0.3000 in 0 s; 18 left, about 0 min")
    assert finished[-1].endswith("none left")


def test_the_report_says_what_the_files_say(study: Callable[..., Study], pretence: Pretence, say: list[str]) -> None:
    made = study()
    conduct(made, pretence, 1, say.append)
    report = json.loads((made.directory / "report.json").read_text())
    assert (report["targets"], report["users"], report["unfinished"]) == (TARGETS, TARGETS, [])

    def values(method: str, metric: str) -> np.ndarray:
        paths = [run.evaluation.per_target for run in made.finals(method)]
        ranks = np.stack([pq.read_table(path)["rank"].to_numpy() for path in paths])
        return metric_values(ranks, [10])[metric]

    row = report["methods"]["ilrec"]
    by_seed = values("ilrec", "HR@10").mean(axis=1)
    assert row["test"]["HR@10"]["mean"] == pytest.approx(by_seed.mean())
    assert row["test"]["HR@10"]["deviation"] == pytest.approx(by_seed.std(ddof=1))
    assert (row["trial"], row["tuning"], row["validation"]["mean"]) == (2, [0.4, 0.5], 0.5)
    assert row["seconds"] == 84
    found = row["difference"]["NDCG@10"]
    expected = paired_difference(values("ilrec", "NDCG@10"), values("lml", "NDCG@10"), np.arange(TARGETS))
    # The users' labels are sorted as text, so the same draws mean other users.
    assert found["mean"] == pytest.approx(expected.mean)
    assert found["interval"] == pytest.approx(expected.interval, abs=0.3 * expected.standard_error)
    assert found["detectable"] == pytest.approx(2.8 * found["standard_error"])
    assert found["detectable_share"] == pytest.approx(found["detectable"] / values("lml", "NDCG@10").mean())
    assert "difference" not in report["methods"]["lml"]

    popular, knn = report["floors"]["most_popular"], report["floors"]["itemknn"]
    assert (popular["test"]["HR@10"], knn["test"]["HR@5"]) == pytest.approx((0.1, 0.5))
    assert popular["difference"]["HR@10"]["mean"] == pytest.approx(0.1 - values("lml", "HR@10").mean())
    text = (made.directory / "report.md").read_text()
    assert "| most-popular | floor |  | 0.1000 | 0.1000 | 0.1000 |  |" in text
    assert "| ItemKNN | floor |  | 0.5000 |" in text
    assert f"| most-popular | {popular['difference']['NDCG@10']['mean']:+.4f}" in text
    assert text in "\n".join(say)
    assert f"| ilrec | 2 of 2 | 0.5000 ± 0.0000 | {row['test']['HR@5']['mean']:.4f} ±" in text
    assert "| no-cpd | 2 (of ilrec) |" in text
    assert f"| ilrec | **{found['mean']:+.4f}" in text
    assert "objective.beta=0.2`; trials 0.4000 / 0.5000" in text


def test_runs_on_other_targets_are_not_compared(
    study: Callable[..., Study], pretence: Pretence, say: list[str]
) -> None:
    conduct(study(), pretence, 1, say.append)
    path = study().finals("sasrec")[1].evaluation.per_target
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(UserError, match=r"toy-sasrec-1-s1.*not the targets that the other runs ranked"):
        conduct(study(), pretence, 1, say.append)


def test_a_run_with_other_settings_is_refused_before_anything_runs(
    study: Callable[..., Study], pretence: Pretence, say: list[str]
) -> None:
    conduct(study(), pretence, 1, say.append)
    with pytest.raises(UserError, match=r"(?s)toy-lml-2-s0 holds a run with other settings:.*rate: 0.002 → 0.004"):
        study(lambda values: values["methods"]["lml"]["trials"][1].update({"training.learning_rate": 0.004}))
    with pytest.raises(UserError, match=r"evaluation\.exclude_seen: True → False"):
        study(lambda values: values["set"].update({"evaluation.exclude_seen": False}))
    study(lambda values: values["set"].update({"cluster.workers": 1, "training.accumulation": 2}))  # not what but how
    with pytest.raises(UserError, match=r"toy-ilrec-1-s0 holds"):  # the only method with rewards
        study(lambda values: values["set"].update({"collaborative": {"kind": "sasrec", "dropout": 0.1}}))


# ---- What is refused -------------------------------------------------------------------------------------------------


def changed(path: str, value: Any) -> dict[str, Any]:
    values = json.loads(json.dumps(STUDY))
    *parents, last = path.split("/")
    at = values
    for parent in parents:
        at = at[parent]
    at[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("refrence", "lml", "refrence: unknown field; known fields: base, set, seeds, reference"),
        ("methods/lml/trails", [], "methods.lml.trails: unknown field; known fields: set, trials, of"),
        ("methods/lml/trials", [{}], "the same tuning budget for all"),
        ("methods/lml/trials", [{}], "lml 1, ilrec 2, sasrec 2"),
        ("methods/lml/trials", [], "methods.lml: give either `trials`"),
        ("methods/lml/of", "ilrec", "methods.lml: give either `trials`"),
        ("methods/no-cpd/of", "ilrek", "methods.no-cpd.of: 'ilrek' is no method with trials"),
        ("methods/no-cpd/of", "no-cpd", "'no-cpd' is no method with trials"),
        ("reference", "sft", "reference 'sft' is no method; choose from lml, ilrec, no-cpd, sasrec"),
        ("seeds", [1, 1], "give each once"),
        ("seeds", [], "seeds: "),
        ("metric", "MRR", "metric: "),
        ("methods/My Method", {"trials": [{}, {}]}, "My Method"),
    ],
)
def test_a_bad_study_is_refused(tmp_path: Path, path: str, value: Any, says: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(yaml.safe_dump(changed(path, value), sort_keys=False))
    with pytest.raises(UserError) as raised:
        load_study(file)
    assert str(raised.value).startswith(f"{file}:\n")
    assert says in str(raised.value)


@pytest.mark.parametrize("content", [None, "", "- a\n", "a: [\n"])
def test_what_is_no_study_is_refused(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "none.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=r"none\.yaml"):
        load_study(file)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("methods/ilrec/trials", [{}, {"objective.bata": 1}], "method ilrec, trial 2: configs/demo.yaml:"),
        ("methods/ilrec/trials", [{}, {"objective.bata": 1}], "did you mean 'beta'?"),
        ("methods/no-cpd/set", {"objective.cpd_wait": 0}, "method no-cpd, trial 1"),
        ("set", {"training.epochs": 0}, "method lml, trial 1"),
        ("base", "configs/nowhere.yaml", "configs/nowhere.yaml: no such file"),
    ],
)
def test_a_bad_experiment_is_refused_before_anything_runs(
    study: Callable[..., Study], tmp_path: Path, path: str, value: Any, says: str
) -> None:
    with pytest.raises(UserError) as raised:
        Study(StudyConfig.model_validate(changed(path, value)), "toy", tmp_path)
    assert says in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_studies_are_valid(path: Path, tmp_path: Path) -> None:
    study = Study(load_study(path), path.stem, tmp_path)
    assert study.config.budget >= 2
    assert len(study.config.seeds) >= 2

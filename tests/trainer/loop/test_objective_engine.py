"""Objectives through the real training step, against plain PyTorch in one process: many cases in one Ray Train launch.

With ILREC_FULL_PRODUCT=1 in the environment it is the full product instead of the pairwise cover.

The reference spells every target out in a row of its own, runs plain `transformers`, loops over positions, and finds
what competes at a position by looking through all identifiers.
"""

from __future__ import annotations

import itertools
import math
import os
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from objectives.config import ILRecConfig, LMLConfig, MSLConfig, ObjectiveConfig, needs_rewards
from tests.objectives import dense
from trainer.config import TrainingConfig
from trainer.loop.plan import BatchPlan, Step
from trainer.loop.rows import TrainingRows

OBJECTIVES: dict[str, ObjectiveConfig] = {
    "lml": LMLConfig(),
    "msl": MSLConfig(temperature=1.5),
    "ats": MSLConfig(temperature="adaptive"),
    "ilrec": ILRecConfig(k=2, ensemble="entropy", beta=0.3, cpd_weight=0.3, crr_weight=0.5, crr_temperature=0.2),
    "ilrec-valid": ILRecConfig(k=2, vocabulary="valid", penalty="additive", beta=1.0, cpd_weight=0.3),
}
STAGES, ACCUMULATIONS = (0, 1, 2, 3), (1, 4)
LEARNING_RATES = (1e-4, 2e-4)
CLIPPING = 0.3  # below the norms that occur, so that it matters
LAYERS, WIDTH, VOCABULARY = 3, 64, 1701  # the embedding has more than 1e5 elements: smaller ones ZeRO 3 keeps whole
HISTORY = 6


class Case(NamedTuple):
    objective: str
    stage: int
    accumulation: int
    lora: bool
    trees: bool

    def __str__(self) -> str:
        rows = "trees" if self.trees else "samples"
        return f"{self.objective}-zero{self.stage}-acc{self.accumulation}-lora{self.lora:d}-{rows}"

    @property
    def reference(self) -> tuple[str, bool, bool]:
        return self.objective, self.lora, self.trees


PAIRWISE = [
    Case(name, s, ACCUMULATIONS[(o + s) % 2], (o + s // 2) % 2 == 0, (o // 2 + s + s // 2) % 2 == 0)
    for o, name in enumerate(OBJECTIVES)
    for s in STAGES
]
PRODUCT = [Case(*each) for each in itertools.product(OBJECTIVES, STAGES, ACCUMULATIONS, (False, True), (False, True))]
CASES = PRODUCT if os.environ.get("ILREC_FULL_PRODUCT") else PAIRWISE
ALONE = [
    Case("ats", 0, 4, False, True),
    Case("ilrec", 2, 1, False, True),
    Case("ilrec", 3, 4, True, False),
    Case("ilrec-valid", 0, 1, True, True),
    Case("lml", 3, 1, False, False),
]


class World:
    """A catalogue with wide and narrow nodes, histories, and a collaborative model with random weights."""

    def __init__(self) -> None:
        from recommender.backbone.backbone import train_tokenizer
        from recommender.catalogue.catalogue import Catalogue
        from recommender.collaborative.config import SASRecConfig
        from recommender.collaborative.sasrec import SASRec
        from recommender.config import IdentifierConfig, PromptConfig
        from recommender.items.item_space import ItemSpace

        rng = np.random.default_rng(0)
        words = ["".join(rng.choice(list("abcdefghijklmnop"), 4)) for _ in range(60)]
        titles = [f"{words[i % 45]} {words[rng.integers(60)]} {words[rng.integers(60)]}" for i in range(90)]
        self.space = ItemSpace.build(
            Catalogue([str(i) for i in range(len(titles))], titles),
            train_tokenizer(titles, 600),
            IdentifierConfig(),
            PromptConfig(history=HISTORY, suffix="Next:"),
        )
        self.trie = self.space.trie
        self.identifiers = [self.space.identifiers.spelled(item).tolist() for item in range(len(titles))]
        self.following: dict[tuple[int, ...], dict[int, list[int]]] = {}
        for item, tokens in enumerate(self.identifiers):
            for t, token in enumerate(tokens):
                self.following.setdefault(tuple(tokens[:t]), {}).setdefault(token, []).append(item)

        # Sequences no longer than a history: each is one row of a tree, or one row for each of its targets.
        chosen = rng.choice(len(titles), 8, replace=False)
        self.sequences = [rng.choice(chosen, size) for size in (2, 3, 4, 5, 5, 6, 7, 7, 3, 4)]

        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.collaborative = SASRec(SASRecConfig(dim=8, layers=1, heads=2), len(titles)).eval()
            self.collaborative.table.weight.data *= 50

    def dataset(self, trees: bool) -> Any:
        """Every item but the first of each sequence is a target."""
        sequences = self.sequences
        positions = [np.arange(1, len(s)) for s in sequences]
        if not trees:
            sequences = [s[: end + 1] for s in sequences for end in range(1, len(s))]
            positions = [np.array([len(s) - 1]) for s in sequences]
        targets = SimpleNamespace(
            sequence=np.repeat(np.arange(len(sequences)), [len(p) for p in positions]).astype(np.int32),
            position=np.concatenate(positions).astype(np.int32),
        )
        offsets = np.cumsum([0, *map(len, sequences)])
        flat = np.concatenate(sequences).astype(np.int32)
        return SimpleNamespace(flat_items=flat, offsets=offsets, targets={"train": targets})

    def model(self, lora: bool) -> nn.Module:
        """A Llama to which the items that occur are likely, as ATS would keep to its lower bound otherwise."""
        from transformers import LlamaConfig, LlamaForCausalLM

        from recommender.backbone.backbone import add_lora
        from recommender.config import LoraConfig

        torch.manual_seed(5)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.05,
            tie_word_embeddings=True,
        )
        model: Any = LlamaForCausalLM(config)
        if lora:
            model = add_lora(model, LoraConfig(rank=4, alpha=8, dropout=0.0))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 or "lora_B" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
            spelled = [self.identifiers[item] for sequence in self.sequences for item in sequence]
            embedding = model.get_input_embeddings().weight
            embedding *= 3
            embedding[:, 0] = 0.5
            embedding[sorted({token for tokens in spelled for token in tokens}), 0] = 1.5
            embedding[sorted({tokens[0] for tokens in spelled}), 0] = 2.5
            plain = model.get_base_model() if lora else model
            plain.model.norm.weight[0] = 3.5
        return model

    def rows(self, name: str, trees: bool) -> TrainingRows:
        branching = isinstance(OBJECTIVES[name], MSLConfig) or name == "ilrec-valid"
        return TrainingRows(self.dataset(trees), self.space, TrainingConfig(), branching)

    def steps(self, rows: TrainingRows) -> list[Step]:
        """Two optimiser steps: one of the plan, and one with a single row, which leaves ranks without any."""
        plan = BatchPlan(rows.lengths, rows.counted, int(rows.lengths.sum() / 1.6), seed=0)
        first = max(plan.epoch(0), key=lambda step: len(step.rows))
        longest = first.rows[:1]
        return [first, Step(longest, int(rows.counted[longest].sum()))]


@lru_cache
def world() -> World:
    return World()


def training(**changes: Any) -> TrainingConfig:
    return TrainingConfig(weight_decay=0.1, betas=(0.9, 0.95), gradient_clipping=CLIPPING, **changes)


class Outcome(NamedTuple):
    """What two optimiser steps come to.

    Attributes:
        sums: of each step, over its positions.
        gradients: of each step, by parameter.
        temperature: at last.
    """

    sums: list[dict[str, float]]
    gradients: list[dict[str, Tensor]]
    first: dict[str, Tensor]
    weights: dict[str, Tensor]
    temperature: float


def reference(name: str, lora: bool, trees: bool) -> Outcome:
    """By autograd and AdamW over a loop."""
    config, here = OBJECTIVES[name], world()
    rows = here.rows(name, trees)
    model, tau = here.model(lora), 1.5
    trained = {f"model.{name}": p for name, p in model.named_parameters() if p.requires_grad}
    first = {name: p.detach().clone() for name, p in trained.items()}
    decayed = {"params": [p for p in trained.values() if p.dim() > 1], "weight_decay": 0.1}
    others = {"params": [p for p in trained.values() if p.dim() <= 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([g for g in (decayed, others) if g["params"]], betas=(0.9, 0.95))
    all_sums, gradients = [], []
    for number, step in enumerate(here.steps(rows)):
        sums = _sums(config, model, rows, step, tau)
        assert sums.pop("positions") == step.counted
        model.zero_grad()
        (sums["loss"] / step.counted).backward()
        found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trained.items()}
        gradients.append(found)
        norm = math.sqrt(sum(g.square().sum().item() for g in found.values()))
        for parameter in trained.values():
            if parameter.grad is not None:
                parameter.grad *= min(1.0, CLIPPING / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATES[number]
        optimizer.step()
        opening = sums.pop("opening", None)
        if opening is not None:
            tau = _moved(tau, opening)
        all_sums.append({name: value.item() for name, value in sums.items()})
    weights = {name: p.detach().clone() for name, p in trained.items()}
    if isinstance(config, MSLConfig):
        return Outcome(all_sums, gradients, first, weights, tau)
    return Outcome(all_sums, gradients, first, weights, 1.0)


def _sums(config: ObjectiveConfig, model: nn.Module, rows: TrainingRows, step: Step, tau: float) -> dict[str, Any]:
    """Sums over the positions of a step; for ATS also `opening`, the logits where responses begin."""
    here = world()
    histories = rows.histories(step.rows)
    samples = [
        (s[:length], int(target))
        for s, lengths, targets in zip(histories.sequences, histories.lengths, histories.targets, strict=True)
        for length, target in zip(lengths, targets, strict=True)
    ]
    paths = [(here.space.prompt.encode(history).tolist(), here.identifiers[target]) for history, target in samples]
    layers = range(LAYERS - config.k, LAYERS) if isinstance(config, ILRecConfig) else ()
    sums: dict[str, Any] = {"positions": 0}
    opening: list[tuple[float, list[float]]] = []
    for (history, target), positions in zip(samples, dense.logits_of(model, paths, layers), strict=True):
        with torch.no_grad():
            scores = here.collaborative.scores(here.collaborative.embed([history]))[0].double().softmax(0)
        for t, (last, *inner) in enumerate(positions):
            following = here.following[tuple(here.identifiers[target][:t])]
            columns = list(range(VOCABULARY))
            if isinstance(config, MSLConfig) or (isinstance(config, ILRecConfig) and config.vocabulary == "valid"):
                columns = sorted(following)
                if len(columns) == 1:
                    continue
            y = columns.index(here.identifiers[target][t])
            z = last[columns]
            if isinstance(config, LMLConfig):
                terms = {"loss": -z.log_softmax(0)[y]}
            elif isinstance(config, MSLConfig):
                adaptive = config.temperature == "adaptive"
                by = tau if adaptive else config.temperature
                terms = {"loss": (tau if adaptive else 1) * -(z / by).log_softmax(0)[y]}
                if adaptive and t == 0:
                    opening.append((z[y].item(), z.tolist()))
            else:
                mass = sum(scores[items].sum() for items in following.values())
                reward = torch.full((len(columns),), -1.0)
                for token, items in following.items():
                    reward[columns.index(token)] = scores[items].sum() / mass
                terms = dense.ilrec(config, z, [each[columns] for each in inner], y, reward)
            sums["positions"] += 1
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value
    for number, layer in enumerate(layers):
        sums[f"cpd_{layer}"] = sums.pop(f"cpd {number}")
    return sums | ({"opening": opening} if opening else {})


def _moved(tau: float, opening: list[tuple[float, list[float]]]) -> float:
    """ATS as in MSL's code."""
    every = np.array([z for _, logits in opening for z in logits])
    delta = np.mean([y for y, _ in opening]) - every.mean()
    constant = math.log(len(opening[0][1]) / 4)
    wanted = (delta + math.sqrt(max(delta**2 - 2 * constant * every.var(ddof=1), 0))) / (2 * constant)
    return 0.95 * tau + 0.05 * min(max(wanted, 1.5), 5.0)


def run(case: Case) -> tuple[Outcome, dict[str, Any]]:
    """The same by the training loop's own step; and what else there is to see."""
    from deepspeed.utils import safe_get_full_grad
    from torch import distributed as dist

    from objectives.objective import build_objective
    from objectives.rewards import RewardSource
    from recommender.backbone.backbone import Backbone
    from trainer.loop.engine import build_engine, full_weights, set_learning_rate
    from trainer.loop.module import TrainedModel
    from trainer.loop.worker import optimiser_step

    config, here = OBJECTIVES[case.objective], world()
    rows = here.rows(case.objective, case.trees)
    backbone = Backbone(here.model(case.lora), here.space.tokenizer)  # type: ignore[arg-type]
    objective = build_objective(config, LAYERS, here.trie)
    source = RewardSource(here.collaborative, here.trie, None) if needs_rewards(config) else None
    module = TrainedModel(backbone, objective, here.trie, 0.0, source, logits_memory_mb=1)
    engine = build_engine(module, training(zero_stage=case.stage, accumulation=case.accumulation))
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    first = {name: value.clone() for name, value in full_weights(engine, trainable_only=True)}
    embedding = backbone.decoder.get_input_embeddings().weight
    kept = embedding.ds_tensor.numel() if case.stage == 3 else embedding.numel()

    sums, gradients, empty, step_of = [], [], 0, engine.step

    def watched() -> None:
        if engine.is_gradient_accumulation_boundary():
            whole = {name: safe_get_full_grad(p) for name, p in trained.items()}
            gradients.append({n: torch.zeros(1) if g is None else g.float().clone() for n, g in whole.items()})
        step_of()

    engine.step = watched
    for number, step in enumerate(here.steps(rows)):
        set_learning_rate(engine, LEARNING_RATES[number])
        sums.append(optimiser_step(engine, module, step, rows))
        objective.advance(sums[-1], step.counted)
        dealt = step.micro_batches(dist.get_world_size(), case.accumulation)
        empty += sum(not len(numbers) for ranks in dealt for numbers in ranks)
    weights = dict(full_weights(engine, trainable_only=True))
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, (objective.state, objective.temperature, sums))
    engine.destroy()
    seen = {
        "ranks agree": all(each == everyones[0] for each in everyones),
        "embedding kept": kept / (VOCABULARY * WIDTH),
        "empty micro-batches": empty,
    }
    return Outcome(sums, gradients, first, weights, objective.temperature), seen


def differences(found: Outcome, expected: Outcome) -> dict[str, Any]:
    def error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
        """Relative to the largest number."""
        assert got.keys() == want.keys()
        largest = max(value.abs().max().item() for value in want.values())
        return max((got[name] - want[name]).abs().max().item() for name in want) / largest

    def norm(values: dict[str, Tensor]) -> float:
        return math.sqrt(sum(value.square().sum().item() for value in values.values()))

    moved, should = (
        {name: each.weights[name] - expected.first[name] for name in expected.first} for each in (found, expected)
    )
    result: dict[str, Any] = {
        "first": max((found.first[name] - value).abs().max().item() for name, value in expected.first.items()),
        "gradients": max(map(error, found.gradients, expected.gradients)),
        "steps": len(found.gradients),
        "update": norm({name: moved[name] - should[name] for name in should}) / norm(should),
        "weights": error(found.weights, expected.weights),
        "temperature": abs(found.temperature - expected.temperature),
        "final temperature": found.temperature,
        "smallest norm": min(map(norm, expected.gradients)),
        "names": sorted(n for s, e in zip(found.sums, expected.sums, strict=True) for n in e.keys() - s.keys()),
        "negatives": [sums.get("negatives", 0.0) for sums in expected.sums],
    }
    for kind in ("loss", "sums"):
        result[kind] = max(
            abs(got[name] - value) / (abs(value) + 1e-2)
            for got, want in zip(found.sums, expected.sums, strict=True)
            for name, value in want.items()
            if (name == "loss") == (kind == "loss") or len(want) == 1
        )
    return result


def worker(config: dict[str, Any]) -> dict[Case, dict[str, Any]]:
    """All cases in step, then each rank its share of the references."""
    from torch import distributed as dist

    rank, ranks = dist.get_rank(), dist.get_world_size()
    outcomes = {Case(*case): run(Case(*case)) for case in config["cases"]}
    results = {}
    for key in sorted({case.reference for case in outcomes})[rank::ranks]:
        expected = reference(*key)
        for case, (found, seen) in outcomes.items():
            if case.reference == key:
                results[case] = differences(found, expected) | seen
    everyones: list[Any] = [None] * ranks
    dist.all_gather_object(everyones, results)
    return {case: result for each in everyones for case, result in each.items()}


def launch(workers: int, cases: list[Case], directory: Path) -> dict[Case, dict[str, Any]]:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        worker,
        train_loop_config={"cases": [tuple(case) for case in cases]},
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(
            name=f"objectives-{workers}",
            storage_path=str(directory),
            worker_runtime_env={"env_vars": {"DS_ACCELERATOR": "cpu"}},
        ),
    )
    return {Case(*case): result for case, result in trainer.fit().return_value.items()}


@pytest.fixture(scope="module")
def two(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, dict[str, Any]]:
    return launch(2, CASES, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def one(two: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, dict[str, Any]]:
    return launch(1, ALONE, tmp_path_factory.mktemp("one"))


def check(case: Case, result: dict[str, Any], workers: int) -> None:
    assert result["steps"] == 2
    assert result["first"] == 0
    assert result["names"] == []
    assert result["loss"] < 1e-5
    assert result["sums"] < 5e-5  # the divergences are small differences
    assert result["gradients"] < 1e-5
    assert result["update"] < 5e-4  # AdamW divides gradients by their size, and rounding errors with them
    assert result["weights"] < 3e-5  # after two steps of up to 1e-3; rounding differs between processors
    assert result["ranks agree"]
    assert result["temperature"] < 1e-6
    assert result["smallest norm"] > CLIPPING, "clipping matters"
    if case.objective == "ats":
        assert result["final temperature"] > 1.51, "ATS has moved"
    if case.objective.startswith("ilrec"):
        assert max(result["negatives"]) > 2
    if workers * case.accumulation > 1:
        assert result["empty micro-batches"] > 0
    if case.stage == 3 and workers > 1:
        assert result["embedding kept"] < 0.51


def test_the_cover_is_pairwise() -> None:
    values = (tuple(OBJECTIVES), STAGES, ACCUMULATIONS, (False, True), (False, True))
    for (i, left), (j, right) in itertools.combinations(enumerate(values), 2):
        assert {(case[i], case[j]) for case in PAIRWISE} == set(itertools.product(left, right))


def test_the_world_has_what_the_cases_are_about() -> None:
    here = world()
    assert here.trie.child_count[0] > 32, "the root is wide"
    trees, samples = here.rows("lml", True), here.rows("lml", False)
    assert len(trees.targets) == len(samples.targets) == len(samples)
    assert len(trees) == len(here.sequences)
    assert trees.lengths.sum() < 0.7 * samples.lengths.sum()
    assert all((row.end == len(row)).all() for row in samples)
    forced = np.concatenate([row.nodes for row in trees]) < 0
    assert forced.any()
    assert not forced.all()
    for rows in (trees, samples):
        first, last = here.steps(rows)
        assert 8 > len(first.rows) > 4 or len(first.rows) >= 16
        assert len(last.rows) == 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_workers_compute_what_plain_pytorch_does(two: dict[Case, dict[str, Any]], case: Case) -> None:
    check(case, two[case], 2)


@pytest.mark.parametrize("case", ALONE, ids=str)
def test_one_worker_computes_what_plain_pytorch_does(one: dict[Case, dict[str, Any]], case: Case) -> None:
    check(case, one[case], 1)

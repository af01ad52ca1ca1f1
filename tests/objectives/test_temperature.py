"""MSL and its adaptive temperature against what the authors' released trainer computed on random inputs.

Their order within a step: τ moves first, by the logits of the step itself, and the loss uses the new τ. The adaptive
loss is averaged over positions with more than one valid token, the one at a fixed τ over all response positions and
not multiplied by τ.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from objectives import losses
from objectives.objective import MSL, AdaptiveMSL, Predictions
from objectives.temperature import ETA, FIRST, HIGHEST, LOWEST, OpeningLogits, adaptive_temperature, moved
from recommender.items.trie import RadixTrie

AUTHORS = json.loads(Path(__file__).with_name("msl_authors.json").read_text())
OF_AUTHORS = pytest.mark.parametrize("case", AUTHORS, ids=[f"authors' case {i}" for i in range(len(AUTHORS))])


class Responses:
    """The response positions of one of the authors' cases.

    Attributes:
        logits: float64 [P, V], of the whole vocabulary; a leaf is `raw`, [B, S, V].
        valid: bool [P, V].
        opens: bool [P]; first tokens of responses.
    """

    def __init__(self, case: dict[str, Any]):
        catalogue = [tuple(item) for item in case["catalogue"]]
        self.raw = torch.tensor(case["logits"], dtype=torch.float64, requires_grad=True)
        rows, valid, target, opens = [], [], [], []
        for b, labels in enumerate(case["labels"]):
            first = next(s for s, label in enumerate(labels) if label != -100)
            response = labels[first:]
            for t, y in enumerate(response):
                children = {item[t] for item in catalogue if list(item[:t]) == response[:t] and len(item) > t}
                rows.append(self.raw[b, first + t - 1])
                valid.append([v in children for v in range(case["vocab"])])
                target.append(y)
                opens.append(t == 0)
        self.logits, self.valid = torch.stack(rows), torch.tensor(valid)
        self.target, self.opens = torch.tensor(target), torch.tensor(opens)

    def opening(self) -> OpeningLogits:
        """Sums over the first positions, in loops."""
        logits = self.logits.detach()
        positions = self.opens.nonzero().flatten().tolist()
        values = [[logits[p, v].item() for v in range(logits.shape[1]) if self.valid[p, v]] for p in positions]
        return OpeningLogits.from_sums(
            len(positions),
            sum(logits[p, self.target[p]].item() for p in positions),
            sum(sum(row) for row in values),
            sum(x * x for row in values for x in row),
            len(values[0]),
        )

    def loss(self, temperature: float) -> Tensor:
        """Per position, over valid tokens only."""
        return losses.masked_softmax(self.logits.masked_fill(~self.valid, -math.inf), self.target, temperature)

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.raw)[0]


def assert_same(found: dict[str, Any], authors: dict[str, Any]) -> None:
    assert found["tau"] == pytest.approx(authors["tau"], rel=1e-4)
    assert found["loss"].item() == pytest.approx(authors["loss"], rel=1e-4)
    expected = torch.tensor(authors["grad"], dtype=torch.float64)
    largest = expected.abs().max().item()
    torch.testing.assert_close(found["grad"], expected, rtol=1e-4, atol=1e-4 * largest)
    assert largest > 1e-3


@pytest.mark.parametrize(("name", "rate"), [("ats", 0.05), ("ats_alpha1", 1.0)])
@OF_AUTHORS
def test_adaptive_temperature_loss_and_gradient_are_the_authors(case: dict[str, Any], name: str, rate: float) -> None:
    responses = Responses(case)
    opening = responses.opening()
    assert opening.children == case["n_first_valid"]
    tau = moved(FIRST, opening, rate)
    branching = responses.valid.sum(1) > 1
    assert not branching.all(), "else the mean over all positions would be the same"
    loss = tau * responses.loss(tau)[branching].mean()
    assert_same({"tau": tau, "loss": loss, "grad": responses.gradient(loss)}, case[name])


@pytest.mark.parametrize("tau", [1.0, 4.5])
@OF_AUTHORS
def test_loss_and_gradient_at_a_fixed_temperature_are_the_authors(case: dict[str, Any], tau: float) -> None:
    responses = Responses(case)
    loss = responses.loss(tau).mean()
    assert_same({"tau": tau, "loss": loss, "grad": responses.gradient(loss)}, case[f"tau{tau:g}"])


def test_the_authors_cases_tell_the_roots_apart() -> None:
    """All ways to τ occur: the lower bound, no real root, and a root that is not the one that MSL's paper prints."""
    ways = set()
    for case in AUTHORS:
        opening = Responses(case).opening()
        constant, delta = math.log(opening.children * ETA), opening.target_mean - opening.mean
        inside = delta**2 - 2 * constant * opening.variance
        if case["ats_alpha1"]["tau"] == LOWEST:
            ways.add("bound")
        elif inside <= 0:
            ways.add("imaginary")
        elif abs((delta - math.sqrt(inside)) / (2 * constant) - case["ats_alpha1"]["tau"]) > 0.1:
            ways.add("other root than the paper's")
    assert ways == {"bound", "imaginary", "other root than the paper's"}


def _as_predictions(case: dict[str, Any], trie: RadixTrie, parts: int) -> tuple[list[Predictions], Tensor]:
    """The branching positions in several parts, each over the columns that its nodes need, padded; and the raw leaf."""
    responses = Responses(case)
    nodes = []
    for labels in case["labels"]:
        response, node, depth = [label for label in labels if label != -100], 0, 0
        for t, token in enumerate(response):
            if t == depth:
                nodes.append(node)
                node = int(trie.child_of(np.array([node]), np.array([token]))[0])
                depth = int(trie.depth[node])
            else:
                nodes.append(-1)
    node = torch.tensor(nodes)
    at = torch.nonzero(responses.valid.sum(1) > 1).flatten()
    assert (node[at] >= 0).all()
    predictions = []
    for part in at.tensor_split(parts):
        columns = [responses.valid[p].nonzero().flatten() for p in part]
        width = max(map(len, columns))
        valid = torch.stack([torch.arange(width) < len(each) for each in columns])
        tokens = torch.stack([torch.cat([each, each[:1].expand(width - len(each))]) for each in columns])
        target = torch.stack([(tokens[i] == responses.target[p]).nonzero()[0, 0] for i, p in enumerate(part)])
        logits = responses.logits[part].gather(1, tokens).float().masked_fill(~valid, -torch.inf)
        predictions.append(Predictions(logits, [], target, node[part], valid))
    return predictions, responses.raw


@pytest.mark.parametrize("parts", [1, 3])
@OF_AUTHORS
def test_the_objective_gives_the_authors_numbers_one_step_later(case: dict[str, Any], parts: int) -> None:
    """Through `losses` and `advance`, however the batch is split: τ after the step, and the loss at that τ."""
    tokens = [token for item in case["catalogue"] for token in item]
    offsets = np.cumsum([0, *map(len, case["catalogue"])])
    trie = RadixTrie.build(np.array(tokens, np.int32), offsets)
    objective = AdaptiveMSL(trie)
    predictions, raw = _as_predictions(case, trie, parts)
    counted = sum(len(part.target) for part in predictions)
    reports = []
    for step in range(2):
        values = [objective.losses(part) for part in predictions]
        sums = {name: sum(part[name].sum().item() for part in values) for name in values[0]}
        if step == 1:
            loss = sum(part["loss"].sum() for part in values) / counted
            found = {"tau": objective.temperature, "loss": loss, "grad": torch.autograd.grad(loss, raw)[0]}
            assert_same(found, case["ats"])
        reports.append(objective.advance(sums, counted))
    assert [report["temperature"] for report in reports] == pytest.approx([FIRST, case["ats"]["tau"]], rel=1e-4)
    assert reports[1]["loss"] == pytest.approx(case["ats"]["loss"], rel=1e-4)
    assert objective.state == {"temperature": pytest.approx(moved(case["ats"]["tau"], Responses(case).opening()))}


def test_sums_make_mean_and_unbiased_variance() -> None:
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 100
    opening = OpeningLogits.from_sums(
        7, logits[:, 2].sum().item(), logits.sum().item(), logits.square().sum().item(), 5
    )
    assert opening.target_mean == pytest.approx(logits[:, 2].mean().item())
    assert opening.mean == pytest.approx(logits.mean().item())
    assert opening.variance == pytest.approx(logits.var().item())
    assert opening.children == 5


def test_equal_logits_have_no_variance_despite_rounding() -> None:
    for value in (0.1, 1e4 + 0.1, -3.3):
        assert OpeningLogits.from_sums(3, 3 * value, 12 * value, 12 * value**2, 4).variance >= 0
    assert OpeningLogits.from_sums(1, 2.0, 2.0, 4.0, 1).variance == 0


@pytest.mark.parametrize("children", [1, 2, 4])
def test_few_children_leave_the_temperature_as_it_is(children: int) -> None:
    """m·η ≤ 1: the logarithm is not positive and says nothing about τ."""
    opening = OpeningLogits(30.0, 0.0, 1.0, children)
    assert children * ETA <= 1
    assert adaptive_temperature(opening) is None
    assert moved(2.25, opening) == 2.25
    assert adaptive_temperature(OpeningLogits(30.0, 0.0, 1.0, 5)) is not None


def test_where_the_root_is_imaginary_the_real_part_counts() -> None:
    constant = math.log(40 * ETA)
    assert 2 * constant * 25.0 > 10.0**2
    assert adaptive_temperature(OpeningLogits(10.0, 0.0, 25.0, 40)) == pytest.approx(10 / (2 * constant))


def test_the_larger_root_solves_the_quadratic() -> None:
    """C τ² − Δ τ + σ²/2 = 0."""
    delta, variance, children = 12.0, 9.0, 40
    tau, constant = adaptive_temperature(OpeningLogits(delta + 3, 3.0, variance, children)), math.log(children * ETA)
    assert tau is not None
    assert constant * tau**2 - delta * tau + variance / 2 == pytest.approx(0, abs=1e-9)
    assert tau > delta / (2 * constant)


@pytest.mark.parametrize(("delta", "bound"), [(-50.0, LOWEST), (0.0, LOWEST), (1e6, HIGHEST)])
def test_the_temperature_stays_within_its_bounds(delta: float, bound: float) -> None:
    assert adaptive_temperature(OpeningLogits(delta, 0.0, 1.0, 40)) == bound
    assert moved(3.0, OpeningLogits(delta, 0.0, 1.0, 40)) == pytest.approx(0.95 * 3 + 0.05 * bound)


def _flat(children: int) -> RadixTrie:
    """Items of two tokens that all open alike, then part."""
    tokens = np.array([[7, token] for token in range(children)], np.int32)
    return RadixTrie.build(tokens.ravel(), np.arange(children + 1) * 2)


def test_a_step_without_openings_keeps_the_temperature() -> None:
    objective = AdaptiveMSL(_flat(8))
    prediction = Predictions(torch.randn(2, 8), [], torch.tensor([0, 1]), torch.tensor([5, 5]))
    sums = {name: value.sum().item() for name, value in objective.losses(prediction).items()}
    assert sums["openings"] == 0
    objective.advance(sums, 2)
    assert objective.temperature == FIRST


def test_items_that_all_open_alike_adapt_where_they_part() -> None:
    trie = _flat(8)
    assert trie.child_count[0] == 1
    objective = AdaptiveMSL(trie)
    logits = torch.zeros(2, 8)
    logits[:, 3] = 20.0
    prediction = Predictions(logits, [], torch.tensor([3, 3]), torch.tensor([1, 1]))
    sums = {name: value.sum().item() for name, value in objective.losses(prediction).items()}
    objective.advance(sums, 2)
    delta, variance, constant = 17.5, float(logits.double().var()), math.log(8 * ETA)
    wanted = (delta + math.sqrt(max(delta**2 - 2 * constant * variance, 0))) / (2 * constant)
    assert objective.temperature == pytest.approx(0.95 * FIRST + 0.05 * min(max(wanted, LOWEST), HIGHEST))
    assert objective.temperature > FIRST


def test_logits_that_are_not_finite_do_not_reach_the_state() -> None:
    objective = AdaptiveMSL(_flat(8))
    prediction = Predictions(torch.full((1, 8), torch.inf), [], torch.tensor([0]), torch.tensor([1]))
    objective.advance({name: value.sum().item() for name, value in objective.losses(prediction).items()}, 1)
    assert objective.temperature == FIRST


def test_search_uses_the_temperature_of_training() -> None:
    assert MSL(4.5).temperature == 4.5
    objective = AdaptiveMSL(_flat(8))
    objective.state = {"temperature": 2.5}  # as a checkpoint brings it
    assert objective.temperature == 2.5

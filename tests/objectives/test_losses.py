"""Each loss against a dense reference that loops over positions in float64, values and gradients."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from objectives import losses

P, V = 7, 11


def _case(seed: int, valid: bool) -> tuple[Tensor, list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(P, V, generator=generator, dtype=torch.float64) * 3
    layers = [torch.randn(P, V, generator=generator, dtype=torch.float64) * 2 for _ in range(2)]
    target = torch.randint(0, V, (P,), generator=generator)
    if valid:
        outside = torch.rand(P, V, generator=generator) < 0.5
        outside.scatter_(1, target[:, None], False)
        outside[0] = True
        outside[0, target[0]] = False  # one valid token
        logits, *layers = (x.masked_fill(outside, -torch.inf) for x in (logits, *layers))
    return logits, layers, target


def _gradient(function: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    logits = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(logits).sum(), logits)
    return gradient


def _reference_negatives(
    layers: list[Tensor], target: Tensor, alpha: float
) -> tuple[list[list[int]], list[list[float]]]:
    sets, weights = [], []
    for t in range(P):
        mean = sum(layer[t] for layer in layers) / len(layers)
        p = mean.softmax(0)
        chosen = [v for v in range(V) if v != target[t] and p[v] > 0 and p[v] >= alpha * p[target[t]]]
        total = sum(math.exp(mean[v]) for v in chosen)
        sets.append(chosen)
        weights.append([math.exp(mean[v]) / total if v in chosen else 0.0 for v in range(V)])
    return sets, weights


@pytest.mark.parametrize("valid", [False, True])
@pytest.mark.parametrize("alpha", [0.1, 0.8, 1.2])
def test_negatives_and_their_weights(valid: bool, alpha: float) -> None:
    _, layers, target = _case(0, valid)
    sets, weights = _reference_negatives(layers, target, alpha)
    negatives = losses.self_hard_negatives(layers, target, alpha)
    assert [row.nonzero().flatten().tolist() for row in negatives.mask] == sets
    torch.testing.assert_close(negatives.weight, torch.tensor(weights, dtype=torch.float64))


@pytest.mark.parametrize("valid", [False, True])
@pytest.mark.parametrize("additive", [False, True])
def test_cross_layer_preference(valid: bool, additive: bool) -> None:
    logits, layers, target = _case(1, valid)
    _, weights = _reference_negatives(layers, target, 0.5)
    negatives = losses.self_hard_negatives(layers, target, 0.5)

    def reference(z: Tensor) -> Tensor:
        rows = []
        for t in range(P):
            kept = [v for v in range(V) if z[t, v] > -math.inf]
            w = {v: weights[t][v] for v in kept}
            terms = [z[t, v] + 0.3 * w[v] if additive else z[t, v] * (1 + 0.3 * w[v]) for v in kept]
            rows.append(torch.stack(terms).logsumexp(0) - z[t, target[t]])
        return torch.stack(rows)

    def ours(z: Tensor) -> Tensor:
        return losses.cross_layer_preference(z, target, negatives, 0.3, additive)

    torch.testing.assert_close(ours(logits), reference(logits))
    torch.testing.assert_close(_gradient(ours, logits), _gradient(reference, logits))


def test_preference_without_negatives_is_cross_entropy() -> None:
    logits, layers, target = _case(2, False)
    negatives = losses.self_hard_negatives(layers, target, 1e9)
    assert not negatives.mask.any()
    torch.testing.assert_close(
        losses.cross_layer_preference(logits, target, negatives, 0.5), losses.language_modelling(logits, target)
    )


@pytest.mark.parametrize("valid", [False, True])
def test_cross_layer_distillation(valid: bool) -> None:
    logits, layers, _ = _case(3, valid)

    def reference(students: Tensor) -> Tensor:
        rows = []
        for t in range(P):
            kept = [v for v in range(V) if logits[t, v] > -math.inf]
            q = logits[t, kept].softmax(0)
            p = [student[t, kept].softmax(0) for student in students]
            rows.append(sum((s * (s / q).log()).sum() for s in p))
        return torch.stack(rows)

    def ours(students: Tensor) -> Tensor:
        return losses.cross_layer_distillation(list(students), logits)

    students = torch.stack(layers)
    torch.testing.assert_close(ours(students), reference(students))
    torch.testing.assert_close(_gradient(ours, students), _gradient(reference, students))


def test_distillation_sends_nothing_to_the_teacher() -> None:
    logits, layers, _ = _case(3, False)
    logits.requires_grad_()
    layers[0].requires_grad_()
    losses.cross_layer_distillation(layers, logits).sum().backward()
    assert logits.grad is None


@pytest.mark.parametrize("temperature", [1.0, 4.5])
def test_masked_softmax(temperature: float) -> None:
    logits, _, target = _case(4, True)
    expected = []
    for t in range(P):
        kept = logits[t][logits[t] > -math.inf]
        expected.append(-math.log(math.exp(logits[t, target[t]] / temperature) / (kept / temperature).exp().sum()))
    ours = losses.masked_softmax(logits, target, temperature)
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))
    assert ours[0] == 0, "a forced token costs nothing"


def test_masked_softmax_equals_the_authors_code() -> None:
    """Loss and gradient that the MSL authors' released trainer gave on random inputs, at fixed temperatures."""
    for case in json.loads(Path(__file__).with_name("msl_authors.json").read_text()):
        catalogue = {tuple(item) for item in case["catalogue"]}
        raw = torch.tensor(case["logits"], dtype=torch.float64)
        for name, temperature in (("tau1", 1.0), ("tau4.5", 4.5)):
            logits = raw.clone().requires_grad_()
            rows, targets = [], []
            for b, labels in enumerate(case["labels"]):
                response = [label for label in labels if label != -100]
                first = labels.index(response[0])
                for t, y in enumerate(response):
                    children = {item[t] for item in catalogue if list(item[:t]) == response[:t] and len(item) > t}
                    outside = torch.ones(case["vocab"], dtype=torch.bool)
                    outside[list(children)] = False
                    rows.append(logits[b, first + t - 1].masked_fill(outside, -torch.inf))
                    targets.append(y)
            loss = losses.masked_softmax(torch.stack(rows), torch.tensor(targets), temperature).mean()
            loss.backward()
            assert loss.item() == pytest.approx(case[name]["loss"], rel=1e-4)
            expected = torch.tensor(case[name]["grad"], dtype=torch.float64)
            torch.testing.assert_close(logits.grad, expected, rtol=1e-4, atol=1e-6)

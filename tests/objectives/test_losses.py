"""Each loss against references that loop over positions in float64, values and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from objectives import losses
from tests.objectives import dense

P, V = 9, 13
EVERYWHERE = pytest.mark.parametrize("narrow", [False, True], ids=["all columns", "valid columns"])


class Case:
    """Random logits; where `narrow`, with columns outside `valid` at −inf. Position 0 then has one valid column."""

    def __init__(self, seed: int, narrow: bool, layers: int = 3, shift: float = 0.0):
        draw = torch.Generator().manual_seed(seed)
        self.target = torch.randint(0, V, (P,), generator=draw)
        self.valid: Tensor | None = None
        if narrow:
            self.valid = torch.rand(P, V, generator=draw) < 0.6
            self.valid[0] = False
            self.valid.scatter_(1, self.target[:, None], True)
        spread = torch.tensor([3.0, 0.5, 1.5, 2.5])
        self.logits, *self.layers = (
            self.outside_at(torch.randn(P, V, generator=draw, dtype=torch.float64) * spread[i] + shift, -math.inf)
            for i in range(layers + 1)
        )
        # Rewards as they come: in [0, 1], some exactly 0, some −1 for "no item", never for the target.
        reward = torch.rand(P, V, generator=draw, dtype=torch.float64)
        reward[torch.rand(P, V, generator=draw) < 0.2] = 0.0
        reward[torch.rand(P, V, generator=draw) < 0.2] = -1.0
        self.reward = self.outside_at(reward, -1.0).scatter(1, self.target[:, None], 0.4)

    def outside_at(self, values: Tensor, filling: float) -> Tensor:
        return values if self.valid is None else values.masked_fill(~self.valid, filling)

    def kept(self, t: int) -> list[int]:
        return list(range(V)) if self.valid is None else self.valid[t].nonzero().flatten().tolist()

    def y(self, t: int) -> int:
        """The target's place among the columns that are kept."""
        return self.kept(t).index(int(self.target[t]))

    def spread_out(self, rows: list[Tensor]) -> Tensor:
        """Vectors over the kept columns of each position as [P, V], with 0 elsewhere."""
        whole = torch.zeros(P, V, dtype=torch.float64)
        for t, row in enumerate(rows):
            whole[t, self.kept(t)] = row
        return whole

    def negatives(
        self, alpha: float = 0.5, threshold: str = "probability"
    ) -> tuple[losses.SelfHardNegatives, list[list[int]], list[Tensor]]:
        """Of the first intermediate layer: as the code finds them, then sets and weights of the reference."""
        found = losses.self_hard_negatives(self.layers[0], self.target, alpha, threshold)
        proposals = [self.layers[0][t, self.kept(t)] for t in range(P)]
        chosen = [dense.negatives(proposal, self.y(t), alpha, threshold) for t, proposal in enumerate(proposals)]
        return found, chosen, [dense.weights(*both) for both in zip(proposals, chosen, strict=True)]


def same_values_and_gradients(
    function: Callable[..., Tensor], reference: Callable[..., list[Tensor]], *inputs: Tensor
) -> None:
    """Values of each position, and the gradient of a sum in which no two positions weigh the same."""
    share = torch.linspace(1, 2, P, dtype=torch.float64)
    results = []
    for compute in (function, reference):
        leaves = [x.clone().requires_grad_() for x in inputs]
        values = compute(*leaves)
        if isinstance(values, list):
            values = torch.stack(values)
        assert values.shape == (P,)
        results.append((values.detach(), torch.autograd.grad((values * share).sum(), leaves, allow_unused=True)))
    (values, gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-12)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert (gradient is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)


def test_language_modelling_is_minus_the_log_probability_of_the_target() -> None:
    case = Case(0, False)

    def reference(z: Tensor) -> list[Tensor]:
        return [-(z[t, case.target[t]].exp() / z[t].exp().sum()).log() for t in range(P)]

    same_values_and_gradients(lambda z: losses.language_modelling(z, case.target), reference, case.logits)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.5])
def test_masked_softmax_divides_by_the_temperature_and_sums_over_valid_tokens(temperature: float) -> None:
    case = Case(1, True)

    def reference(z: Tensor) -> list[Tensor]:
        return [
            -((z[t, case.target[t]] / temperature).exp() / (z[t, case.kept(t)] / temperature).exp().sum()).log()
            for t in range(P)
        ]

    def ours(z: Tensor) -> Tensor:
        return losses.masked_softmax(z, case.target, temperature)

    same_values_and_gradients(ours, reference, case.logits)
    assert ours(case.logits)[0] == 0, "a forced token costs nothing"


@pytest.mark.parametrize("how", ["mean", "variance", "entropy", "max_prob"])
@pytest.mark.parametrize("layers", [1, 2, 3])
@EVERYWHERE
def test_the_ensemble_weighs_layers_by_their_confidence(how: str, layers: int, narrow: bool) -> None:
    case = Case(2, narrow, layers)
    found = losses.layer_ensemble(case.layers, how, case.valid)
    for t in range(P):
        kept = case.kept(t)
        expected = dense.ensemble([layer[t, kept] for layer in case.layers], how)
        torch.testing.assert_close(found[t, kept], expected)
        outside = [v for v in range(V) if v not in kept]
        assert (found[t, outside] == -math.inf).all()


def test_the_ways_to_weigh_layers_differ() -> None:
    """Else the test above could not tell one from the other."""
    case = Case(2, False)
    found = [losses.layer_ensemble(case.layers, how) for how in ("mean", "variance", "entropy", "max_prob")]
    assert all((a - b).abs().max() > 0.01 for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize("how", ["mean", "variance", "entropy", "max_prob"])
def test_layers_of_very_different_confidence_make_no_nan_that_matters(how: str) -> None:
    case = Case(3, True, 2)
    layers = [case.layers[0].float() * 40, case.layers[1].float() * 0.01]
    proposal = losses.layer_ensemble(layers, how, case.valid)
    found = losses.self_hard_negatives(proposal, case.target, 0.5)
    assert case.valid is not None
    assert proposal[case.valid].isfinite().all()
    assert found.weight.isfinite().all()
    assert not found.mask[~case.valid].any()


@pytest.mark.parametrize("threshold", ["probability", "logit"])
@pytest.mark.parametrize("alpha", [0.1, 0.8, 1.2])
@pytest.mark.parametrize("shift", [0.0, -20.0], ids=["", "all negative"])
@EVERYWHERE
def test_negatives_are_the_tokens_as_likely_as_the_target(
    threshold: str, alpha: float, shift: float, narrow: bool
) -> None:
    case = Case(4, narrow, 1, shift)
    found, chosen, weights = case.negatives(alpha, threshold)
    for t in range(P):
        assert found.mask[t].nonzero().flatten().tolist() == [case.kept(t)[v] for v in chosen[t]]
    assert ((found.mask == 0) | (found.mask == 1)).all()
    torch.testing.assert_close(found.weight, case.spread_out(weights))
    some = found.mask.any(1)
    assert some.any() or (shift and threshold == "logit"), "below 0 the threshold on logits may ask for too much"
    torch.testing.assert_close(found.weight.sum(1), some.double())
    if narrow:
        assert not some[0], "where one token is valid there is no negative"


def test_a_larger_alpha_leaves_fewer_negatives() -> None:
    case = Case(4, False, 1)
    counts = [int(case.negatives(alpha)[0].mask.sum()) for alpha in (0.1, 0.8, 1.2, math.inf)]
    assert all(more > fewer for more, fewer in pairwise(counts))
    assert counts[-1] == 0


def test_a_threshold_on_logits_inverts_below_zero() -> None:
    """Why the threshold is on probabilities: α = 0.8 of a negative logit asks for more than the target's."""
    proposal, target = torch.tensor([[-10.0, -9.0, -7.0]]), torch.tensor([0])
    assert losses.self_hard_negatives(proposal, target, 0.8, "logit").mask.tolist() == [[False, False, True]]
    assert losses.self_hard_negatives(proposal, target, 0.8).mask.tolist() == [[False, True, True]]


def test_a_token_exactly_as_likely_as_the_target_is_a_negative() -> None:
    proposal = torch.tensor([[2.0, 2.0, math.nextafter(2.0, 0.0), 1.0, 3.0]], dtype=torch.float64)
    for threshold in ("probability", "logit"):
        found = losses.self_hard_negatives(proposal, torch.tensor([0]), 1.0, threshold)
        assert found.mask.tolist() == [[0, 1, 0, 0, 1]]


def test_the_threshold_on_probabilities_ignores_shifts() -> None:
    case, shifted = Case(5, False, 1), Case(5, False, 1, -50.0)
    assert torch.equal(case.negatives(0.8)[0].mask, shifted.negatives(0.8)[0].mask)


def test_negatives_leave_their_input_alone_and_take_no_gradient() -> None:
    case = Case(6, True)
    before = [layer.clone() for layer in case.layers]
    leaves = [layer.clone().requires_grad_() for layer in case.layers]
    proposal = losses.layer_ensemble(leaves, "entropy", case.valid)
    found = losses.self_hard_negatives(leaves[0], case.target, 0.5)
    assert not proposal.requires_grad
    assert not found.weight.requires_grad
    assert not losses.layer_ensemble(leaves[:1]).requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, leaves, strict=True))


@pytest.mark.parametrize("penalty", ["scaled", "additive"])
@pytest.mark.parametrize("shift", [0.0, -20.0], ids=["", "all negative"])
@EVERYWHERE
def test_cross_layer_preference_penalises_negatives(penalty: str, shift: float, narrow: bool) -> None:
    case = Case(7, narrow, 1, shift)
    found, _, weights = case.negatives()

    def reference(z: Tensor) -> list[Tensor]:
        return [dense.preference(z[t, case.kept(t)], case.y(t), weights[t], 0.3, penalty) for t in range(P)]

    def ours(z: Tensor) -> Tensor:
        return losses.cross_layer_preference(z, case.target, found, 0.3, penalty)

    same_values_and_gradients(ours, reference, case.logits)
    change = ours(case.logits) - losses.language_modelling(case.logits, case.target)
    assert (change[found.mask.any(1)].abs() > 1e-4).all()
    if shift and penalty == "scaled":
        assert (change <= 0).all(), "below 0 the scaled form rewards negatives"
    if penalty == "additive":
        assert (change >= 0).all()


@EVERYWHERE
def test_the_gradient_of_scaled_preference_is_the_closed_form(narrow: bool) -> None:
    """ILRec A.3: ∂L/∂z_v = softmax(z')_v (1 + β w_v) − [v = y], with w a constant."""
    case, beta = Case(8, narrow, 1), 0.7
    found, _, _ = case.negatives()
    logits = case.logits.clone().requires_grad_()
    losses.cross_layer_preference(logits, case.target, found, beta).sum().backward()
    for t in range(P):
        kept = case.kept(t)
        scale = 1 + beta * found.weight[t, kept]
        expected = (case.logits[t, kept] * scale).softmax(0) * scale
        expected[case.y(t)] -= 1
        assert logits.grad is not None
        torch.testing.assert_close(logits.grad[t, kept], expected)
        assert logits.grad[t].count_nonzero() <= len(kept)


@pytest.mark.parametrize("penalty", ["scaled", "additive"])
@EVERYWHERE
def test_preference_without_negatives_is_cross_entropy(penalty: str, narrow: bool) -> None:
    case = Case(9, narrow, 1)
    for alpha in (1e9, math.inf):
        found, _, _ = case.negatives(alpha)
        assert not found.mask.any()
        assert not found.weight.any()
        same_values_and_gradients(
            lambda z, found=found: losses.cross_layer_preference(z, case.target, found, 0.5, penalty),
            lambda z: [z[t, case.kept(t)].logsumexp(0) - z[t, case.target[t]] for t in range(P)],
            case.logits,
        )


def test_additive_preference_ignores_shifts_and_scaled_does_not() -> None:
    case = Case(10, False, 1)
    found, _, _ = case.negatives()
    for penalty, tells in (("additive", False), ("scaled", True)):
        plain, shifted = (
            losses.cross_layer_preference(z, case.target, found, 0.3, penalty) for z in (case.logits, case.logits + 5)
        )
        assert ((plain - shifted).abs().max() > 0.01) == tells


@pytest.mark.parametrize("direction", ["student_teacher", "teacher_student"])
@EVERYWHERE
def test_cross_layer_distillation_is_a_divergence_whose_teacher_is_fixed(direction: str, narrow: bool) -> None:
    case = Case(11, narrow, 1)

    def reference(student: Tensor) -> list[Tensor]:
        kept = [case.kept(t) for t in range(P)]
        return [dense.distillation(student[t, kept[t]], case.logits[t, kept[t]], direction) for t in range(P)]

    def ours(student: Tensor) -> Tensor:
        return losses.cross_layer_distillation(student, case.logits.log_softmax(1), direction, case.valid)

    same_values_and_gradients(ours, reference, case.layers[0])
    values = ours(case.layers[0])
    assert (values[1:] > 1e-3).all()
    teacher = case.logits.clone().requires_grad_()
    fixed = losses.cross_layer_distillation(case.layers[0], teacher.log_softmax(1), direction, case.valid)
    assert not fixed.requires_grad
    torch.testing.assert_close(ours(case.logits), torch.zeros(P, dtype=torch.float64))
    if narrow:
        assert values[0] == 0, "over one valid token all distributions are equal"


def test_distillation_survives_probabilities_that_underflow() -> None:
    far = torch.tensor([[0.0, -300.0, 200.0]], requires_grad=True)
    near = torch.tensor([[0.0, 1.0, -150.0]])
    for direction in ("student_teacher", "teacher_student"):
        value = losses.cross_layer_distillation(far, near.log_softmax(1), direction)
        (gradient,) = torch.autograd.grad(value.sum(), far)
        assert value.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("temperature", [0.05, 1.0, 3.0])
@pytest.mark.parametrize("support", ["H", "H_valid"])
@EVERYWHERE
def test_soft_labels_and_their_cross_entropy(temperature: float, support: str, narrow: bool) -> None:
    case = Case(12, narrow, 1)
    found, chosen, _ = case.negatives(0.1)
    labels = losses.soft_labels(case.reward, case.target, found.mask, temperature, support)
    expected = [
        dense.soft_labels(case.reward[t, case.kept(t)], case.y(t), chosen[t], temperature, support) for t in range(P)
    ]
    torch.testing.assert_close(labels, case.spread_out(expected))
    torch.testing.assert_close(labels.sum(1), torch.ones(P, dtype=torch.float64))

    def reference(z: Tensor) -> list[Tensor]:
        return [dense.collaborative_reward(z[t, case.kept(t)], expected[t]) for t in range(P)]

    same_values_and_gradients(
        lambda z: losses.collaborative_reward(z.log_softmax(1), labels, case.valid), reference, case.logits
    )


def test_the_supports_differ_in_negatives_that_lead_to_no_item() -> None:
    reward = torch.tensor([[0.5, -1.0, 0.0, 0.25, 0.9]])
    target, negatives = torch.tensor([0]), torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0]])
    whole = losses.soft_labels(reward, target, negatives)
    valid = losses.soft_labels(reward, target, negatives, support="H_valid")
    weight = torch.tensor([[0.5, 0.0, 0.0, 0.25]]).exp()
    torch.testing.assert_close(whole[:, :4], weight / weight.sum())
    assert whole[0, 4] == valid[0, 4] == 0, "not in H"
    assert valid[0, 1] == 0
    assert whole[0, 1] == whole[0, 2], "no item counts as a reward of 0"
    torch.testing.assert_close(valid[0, [0, 2, 3]], weight[0, [0, 2, 3]] / weight[0, [0, 2, 3]].sum())


def test_without_negatives_the_soft_label_is_the_target() -> None:
    case = Case(13, False, 1)
    labels = losses.soft_labels(case.reward, case.target, torch.zeros(P, V), 0.1)
    assert torch.equal(labels, torch.nn.functional.one_hot(case.target, V).double())
    torch.testing.assert_close(
        losses.collaborative_reward(case.logits.log_softmax(1), labels),
        losses.language_modelling(case.logits, case.target),
    )


def test_soft_labels_take_no_gradient() -> None:
    case = Case(14, False, 1)
    reward = case.reward.clone().requires_grad_()
    assert not losses.soft_labels(reward, case.target, case.negatives()[0].mask).requires_grad


@pytest.mark.filterwarnings("ignore:var")
@EVERYWHERE
def test_a_loss_over_nothing_is_nothing(narrow: bool) -> None:
    empty = torch.zeros(0, 3)
    target, valid = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.bool) if narrow else None
    found = losses.self_hard_negatives(losses.layer_ensemble([empty, empty], "variance", valid), target, 0.5)
    assert losses.cross_layer_preference(empty, target, found, 0.1).sum() == 0
    assert losses.cross_layer_distillation(empty, empty, valid=valid).sum() == 0
    labels = losses.soft_labels(empty, target, found.mask)
    assert losses.collaborative_reward(empty, labels, valid).sum() == 0
    assert losses.masked_softmax(empty, target, 2.0).sum() == losses.language_modelling(empty, target).sum() == 0

"""The prediction layer in pieces, against plain `transformers` and autograd with all logits at once.

The reference runs every sample in a row of its own and loops over positions; what competes at a position it finds by
looking through the catalogue.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from objectives.blocks import child_blocks, vocabulary_blocks
from objectives.config import ILRecConfig, LMLConfig, MSLConfig, ObjectiveConfig, needs_rewards
from objectives.head import objective_sums
from objectives.objective import LML, MSL, ILRec, build_objective
from objectives.rewards import Histories, RewardSource
from recommender.backbone.backbone import Backbone, add_lora
from recommender.backbone.tree import Sample, build_row, collate
from recommender.config import LoraConfig
from recommender.errors import UserError
from tests.objectives import dense
from tests.objectives.catalogues import Catalogue, Stub
from trainer.loop.module import TrainedModel

LAYERS, WIDTH = 3, 16
VOCABULARY, MANY = 101, 5003
CATALOGUE = Catalogue([50, 3, 40], 150, 0, 0)
REWARDS = Stub(len(CATALOGUE), 3.0)
SCALE = 0.37  # of the loss, before the backward pass


def backbone_of(kind: str = "tied", vocabulary: int = VOCABULARY, seed: int = 0) -> Backbone:
    """Three layers of random weights, large enough for logits that differ."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        tie_word_embeddings=kind != "untied" and kind != "bias",
    )
    model: Any = LlamaForCausalLM(config)
    if kind == "bias":
        model.lm_head = nn.Linear(WIDTH, vocabulary)
    if kind == "lora":
        model = add_lora(model, LoraConfig(rank=2, alpha=4, dropout=0.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return Backbone(model, SimpleNamespace(pad_token_id=0, eos_token_id=0))  # type: ignore[arg-type]


class Samples:
    """Rows of histories and targets: prompts that share prefixes, and responses that share tokens."""

    def __init__(self, rows: int = 3, each: int = 3, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.sequences = [rng.integers(0, len(CATALOGUE), 5) for _ in range(rows)]
        lengths = [np.sort(rng.choice(5, each, replace=False)) for _ in range(rows)]
        self.histories = Histories(
            [sequence[:-1] for sequence in self.sequences],
            lengths,
            [sequence[n] for sequence, n in zip(self.sequences, lengths, strict=True)],
        )
        self.samples = [
            [(s[:n], int(s[n])) for n in ns] for s, ns in zip(self.sequences, self.histories.lengths, strict=True)
        ]
        self.rows = [
            build_row(
                [
                    Sample(
                        np.array(self.prompt(history), np.int32),
                        np.array(CATALOGUE.identifiers[item], np.int32),
                        CATALOGUE.nodes_of(item),
                    )
                    for history, item in row
                ]
            )
            for row in self.samples
        ]

    @staticmethod
    def prompt(history: np.ndarray) -> list[int]:
        return [95, *(token for item in history for token in CATALOGUE.identifiers[item]), 96]

    def expected(self, model: nn.Module, config: ObjectiveConfig, layers: tuple[int, ...]) -> dict[str, Tensor]:
        """Sums over all positions of the batch, by looping over them."""
        flat = [sample for row in self.samples for sample in row]
        paths = [(self.prompt(history), CATALOGUE.identifiers[item]) for history, item in flat]
        sums: dict[str, Tensor] = {}
        for (history, item), positions in zip(flat, dense.logits_of(model, paths, layers), strict=True):
            for t, at in enumerate(positions):
                start = int(CATALOGUE.offsets[item])
                valid = CATALOGUE.competing[start + t]
                narrow = isinstance(config, MSLConfig) or getattr(config, "vocabulary", "full") == "valid"
                if narrow and len(valid) == 1:
                    continue
                columns = valid if narrow else list(range(at[0].shape[0]))
                y = columns.index(CATALOGUE.identifiers[item][t])
                z, *others = (logits.float()[columns] for logits in at)
                if isinstance(config, LMLConfig):
                    terms = {"loss": -z.log_softmax(0)[y]}
                elif isinstance(config, MSLConfig):
                    tau = 1.5 if config.temperature == "adaptive" else config.temperature
                    terms = {"loss": (1.5 if config.temperature == "adaptive" else 1) * -(z / tau).log_softmax(0)[y]}
                    if config.temperature == "adaptive":
                        opens = float(t == 0)
                        terms |= {"openings": z.new_tensor(opens), "opening_target": z[y] * opens}
                        terms |= {"opening_sum": z.sum() * opens, "opening_squares": (z**2).sum() * opens}
                else:
                    known = CATALOGUE.shares(tuple(CATALOGUE.identifiers[item][:t]), self.scores(history))
                    reward = torch.tensor([known.get(token, -1.0) for token in columns])
                    terms = dense.ilrec(config, z, others, y, reward)
                for name, value in terms.items():
                    sums[name] = sums.get(name, torch.zeros(())) + value
        for number, layer in enumerate(layers):
            if f"cpd {number}" in sums:
                sums[f"cpd_{layer}"] = sums.pop(f"cpd {number}")
        return sums

    @staticmethod
    def scores(history: np.ndarray) -> Tensor:
        return REWARDS.scores(REWARDS.embed(history)[None])[0].detach().double()


def module_of(backbone: Backbone, config: ObjectiveConfig, memory_mb: int = 256) -> TrainedModel:
    objective = build_objective(config, LAYERS, CATALOGUE.trie)
    source = None
    if needs_rewards(config):
        source = RewardSource(REWARDS, CATALOGUE.trie, config.crr_items)  # type: ignore[arg-type, union-attr]
    return TrainedModel(backbone, objective, CATALOGUE.trie, 0.0, source, memory_mb)


def micro_batch(module: TrainedModel, samples: Samples) -> Any:
    batch = collate(samples.rows, 0, module.objective.branching_only)
    return module.micro_batch(batch, samples.histories if module.reward_source is not None else None)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def same_sums_and_gradients(kind: str, config: ObjectiveConfig, memory_mb: int, vocabulary: int = VOCABULARY) -> None:
    samples = Samples()
    backbone = backbone_of(kind, vocabulary)
    module = module_of(backbone, config, memory_mb)
    loss = module(micro_batch(module, samples))
    (loss * SCALE).backward()
    found = gradients(backbone.model)

    model = backbone_of(kind, vocabulary).model
    expected = samples.expected(model, config, module.objective.layers)
    (expected["loss"] * SCALE).backward()
    assert loss.item() == pytest.approx(expected["loss"].item(), rel=1e-5)
    assert module.sums.keys() == expected.keys()
    for name, value in expected.items():
        assert module.sums[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-4), name
    wanted = gradients(model)
    assert found.keys() == wanted.keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5 * largest, msg=lambda m, n=name: n + m)
    learns = "lora_" if kind == "lora" else ""
    assert all(gradient.any() for name, gradient in wanted.items() if learns in name)


ILREC: dict[str, dict[str, Any]] = {
    "paper": {"k": 1, "cpd_weight": 0.3, "crr_weight": 0.5},
    "preference only": {"k": 2, "cpd_weight": 0.0},
    "without distillation": {"k": 2, "ensemble": "entropy", "cpd_weight": 0.0, "crr_weight": 0.5},
    "without rewards": {"k": 2, "ensemble": "variance", "cpd_weight": 0.3},
    "without preference": {"beta": 0.0, "cpd_weight": 0.3, "crr_weight": 0.5, "crr_temperature": 0.1},
    "additive": {"k": 2, "penalty": "additive", "beta": 2.0, "threshold": "logit", "ensemble": "max_prob"},
    "supports": {"crr_weight": 0.5, "crr_support": "H_valid", "alpha": 0.1, "cpd_direction": "teacher_student"},
    "negatives from the end": {"negatives_from": "final", "cpd_weight": 0.3, "crr_weight": 0.5},
    "no layers": {"negatives_from": "final", "cpd_weight": 0.0, "beta": 0.2},
    "a layer by name": {"layers": (1,), "cpd_weight": 0.3, "alpha": 1.2},
    "nothing is a negative": {"alpha": 1e9, "crr_weight": 0.5, "cpd_weight": 0.3},
}
CONFIGS: dict[str, ObjectiveConfig] = {
    "lml": LMLConfig(),
    "msl": MSLConfig(temperature=2.0),
    "ats": MSLConfig(temperature="adaptive"),
    **{
        f"ilrec {vocabulary}: {name}": ILRecConfig(vocabulary=vocabulary, **({"beta": 0.5} | settings))  # type: ignore[arg-type]
        for vocabulary in ("full", "valid")
        for name, settings in ILREC.items()
    },
}
PIECES = pytest.mark.parametrize("memory_mb", [256, 0], ids=["one piece", "position by position"])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_sums_and_gradients_are_those_of_all_logits_at_once(config: ObjectiveConfig) -> None:
    same_sums_and_gradients("tied", config, 256)


EVERY_HEAD = ("lml", "msl", "ilrec full: paper", "ilrec valid: paper")


@PIECES
@pytest.mark.parametrize("kind", ["tied", "untied", "bias", "lora"])
@pytest.mark.parametrize("name", EVERY_HEAD)
def test_every_kind_of_head_in_pieces_of_any_size(name: str, kind: str, memory_mb: int) -> None:
    """LoRA: the head is frozen, and gradients only pass through it."""
    same_sums_and_gradients(kind, CONFIGS[name], memory_mb)


@pytest.mark.parametrize("name", ["lml", "ilrec full: paper"])
def test_pieces_of_several_positions(name: str) -> None:
    """1 MiB is enough for 13 positions and for 3, which do not divide the batch."""
    same_sums_and_gradients("tied", CONFIGS[name], 1, MANY)


def test_the_samples_have_wide_and_narrow_and_forced_positions() -> None:
    """Else the tests above would compare less than they say."""
    nodes = np.concatenate([row.nodes for row in Samples().rows])
    assert (nodes == 0).sum() > 5
    assert CATALOGUE.trie.child_count[0] > 32
    assert (CATALOGUE.trie.child_count[nodes[nodes > 0]] < 32).any()
    assert (nodes < 0).sum() > 3
    assert any((row.end[:-1] != row.end[1:]).any() for row in Samples().rows), "rows branch"


@pytest.mark.parametrize("name", EVERY_HEAD)
def test_without_gradients_the_sums_are_the_same(name: str) -> None:
    module = module_of(backbone_of(), CONFIGS[name])
    batch = micro_batch(module, Samples())
    loss = module(batch)
    sums = dict(module.sums)
    with torch.no_grad():
        again = module(batch)
    assert loss.requires_grad
    assert not again.requires_grad
    assert loss.item() == again.item()
    assert {name: value.item() for name, value in sums.items()} == {n: v.item() for n, v in module.sums.items()}


def test_adapters_on_the_head_are_refused() -> None:
    """The prediction layer's weight is used as it is; what an adapter adds would be left out without a word."""
    plain: Any = backbone_of("untied").model
    with pytest.raises(UserError, match="leave the prediction layer"):
        add_lora(plain, LoraConfig(rank=2, target_modules=("q_proj", "lm_head")))


@pytest.mark.filterwarnings("ignore:var")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_without_predictions_is_zero_and_reaches_every_weight(name: str) -> None:
    """What a rank without rows runs: ZeRO needs the same gradients to appear on all ranks."""
    samples = Samples(rows=1)
    config = CONFIGS[name]
    reached, names = [], []
    for empty in (False, True):
        module = module_of(backbone_of(), config)
        batch = collate(samples.rows, 0, module.objective.branching_only)
        if empty:
            nothing = torch.zeros(0, dtype=torch.int64)
            batch = type(batch)(**(vars(batch) | dict.fromkeys(("source", "target", "nodes", "sample"), nothing)))
        histories = Histories([], [], []) if empty else samples.histories
        loss = module(module.micro_batch(batch, histories if module.reward_source is not None else None))
        loss.backward()
        reached.append({n for n, p in module.named_parameters() if p.grad is not None})
        names.append(set(module.sums))
        if empty:
            assert loss.item() == 0
            assert all(value == 0 for value in module.sums.values())
            assert all(not p.grad.any() for p in module.parameters() if p.grad is not None)
    assert names[0] == names[1]
    assert reached[0] == reached[1]


def test_sharp_soft_labels_leave_every_sum_finite() -> None:
    """The training loop takes no step where a sum is not finite, and says so only where it is the loss."""
    config = ILRecConfig(alpha=0.1, crr_weight=0.5, crr_temperature=0.002)
    module = module_of(backbone_of(), config)
    assert module(micro_batch(module, Samples())).isfinite()
    assert all(value.isfinite() for value in module.sums.values())


class Recorder(TorchDispatchMode):
    """Watches all tensors that come into being, views aside.

    Attributes:
        shapes: theirs.
        peak: the most bytes that those with logits' columns (V, but for [V, D]) took at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        self._alive = {key: (each, size) for key, (each, size) in self._alive.items() if not each.expired()}
        for x in tree_leaves(output):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in known:
                self.shapes.add(tuple(x.shape))
                if MANY in x.shape and x.shape != (MANY, WIDTH):
                    storage = x.untyped_storage()
                    self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return output


def recorded(function: Callable[[], Any]) -> Recorder:
    with Recorder() as recorder:
        function()
    return recorder


def many_samples() -> Samples:
    samples = Samples(rows=12, each=4)
    assert sum(len(row.target) for row in samples.rows) * MANY > 3 * 2**18
    return samples


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in ("lml", "ilrec full: paper") for kind in ("tied", "bias", "lora")),
        *((f"ilrec full: {name}", "untied") for name in ILREC if name != "paper"),
    ],
)
def test_logits_and_what_losses_make_of_them_keep_to_the_budget(name: str, kind: str) -> None:
    """With 1 MiB: logits, masks, probabilities and gradients together, in the forward and the backward pass."""
    samples = many_samples()
    module = module_of(backbone_of(kind, MANY), CONFIGS[name], 1)
    batch = micro_batch(module, samples)
    seen = recorded(lambda: module(batch).backward())
    assert 0.4 * 2**20 < seen.peak < 1.3 * 2**20
    assert max(map(math.prod, seen.shapes)) < len(batch.batch.target) * MANY / 4


def test_the_recorder_sees_logits_of_a_whole_batch() -> None:
    """Else the test above could not fail."""
    model: Any = backbone_of("tied", MANY).model
    batch = collate(many_samples().rows, 0)

    def at_once() -> None:
        logits = model(batch.input_ids).logits.flatten(0, 1)[batch.source]
        F.cross_entropy(logits, batch.target).backward()

    seen = recorded(at_once)
    assert (len(batch.target), MANY) in seen.shapes
    assert seen.peak > 3 * 4 * len(batch.target) * MANY


@pytest.mark.parametrize("kind", ["tied", "untied", "bias", "lora"])
@pytest.mark.parametrize("name", ["msl", "ats", "ilrec valid: paper", "ilrec valid: without rewards"])
def test_over_valid_tokens_nothing_spans_the_vocabulary_but_the_heads_gradient(name: str, kind: str) -> None:
    samples = many_samples()
    module = module_of(backbone_of(kind, MANY), CONFIGS[name], 1)
    batch = micro_batch(module, samples)

    spanning = {shape for shape in recorded(lambda: module(batch).backward()).shapes if MANY in shape}
    allowed = {(MANY, WIDTH)} | ({(MANY,)} if kind == "bias" else set())
    assert spanning <= allowed
    assert bool(spanning) == (kind != "lora")


def test_narrow_blocks_keep_to_the_budget_as_well() -> None:
    """There the rows of the prediction layer are gathered for each position: [n, w, D]."""
    backbone = backbone_of("untied")
    nodes = np.flatnonzero((CATALOGUE.node > 0) & (CATALOGUE.trie.child_count[CATALOGUE.node] > 1))
    at = np.random.default_rng(0).choice(nodes, 12_000)
    blocks = child_blocks(
        CATALOGUE.trie, torch.from_numpy(CATALOGUE.node[at]).long(), torch.from_numpy(CATALOGUE.tokens[at]).long()
    )
    assert max(len(b.at) * b.tokens.shape[1] * WIDTH for b in blocks if b.tokens is not None) > 2**18
    hidden = torch.randn(len(at), WIDTH, requires_grad=True)

    seen = recorded(lambda: objective_sums(MSL(2.0), backbone, hidden, [], blocks, None, 1)["loss"].backward())
    assert max(math.prod(shape) for shape in seen.shapes if len(shape) == 3) <= 2**18


def test_scaling_by_almost_one_survives_bfloat16() -> None:
    """1 + βw = 1.003 is 1 in bfloat16: logits become float32 before anything scales them."""
    backbone = backbone_of("untied")
    backbone.model.to(torch.bfloat16)
    draw = torch.Generator().manual_seed(0)
    hidden = (3 * torch.randn(40, WIDTH, generator=draw)).bfloat16()
    tap = hidden / 3  # the layers agree, so that what is penalised is likely
    target = torch.randint(0, VOCABULARY, (40,), generator=draw)
    config = ILRecConfig(k=1, beta=0.003, alpha=1.2, cpd_weight=0.0)
    blocks = vocabulary_blocks(torch.zeros_like(target), target)
    sums = objective_sums(ILRec(config, LAYERS), backbone, hidden, [tap], blocks, None, 256)
    z, layer = (backbone.head(x).detach().double() for x in (hidden, backbone.norm(tap)))
    expected = sum(float(dense.ilrec(config, z[i], [layer[i]], int(target[i]))["loss"]) for i in range(40))
    plain = float(F.cross_entropy(z, target, reduction="sum"))
    assert abs(expected - plain) > 0.01
    assert abs(sums["loss"].item() - expected) < 0.01 * abs(expected - plain)


@pytest.mark.parametrize("valid", [False, True], ids=["vocabulary", "valid tokens"])
def test_bfloat16_gradients_are_about_as_good_as_autograds(valid: bool) -> None:
    """Against float32 on the same numbers. Over many pieces the weight's gradient adds up in bfloat16, at a price."""
    positions = 1500
    backbone = backbone_of("untied", MANY)
    backbone.model.to(torch.bfloat16)
    rng = np.random.default_rng(0)
    at = rng.choice(CATALOGUE.branching(), positions)
    node, target = (torch.from_numpy(x[at]).long() for x in (CATALOGUE.node, CATALOGUE.tokens))
    outside = torch.full((positions, MANY), valid)
    for row, where in enumerate(at):
        outside[row, CATALOGUE.competing[where]] = False
    start = torch.randn(positions, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight: Any = backbone.head.weight

    def plain(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (start, weight)]
        logits = F.linear(*leaves).float().masked_fill(outside, -torch.inf)
        return [g.float() for g in torch.autograd.grad(F.cross_entropy(logits / 2, target, reduction="sum"), leaves)]

    def ours(memory_mb: int) -> list[Tensor]:
        hidden = start.clone().requires_grad_()
        blocks = child_blocks(CATALOGUE.trie, node, target) if valid else vocabulary_blocks(node, target)
        loss = objective_sums(MSL(2.0), backbone, hidden, [], blocks, None, memory_mb)["loss"]
        return [g.float() for g in torch.autograd.grad(loss, [hidden, weight])]

    exact, usual = plain(torch.float32), plain(torch.bfloat16)
    for memory_mb, worse in ((256, 2), (2, 8)):
        for found, reference, best in zip(ours(memory_mb), usual, exact, strict=True):
            assert found.dtype == torch.float32
            assert (found - best).norm() < worse * (reference - best).norm()


def test_the_head_gets_its_own_forward_back() -> None:
    backbone = backbone_of()
    module = module_of(backbone, LMLConfig())
    before = backbone.logits(torch.ones(1, WIDTH))
    module(micro_batch(module, Samples()))
    assert "forward" not in vars(backbone.head)
    assert torch.equal(backbone.logits(torch.ones(1, WIDTH)), before)
    with pytest.raises(RuntimeError):
        backbone.as_head(lambda *_: (_ for _ in ()).throw(RuntimeError()), torch.ones(1))
    assert torch.equal(backbone.logits(torch.ones(1, WIDTH)), before)


def test_the_order_of_the_predictions_does_not_matter() -> None:
    """Blocks name the predictions they hold; states find their gradients again."""
    backbone = backbone_of("untied")
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, WIDTH, generator=draw)
    target = torch.randint(0, VOCABULARY, (12,), generator=draw)
    order = torch.randperm(12, generator=draw)
    results = []
    for permutation in (torch.arange(12), order):
        leaf = hidden[permutation].requires_grad_()
        blocks = vocabulary_blocks(torch.zeros_like(target), target[permutation])
        loss = objective_sums(LML(), backbone, leaf, [], blocks, None, 256)["loss"]
        results.append(torch.autograd.grad(loss, leaf)[0][permutation.argsort()])
    torch.testing.assert_close(*results)

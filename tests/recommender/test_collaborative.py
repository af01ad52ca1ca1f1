"""The collaborative models: embeddings, scores, losses, bundles, and the recommender around them."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from pydantic import ValidationError
from torch import nn

from recommender.bundle import Manifest, read_manifest
from recommender.catalogue.catalogue import Catalogue
from recommender.collaborative.attention import LiGRBlock
from recommender.collaborative.bert4rec import BERT4Rec
from recommender.collaborative.config import (
    BERT4RecConfig,
    BPRConfig,
    CaserConfig,
    CollaborativeConfig,
    ContentConfig,
    ESASRecConfig,
    GRU4RecConfig,
    SASRecConfig,
)
from recommender.collaborative.losses import bpr, gbce, gbce_exponent, sampled_softmax
from recommender.collaborative.model import CausalModel, CollaborativeModel, TrainingBatch
from recommender.collaborative.recommender import CollaborativeRecommender, build_model, load_model
from recommender.errors import UserError
from recommender.loading import load_recommender
from recommender.recommender import Recommender, merge_adapter, starting_point
from service.api import create_api
from service.config import ServingConfig
from service.metrics import Metrics
from service.models import Models

ITEMS, ROOM = 30, 8
SHAPE = {"dim": 16, "max_length": ROOM}
CONFIGS: list[CollaborativeConfig] = [
    SASRecConfig(**SHAPE),
    GRU4RecConfig(**SHAPE, layers=2, hidden=24),
    BERT4RecConfig(**SHAPE),
    CaserConfig(**SHAPE),
    BPRConfig(**SHAPE, negatives=4),
    ESASRecConfig(**SHAPE),
]
CAUSAL = [config for config in CONFIGS if config.kind != "bert4rec"]
HISTORIES = [[3, 20, 7], [29], [], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [4, 4, 4]]


def shaken(config: CollaborativeConfig, seed: int = 0) -> CollaborativeModel:
    """A model whose weights are large enough for everything to matter."""
    torch.manual_seed(seed)
    model = build_model(config, ITEMS).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(params=CONFIGS, ids=lambda config: config.kind)
def model(request: pytest.FixtureRequest) -> CollaborativeModel:
    return shaken(request.param)


@pytest.fixture
def recommender(model: CollaborativeModel) -> CollaborativeRecommender:
    catalogue = Catalogue([f"i{n}" for n in range(ITEMS)], [f"Title {n}" for n in range(ITEMS)])
    manifest = Manifest(name="cf", recommender=model.config.model_dump(mode="json"), metrics={"validation_HR@10": 0.2})
    return CollaborativeRecommender(catalogue, model, manifest)


def batch_of(windows: list[list[int]], targets: list[list[int]], negatives: list[int] | None = None) -> TrainingBatch:
    """Windows and the places of their targets, padded on the right."""
    longest = max(map(len, windows))
    items, wanted = np.zeros((len(windows), longest), np.int64), np.zeros((len(windows), longest), bool)
    for row, (window, places) in enumerate(zip(windows, targets, strict=True)):
        items[row, : len(window)] = window
        wanted[row, places] = True
    return TrainingBatch(
        items=torch.from_numpy(items),
        lengths=torch.tensor([len(window) for window in windows]),
        targets=torch.from_numpy(wanted),
        draws=torch.rand(items.shape, generator=torch.Generator().manual_seed(0)),
        negatives=None if negatives is None else torch.tensor(negatives),
    )


# ---- Embeddings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [ROOM, ROOM + 5])
def test_prefixes_are_embedded_as_if_alone(model: CollaborativeModel, length: int) -> None:
    items = np.random.default_rng(0).integers(0, ITEMS, length)
    lengths = np.array([length, 0, 1, 3, length - 1, 3])
    other, fewer = items[::-1][: length - 2].copy(), np.array([2, length - 2])
    together = model.embed_prefixes([items, other], [lengths, fewer])
    alone = torch.cat([model.embed([items[:n]]) for n in lengths] + [model.embed([other[:n]]) for n in fewer])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert together.isfinite().all()
    assert (together[0] - together[3]).abs().max() > 1e-3


def test_company_and_padding_change_nothing(model: CollaborativeModel) -> None:
    histories = [np.array(history, np.int64) for history in HISTORIES]
    together = model.embed(histories)
    alone = torch.cat([model.embed([history]) for history in histories])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_only_the_last_items_are_read(model: CollaborativeModel) -> None:
    items = np.arange(ROOM + 4)
    early, late = items.copy(), items.copy()
    early[3], late[4] = 29, 29
    whole, without, changed = model.embed([items, early, late])
    torch.testing.assert_close(whole, without, atol=1e-6, rtol=0)  # rows of a batch may be summed in another order
    assert (whole - changed).abs().max() > 1e-5


@pytest.mark.parametrize("config", CAUSAL, ids=lambda config: config.kind)
def test_a_later_item_never_changes_an_earlier_state(config: CollaborativeConfig) -> None:
    model = shaken(config)
    assert isinstance(model, CausalModel)
    items = torch.arange(ROOM)[None]
    states = model.states(items)
    for place in range(ROOM):
        changed = items.clone()
        changed[0, place] = 29
        moved = (model.states(changed) - states).abs().amax(2)[0] > 1e-7
        assert not moved[:place].any()
        assert moved[place]


@pytest.mark.parametrize("config", CAUSAL, ids=lambda config: config.kind)  # BERT4Rec reads the mask alone
def test_an_empty_history_scores_the_biases(config: CollaborativeConfig) -> None:
    model = shaken(config)
    scores = model.scores(model.embed([np.empty(0, np.int64)]))
    torch.testing.assert_close(scores[0], model.bias)


def test_scores_are_of_all_items_and_of_nothing_else(model: CollaborativeModel) -> None:
    embedding = model.embed([np.array([1, 2])])
    scores = model.scores(embedding)
    assert scores.shape == (1, ITEMS)
    assert scores.dtype == torch.float32
    expected = [(embedding[0] @ model.table.weight[i] + model.bias[i]).item() for i in range(ITEMS)]
    np.testing.assert_allclose(scores[0].detach(), expected, atol=1e-5)


# ---- Losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [c for c in CAUSAL if c.loss == "softmax"], ids=lambda config: config.kind)
def test_the_loss_is_the_sum_over_the_targets_alone(config: CollaborativeConfig) -> None:
    """−log softmax of each target after its own prefix, computed one by one."""
    model = shaken(config)
    windows, targets = [[3, 1, 4, 1, 5], [9, 2, 6]], [[1, 4], [2]]
    loss, counted = model.loss_sum(batch_of(windows, targets))
    assert counted == 3
    expected = 0.0
    for window, places in zip(windows, targets, strict=True):
        for place in places:
            scores = model.scores(model.embed([np.array(window[:place])]))
            expected -= scores.log_softmax(1)[0, window[place]].item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def dense_losses(
    scores: torch.Tensor, targets: list[int], negatives: list[int], beta: float
) -> dict[str, torch.Tensor]:
    """Each loss from rows of all scores, target by target; a negative that is the target does not count."""
    sums = {name: torch.zeros((), dtype=scores.dtype) for name in ("softmax", "gbce", "bpr")}
    for row, target in zip(scores, targets, strict=True):
        others = row[[item for item in negatives if item != target]]
        sums["softmax"] = sums["softmax"] - torch.log(row[target].exp() / (row[target].exp() + others.exp().sum()))
        positive, negative = torch.sigmoid(row[target]), torch.sigmoid(others)
        binary = beta * torch.log(positive) + torch.log(1 - negative).sum()
        sums["gbce"] = sums["gbce"] - binary / (len(negatives) + 1)
        sums["bpr"] = sums["bpr"] - torch.log(torch.sigmoid(row[target] - others)).sum() / len(negatives)
    return sums


def test_losses_and_their_gradients_are_those_of_the_equations() -> None:
    targets, negatives, beta = [3, 7, 4], [7, 4, 9, 9, 0], 0.3
    scores = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for name, expected in dense_losses(scores, targets, negatives, beta).items():
        positive, negative = scores[range(3), targets], scores[:, negatives]
        negative = negative.masked_fill(torch.tensor(targets)[:, None] == torch.tensor(negatives), -torch.inf)
        loss = {"softmax": sampled_softmax, "gbce": lambda p, n: gbce(p, n, beta), "bpr": bpr}[name](positive, negative)
        torch.testing.assert_close(loss, expected)
        found, wanted = (torch.autograd.grad(each, scores, retain_graph=True)[0] for each in (loss, expected))
        torch.testing.assert_close(found, wanted)
        assert wanted.abs().max() > 0.01


def test_losses_are_finite_for_scores_of_any_size() -> None:
    for loss in (sampled_softmax, lambda p, n: gbce(p, n, 0.5), bpr):
        positive, negative = torch.tensor([-500.0, 500.0]), torch.tensor([[500.0, -torch.inf], [-500.0, 500.0]])
        assert loss(positive, negative).isfinite()


def test_gbce_s_exponent_goes_from_plain_to_the_sampled_share() -> None:
    assert gbce_exponent(10, 101, 0.0) == 1
    assert gbce_exponent(10, 101, 1.0) == pytest.approx(0.1)
    assert gbce_exponent(10, 101, 0.75) == pytest.approx(0.325)
    assert gbce_exponent(1000, 101, 0.75) == 1  # negatives are drawn with replacement, so there may be more


@pytest.mark.parametrize("temperature", [None, 0.2])
@pytest.mark.parametrize("kind", ["softmax", "gbce", "bpr"])
def test_a_model_s_loss_is_that_of_its_scores(kind: str, temperature: float | None) -> None:
    model = shaken(SASRecConfig(**SHAPE, loss=kind, negatives=3, temperature=temperature, calibration=0.6))
    loss, _ = model.loss_sum(batch_of([[3, 1, 4]], [[2]], negatives=[7, 4, 9]))  # 4 is the target itself
    scores = model.scores(model.embed([np.array([3, 1])])).double()
    expected = dense_losses(scores, [4], [7, 4, 9], gbce_exponent(3, ITEMS, 0.6))[kind]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [None, 0.2])
def test_a_sample_of_all_items_is_no_sample(temperature: float | None) -> None:
    """Loss and gradients are those of the softmax over all items; those of the table are sparse."""
    losses, gradients = [], []
    for negatives in (None, list(range(ITEMS))):
        model = shaken(SASRecConfig(**SHAPE, temperature=temperature, negatives=negatives and len(negatives)))
        loss, _ = model.loss_sum(batch_of([[3, 1, 4, 1, 5], [9, 2, 6]], [[1, 4], [2]], negatives))
        loss.backward()
        assert model.table.weight.grad is not None
        assert model.table.weight.grad.is_sparse == (negatives is not None)
        losses.append(loss.item())
        gradients.append({name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


def test_a_cosine_does_not_see_lengths() -> None:
    model = shaken(SASRecConfig(**SHAPE, temperature=0.1))
    before = model.scores(model.embed([np.array([1, 2])]))
    cosine = torch.nn.functional.cosine_similarity(model.embed([np.array([1, 2])]), model.table.weight[:ITEMS])
    torch.testing.assert_close(before[0], cosine / 0.1 + model.bias)


def test_texts_are_learnt_from_and_folded_away() -> None:
    model = shaken(ESASRecConfig(**SHAPE, negatives=None, content=ContentConfig(own=0.5)))
    known = torch.arange(ITEMS) != 4
    model.learn_texts(torch.randn(ITEMS, 6, generator=torch.Generator().manual_seed(0)), known)
    assert model.content is not None
    assert not model.table.weight[4].any()  # nothing of its own for an item that training never saw
    loss, _ = model.train().loss_sum(batch_of([[3, 1, 5]], [[1, 2]]))
    loss.backward()
    assert model.content.projection.weight.grad is not None
    assert model.content.projection.weight.grad.abs().max() > 0
    assert model.table.weight.grad is not None
    assert not model.table.weight.grad[4].any()
    assert model.bias.grad is not None
    assert model.bias.grad[4] == 0  # nor does it learn that such an item never comes
    model.eval()
    histories = [np.array([3, 4]), np.array([4]), np.array([1, 2, 3])]
    before = model.scores(model.embed(histories))
    model.fold_texts()
    torch.testing.assert_close(model.scores(model.embed(histories)), before, atol=1e-5, rtol=1e-5)
    assert set(model.state_dict()) == set(build_model(model.config, ITEMS).state_dict())


def test_some_lookups_of_training_have_the_text_alone() -> None:
    model = shaken(SASRecConfig(**SHAPE, content=ContentConfig(own=0.5)))
    model.learn_texts(torch.zeros(ITEMS, 6), torch.ones(ITEMS, dtype=torch.bool))
    items = torch.arange(ITEMS).repeat(40)
    kept = model.train().vectors(items).abs().amax(1) > 0
    assert 0.4 < kept.float().mean() < 0.6
    assert (model.eval().vectors(items) == model.table(items)).all()


def test_ligr_layers_are_gated() -> None:
    """With gates that are shut a block passes its input on; open, it is a block of SASRec's shape with SwiGLU."""
    block = LiGRBlock(16, 2, 32, 0.0)
    states = torch.randn(2, 5, 16)
    for gate, expected in ((-1e4, states), (1e4, None)):
        for layer in (block.attention_gate, block.feed_forward_gate):
            nn.init.zeros_(layer.weight)
            nn.init.constant_(layer.bias, gate)
        if expected is None:
            after = states + block.attended(block.before_attention(states), None)
            expected = after + block.feed_forward(block.before_feed_forward(after))
        torch.testing.assert_close(block(states), expected)


def test_bert4rec_masks_targets_and_at_least_one_in_each_window() -> None:
    windows = [[3, 1, 4, 1, 5], [9, 2, 6]] * 50
    batch = batch_of(windows, [[1, 3, 4], [1]] * 50)
    model = shaken(BERT4RecConfig(**SHAPE, masked=0.3, last_only=0.4))
    assert isinstance(model, BERT4Rec)
    hidden = model._hidden(batch)
    assert not (hidden & ~batch.targets).any()
    assert hidden.any(1).all()
    last = hidden[::2][:, 4] & ~hidden[::2][:, 1] & ~hidden[::2][:, 3]
    assert 20 <= int(last.sum()) <= 45  # of 50: those that had to, and those that drew so
    assert model.loss_sum(batch)[1] == int(hidden.sum())


def test_bert4rec_reads_both_sides_but_never_what_it_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shaken(BERT4RecConfig(**SHAPE, last_only=1.0))  # masks place 2, the last target
    embeddings: list[torch.Tensor] = []

    def spy(found: torch.Tensor, *_: object) -> torch.Tensor:
        embeddings.append(found)
        return found.sum()

    monkeypatch.setattr(model, "prediction_loss", spy)
    for window in ([3, 1, 4, 1, 5], [3, 1, 9, 1, 5], [3, 1, 4, 8, 5], [3, 7, 4, 1, 5]):
        model.loss_sum(batch_of([window], [[1, 2]]))
    plain, other_target, other_later, other_earlier = embeddings
    assert torch.equal(plain, other_target)
    assert not torch.allclose(plain, other_later)
    assert not torch.allclose(plain, other_earlier)


def test_gru4rec_s_state_is_as_wide_as_its_item_vectors_unless_told() -> None:
    shapes = {name: tuple(p.shape) for name, p in shaken(GRU4RecConfig(**SHAPE)).named_parameters()}
    wide = {name: tuple(p.shape) for name, p in shaken(GRU4RecConfig(**SHAPE, hidden=24)).named_parameters()}
    assert (shapes["gru.weight_hh_l0"], shapes["out.weight"]) == ((48, 16), (16, 16))
    assert (wide["gru.weight_hh_l0"], wide["out.weight"]) == ((72, 24), (16, 24))


# ---- The recommender and its bundle ----------------------------------------------------------------------------------


def test_recommendations_are_those_of_brute_force(recommender: CollaborativeRecommender) -> None:
    with torch.no_grad():
        scores = recommender.model.scores(recommender.model.embed([np.array(h, np.int64) for h in HISTORIES]))
    probabilities = scores.log_softmax(1).double().numpy()
    allow = [None, {3, 4, 5}, set(range(20)), None, {8}]
    exclude = [{3, 20, 7}, {5}, set(), set(range(28)), set()]
    k = [5, 4, 30, 3, 2]
    answers = recommender.recommend(HISTORIES, k, exclude, allow)
    for row, answer in enumerate(answers):
        left = sorted(set(range(ITEMS) if allow[row] is None else allow[row]) - exclude[row])
        best = sorted(left, key=lambda item: (-probabilities[row, item], item))[: k[row]]
        assert answer.items == best
        np.testing.assert_allclose(answer.scores, probabilities[row, best], atol=1e-6)
        assert answer.exact
        assert answer.expansions == 0
    assert [len(answer.items) for answer in answers] == [5, 2, 20, 2, 1]
    [everything] = recommender.recommend([[1]], 1000)
    assert sorted(everything.items) == list(range(ITEMS))


def test_equal_scores_come_in_the_catalogue_s_order(recommender: CollaborativeRecommender) -> None:
    model = copy.deepcopy(recommender.model)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        model.bias[[25, 11]] = 1.0
    tied = CollaborativeRecommender(recommender.catalogue, model, recommender.manifest)
    assert tied.recommend([[1, 2]], 6)[0].items == [11, 25, 0, 1, 2, 3]


def test_what_is_saved_comes_back(recommender: CollaborativeRecommender, tmp_path: Path) -> None:
    recommender.save(tmp_path / "bundle")
    loaded = load_recommender(tmp_path / "bundle")
    assert isinstance(loaded, CollaborativeRecommender)
    assert loaded.model.config == recommender.model.config
    assert loaded.catalogue.item_ids == recommender.catalogue.item_ids
    for name, value in recommender.model.state_dict().items():
        assert torch.equal(value, loaded.model.state_dict()[name])
    assert [vars(a) for a in loaded.recommend(HISTORIES, 7)] == [vars(a) for a in recommender.recommend(HISTORIES, 7)]
    assert torch.equal(load_model(tmp_path / "bundle").bias, recommender.model.bias)
    assert read_manifest(tmp_path / "bundle").kind == recommender.model.config.kind
    assert {path.suffix for path in (tmp_path / "bundle").iterdir()} <= {
        ".json",
        ".md",
        ".parquet",
        ".safetensors",
        ".marisa",
    }


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    model = shaken(CONFIGS[0])
    catalogue = Catalogue([f"i{n}" for n in range(ITEMS)], [f"Title {n}" for n in range(ITEMS)])
    manifest = Manifest(name="cf", recommender=model.config.model_dump(mode="json"))
    CollaborativeRecommender(catalogue, model, manifest).save(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_each_kind_of_bundle_is_refused_where_the_other_is_needed(bundle: Path, tiny_bundle: Path) -> None:
    assert isinstance(load_recommender(tiny_bundle), Recommender)
    with pytest.raises(UserError, match=r"holds a language model, and a collaborative one is needed.*sasrec"):
        load_model(tiny_bundle)
    with pytest.raises(UserError, match=r"holds no language model \(sasrec\), and one is needed here"):
        Recommender.load(bundle)
    with pytest.raises(UserError, match="holds no language model"):
        starting_point(bundle, None, torch.float32)
    with pytest.raises(UserError, match="holds no language model"):
        merge_adapter(bundle, bundle.parent / "merged")


def test_a_damaged_bundle_is_refused(bundle: Path) -> None:
    damaged = shutil.copytree(bundle, bundle.parent / "damaged")
    (damaged / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"model\.safetensors: differs from its checksum"):
        load_model(damaged)
    path = damaged / "recommender.json"
    path.write_text(path.read_text().replace("checksums", "no_checksums"))
    with pytest.raises(UserError, match="its model cannot be read"):
        load_model(damaged)


def test_the_endpoint_serves_it(bundle: Path) -> None:
    recommender = load_recommender(bundle)
    models = Models(ServingConfig(), Metrics())
    models.replace({"cf": recommender})
    with TestClient(create_api(models)) as client:
        answer = client.post("/v1/recommendations", json={"history": ["i3", "Title 20"], "k": 4}).json()
        [model] = client.get("/v1/models").json()["models"]
    expected = recommender.recommend([[3, 20]], 4, [{3, 20}])[0]
    assert [item["item_id"] for item in answer["items"]] == [f"i{item}" for item in expected.items]
    assert answer["exact"]
    assert answer["complete"]
    assert model["items"] == ITEMS


def test_models_need_torch_alone() -> None:
    script = (
        "import sys, recommender.collaborative.recommender; "
        "sys.exit(any(name in sys.modules for name in ('ray', 'deepspeed', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_configs_are_strict() -> None:
    with pytest.raises(ValidationError, match="dropuot"):
        SASRecConfig.model_validate({"kind": "sasrec", "dropuot": 0.1})
    with pytest.raises(ValidationError, match="do not divide"):
        SASRecConfig(dim=10, heads=3)
    with pytest.raises(ValidationError, match="negatives"):
        BPRConfig.model_validate({"negatives": None})
    with pytest.raises(ValidationError, match=r"gbce compares targets with negatives; set negatives"):
        SASRecConfig(loss="gbce")
    with pytest.raises(ValidationError, match=r"content\.ownn"):
        SASRecConfig.model_validate({"content": {"ownn": 0.5}})
    assert ESASRecConfig().negatives == 256


def test_a_bundle_of_before_opens(bundle: Path) -> None:
    """Configs that name none of the later fields mean what they meant."""
    config = json.loads((bundle / "collaborative.json").read_text())
    for later in ("loss", "calibration", "temperature", "content"):
        del config[later]
    assert SASRecConfig.model_validate(config) == load_model(bundle).config

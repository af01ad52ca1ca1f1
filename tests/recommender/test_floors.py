"""ItemKNN and TF-IDF against ten dense lines each; their bundles; what is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from fastapi.testclient import TestClient
from pydantic import ValidationError

from recommender import golden
from recommender.bundle import Manifest, read_manifest
from recommender.catalogue.catalogue import Catalogue
from recommender.collaborative.recommender import load_model
from recommender.errors import UserError
from recommender.floors import itemknn
from recommender.floors.config import ItemKNNConfig, ItemKNNSettings, Normalisation, Terms, TfidfConfig, TfidfSettings
from recommender.floors.itemknn import ItemKNN
from recommender.floors.model import weighted
from recommender.floors.recommender import FloorRecommender
from recommender.floors.tfidf import Tfidf, texts_of
from recommender.loading import load_recommender
from recommender.recommender import Recommender
from service.api import create_api
from service.config import ServingConfig
from service.metrics import Metrics
from service.models import Models

ITEMS = 30
HISTORIES = [[3, 20, 7], [29], [], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [4, 4, 4]]
WORDS = ["tent", "stove", "green", "red", "large", "two persons", "part 2", "part 3", "camp", "sleeping bag", "é"]


def sequences(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sequences over the first 25 items, in which items come again."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 12, 40)
    return np.repeat(np.arange(40), lengths), rng.integers(0, 25, lengths.sum()).astype(np.int32)


def titles(seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 6))) for _ in range(ITEMS - 1)] + [""]


def settings(
    normalisation: Normalisation = "cosine", shrinkage: float = 2.0, backward: float = 0.5, neighbours: int = 6
) -> ItemKNNSettings:
    return ItemKNNSettings(
        normalisation=normalisation, shrinkage=shrinkage, backward=backward, window=3, neighbours=neighbours
    )


def words(terms: Terms = "words") -> TfidfSettings:
    return TfidfSettings(columns=("title",), terms=terms, most_terms=1000)


def catalogue() -> Catalogue:
    counts = np.bincount(sequences()[1], minlength=ITEMS)
    return Catalogue([f"i{n}" for n in range(ITEMS)], titles(), popularity=counts)


def dense_itemknn(config: ItemKNNSettings, history: list[int], decay: float) -> np.ndarray:
    """The definition, one pair of places at a time."""
    sequence, items = sequences()
    count, occurs = np.zeros((ITEMS, ITEMS)), Counter(items.tolist())
    for a in range(len(items)):
        for b in range(a + 1, min(a + config.window + 1, len(items))):
            if sequence[a] == sequence[b]:
                count[items[a], items[b]] += 1 / (b - a)
                count[items[b], items[a]] += config.backward / (b - a)
    scores = np.array([1e-9 * occurs[j] / len(items) for j in range(ITEMS)])
    for age, i in enumerate(reversed(history)):
        similar = np.zeros(ITEMS)
        for j in range(ITEMS):
            both, ni, nj = count[i, j], occurs[i], occurs[j]
            norm = {"cosine": (ni * nj) ** 0.5, "jaccard": max(ni + nj - both, both), "conditional": ni}
            similar[j] = 0 if i == j or not both else both / (norm[config.normalisation] + config.shrinkage)
        similar[np.argsort(-similar, kind="stable")[config.neighbours :]] = 0
        scores += decay**age * similar
    return scores


def dense_tfidf(history: list[int], decay: float) -> np.ndarray:
    """The definition over words."""
    texts = [Counter(title.split()) for title in titles()]
    terms = sorted({term for text in texts for term in text})
    idf = np.array([np.log((1 + ITEMS) / (1 + sum(term in text for text in texts))) + 1 for term in terms])
    vectors = np.array([[1 + np.log(text[t]) if t in text else 0 for t in terms] for text in texts]) * idf
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    profile = sum((decay**age * vectors[i] for age, i in enumerate(reversed(history))), np.zeros(len(terms)))
    found: np.ndarray = vectors @ profile / max(float(np.linalg.norm(profile)), 1e-12)
    return found


def rows(histories: list[list[int]], decay: float = 0.7) -> np.ndarray:
    return weighted([np.array(h, np.int64) for h in histories], decay, ITEMS)


@pytest.mark.parametrize("pairs", [1, 40, 1 << 22])  # counted at once: an item at a time and in pieces, some, all
@pytest.mark.parametrize("normalisation", ["cosine", "jaccard", "conditional"])
@pytest.mark.parametrize("backward", [0.0, 0.5])
def test_itemknn_scores_are_those_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, normalisation: Normalisation, backward: float, pairs: int
) -> None:
    monkeypatch.setattr(itemknn, "PAIRS", pairs)
    config = settings(normalisation, backward=backward)
    found = ItemKNN.fit(config, *sequences(), ITEMS).scores(rows(HISTORIES))
    assert found.dtype == np.float32
    for row, history in zip(found, HISTORIES, strict=True):
        np.testing.assert_allclose(row, dense_itemknn(config, history, 0.7), rtol=1e-5, atol=1e-12)


def test_where_no_count_decides_the_most_popular_come_first() -> None:
    model = ItemKNN.fit(settings(), *sequences(), ITEMS)
    recommender = FloorRecommender(catalogue(), model, 0.5, Manifest(name="knn"))
    counts = catalogue().popularity
    assert counts is not None
    popular = sorted(range(ITEMS), key=lambda item: (-counts[item], item))
    unknown_and_none = recommender.recommend([[28], []], ITEMS)
    assert [answer.items for answer in unknown_and_none] == [popular, popular]


def test_tfidf_scores_are_those_of_the_definition() -> None:
    found = Tfidf.fit(words(), titles()).scores(rows(HISTORIES))
    assert found.dtype == np.float32
    for row, history in zip(found, HISTORIES, strict=True):
        np.testing.assert_allclose(row, dense_tfidf(history, 0.7), atol=1e-6)
    assert (found[1] == 0).all()  # item 29 has no title
    assert found.max() <= 1 + 1e-6


def test_scores_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    for model in (ItemKNN.fit(settings(), *sequences(), ITEMS), Tfidf.fit(words("characters"), titles())):
        together = model.scores(rows(HISTORIES * 40))  # more than are scored at once
        alone = np.concatenate([model.scores(rows([history])) for history in HISTORIES] * 40)
        np.testing.assert_allclose(together, alone, rtol=1e-6)


@pytest.mark.parametrize("terms", ["words", "word_pairs", "characters"])
def test_further_texts_get_the_vectors_that_items_have(terms: Terms) -> None:
    model = Tfidf.fit(words(terms), titles())
    again = Tfidf.of(words(terms), model.tensors(), json.loads(json.dumps(model.terms)))
    np.testing.assert_allclose(again.encode(titles()).toarray(), model.vectors.toarray(), atol=1e-6)
    assert again.encode(["unheard of"]).shape == (1, len(model.terms))


def test_texts_are_made_of_any_columns() -> None:
    items = pa.table({"title": ["A &amp; B", None], "tags": [["x", "y"], []], "year": [1999, None]})
    assert texts_of(items, ["title", "tags", "year"]) == ["A & B x y 1999", ""]
    with pytest.raises(UserError, match=r"recommender\.columns: the items have no column 'brand'; there are: title"):
        texts_of(items, ["title", "brand"])


@pytest.mark.parametrize("terms", ["words", "characters"])
def test_a_tfidf_without_text_is_refused(terms: Terms) -> None:
    with pytest.raises(UserError, match=r"recommender\.columns: none of the 3 items has text in title"):
        Tfidf.fit(words(terms), ["", "", ""])


@pytest.fixture(params=["itemknn", "tfidf"])
def recommender(request: pytest.FixtureRequest) -> FloorRecommender:
    known = request.param == "itemknn"
    model = ItemKNN.fit(settings(), *sequences(), ITEMS) if known else Tfidf.fit(words(), titles())
    return FloorRecommender(catalogue(), model, 0.7, Manifest(name="floor", recommender={"kind": request.param}))


def test_recommendations_are_those_of_brute_force(recommender: FloorRecommender) -> None:
    scores = recommender.model.scores(rows(HISTORIES))
    exclude = [{3, 20, 7}, {5}, set(), set(range(28)), set()]
    allow = [None, {3, 4, 5}, set(range(20)), None, {8}]
    for row, answer in enumerate(recommender.recommend(HISTORIES, 5, exclude, allow)):
        left = sorted(set(range(ITEMS) if allow[row] is None else allow[row] or ()) - exclude[row])
        best = sorted(left, key=lambda item: (-scores[row, item], item))[:5]
        assert answer.items == best
        np.testing.assert_allclose(answer.scores, scores[row, best])
        assert answer.exact
    assert recommender.rank([[3, 20]], [[1, 7]])[0] == recommender.scores([[3, 20]])[0, [1, 7]].tolist()


def test_what_is_saved_comes_back(recommender: FloorRecommender, tmp_path: Path) -> None:
    recommender.save(tmp_path / "bundle")
    loaded = load_recommender(tmp_path / "bundle")
    assert isinstance(loaded, FloorRecommender)
    golden.check(loaded)
    assert (loaded.decay, loaded.model.settings) == (recommender.decay, recommender.model.settings)
    assert torch.equal(loaded.scores(HISTORIES), recommender.scores(HISTORIES))
    assert read_manifest(tmp_path / "bundle").kind in ("itemknn", "tfidf")
    suffixes = {path.suffix for path in (tmp_path / "bundle").iterdir()}
    assert suffixes <= {".json", ".md", ".parquet", ".safetensors", ".marisa"}


def test_a_bundle_is_refused_where_another_kind_is_needed(recommender: FloorRecommender, tmp_path: Path) -> None:
    recommender.save(tmp_path / "bundle")
    with pytest.raises(UserError, match=r"holds (itemknn|tfidf), and a collaborative one is needed"):
        load_model(tmp_path / "bundle")
    with pytest.raises(UserError, match=r"holds no language model \((itemknn|tfidf)\)"):
        Recommender.load(tmp_path / "bundle")


def test_a_damaged_bundle_is_refused(recommender: FloorRecommender, tmp_path: Path) -> None:
    recommender.save(tmp_path / "bundle")
    for name, content in [("model.safetensors", b"nothing"), ("floor.json", b"{}"), ("floor.json", b"no")]:
        damaged = shutil.copytree(tmp_path / "bundle", tmp_path / "damaged", dirs_exist_ok=True)
        (damaged / name).write_bytes(content)
        with pytest.raises(UserError, match="differs from its checksum"):
            load_recommender(damaged)
        path = damaged / "recommender.json"
        path.write_text(path.read_text().replace("checksums", "no_checksums"))
        with pytest.raises(UserError, match="its model cannot be read"):
            load_recommender(damaged)


def test_the_endpoint_serves_it(recommender: FloorRecommender) -> None:
    models = Models(ServingConfig(), Metrics())
    models.replace({"floor": recommender})
    with TestClient(create_api(models)) as client:
        answer = client.post("/v1/recommendations", json={"history": ["i3", "i20"], "k": 4}).json()
        ranked = client.post("/v1/rank", json={"history": ["i3"], "candidates": ["i1", "i2"]}).json()
        nobody = client.post("/v1/recommendations", json={"history": [], "k": 4}).json()
    expected = recommender.recommend([[3, 20]], 4, [{3, 20}])[0]
    assert [item["item_id"] for item in answer["items"]] == [f"i{item}" for item in expected.items]
    assert answer["exact"]
    assert len(ranked["items"]) == 2
    assert nobody["fallback"]


def test_configs_take_one_value_or_several_and_are_strict() -> None:
    config = ItemKNNConfig.model_validate({"decay": 0.7, "normalisation": ["jaccard"], "backward": [0, 1]})
    assert (config.decay, config.normalisation) == ((0.7,), ("jaccard",))
    assert [each.backward for each in config.settings()] == [0, 1]
    assert 8 <= sum(len(c.decay) for c in (ItemKNNConfig(),) for _ in c.settings()) <= 16
    for model, wrong in [
        (ItemKNNConfig, {"decay": 0}),
        (ItemKNNConfig, {"decay": []}),
        (ItemKNNConfig, {"backward": [2]}),
        (ItemKNNConfig, {"shrinkage": float("nan")}),
        (ItemKNNConfig, {"normalization": "cosine"}),
        (TfidfConfig, {"columns": []}),
        (TfidfConfig, {"terms": "sentences"}),
    ]:
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            model.model_validate(wrong)

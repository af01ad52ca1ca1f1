"""Priors: terms of items beside a model's score, and the weights that `ilrec blend` finds for them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

import ilrec
from recommender import golden
from recommender.bundle import Manifest, peek_manifest
from recommender.catalogue.catalogue import Catalogue
from recommender.config import (
    ColumnPrior,
    ModelPrior,
    NewPrior,
    PopularityPrior,
    PriorConfig,
    SearchConfig,
    UnconditionalPrior,
)
from recommender.errors import UserError
from recommender.floors.recommender import FloorRecommender
from recommender.loading import load_recommender
from recommender.models import Version
from recommender.priors import Priors, column_values, unconditional
from recommender.recommender import Recommender, extend_bundle
from tests.brute_force import BruteForce
from trainer.blended import BLEND, PAGE, blend, importances, prior_name
from trainer.data.dataset import Dataset
from trainer.evaluation.blend import Weighing, with_scales
from trainer.evaluation.floors import floor_bundles, floors_of
from trainer.evaluation.pools import Pools, pools_of
from trainer.evaluation.ranking import held_out, ranks_of
from trainer.experiment import Experiment
from trainer.parts import Prepared


def quiet(text: str) -> None:
    """Says nothing."""


@pytest.fixture(scope="module")
def blended(tiny_experiment: Experiment, tiny_bundle: Path) -> Version:
    """The tiny model with random weights, blended with all that can be had."""
    version = ilrec.Experiment(tiny_experiment, quiet).blend(tiny_bundle_reference(tiny_bundle))
    assert isinstance(version, Version)
    return version


def tiny_bundle_reference(bundle: Path) -> str:
    return f"{bundle.parents[1].name}@{bundle.parent.name}"


# -- The terms --------------------------------------------------------------------------------------------------------


def test_columns_become_terms() -> None:
    table = pa.table(
        {
            "price": [1.0, None, 3.0],
            "on": [True, False, True],
            "day": pa.array([0, 86_400, 0], pa.timestamp("s")),
            "name": list("abc"),
        }
    )
    catalogue = Catalogue(["a", "b", "c"], ["A", "B", "C"], table)

    def of(column: str, transform: str) -> list[float]:
        return column_values(catalogue, ColumnPrior(kind="column", column=column, transform=transform)).tolist()  # type: ignore[arg-type]

    assert of("price", "none") == [1.0, 2.0, 3.0]  # what has no value has the mean
    assert of("price", "standard") == pytest.approx([-(1.5**0.5), 0, 1.5**0.5])
    assert of("price", "log") == pytest.approx(np.log1p([1, 2, 3]).tolist())
    assert of("on", "none") == [1.0, 0.0, 1.0]
    assert of("day", "none") == [0.0, 1.0, 0.0]
    for column, wrong in (
        ("name", "holds neither numbers nor dates"),
        ("cost", "no column 'cost'; there are: price, on, day, name"),
    ):
        with pytest.raises(UserError, match=wrong):
            of(column, "none")


def test_a_prior_that_cannot_be_is_refused_by_its_field() -> None:
    table = pa.table({"low": [-1.0, 2.0], "none": pa.array([None, None], pa.float64())})
    catalogue = Catalogue(["a", "b"], ["A", "B"], table)
    cases: list[tuple[PriorConfig, str]] = [
        (ColumnPrior(kind="column", column="low", transform="log"), "below 0"),
        (ColumnPrior(kind="column", column="none"), "no value at all"),
        (PopularityPrior(kind="popularity"), "does not know how often"),
        (UnconditionalPrior(kind="unconditional"), "was not computed"),
    ]
    for config, wrong in cases:
        with pytest.raises(UserError, match=rf"^search\.priors\.mine: .*{wrong}"):
            Priors(catalogue, {"mine": config})
    with pytest.raises(UserError, match=r"search\.priors\.mine: its values are not all finite"):
        Priors(catalogue, {"mine": UnconditionalPrior(kind="unconditional")}, {}, torch.tensor([0.0, torch.nan]))
    counted = Catalogue(["a", "b"], ["A", "B"], None, np.array([3, 0]))
    priors = Priors(counted, {"p": PopularityPrior(kind="popularity", weight=-2), "n": NewPrior(kind="new")})
    assert priors.of([[], [1]]) is not None
    assert torch.stack([*priors.of([[], [1]])]).tolist() == [pytest.approx([-2 * np.log(4), 1.0])] * 2  # type: ignore[misc]
    with pytest.raises(UserError, match=r"search\.priors\.q: the model was exported without it \(it has: p, n\)"):
        priors.of([[]], {"q": NewPrior(kind="new")})
    assert priors.of([[]], {}) is None


# -- The blend --------------------------------------------------------------------------------------------------------


def test_the_blended_bundle_needs_nothing_else_and_ranks_by_the_sum(
    blended: Version, tiny_bundle: Path, tiny_prepared: Prepared
) -> None:
    recommender = load_recommender(blended.bundle)
    golden.check(recommender)
    assert isinstance(recommender, Recommender)
    assert recommender.manifest.search.priors
    assert recommender.manifest.made_from == tiny_bundle_reference(tiny_bundle)
    assert not any(str(config).startswith("/") for config in recommender.manifest.search.priors.values())
    force, wide = BruteForce(tiny_bundle), SearchConfig(node_budget=1000)
    for history in ([3, 50, 7], [12]):
        terms = recommender.priors.of([history])
        assert terms is not None
        expected = force.scores(history) + terms[0].numpy()
        seen = list(history)
        expected[seen] = -np.inf
        [found] = recommender.recommend([history], 10, [seen], search=wide)
        assert found.exact
        np.testing.assert_allclose(found.scores, np.sort(expected)[::-1][:10], atol=2e-4)
        np.testing.assert_allclose(expected[found.items], found.scores, atol=2e-4)
        [ranked] = recommender.rank([history], [found.items])
        np.testing.assert_allclose(ranked, found.scores, atol=2e-4)
        for spelling, score in zip(recommender.spellings(history, found.items), found.scores, strict=True):
            assert sum(value for _, value in spelling) == pytest.approx(score, abs=2e-4)
            assert spelling[-1][0] == f"[{list(recommender.manifest.search.priors)[-1]}]"


def test_the_blend_is_better_than_the_model_and_says_so(blended: Version, tiny_prepared: Prepared) -> None:
    saved = json.loads((blended.directory / BLEND).read_text())
    assert saved["singles"]["blend"]["NDCG@10"] > saved["singles"]["model"]["NDCG@10"]
    assert saved["singles"]["blend"]["NDCG@10"] >= max(
        saved["singles"][name]["NDCG@10"] for name in ("itemknn", "tfidf")
    )
    assert peek_manifest(blended.bundle).metrics["validation_NDCG@10"] == saved["singles"]["blend"]["NDCG@10"]
    page = (blended.directory / PAGE).read_text()
    assert "NDCG@10 as one weight changes" in page


def test_pools_give_the_ranks_of_the_search(
    blended: Version, tiny_experiment: Experiment, tiny_prepared: Prepared
) -> None:
    """What weights are chosen by is what is served."""
    dataset = Dataset.load(tiny_prepared.dataset)
    split = held_out(dataset, "validation", 24)
    recommender = load_recommender(blended.bundle, search=SearchConfig(node_budget=2000))
    assert isinstance(recommender, Recommender)
    pools = pools_of(recommender, recommender.priors, split, True, 100, 8)
    total = Weighing(pools, recommender.priors.configs).total(recommender.priors.configs)
    by_pools = pools.ranks(total)
    by_search = ranks_of(recommender, split, 10, True, 8).ranks
    assert np.where(by_pools <= 10, by_pools, 0).tolist() == by_search.tolist()


def test_weights_are_given_for_a_call_and_for_a_model(blended: Version) -> None:
    shop = ilrec.load(str(blended.bundle))
    own = shop.recommend(["i3"], k=5)
    plain = shop.recommend(["i3"], k=5, boost=dict.fromkeys(shop.manifest.search.priors or {}, 0.0))
    assert plain.item_ids != own.item_ids
    assert all(item.score < 0 for item in plain)  # log-probabilities alone
    assert shop.recommend(["i3"], k=5).item_ids == own.item_ids
    with pytest.raises(UserError, match=r"boost\.margin: the model has no such prior; it has: "):
        shop.recommend(["i3"], boost={"margin": 1.0})
    bare = load_recommender(blended.bundle, search=SearchConfig(priors={}))
    assert [bare.catalogue.item_ids[i] for i in bare.recommend([[3]], 5, [[3]])[0].items] == plain.item_ids
    with pytest.raises(UserError, match=r"search\.priors\.margin: the model was exported without it"):
        load_recommender(blended.bundle, search=SearchConfig(priors={"margin": NewPrior(kind="new")}))


def test_new_items_come_into_a_blended_model(blended: Version, tmp_path: Path) -> None:
    old = load_recommender(blended.bundle)
    title = old.catalogue.titles[3]
    further = Catalogue(
        ["new1", "new2"],
        [title + " mark two", "Quite another thing"],
        pa.table({"item_id": ["new1", "new2"], "title": [title + " mark two", "Quite another thing"]}),
    )
    extend_bundle(blended.bundle, further, tmp_path / "extended")
    recommender = load_recommender(tmp_path / "extended")
    golden.check(recommender)
    [found] = recommender.recommend([[3]], len(recommender.catalogue), search=SearchConfig(node_budget=5000))
    assert len(found.items) == len(old.catalogue) + 2
    assert found.items.index(len(old.catalogue)) < found.items.index(len(old.catalogue) + 1)  # its title is alike


def test_priors_of_the_config(
    tiny_experiment: Experiment, tiny_bundle: Path, tiny_prepared: Prepared, tmp_path: Path
) -> None:
    """Only those that are named are weighed; models of another catalogue, and language models, are refused."""
    named = {"few": PopularityPrior(kind="popularity", limits=(-1, 0))}
    asked = tiny_experiment.model_copy(update={"search": SearchConfig(priors=named)})
    blend(asked, tiny_bundle, tiny_prepared, [], tmp_path / "one", quiet)
    assert set(peek_manifest(tmp_path / "one").search.priors or {}) <= {"few"}
    with pytest.raises(UserError, match=r"search\.priors\.[\w-]+\.path: .* holds a language model"):
        blend(tiny_experiment, tiny_bundle, tiny_prepared, [str(tiny_bundle)], tmp_path / "two", quiet)
    with pytest.raises(UserError, match="--add nobody: no model of this name"):
        blend(tiny_experiment, tiny_bundle, tiny_prepared, ["nobody"], tmp_path / "two", quiet)
    assert not (tmp_path / "two").exists()


def test_priors_of_a_config_belong_to_blend(tiny_experiment: Experiment, tiny_bundle: Path) -> None:
    """Training and evaluation do not read them; `{}` leaves out those that a model has."""
    named = SearchConfig(priors={"few": PopularityPrior(kind="popularity")}, width=7)
    assert named.unblended() == SearchConfig(width=7)
    assert SearchConfig(priors={}).unblended().priors == {}


@pytest.mark.parametrize("name", ["model", "blend"])
def test_names_that_a_table_needs_are_refused(
    name: str, tiny_experiment: Experiment, tiny_bundle: Path, tiny_prepared: Prepared, tmp_path: Path
) -> None:
    search = SearchConfig(priors={name: PopularityPrior(kind="popularity")})
    asked = tiny_experiment.model_copy(update={"search": search})
    with pytest.raises(UserError, match=rf"search\.priors\.{name}: stands for something else"):
        blend(asked, tiny_bundle, tiny_prepared, [], tmp_path / "out", quiet)


def test_names_of_further_models(tiny_experiment: Experiment, tiny_bundle: Path, tmp_path: Path) -> None:
    storage = tiny_experiment.storage
    assert prior_name(tiny_bundle_reference(tiny_bundle), storage) == f"random-{tiny_bundle.parent.name}"
    assert prior_name(str(tiny_bundle), storage) == f"random-{tiny_bundle.parent.name}"
    long = tmp_path / ("a.long" * 20)
    long.symlink_to(tiny_bundle)
    assert SearchConfig(priors={prior_name(str(long), storage): NewPrior(kind="new")}).priors


def test_a_model_of_other_data_is_refused(
    tiny_experiment: Experiment, tiny_bundle: Path, tiny_prepared: Prepared, tmp_path: Path
) -> None:
    """It may have seen the targets that weights are found on."""
    dataset = Dataset.load(tiny_prepared.dataset)
    bundles = floor_bundles(dataset, tiny_experiment.evaluation, floors_of(tiny_experiment), quiet)
    floor = load_recommender(bundles["itemknn"])
    assert isinstance(floor, FloorRecommender)
    floor.manifest = floor.manifest.model_copy(update={"data_fingerprint": "other"})
    floor.save(tmp_path / "leaky")
    with pytest.raises(UserError, match=r"search\.priors\.leaky\.path: .* was trained on other data"):
        blend(tiny_experiment, tiny_bundle, tiny_prepared, [str(tmp_path / "leaky")], tmp_path / "out", quiet)


def test_limits_of_a_call_keep_the_score_that_was_trained(tiny_bundle: Path) -> None:
    recommender = Recommender.load(tiny_bundle)
    space, backbone = recommender.space, recommender.backbone
    trained = Recommender(space, backbone, Manifest(name="lml", score="full", search=SearchConfig(node_budget=2000)))
    [whole] = trained.recommend([[3, 50]], 5)
    [bounded] = trained.recommend([[3, 50]], 5, search=SearchConfig(node_budget=1999))
    [ranked] = trained.rank([[3, 50]], [whole.items], SearchConfig(node_budget=9))
    assert bounded == whole
    np.testing.assert_allclose(ranked, whole.scores, atol=1e-4)
    assert whole.scores != recommender.recommend([[3, 50]], 5)[0].scores


def test_no_target_in_any_list() -> None:
    made = pools(0)
    nowhere = Weighing(replace(made, place=np.full(400, -1)), {"useful": NewPrior(kind="new")})
    with pytest.raises(UserError, match="none of the 400 validation targets is in a list"):
        nowhere.fitted(np.ones(400))


# -- Weights ----------------------------------------------------------------------------------------------------------


def pools(seed: int, targets: int = 400, width: int = 40) -> Pools:
    """The target is what the model's score, one useful prior and chance say; a second prior is noise."""
    generator = np.random.default_rng(seed)
    model, useful, noise = generator.normal(size=(3, targets, width)).astype(np.float32)
    place = (model + 2 * useful + generator.gumbel(size=(targets, width))).argmax(1)
    items = np.tile(np.arange(width, dtype=np.int32), (targets, 1))
    return Pools(items, {"model": model, "useful": useful, "noise": noise}, place)


def test_the_weight_of_what_helps_is_found_and_what_does_not_gets_none() -> None:
    configs: dict[str, PriorConfig] = {name: NewPrior(kind="new") for name in ("useful", "noise")}
    weighing = Weighing(pools(0), configs)
    found = weighing.fitted(np.ones(400))
    assert 1.5 < found.configs["useful"].weight < 2.7
    assert abs(found.configs["noise"].weight if "noise" in found.configs else 0) < 0.3
    assert found.ndcg == pytest.approx(weighing.ndcg(found.configs), abs=2e-3)  # weights are rounded
    assert found.ndcg > weighing.ndcg({}) + 0.1


def test_the_scale_of_counts_is_the_best_that_a_history_has() -> None:
    made = replace(
        pools(1), scores={"model": np.zeros((2, 3), np.float32), "knn": np.array([[0, 2, 1], [4, 9, 0]], np.float32)}
    )
    made = replace(made, items=np.array([[0, 1, 2], [3, -1, -1]], np.int32), place=np.array([0, 0]))
    config = with_scales(made, {"knn": ModelPrior(kind="model", path="", transform="log")})["knn"]
    assert isinstance(config, ModelPrior)
    assert config.scale == 3.0


def test_ranks_in_a_pool() -> None:
    made = Pools(np.array([[2, 5, 7, -1], [1, 3, 4, 6], [0, 1, 2, 3]], np.int32), {}, np.array([1, 2, -1]))
    total = np.array([[1.0, 1.0, 2.0, 9.0], [0.0, 3.0, 3.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    assert made.ranks(total).tolist() == [3, 2, 0]  # ties go to the lower item; what only fills up does not count


def test_where_splits_follow_time_later_targets_count_more(tiny_prepared: Prepared) -> None:
    dataset = Dataset.load(tiny_prepared.dataset)
    assert importances(dataset, np.arange(16)).tolist() == [1.0] * 16  # leave one out
    found = importances(replace(dataset, protocol="chronological"), np.arange(16))
    targets = dataset.targets["validation"]
    times = dataset.times[dataset.offsets[targets.sequence[:16]] + targets.position[:16]]
    order = np.argsort(times, kind="stable")
    assert found[order[[15, 13, 11]]] == pytest.approx([1.0, 0.5, 0.25])
    assert (np.diff(found[order]) > 0).all()


def test_targets_count_by_their_importance() -> None:
    """The useful prior is useful in one half of the targets and turned round in the other."""
    made = pools(2)
    turned = made.scores["useful"].copy()
    turned[200:] *= -1
    made = replace(made, scores=made.scores | {"useful": turned})
    weighing = Weighing(made, {"useful": NewPrior(kind="new")})
    for half, sign in ((slice(0, 200), 1), (slice(200, 400), -1)):
        importance = np.zeros(400)
        importance[half] = 1.0
        assert sign * weighing.fitted(importance).configs["useful"].weight > 1


def test_what_the_model_says_without_a_history(tiny_bundle: Path) -> None:
    recommender = load_recommender(tiny_bundle)
    found = unconditional(recommender, at_once=64)
    np.testing.assert_allclose(found.numpy(), BruteForce(tiny_bundle).scores([]), atol=2e-4)

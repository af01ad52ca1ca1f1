"""`import ilrec`: models asked by name, experiments run, what comes back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import ilrec
from tests.test_cli import HEAVY
from trainer.experiment import Experiment
from trainer.parts import Prepared

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def shop(tiny_bundle: Path) -> ilrec.Recommender:
    return ilrec.load(tiny_bundle)


def test_importing_it_is_light() -> None:
    say = "import sys, ilrec; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", say], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())


def test_a_list_has_ids_titles_and_scores(shop: ilrec.Recommender) -> None:
    title = shop.catalogue.titles[50]
    found = shop.recommend(["i3", title.upper()], k=4)
    assert found.exact
    assert [item.rank for item in found] == [1, 2, 3, 4]
    assert [item.score for item in found] == sorted((item.score for item in found), reverse=True)
    assert not {"i3", "i50"} & set(found.item_ids)
    assert [shop.catalogue.titles[shop.catalogue.item_ids.index(item.item_id)] for item in found] == [
        item.title for item in found
    ]
    assert repr(found).startswith("4 items, exact\n  1  ")
    [one, two] = shop.recommend_batch([["i3", title], ["i7"]], k=4)
    assert one.item_ids == found.item_ids
    assert two.item_ids != one.item_ids


def test_filters_are_those_of_the_endpoint(shop: ilrec.Recommender) -> None:
    assert shop.catalogue.columns is not None
    brands = dict(zip(shop.catalogue.item_ids, shop.catalogue.columns["brand"].to_pylist(), strict=True))
    every = shop.recommend(["i3"], k=200, exclude_seen=False).item_ids
    assert sorted(every) == sorted(brands)
    brand = brands[every[0]]
    of_brand = [item for item in every if brands[item] == brand]
    assert shop.recommend(["i3"], k=5, where={"brand": brand}, exclude_seen=False).item_ids == of_brand[:5]
    assert shop.recommend(["i3"], k=5, where={"brand": ["no such"]}).item_ids == []
    denied = shop.recommend(["i3"], k=3, allow=every[:5], deny=every[:2], exclude_seen=False)
    assert denied.item_ids == every[2:5]
    capped = shop.recommend(["i3"], k=6, max_per={"brand": 1})
    assert len({brands[item] for item in capped.item_ids}) == len(capped) == 6


def test_candidates_are_ranked_as_they_would_be_listed(shop: ilrec.Recommender) -> None:
    listed = shop.recommend(["i3", "i9"], k=5)
    ranked = shop.rank(["i3", "i9"], [*reversed(listed.item_ids), listed[0].title])
    assert ranked.item_ids == listed.item_ids
    assert [item.score for item in ranked] == pytest.approx([item.score for item in listed], abs=1e-4)
    why = shop.explain(["i3", "i9"], listed[0].item_id)
    assert why.score == pytest.approx(listed[0].score, abs=1e-4)
    assert sum(value for _, value in why.tokens) == pytest.approx(why.score)
    assert listed[0].title[:3] in "".join(text for text, _ in why.tokens)


def test_what_is_unknown_is_refused_with_what_was_meant(shop: ilrec.Recommender) -> None:
    title = shop.catalogue.titles[3]
    with pytest.raises(ilrec.UserError, match="did you mean"):
        shop.recommend([title[:-1] + "x"])
    with pytest.raises(ilrec.UserError, match=r"where\.brnd: unknown column; columns .*brand"):
        shop.recommend(["i3"], where={"brnd": "x"})
    with pytest.raises(ilrec.UserError, match="is one text"):
        shop.recommend("i3")
    with pytest.raises(ilrec.UserError, match="history: is empty"):
        shop.recommend([])
    with pytest.raises(ilrec.UserError, match=r"max_per\.brand: give 1 or more"):
        shop.recommend(["i3"], max_per={"brand": 0})


def test_users_have_histories(tiny_bundle: Path, tiny_prepared: Prepared, shop: ilrec.Recommender) -> None:
    of_model, of_data = ilrec.histories(tiny_bundle), ilrec.histories(tiny_prepared)
    assert len(of_model) == 60
    assert dict(of_model) == dict(of_data)
    user = next(iter(of_model))
    assert len(shop.recommend(of_model[user], k=3)) == 3
    with pytest.raises(ilrec.UserError, match=f"user {user + 'x'!r} is not in the data; did you mean {user!r}"):
        of_model.of(user + "x")


def test_an_experiment_is_a_file_a_mapping_or_a_model(
    tiny_bundle: Path, tiny_experiment: Experiment, tiny_prepared: Prepared
) -> None:
    run = ilrec.experiment(tiny_bundle, {"training.epochs": 7}, lambda text: None)
    assert (run.config.name, run.config.training.epochs) == ("random", 7)
    assert run.prepare() == tiny_prepared
    assert run.recommender("latest").manifest.name == "tiny"
    values = tiny_experiment.model_dump(mode="json")
    assert ilrec.experiment(values, ["training.epochs=3"]).config == tiny_experiment
    with pytest.raises(ilrec.UserError, match=r"training\.epoch: unknown field; did you mean 'epochs'"):
        ilrec.experiment(values, {"training.epoch": 3})


def test_the_command_takes_filters_and_prints_json(tiny_bundle: Path, shop: ilrec.Recommender) -> None:
    from tests.test_cli import ilrec as command
    from tests.test_cli import without_probe

    assert shop.catalogue.columns is not None
    brand = shop.catalogue.columns["brand"][7].as_py()
    user = next(iter(ilrec.histories(tiny_bundle)))
    asked = ["--user", user, "-k", "3", "--where", f"brand={brand}", "--max-per", "kind=1", "--json"]
    found = json.loads(without_probe(command("recommend", str(tiny_bundle), *asked)))
    history = ilrec.histories(tiny_bundle)[user]
    expected = shop.recommend(history, k=3, where={"brand": brand}, max_per={"kind": 1})
    assert [item["item_id"] for item in found["items"]] == expected.item_ids
    assert found["exact"] is expected.exact

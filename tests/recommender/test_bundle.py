"""Bundles: what is saved comes back, elsewhere too; what is not whole is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pyarrow as pa
import pytest
import torch

from recommender import golden
from recommender.backbone.backbone import (
    Backbone,
    count_layers,
    empty_backbone,
    load_backbone,
    load_tokenizer,
    train_tokenizer,
)
from recommender.backbone.bases import Bases
from recommender.bundle import Manifest, read_manifest, write_bundle
from recommender.catalogue.catalogue import Catalogue
from recommender.config import (
    IdentifierConfig,
    LoraConfig,
    PresetBackbone,
    PretrainedBackbone,
    PriorConfig,
    PromptConfig,
    SearchConfig,
    UnconditionalPrior,
)
from recommender.errors import UserError
from recommender.items.item_space import ItemSpace
from recommender.priors import Priors, unconditional
from recommender.recommender import Recommender, extend_bundle, merge_adapter, starting_point
from tests.brute_force import BruteForce

HISTORIES = [[3, 50, 7], [199], [], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]]


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that may be damaged."""
    return shutil.copytree(tiny_bundle, tmp_path / "copy")


@pytest.fixture(scope="module")
def adapted(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of adapters over the tiny bundle."""
    return adapted_bundle(tiny_bundle, tmp_path_factory.mktemp("adapted") / "bundle", seed=0)


def adapted_bundle(base: Path, directory: Path, seed: int) -> Path:
    backbone = starting_point(base, LoraConfig(rank=4), torch.float32)
    _shake(backbone, seed)
    Recommender(ItemSpace.load(base), backbone, Manifest(name="adapted")).save(directory)
    return directory


def _shake(backbone: Backbone, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in backbone.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def answers(bundle: Path) -> list[dict[str, Any]]:
    return [vars(answer) for answer in Recommender.load(bundle).recommend(HISTORIES, 7)]


def test_another_process_gives_the_same_recommendations(tiny_bundle: Path) -> None:
    script = (
        "import json, sys, torch\n"
        "from recommender.recommender import Recommender\n"
        "torch.set_num_threads(int(sys.argv[3]))\n"
        "answers = Recommender.load(sys.argv[1]).recommend(json.loads(sys.argv[2]), 7)\n"
        "print(json.dumps([vars(answer) for answer in answers]))\n"
        "assert not {'ray', 'deepspeed', 'trainer'} & set(sys.modules)\n"
    )
    arguments = [str(tiny_bundle), json.dumps(HISTORIES), str(torch.get_num_threads())]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == answers(tiny_bundle)


def test_scores_are_those_of_brute_force(tiny_bundle: Path) -> None:
    force = BruteForce(tiny_bundle)
    for history, answer in zip(HISTORIES, answers(tiny_bundle), strict=True):
        scores = force.scores(history)
        assert answer["exact"]
        np.testing.assert_allclose(answer["scores"], np.sort(scores)[::-1][:7], atol=1e-4)
        np.testing.assert_allclose(answer["scores"], scores[answer["items"]], atol=1e-4)


def test_plain_transformers_opens_it(tiny_bundle: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_bundle)
    model, loading = AutoModelForCausalLM.from_pretrained(tiny_bundle, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    space = ItemSpace.load(tiny_bundle)
    for item in (0, 77, 199):
        spelled = space.identifiers.spelled(item)
        assert spelled[-1] == tokenizer.eos_token_id == model.config.eos_token_id
        assert tokenizer.decode(spelled[:-1]).strip() == space.catalogue.titles[item]
    prompt = torch.tensor([space.prompt.encode([3, 50, 7]).tolist()])
    first, second = (model.generate(prompt, max_new_tokens=8, attention_mask=torch.ones_like(prompt)) for _ in range(2))
    assert torch.equal(first, second)
    assert not model.generation_config.do_sample


def test_nothing_in_it_is_pickled(tiny_bundle: Path) -> None:
    names = sorted(path.name for path in tiny_bundle.iterdir())
    suffixes = {name.rpartition(".")[2] for name in names}
    assert suffixes <= {"json", "safetensors", "parquet", "marisa", "md", "jinja"}, names
    for path in tiny_bundle.iterdir():
        head = path.read_bytes()[:2]
        assert head not in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"), path.name  # pickle, torch.save


def test_every_file_is_under_a_checksum(tiny_bundle: Path) -> None:
    names = {path.name for path in tiny_bundle.iterdir()}
    assert names - set(read_manifest(tiny_bundle).checksums) == {"recommender.json", "README.md"}


@pytest.mark.parametrize("name", ["model.safetensors", "trie.safetensors", "catalogue.parquet", "items.json"])
def test_a_damaged_file_is_refused(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name}: differs from its checksum .* copy or export again"):
        Recommender.load(copy)


def test_a_truncated_file_is_refused(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: differs"):
        Recommender.load(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "items.json", "config.json"])
def test_a_missing_file_is_refused(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"{name}: missing from the bundle; copy the whole directory again"):
        Recommender.load(copy)


def test_another_schema_version_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / "recommender.json").read_text())
    (copy / "recommender.json").write_text(json.dumps(manifest | {"schema_version": 99}))
    with pytest.raises(UserError, match="schema version 99, this release reads version 1; export the bundle again"):
        Recommender.load(copy)


@pytest.mark.parametrize("text", ["{", "[]", "", '{"schema_version": 1}', "\ufffd"])
def test_a_damaged_manifest_is_refused(copy: Path, text: str) -> None:
    (copy / "recommender.json").write_text(text)
    with pytest.raises(UserError, match=r"recommender\.json: "):
        Recommender.load(copy)


@pytest.mark.parametrize("made", [False, True])
def test_what_is_no_bundle_is_refused(tmp_path: Path, made: bool) -> None:
    directory = tmp_path / "elsewhere"
    if made:
        directory.mkdir()
    with pytest.raises(UserError, match=r"elsewhere: not a bundle .* `ilrec models list` shows"):
        Recommender.load(directory)


def test_a_file_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a bundle"):
        Recommender.load(tmp_path / "file")


def test_a_bundle_is_complete_or_absent(tiny_bundle: Path, tmp_path: Path) -> None:
    def breaks_off(aside: Path) -> None:
        (aside / "config.json").write_text("{}")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write_bundle(tmp_path / "new", Manifest(name="new"), breaks_off)
    assert not list(tmp_path.iterdir())
    Recommender.load(tiny_bundle).save(tmp_path / "new")
    assert answers(tmp_path / "new") == answers(tiny_bundle)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_search_settings_are_saved_and_may_be_replaced(tiny_bundle: Path, tmp_path: Path) -> None:
    recommender, copy = Recommender.load(tiny_bundle), tmp_path / "copy"
    beam = recommender.manifest.model_copy(update={"search": SearchConfig(mode="beam", width=1)})
    Recommender(recommender.space, recommender.backbone, beam).save(copy)
    assert Recommender.load(copy).manifest.search.width == 1
    assert len(Recommender.load(copy).recommend([[3]], 5)[0].items) <= 5
    assert Recommender.load(copy, search=SearchConfig()).recommend([[3]], 5)[0].exact


def test_fewer_items_than_k_are_left(tiny_bundle: Path) -> None:
    recommender = Recommender.load(tiny_bundle)
    only, none, all_but_two, everything = recommender.recommend(
        [[1, 2]] * 4,
        [10, 10, 10, 500],
        exclude=[[1, 2], [1, 2], [i for i in range(200) if i not in (8, 9)], []],
        allow=[[1, 2, 3, 4, 5], [1], None, None],
    )
    assert sorted(only.items) == [3, 4, 5]
    assert none.items == none.scores == []
    assert sorted(all_but_two.items) == [8, 9]
    assert sorted(everything.items) == list(range(200))
    assert all(answer.exact for answer in (only, none, all_but_two))
    scores = BruteForce(tiny_bundle).scores([1, 2])
    np.testing.assert_allclose(everything.scores, np.sort(scores)[::-1], atol=1e-4)


# ---- New items -------------------------------------------------------------------------------------------------------


def test_new_items_are_named_without_training(tiny_bundle: Path, tmp_path: Path) -> None:
    known = Catalogue.load(tiny_bundle)
    further = Catalogue(["new1", "new2"], ["A tent for two", known.titles[0]], pa.table({"price": [10.0, 20.0]}))
    extend_bundle(tiny_bundle, further, tmp_path / "more")
    before, after = Recommender.load(tiny_bundle), Recommender.load(tmp_path / "more")
    assert after.catalogue.item_ids == [*known.item_ids, "new1", "new2"]
    assert after.catalogue.titles[200:] == ["A tent for two", known.titles[0]]
    for item in range(200):
        np.testing.assert_array_equal(after.space.identifiers.spelled(item), before.space.identifiers.spelled(item))
    assert after.catalogue.columns["price"].to_pylist()[198:] == [None, None, 10.0, 20.0]
    answer = after.recommend([[3, 200]], 202)[0]
    assert sorted(answer.items) == list(range(202))
    np.testing.assert_allclose(answer.scores, np.sort(BruteForce(tmp_path / "more").scores([3, 200]))[::-1], atol=1e-4)


# ---- Items with one token each ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def item_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with random weights whose 200 items have a token each."""
    identifier, prompt = IdentifierConfig(kind="item"), PromptConfig(template="items", history=8)
    space = ItemSpace.build(Catalogue.load(tiny_bundle), train_tokenizer([], 4096), identifier, prompt)
    backbone = load_backbone(PresetBackbone(size="mini", embedding_scale=8), space.tokenizer, seed=1)
    directory = tmp_path_factory.mktemp("items") / "bundle"
    Recommender(space, backbone, Manifest(name="items")).save(directory)
    return directory


def test_items_with_one_token_are_found_ranked_and_spelled(item_bundle: Path) -> None:
    force, recommender = BruteForce(item_bundle), Recommender.load(item_bundle)
    assert recommender.space.trie.nodes == 201
    for history, answer in zip(HISTORIES, answers(item_bundle), strict=True):
        scores = force.scores(history)
        assert answer["exact"]
        assert answer["expansions"] == 0, "the root's children are all there is"
        np.testing.assert_allclose(answer["scores"], np.sort(scores)[::-1][:7], atol=1e-4)
    history = [3, 50]
    np.testing.assert_allclose(
        recommender.rank([history], [[9, 199, 3]])[0], force.scores(history)[[9, 199, 3]], atol=1e-4
    )
    name = f"<item {recommender.catalogue.item_ids[9]}>"
    for score in ("valid", "full"):
        search = SearchConfig.model_validate({"score": score})
        ((text, of_item), (_, of_end)), _ = recommender.spellings(history, [9, 7], search)
        assert text == name
        assert of_end == 0 if score == "valid" else of_end < 0
        assert of_item + of_end == pytest.approx(recommender.rank([history], [[9]], search)[0][0], abs=1e-5)
    found = recommender.recommend([history], 5, search=SearchConfig(score="full"))[0]
    of_all = recommender.rank([history], [list(range(200))], SearchConfig(score="full"))[0]
    np.testing.assert_allclose(found.scores, np.sort(of_all)[::-1][:5], atol=1e-4)


def test_plain_transformers_reads_items_with_one_token(item_bundle: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(item_bundle), AutoModelForCausalLM.from_pretrained(item_bundle)
    space = ItemSpace.load(item_bundle)
    names = [f"<item {space.catalogue.item_ids[item]}>" for item in (3, 50)]
    written = tokenizer("</s>" + "".join(names), add_special_tokens=False)["input_ids"]
    assert written == space.prompt.encode([3, 50]).tolist()
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == 258 + 200


def test_new_items_without_a_token_are_refused(item_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"identifier\.kind: item: the model has a token for each item"):
        extend_bundle(item_bundle, Catalogue(["new1"], ["A tent for two"]), tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_training_goes_on_with_more_items(item_bundle: Path) -> None:
    known = ItemSpace.load(item_bundle)
    catalogue = Catalogue(["new", *known.catalogue.item_ids], ["A tent", *known.catalogue.titles])
    space = ItemSpace.build(catalogue, known.tokenizer, known.identifier_config, known.prompt.config)
    before, after, other = (
        starting_point(item_bundle, None, torch.float32, seed, tokenizer)
        for seed, tokenizer in ((0, None), (0, space.tokenizer), (1, space.tokenizer))
    )
    assert space.identifiers.spelled(0)[0] == before.vocabulary
    assert after.vocabulary == before.vocabulary + 1 == after.head.weight.shape[0]
    assert torch.equal(after.head.weight[:-1], before.head.weight)
    assert not torch.equal(after.head.weight[-1], other.head.weight[-1]), "drawn from the seed"
    with pytest.raises(UserError, match=r"backbone\.lora: 1 items have no token in"):
        starting_point(item_bundle, LoraConfig(rank=2), torch.float32, 0, space.tokenizer)


def test_a_pretrained_model_gets_room_for_items(tiny_bundle: Path) -> None:
    catalogue = Catalogue.load(tiny_bundle)
    config = PretrainedBackbone(kind="pretrained", path=str(tiny_bundle))
    tokenizer = load_tokenizer(config, [])
    letters = len(tokenizer)
    space = ItemSpace.build(catalogue, tokenizer, IdentifierConfig(kind="item"), PromptConfig(template="products"))
    backbone = load_backbone(config, space.tokenizer, seed=1)
    assert backbone.vocabulary == backbone.head.weight.shape[0] == letters + 200
    assert 0.015 < float(backbone.head.weight[letters:].detach().std()) < 0.025
    assert empty_backbone(config, space.tokenizer, None).vocabulary == letters + 200
    answer = Recommender(space, backbone, Manifest(name="items")).recommend([[3, 50]], 200)[0]
    assert answer.exact
    assert sorted(answer.items) == list(range(200))


def test_a_known_item_is_not_added(tiny_bundle: Path, tmp_path: Path) -> None:
    known = Catalogue.load(tiny_bundle)
    with pytest.raises(UserError, match="holds an item id twice"):
        extend_bundle(tiny_bundle, Catalogue([known.item_ids[5]], ["Whatever"]), tmp_path / "more")
    assert not (tmp_path / "more").exists()


# ---- Adapters --------------------------------------------------------------------------------------------------------


def test_an_adapter_bundle_is_its_base_plus_the_adapter(adapted: Path, tiny_bundle: Path) -> None:
    assert (adapted / "adapter_model.safetensors").exists()
    assert not (adapted / "model.safetensors").exists()
    scores, base = BruteForce(adapted).scores([3, 50]), BruteForce(tiny_bundle).scores([3, 50])
    assert np.abs(scores - base).max() > 0.1
    answer = Recommender.load(adapted).recommend([[3, 50]], 7)[0]
    np.testing.assert_allclose(answer.scores, np.sort(scores)[::-1][:7], atol=1e-4)


def test_a_merged_bundle_scores_alike_and_stands_alone(tiny_bundle: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_bundle, tmp_path / "base")
    adapted = adapted_bundle(base, tmp_path / "adapted", seed=1)
    expected = BruteForce(adapted).scores([3, 50])
    merge_adapter(adapted, tmp_path / "merged")
    shutil.rmtree(base)
    shutil.rmtree(adapted)
    np.testing.assert_allclose(BruteForce(tmp_path / "merged").scores([3, 50]), expected, atol=1e-4)
    answer = Recommender.load(tmp_path / "merged").recommend([[3, 50]], 7)[0]
    np.testing.assert_allclose(answer.scores, np.sort(expected)[::-1][:7], atol=1e-4)
    assert read_manifest(tmp_path / "merged").name == "adapted"


def test_training_may_go_on_from_an_adapter_bundle_with_all_weights(adapted: Path, tmp_path: Path) -> None:
    backbone = starting_point(adapted, None, torch.float32)
    Recommender(ItemSpace.load(adapted), backbone, Manifest(name="whole")).save(tmp_path / "whole")
    expected = BruteForce(adapted).scores([3, 50])
    np.testing.assert_allclose(BruteForce(tmp_path / "whole").scores([3, 50]), expected, atol=1e-4)


def test_adapters_are_drawn_from_the_seed(tiny_bundle: Path) -> None:
    first, again, other = (
        dict(starting_point(tiny_bundle, LoraConfig(), torch.float32, seed).model.named_parameters())
        for seed in (1, 1, 2)
    )
    drawn = [name for name in first if "lora_A" in name]
    assert drawn
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_adapters_over_an_adapter_bundle_are_refused(adapted: Path) -> None:
    with pytest.raises(UserError, match="could not be saved by itself; fold it in first"):
        starting_point(adapted, LoraConfig(rank=2), torch.float32)


@pytest.mark.parametrize("again", [False, True])
def test_the_base_of_an_adapter_bundle_is_missing(tiny_bundle: Path, tmp_path: Path, again: bool) -> None:
    far = tmp_path / "so" / "far" / "off"  # that the tiny bundle itself, which has the same weights, is not found
    copy = Path(shutil.copytree(tiny_bundle, far / "copy"))
    adapted = adapted_bundle(copy, far / "adapted", seed=1)
    recommender = Recommender.load(copy)
    shutil.rmtree(copy)
    if again:  # trained again, so that other weights lie where its base was
        with torch.no_grad():
            next(recommender.backbone.model.parameters()).add_(0.1)
        recommender.save(copy)
    for use in (Recommender.load, lambda bundle: merge_adapter(bundle, tmp_path / "merged")):
        with pytest.raises(UserError, match=rf"{adapted}: the bundle under its adapter, once {copy}, is not there any"):
            use(adapted)


def test_an_adapter_is_opened_over_its_base_wherever_that_is_now(copy: Path, tmp_path: Path) -> None:
    adapted = adapted_bundle(copy, tmp_path / "adapted", seed=1)
    expected = answers(adapted)
    moved = shutil.move(copy, tmp_path / "moved")
    assert answers(adapted) == expected
    assert count_layers(str(adapted), None) == count_layers(moved, None)
    Recommender.load(adapted).save(tmp_path / "again")  # and what is saved from it knows its base
    assert read_manifest(tmp_path / "again").base == read_manifest(adapted).base
    assert answers(tmp_path / "again") == expected


def test_a_blended_adapter_is_merged_with_its_priors(tiny_bundle: Path, tmp_path: Path) -> None:
    adapted = Recommender.load(adapted_bundle(tiny_bundle, tmp_path / "adapted", seed=1))
    configs: dict[str, PriorConfig] = {"alone": UnconditionalPrior(kind="unconditional", weight=-0.5)}
    search = adapted.manifest.search.model_copy(update={"priors": configs})
    manifest = adapted.manifest.model_copy(update={"search": search})
    priors = Priors(adapted.catalogue, configs, {}, unconditional(adapted))
    Recommender(adapted.space, adapted.backbone, manifest, priors=priors).save(tmp_path / "blended")
    merge_adapter(tmp_path / "blended", tmp_path / "merged")
    [before], [after] = (Recommender.load(tmp_path / name).recommend([[3, 50]], 7) for name in ("blended", "merged"))
    assert before.items == after.items != adapted.recommend([[3, 50]], 7)[0].items
    np.testing.assert_allclose(before.scores, after.scores, atol=1e-4)


def test_there_is_no_adapter_to_merge(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds full weights, there is no adapter to merge"):
        merge_adapter(tiny_bundle, tmp_path / "merged")


# ---- Shared bases ----------------------------------------------------------------------------------------------------


def _weights(recommender: Recommender) -> dict[int, int]:
    """Bytes of the model's tensors, by where they lie."""
    return {each.data_ptr(): each.nbytes for each in recommender.backbone.model.parameters()}


def test_adapters_share_their_base_with_each_other_and_with_its_own_bundle(
    tiny_bundle: Path, adapted: Path, tmp_path: Path
) -> None:
    other = adapted_bundle(tiny_bundle, tmp_path / "other", seed=1)
    merge_adapter(adapted, tmp_path / "merged")
    bundles = [adapted, other, tiny_bundle, tmp_path / "merged"]
    bases = Bases()
    first, second, plain, merged = together = [Recommender.load(bundle, bases=bases) for bundle in bundles]
    for recommender, bundle in zip(together, bundles, strict=True):
        golden.check(recommender)
        assert [vars(answer) for answer in recommender.recommend(HISTORIES, 7)] == answers(bundle)
    base = _weights(plain)
    assert base.items() <= _weights(first).items()
    assert base.items() <= _weights(second).items()
    assert not base.keys() & _weights(merged).keys()
    adapters = [sum(_weights(each).values()) - sum(base.values()) for each in (first, second)]
    held = sum((_weights(first) | _weights(second) | base).values())
    assert held == sum(base.values()) + sum(adapters)
    assert max(adapters) < sum(base.values()) / 4
    assert not base.keys() & _weights(Recommender.load(adapted, bases=Bases())).keys()


def test_what_an_adapter_changes_stays_with_it(tiny_bundle: Path) -> None:
    bases = Bases()
    plain, adapted = (Recommender.load(tiny_bundle, bases=bases).backbone.model for _ in range(2))
    tokens = torch.arange(4, 20)[None]
    with torch.no_grad():
        before = plain(tokens).logits
        config = peft.LoraConfig(
            target_modules=["q_proj"],
            init_lora_weights="pissa",  # takes the adapter's first weights out of the base's
            trainable_token_indices={"embed_tokens": [4, 5]},
            modules_to_save=["norm"],
        )
        changed: Any = peft.get_peft_model(adapted, config)
        for parameter in changed.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        assert not torch.allclose(changed(tokens).logits, before, atol=0.1)
        assert torch.equal(plain(tokens).logits, before)
        assert torch.equal(Recommender.load(tiny_bundle, bases=bases).backbone.model(tokens).logits, before)


def test_a_base_that_was_written_again_is_loaded_again(tiny_bundle: Path, copy: Path) -> None:
    bases = Bases()
    before = Recommender.load(copy, bases=bases)
    assert _weights(Recommender.load(copy, bases=bases)) == _weights(before)
    assert not _weights(Recommender.load(tiny_bundle, bases=bases)).keys() & _weights(before).keys()
    shutil.rmtree(copy)
    before.save(copy)
    after = Recommender.load(copy, bases=bases)
    assert not _weights(after).keys() & _weights(before).keys()

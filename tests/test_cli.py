"""The command line as a person meets it: processes of their own, their output and their exit status."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deploy.commands.models import listed as parted
from recommender.errors import UserError
from recommender.models import Model
from recommender.recommender import Recommender
from tests.recommender.test_bundle import adapted_bundle
from tests.trainer.loop.test_survival import fill
from trainer.experiment import Experiment, load_experiment

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("**/*.yaml"))
VERBS = [
    *("simulate", "prepare", "train", "tune", "evaluate", "recommend", "serve", "export", "extend", "schema", "demo"),
    *("plan", "submit", "jobs", "runs", "models"),
]
HEAVY = {"torch", "transformers", "ray", "deepspeed", "pyarrow", "peft"}

# Runs the command line and then says, on a line of its own, what it has imported.
PROBE = """
import sys, atexit
atexit.register(lambda: print("imported:", *sorted({name.partition(".")[0] for name in sys.modules})))
import ilrec
ilrec.main()
"""


def ilrec(*arguments: str, status: int = 0, columns: int = 120) -> str:
    """Its output, both streams; asserts the status and that there is no traceback."""
    environment = {"COLUMNS": str(columns), "PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    text = done.stdout + done.stderr
    assert done.returncode == status, text
    assert "Traceback" not in text
    return text


def imported(text: str) -> set[str]:
    return set(re.findall(r"^imported: (.*)$", text, re.MULTILINE)[0].split())


def without_probe(text: str) -> str:
    return re.sub(r"^imported: .*\n", "", text, flags=re.MULTILINE)


def test_help_teaches_a_first_run() -> None:
    text = ilrec("--help")
    for verb in VERBS:
        assert re.search(rf"^\s+{verb}\s", text, re.MULTILINE)
    assert "ilrec train configs/demo.yaml" in text
    assert not HEAVY & imported(text)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_teaches_by_example(verb: str) -> None:
    text = ilrec(verb, "--help")
    assert re.search(rf"^  ilrec {verb}\b", text, re.MULTILINE)
    assert "\b" not in text
    assert not HEAVY & imported(text)


def test_no_verb_is_help() -> None:
    assert "Usage:" in ilrec(status=2)


def test_an_unknown_verb_is_refused() -> None:
    assert "'trian'" in ilrec("trian", status=2)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "my.yaml"
    path.write_text("name: my\nworld: {}\n")
    return path


@pytest.mark.parametrize("verb", ["prepare", "train", "evaluate", "demo"])
def test_a_misspelt_key_is_refused_by_name_before_anything_heavy(config: Path, verb: str) -> None:
    config.write_text("name: my\nworld: {}\ntraining:\n  epochs: 3\n  learning_rat: 0.1\nclustr: {}\n")
    text = ilrec(verb, str(config), status=2)
    assert f"error: {config}:" in text
    assert "training.learning_rat: unknown field; did you mean 'learning_rate'?" in text
    assert "clustr: unknown field; did you mean 'cluster'?" in text
    assert not HEAVY & imported(text)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("training.epoch=3", "training.epoch: unknown field; did you mean 'epochs'?"),
        ("training.epochs=many", "training.epochs: Input should be a valid integer"),
        ("training.epochs=0", "training.epochs: Input should be greater than or equal to 1 (given: 0)"),
        ("training.epochs", "--set training.epochs: write it as section.field=value"),
        ("=3", "--set =3: write it as section.field=value"),
        ("training..epochs=3", "write it as section.field=value"),
        ("training.epochs=[3", "'[3' is not a YAML value"),
        ("training=3", "training: "),
        ("objective.kind=msls", "objective"),
        ("backbone.size=small", "backbone: say which kind: preset or pretrained (given: {'size': 'small'})"),
        ("backbone={kind: preset, sizes: tiny}", "sizes: unknown field; did you mean 'size'?"),
        ("backbone.kind=prset", "'preset', 'pretrained'"),
        ("name=../up", "name: "),
    ],
)
def test_a_bad_override_is_refused(config: Path, override: str, says: str) -> None:
    text = ilrec("train", str(config), "--set", override, status=2)
    assert "error: " in text
    assert says in text
    assert not HEAVY & imported(text)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no experiment; it should open with `name: …`"),
        ("- a\n", "holds no experiment"),
        ("name: [\n", "not valid YAML"),
        ("name: my\nworld: {}\nobjective: {kind: msl}\nobjective: {kind: lml}\n", "objective stands here twice"),
        ("name: my\nworld: {items: 9, items: 8}\n", "items stands here twice"),
        ("name: my\n", "give either `data` (your files) or `world` (a simulated one)"),
        ("name: my\nworld: {}\nstorage: ${NOWHERE}\n", "the environment variable NOWHERE is not set"),
        ("name: my\nworld: {items: 10000000}\n", "world.items: Input should be less than or equal to 2000000"),
        ("name: my\nworld: {}\nbackbone: {kind: preset, lora: {}}\n", "need `init_from`"),
        ("name: my\nworld: {}\nidentifier: {kind: item, max_tokens: 8}\n", "identifier.max_tokens is of kind: title"),
        ("name: my\nworld: {}\nidentifier: {kind: itm}\n", "identifier.kind: Input should be 'title' or 'item'"),
        (
            "name: my\nworld: {}\nidentifier: {kind: item}\nbackbone: {kind: pretrained, path: p, lora: {}}\n",
            "backbone.lora: identifier.kind: item adds a token for each item, whose vectors adapters do not train",
        ),
    ],
)
def test_a_bad_config_is_refused(config: Path, content: str, says: str) -> None:
    config.write_text(content)
    assert says in ilrec("train", str(config), status=2)


def test_a_missing_file_is_named() -> None:
    assert "error: nowhere.yaml: no such file" in ilrec("train", "nowhere.yaml", status=2)


def test_a_directory_is_no_config(tmp_path: Path) -> None:
    assert f"error: {tmp_path}: no bundle (no recommender.json)" in ilrec("train", str(tmp_path), status=2)


def test_missing_data_are_named(config: Path, tmp_path: Path) -> None:
    config.write_text("name: my\ndata: {format: interactions, interactions: no.csv, items: no.jsonl}\n")
    text = ilrec("prepare", str(config), "--set", f"cluster.storage={tmp_path}/runs", status=2)
    assert re.search(r"error: .*no\.(csv|jsonl)", text)


def test_a_storage_that_cannot_be_written_is_named(config: Path) -> None:
    text = ilrec("prepare", str(config), "--set", f"cluster.storage={config}/runs", status=2)
    assert f"error: {config}/runs" in text
    assert "check the path and who may write there" in text


def test_evaluate_says_what_is_missing(config: Path, tmp_path: Path) -> None:
    storage = f"cluster.storage={tmp_path}/runs"
    assert "'tset' is not one of" in ilrec("evaluate", str(config), "--split", "tset", status=2)
    assert "my: no version in" in ilrec("evaluate", str(config), "--set", storage, status=2)
    text = ilrec("evaluate", "shop", "--storage", str(tmp_path), status=2)
    assert f"shop: no model of this name in {tmp_path}, which holds none" in text
    assert not HEAVY & imported(text)


def test_schema_accepts_what_the_program_accepts(config: Path) -> None:
    text = ilrec("schema")
    assert not HEAVY & imported(text)
    schema = json.loads(without_probe(text))
    validator = jsonschema.validators.validator_for(schema)
    validator.check_schema(schema)
    for path in CONFIGS:
        validator(schema).validate(yaml.safe_load(path.read_text()))
    with pytest.raises(jsonschema.ValidationError):
        validator(schema).validate({"name": "my", "world": {}, "trainin": {}})


def test_schema_describes_every_section() -> None:
    schema = Experiment.model_json_schema()
    assert set(schema["properties"]) == set(Experiment.model_fields)
    for section in ("TrainingConfig", "ClusterConfig", "PromptConfig", "SearchConfig", "WorldConfig"):
        assert schema["$defs"][section]["additionalProperties"] is False


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_are_valid(path: Path) -> None:
    assert load_experiment(path).name
    assert load_experiment(path, ["training.epochs=7"]).training.epochs == 7


def test_variables_are_expanded(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text("name: ${WHO}\nworld: {}\ncluster: {storage: '${WHERE:-runs/a}'}\n")
    monkeypatch.setenv("WHO", "me")
    monkeypatch.delenv("WHERE", raising=False)
    experiment = load_experiment(config)
    assert (experiment.name, experiment.cluster.storage) == ("me", "runs/a")
    assert load_experiment(config, ["cluster.storage=runs/${WHO}"]).cluster.storage == "runs/me"


def test_the_fewest_workers_are_no_more_than_the_most(config: Path) -> None:
    fewest = ["cluster.workers=2", "cluster.min_workers=2"]
    assert load_experiment(config, fewest).cluster.fewest_workers == 2
    assert load_experiment(config).cluster.fewest_workers == load_experiment(config).cluster.workers
    with pytest.raises(UserError, match=r"cluster\.min_workers is 3, and cluster\.workers only 2"):
        load_experiment(config, [*fewest, "cluster.min_workers=3"])


@pytest.mark.parametrize("gpus", ["0.5", "2"])
def test_gpus_that_workers_could_not_train_on(config: Path, gpus: str) -> None:
    sets = ["--set", f"cluster.gpus_per_worker={gpus}", "--set", "cluster.workers=2"]
    assert "gpus_per_worker" in ilrec("prepare", str(config), *sets, status=2)


@pytest.mark.parametrize("verb", ["train", "tune"])
def test_a_run_has_one_trainer(config: Path, tmp_path: Path, verb: str) -> None:
    directory = tmp_path / "runs" / "taken"
    directory.mkdir(parents=True)
    sets = ["--set", f"cluster.storage={directory.parent}", "--set", "name=taken", "--set", "objective.kind=msl"]
    sweep = "{parameters: {training.learning_rate: {kind: choice, values: [1.0e-3]}}, trials: 1}"
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = ilrec(verb, str(config), *sets, *(["--set", f"sweep={sweep}"] if verb == "tune" else []), status=2)
    assert "another command is training this model" in text
    assert [path.name for path in directory.iterdir()] == [".lock"]


def test_simulate_takes_settings(tmp_path: Path) -> None:
    sizes = ["--set", "items=60", "--set", "users=20", "--set", "kinds=5", "--set", "brands=4"]
    shape = ["--set", "mean_length=6", "--set", "max_length=10"]
    text = ilrec("simulate", str(tmp_path / "world"), *sizes, *shape)
    assert "60 items, 20 users" in text
    assert json.loads((tmp_path / "world" / "world.json").read_text())["config"]["items"] == 60
    assert not {"torch", "ray", "transformers"} & imported(text)
    refused = ilrec("simulate", str(tmp_path / "world"), "--set", "item=60", status=2)
    assert "item: unknown field; did you mean 'items'?" in refused


# ---- recommend -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recommender(tiny_bundle: Path) -> Recommender:
    return Recommender.load(tiny_bundle)


def listed(text: str) -> list[tuple[str, ...]]:
    """Rank, score, item id and title of every printed line."""
    return re.findall(r"^ *(\d+) +(-?\d+\.\d+)  (\S+)  (.+)$", text, re.MULTILINE)


def test_recommend_prints_k_lines(tiny_bundle: Path, recommender: Recommender) -> None:
    catalogue = recommender.catalogue
    history = f"{catalogue.titles[3].upper()} ; {catalogue.item_ids[50]};"
    text = ilrec("recommend", str(tiny_bundle), "--history", history, "-k", "4")
    expected = recommender.recommend([[3, 50]], 4, [{3, 50}])[0]
    rows: list[Any] = [
        (str(rank), f"{score:.3f}", catalogue.item_ids[item], catalogue.titles[item])
        for rank, (item, score) in enumerate(zip(expected.items, expected.scores, strict=True), 1)
    ]
    assert listed(text) == rows
    assert "exact: this is the true top-K" in text
    assert not {"ray", "deepspeed"} & imported(text)


def test_a_history_may_be_a_json_list() -> None:
    titles = ["Tent; two persons", "[Import] stove"]
    assert parted(json.dumps(titles)) == titles
    assert parted("[Import] stove; 12") == ["[Import] stove", "12"]
    assert parted("12") == ["12"]
    assert parted("[]") == parted(" ; ") == []


def test_recommend_says_what_is_left(tiny_bundle: Path) -> None:
    text = ilrec("recommend", str(tiny_bundle), "--history", "i7;i8", "-k", "300", "--seen")
    assert len(listed(text)) == 200
    assert "only 200 items are left" in text


def test_an_unknown_title_is_refused_with_one_like_it(tiny_bundle: Path, recommender: Recommender) -> None:
    title = recommender.catalogue.titles[3]
    text = ilrec("recommend", str(tiny_bundle), "--history", f"i7; {title[:-1]}x", status=2)
    assert "error: history: 1 of 2 items are not in the catalogue" in text
    assert f"did you mean {title!r}?" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--history", " ; "], "--history is empty"),
        (["--history", "i7", "-k", "0"], "0"),
        ([], "--history"),
    ],
)
def test_bad_requests_are_refused(tiny_bundle: Path, arguments: list[str], says: str) -> None:
    assert says in ilrec("recommend", str(tiny_bundle), *arguments, status=2)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    for arguments in (["recommend", str(tmp_path), "--history", "i7"], ["export", str(tmp_path), "out", "--merge"]):
        assert f"error: {tmp_path}: no bundle" in ilrec(*arguments, status=2)
    text = without_probe(ilrec("serve", "shop", "--storage", str(tmp_path), status=2))
    assert text.startswith(f"error: shop: no model of this name in {tmp_path}, which holds none.")
    assert text.count("\n") == 1


def test_extend_adds_what_is_new(tiny_bundle: Path, recommender: Recommender, tmp_path: Path) -> None:
    known, items, out = recommender.catalogue.item_ids[7], tmp_path / "items.csv", str(tmp_path / "more")
    items.write_text(f"sku,title\n{known},Another title\nn1,A new tent\n")
    text = ilrec("extend", str(tiny_bundle), str(items), out, "--id-column", "sku")
    assert "1 items added to 200, 1 were known" in text
    assert "n1  A new tent" in ilrec("recommend", out, "--history", "n1; n1", "-k", "201", "--seen")
    assert "are in" in ilrec("extend", out, str(items), str(tmp_path / "again"), "--id-column", "sku", status=2)
    for taken in (out, str(tiny_bundle)):  # not even its own input is overwritten
        refused = ilrec("extend", str(tiny_bundle), str(items), taken, "--id-column", "sku", status=2)
        assert f"error: {taken}: is there already, and is left as it is" in refused
    assert "so say where the new bundle goes" in ilrec("extend", out, str(items), "--id-column", "title", status=2)


def test_a_model_grows_by_versions_and_is_rolled_back(tiny_bundle: Path, tmp_path: Path) -> None:
    storage, items = ["--storage", str(tmp_path / "runs")], tmp_path / "items.csv"
    shutil.copytree(tiny_bundle, tmp_path / "runs" / "shop" / "1" / "bundle")
    items.write_text("item_id,title\nn1,A new tent\n")
    text = ilrec("extend", "shop", str(items), *storage)
    assert "shop@2: 1 items added to 200" in text
    assert "ilrec models promote shop@2 (the name stands for shop@1)" in text
    unknown = ["recommend", "shop", "--history", "n1", *storage]
    assert "not in the catalogue" in ilrec(*unknown, status=2)
    assert "shop stands for shop@2, and no longer for shop@1" in ilrec("models", "promote", "shop", *storage)
    assert listed(ilrec(*unknown))
    shown = ilrec("models", "show", "shop", *storage)
    assert re.search(r"@1 .*\n.*@2\* .* shop@1", shown)
    assert re.search(r"first +shop@1\n.* promote +shop@2", shown)
    assert not HEAVY - {"pyarrow"} & imported(shown)
    assert "shop stands for shop@1 again" in ilrec("models", "rollback", "shop", *storage)
    assert "nothing was promoted before" in ilrec("models", "rollback", "shop", *storage, status=2)
    assert re.search(r"shop +@1 +1, 2 ", ilrec("models", "list", *storage))
    assert "there is no such version; there are shop@1, shop@2" in ilrec(
        "models", "promote", "shop@7", *storage, status=2
    )
    assert "no version in" in ilrec("models", "promote", "shp", *storage, status=2)


def test_libraries_keep_quiet(tiny_bundle: Path, tmp_path: Path) -> None:
    """Merging an adapter loads peft and, with it, DeepSpeed."""
    adapter, out = adapted_bundle(tiny_bundle, tmp_path / "adapter", 1), tmp_path / "merged"
    assert without_probe(ilrec("export", str(adapter), str(out), "--merge")) == f"merged bundle: {out}\n"


def test_export_says_what_to_do(tiny_bundle: Path, tmp_path: Path) -> None:
    assert "--merge" in ilrec("export", str(tiny_bundle), str(tmp_path / "out"), status=2)
    assert "no adapter to merge" in ilrec("export", str(tiny_bundle), str(tmp_path / "out"), "--merge", status=2)


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A disk without room, but for what a file that can be removed takes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no file system of its own to fill up: mounting one is not allowed here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tiny_bundle: Path, full: Path, tmp_path: Path) -> None:
    storage, items = full / "runs", tmp_path / "items.csv"
    for number in ("1", "2"):
        shutil.copytree(tiny_bundle, storage / "shop" / number / "bundle")
    items.write_text("item_id,title\nn1,A new tent\n")
    world = "{items: 200, users: 60, kinds: 10, brands: 8, uses: 3, min_length: 5}"
    (tmp_path / "my.yaml").write_text(f"name: my\nworld: {world}\ncluster: {{storage: {storage}}}\n")
    commands = [
        ["extend", "shop", str(items), "--storage", str(storage)],
        ["models", "promote", "shop@2", "--storage", str(storage)],
        ["prepare", str(tmp_path / "my.yaml")],
    ]
    filled = fill(full)
    before = {path: path.read_bytes() for path in storage.rglob("*") if path.is_file()}
    for command in commands:
        text = without_probe(ilrec(*command, status=2)).splitlines()
        assert text[-1].startswith("error: the disk is full: what was there is whole; make room, and")
        assert sum(line.startswith("error:") for line in text) == 1
    assert all(path.read_bytes() == content for path, content in before.items())
    assert str(Model(storage, "shop").promoted) == "shop@1"
    filled.unlink()
    for command in commands:
        ilrec(*command)
    assert str(Model(storage, "shop").promoted) == "shop@2"
    assert not list(storage.rglob("*.partial-*"))

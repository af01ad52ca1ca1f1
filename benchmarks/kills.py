"""Is anything ever lost? Kills commands (kill -9) at random moments, and looks at what is left.

    python -m benchmarks.kills --points 30 --seed 0
    python -m benchmarks.kills --only extend,promote

Each command runs in a process of its own on a copy of a small storage, first to its end, then killed again and again:
every other time when so much time has passed, otherwise right before one of its changes to the file system. After each
kill, what was complete must be byte for byte what it was (or, where the command is told to change it, what it becomes),
every name must stand for a whole bundle, and nothing half-made may be listed as complete. Then the same command runs
again: it has to succeed, and end where an undisturbed one does.

Processes are forked from this one, which has imported all that is heavy and started nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.chaos import experiment
from benchmarks.local_cluster import LocalCluster
from recommender.errors import UserError
from recommender.files import read_json, sha256
from recommender.models import Model, find_bundles, find_models
from trainer.parts import PARTS
from trainer.reporting.runs import find_runs

_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")
_MARKERS = ("dataset.json", "spelling.json", "world.json", "recommender.json")  # with one of them a part is complete
_VERBS = ("trainer.derived", "deploy.convert", "deploy.models", "deploy.runs")
_REDRAWN = ("report.html", "train.log")
_DEADLINE = 600  # seconds for a command


@dataclass(frozen=True)
class Command:
    """A command and the storage that it finds.

    Attributes:
        arguments: of `ilrec`; {storage} and {here} stand for the storage and for the directory around it.
        setup: makes the storage; called once.
        changes: beginnings of the paths below the storage that the command is told to change or remove.
        again: whether it may be called again when it was done already; a second `rollback` goes further back, a second
            `extend` or `export` makes a further version.
        ray: whether it needs a cluster.
    """

    name: str
    arguments: tuple[str, ...]
    setup: Callable[[Path], None]
    changes: tuple[str, ...] = ()
    again: bool = True
    ray: bool = False


@dataclass
class Outcome:
    """What kills of a command led to: how many were before, within and after its last change, and what was violated."""

    kills: int
    left: Counter[str]
    violations: list[str]
    seconds: float


# -- A command in a process of its own --------------------------------------------------------------------------------


def run(
    arguments: Sequence[str], output: Path, seconds: float | None = None, change: int | None = None
) -> tuple[int, int, float]:
    """Run an `ilrec` command in a forked process.

    Args:
        output: what it says is appended to it.
        seconds: after which it and all that it started are killed.
        change: the number of the change to the file system, from 1, before which it is killed.

    Returns:
        Its status (-9: killed), how many changes it made, and for how many seconds it ran.
    """
    counted = output.with_suffix(".changes")
    started = time.monotonic()
    child = os.fork()
    if not child:
        _be_ilrec(arguments, output, counted, change)
    with suppress(OSError):  # here as well as there, whichever comes first: to be killed it needs its group
        os.setpgid(child, child)
    deadline = started + (_DEADLINE if seconds is None else seconds)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.002)
    took = time.monotonic() - started
    changes = int(counted.read_text() or 0) if counted.exists() else 0
    return os.waitstatus_to_exitcode(status), changes, took


def _be_ilrec(arguments: Sequence[str], output: Path, counted: Path, change: int | None) -> None:
    """The forked process: never returns."""
    status = 1
    try:
        os.setpgid(0, 0)
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        made = 0

        def audit(event: str, details: tuple[Any, ...]) -> None:
            nonlocal made
            if event in _CHANGES or (event == "open" and _writes(details)):
                made += 1
                if made == change:
                    os.killpg(0, signal.SIGKILL)

        import ilrec

        sys.argv = ["ilrec", *arguments]
        sys.addaudithook(audit)
        try:
            ilrec.main()
        except SystemExit as end:
            status = int(end.code or 0) if not isinstance(end.code, str) else 1
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(os.open(counted, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), str(made).encode())
    finally:
        os._exit(status)


def _writes(details: tuple[Any, ...]) -> bool:
    path, mode, flags = details
    if str(path).startswith(("/dev/", "/proc/")):
        return False
    return (
        any(letter in mode for letter in "wax+") if isinstance(mode, str) else bool(flags & (os.O_WRONLY | os.O_RDWR))
    )


# -- What is in a storage ---------------------------------------------------------------------------------------------


def complete_files(storage: Path) -> dict[str, str]:
    """The checksums of all files of what is complete: versions, their evaluations, parts, histories of models."""
    roots = [bundle.parent if bundle.name == "bundle" else bundle for bundle in find_bundles(storage)]
    roots += [marker.parent for marker in _markers(storage)]
    files = [path for root in roots for path in root.rglob("*") if path.is_file()]
    files += storage.glob("*/model.json")
    found = {}
    for path in files:
        name = str(path.relative_to(storage))
        if not any(part.startswith(".") for part in Path(name).parts) and path.name not in _REDRAWN:
            found[name] = sha256(path)
    return found


def _markers(storage: Path) -> Iterator[Path]:
    for name in _MARKERS:
        yield from (path for path in (storage / PARTS).glob(f"*/*/{name}") if path.parent.name[0] != ".")


def content(storage: Path) -> dict[str, Any]:
    """What there is, without when and under which number it was made: what a command's outcome is compared by."""
    models = {}
    for model in find_models(storage):
        promoted = model.promoted
        kept = [
            (
                _bundle_content(version.bundle),
                (version.directory / "ray").is_dir() and any((version.directory / "ray").iterdir()),
                sorted(_evaluation(path) for path in version.directory.glob("evaluation/*/report.json")),
                (version.directory / "report.html").exists(),
            )
            for version in model.complete
        ]
        stands = None if promoted is None else _bundle_content(promoted.bundle)
        models[model.name] = (kept, stands, [event.action for event in model.events])
    parts = {str(path.parent.relative_to(storage)): _part(path.parent) for path in _markers(storage)}
    return {"models": models, "parts": parts}


def _bundle_content(bundle: Path) -> dict[str, Any]:
    manifest = read_json(bundle / "recommender.json")
    trained = "made_from" in manifest and not manifest["made_from"] and manifest["metrics"]
    # Training on threads that add up in another order ends in other last digits: its metrics have to be near.
    return {"name": manifest["name"], "made_from": manifest["made_from"].partition("@")[0]} | (
        {"metrics": {name: round(value, 2) for name, value in manifest["metrics"].items()}}
        if trained
        else {"checksums": manifest["checksums"]}
    )


def _evaluation(report: Path) -> str:
    return f"{report.parent.name}: {json.loads(report.read_text())['metrics']['model']}"


def _part(directory: Path) -> str:
    names = sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return hashlib.sha256(str([str(name) for name in names]).encode()).hexdigest()


def violations(storage: Path, before: dict[str, str], after: dict[str, str], changes: Sequence[str]) -> list[str]:
    """What is wrong with a storage in which a command was killed.

    Args:
        before, after: its files before the command, and after one that nobody disturbed.
    """
    from recommender.bundle import read_manifest
    from recommender.models import find_bundle

    found = []
    now = complete_files(storage)
    for name, checksum in before.items():
        if now.get(name) == checksum:
            continue
        told_to = name.startswith(tuple(changes))
        as_after = name.endswith("model.json") or name not in now or now[name] == after.get(name, now[name])
        if not (told_to and as_after):
            found.append(f"{name} {'changed' if name in now else 'is gone'}")
    try:
        for model in find_models(storage):
            read_manifest(find_bundle(model.name, storage))
            for version in model.complete:
                read_manifest(version.bundle)
        find_runs(storage)
        for report in storage.glob("*/*/evaluation/[!.]*/report.json"):
            json.loads(report.read_text())
            if not (report.parent / "targets.parquet").exists():
                found.append(f"{report.parent} is an evaluation without targets")
    except (UserError, ValueError, OSError) as error:
        found.append(f"not whole: {error}")
    for marker in _markers(storage):
        wanted = [name for name in after if name.startswith(f"{marker.parent.relative_to(storage)}/")]
        missing = [name for name in wanted if name not in now]
        if missing:
            found.append(f"a part is half: {missing}")
    return found


# -- Kills ------------------------------------------------------------------------------------------------------------


def disturb(command: Command, points: int, rng: random.Random, directory: Path) -> Outcome:
    """Kill a command at random moments; says what came of it."""
    started = time.monotonic()
    base, output = directory / f"{command.name}-base", directory / f"{command.name}.out"
    command.setup(base)
    storage = directory / command.name  # each time the same, as configs hold it
    arguments = [each.format(storage=storage, here=directory) for each in command.arguments]
    shutil.copytree(base, storage, symlinks=True)
    before, first = complete_files(storage), content(storage)
    status, changes, seconds = run(arguments, output)
    if status:
        raise UserError(f"{command.name} fails undisturbed, with status {status}:\n{output.read_text()[-3000:]}")
    after, expected = complete_files(storage), content(storage)
    outcome = Outcome(0, Counter(), [], 0.0)
    for point in range(points):
        shutil.rmtree(storage)
        shutil.copytree(base, storage, symlinks=True)
        if point % 2 or not changes:
            moment = rng.uniform(0, seconds)
            status, _, _ = run(arguments, output, seconds=moment)
            where = f"after {moment:.3f} s"
        else:
            change = rng.randint(1, changes)
            status, _, _ = run(arguments, output, change=change)
            where = f"before change {change} of {changes}"
        if status != -signal.SIGKILL:
            outcome.left["ended before"] += 1
        outcome.kills += status == -signal.SIGKILL
        wrong = violations(storage, before, after, command.changes)
        reached = content(storage)
        done = reached == expected
        outcome.left["as after it" if done else "as before it" if reached == first else "on the way"] += 1
        if not (done and not command.again):
            status, _, _ = run(arguments, output)
            if status:
                wrong.append(f"the same command then fails with status {status}: {output.read_text()[-1500:]}")
            elif (reached := content(storage)) != expected:
                wrong.append(f"the same command then ends elsewhere: {_difference(expected, reached)}")
            wrong += violations(storage, before, complete_files(storage), command.changes)
        outcome.violations += [f"{command.name}, killed {where}: {each}" for each in wrong]
    shutil.rmtree(storage)
    outcome.seconds = time.monotonic() - started
    return outcome


def _difference(expected: dict[str, Any], reached: dict[str, Any]) -> str:
    left, right = json.dumps(expected, indent=1).splitlines(), json.dumps(reached, indent=1).splitlines()
    missing, further = [line for line in left if line not in right], [line for line in right if line not in left]
    return f"missing {missing[:8]}, further {further[:8]}"


# -- Commands and storages --------------------------------------------------------------------------------------------


class Commands:
    """The commands that are killed, on storages that are made from one small model and its adapter.

    Args:
        directory: where all of it lies.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._template = directory / "template"
        values = experiment("shop", Path("storage"))
        values["training"] |= {"epochs": 2, "batch_tokens": 700}
        values["evaluation"] = {"exclude_seen": True, "bootstrap": 100, "batch": 16}
        values["cluster"] |= {"workers": 1}
        self._values = values
        (directory / "items.csv").write_text("item_id,title\nn1,A new tent\nn2,Another stove\n")

    def all(self) -> list[Command]:
        """By name; those that need Ray last."""
        here = ("--storage", "{storage}")
        return [
            Command("prepare", ("prepare", self._config("prepare")), self._other_data),
            Command("extend", ("extend", "shop", "{here}/items.csv", *here), self._shop, again=False),
            Command("export", ("export", "adapter", "--merge", *here), self._shop, again=False),
            Command("promote", ("models", "promote", "shop@2", *here), self._shop, ("shop/model.json",)),
            Command(
                "rollback", ("models", "rollback", "shop", *here), self._promoted, ("shop/model.json",), again=False
            ),
            Command("prune", ("runs", "prune", "--yes", *here), self._full, ("shop/1/ray/",)),
            Command(
                "prune-all",
                ("runs", "prune", "--yes", "--keep", "1", "--parts", *here),
                self._full,
                ("shop/", "parts/"),
            ),
            Command("convert", ("runs", "convert", "--yes", *here), self._earlier, ("old/",)),
            Command("evaluate", ("evaluate", "shop@1", *here), self._shop, ray=True),
            Command("train", ("train", self._config("train")), self._shop, ray=True),
        ]

    def _config(self, command: str) -> str:
        path = self._directory / f"{command}.yaml"
        values = self._values | {"cluster": self._values["cluster"] | {"storage": str(self._directory / command)}}
        path.write_text(yaml.safe_dump(values))
        return str(path)

    def _copy(self, storage: Path) -> None:
        if not self._template.exists():
            _in_a_process(lambda: _make(self._values, self._template))
        shutil.copytree(self._template, storage)

    def _shop(self, storage: Path) -> None:
        """Two versions of a model, an adapter on the first, their parts, no checkpoints."""
        self._copy(storage)

    def _other_data(self, storage: Path) -> None:
        """The same, but that the world and all that was made of it are missing."""
        self._copy(storage)
        shutil.rmtree(storage / PARTS)

    def _promoted(self, storage: Path) -> None:
        self._copy(storage)
        shop = Model(storage, "shop")
        shop.promote(shop.version("2"))

    def _full(self, storage: Path) -> None:
        """With checkpoints, an old version and a part that no version needs."""
        self._copy(storage)
        for number in (3, 4):
            _again(storage, number)
        shop = Model(storage, "shop")
        shop.promote(shop.version("2"))
        for step in (2, 4):
            directory = storage / "shop" / "1" / "ray" / f"step-{step:08d}"
            directory.mkdir(parents=True)
            (directory / "shard.safetensors").write_bytes(bytes(4096))
        shutil.copytree(next((storage / PARTS / "datasets").iterdir()), storage / PARTS / "datasets" / "0123")
        for part in (storage / PARTS).glob("*/[!.]*"):
            os.utime(part, (1e9, 1e9))

    def _earlier(self, storage: Path) -> None:
        """With a run of a release before versions: a directory that is no version's."""
        self._copy(storage)
        old = storage / "old"
        shutil.copytree(storage / "shop" / "2" / "bundle", old / "bundle")
        for name in ("train.log", "training.json", "report.html"):
            (old / name).write_text("[]")
        (old / "experiment.json").write_text(json.dumps({"recommender.kind": "language_model"}))
        (old / "prepared" / "dataset").mkdir(parents=True)
        (old / "prepared" / "dataset" / "stats.json").write_text("{}")
        (old / "ray" / "step-00000002").mkdir(parents=True)
        (old / "evaluation").mkdir()
        (old / "evaluation" / "test.json").write_text(json.dumps({"metrics": {"model": {"NDCG@10": 0.5}}}))
        (old / "evaluation" / "test.parquet").write_text("rows")


def _again(storage: Path, number: int) -> None:
    """Another version of the shop, like the second."""
    version = storage / "shop" / str(number)
    shutil.copytree(storage / "shop" / "2", version)
    manifest = read_json(version / "bundle" / "recommender.json")
    (version / "bundle" / "recommender.json").write_text(json.dumps(manifest | {"version": number}))


def _make(values: dict[str, Any], storage: Path) -> None:
    """Untrained models: what is in them does not matter, as long as it stays what it is."""
    import torch

    from recommender.backbone.backbone import load_backbone
    from recommender.bundle import Manifest
    from recommender.config import LoraConfig
    from recommender.items.item_space import ItemSpace
    from recommender.recommender import Recommender, starting_point
    from trainer.experiment import Experiment
    from trainer.prepare import prepare
    from trainer.run import begin

    of = Experiment.model_validate(values | {"cluster": values["cluster"] | {"storage": str(storage)}})
    other = of.model_copy(update={"training": of.training.model_copy(update={"seed": 7})})
    prepared = prepare(of, lambda text: None)
    space = ItemSpace.load(prepared.items)
    for seed in (1, 2):
        version = begin(other, prepared, say=lambda text: None)
        manifest = Manifest(name="shop", version=seed, data_fingerprint=prepared.fingerprint)
        Recommender(space, load_backbone(of.backbone, space.tokenizer, seed=seed), manifest).save(version.bundle)
    adapter = begin(other.model_copy(update={"name": "adapter"}), prepared, say=lambda text: None)
    base = Model(storage, "shop").version("1").bundle
    backbone = starting_point(base, LoraConfig(rank=4), torch.float32)
    Recommender(space, backbone, Manifest(name="adapter", version=1)).save(adapter.bundle)


def _in_a_process(work: Callable[[], None]) -> None:
    """Threads that it starts must not be in a process that is forked later."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        raise UserError("the storage to begin with could not be made")


@contextmanager
def one_ray(needed: bool) -> Iterator[None]:
    """A cluster that the commands join, if any needs it."""
    if not needed:
        yield
        return
    with LocalCluster(1) as cluster:
        os.environ.update(cluster.environment)
        yield


def import_all() -> None:
    """What commands import, so that a forked one needs not."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch

    for module in ("peft", "pyarrow.parquet", "recommender.recommender", "trainer.prepare", *_VERBS):
        importlib.import_module(module)
    torch.set_num_threads(1)


def table(outcomes: dict[str, Outcome]) -> Table:
    """A row for each command."""
    found = Table("command", "killed", "ended before", "as before it", "on the way", "as after it", "violations", "s")
    for name, outcome in outcomes.items():
        left = [str(outcome.left[state]) for state in ("ended before", "as before it", "on the way", "as after it")]
        found.add_row(name, str(outcome.kills), *left, str(len(outcome.violations)), f"{outcome.seconds:.0f}")
    return found


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kills", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=30, help="kills of each command")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", help="names of commands, parted by commas")
    args = parser.parse_args()
    rng, outcomes = random.Random(args.seed), {}
    with tempfile.TemporaryDirectory(prefix="kills-") as temporary:
        directory = Path(temporary)
        commands = Commands(directory).all()
        if args.only is not None:
            commands = [command for command in commands if command.name in args.only.split(",")]
        with one_ray(any(command.ray for command in commands)):
            import_all()
            for command in commands:
                outcomes[command.name] = outcome = disturb(command, args.points, rng, directory)
                for violation in outcome.violations:
                    print(violation, flush=True)
                print(f"{command.name}: {outcome.kills} kills, {len(outcome.violations)} violations", flush=True)
    Console(width=100).print(table(outcomes))
    sys.exit(any(outcome.violations for outcome in outcomes.values()))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")

"""The command line: one verb a job, nothing but arguments. Heavy packages are imported by the verb that runs."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from recommender.errors import UserError
from recommender.quiet import quiet

if TYPE_CHECKING:
    from recommender.models import Version

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Train, evaluate and serve recommenders, language models and collaborative ones, on Ray.

A first run, start to end:

  ilrec train configs/demo.yaml
  ilrec evaluate demo
  ilrec serve demo

Every verb explains itself: ilrec train --help.""",
)

Config = Annotated[Path, typer.Argument(help="The experiment, a YAML file (see configs/ and `ilrec schema`).")]
Set = Annotated[
    list[str],
    typer.Option("--set", "-s", metavar="FIELD=VALUE", help="Override a field: --set training.epochs=3. Repeatable."),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Begin a new version, even where there is one of this config; keeps all others.")
]
Promote = Annotated[
    bool, typer.Option("--promote", help="Let the name stand for what was trained; without it only the first is.")
]
Reference = Annotated[
    str, typer.Argument(help="A model: name (what is promoted), name@2, name@latest, or the path of a bundle.")
]
Storage = Annotated[
    Path, typer.Option(envvar="ILREC_STORAGE", help="Where models and runs lie: cluster.storage of their experiments.")
]
Address = Annotated[
    str,
    typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard, http://<head>:8265."),
]
Job = Annotated[str, typer.Argument(help="A job's id, as `ilrec submit` and `ilrec jobs list` print it.")]

jobs_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""List, show, follow and stop the jobs of a Ray cluster.

\b
ilrec jobs list --address http://head:8265
ilrec jobs status raysubmit_x
ilrec jobs logs raysubmit_x --follow
ilrec jobs stop raysubmit_x""",
)
app.add_typer(jobs_app, name="jobs")

runs_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""List and compare runs, and remove what finished ones no longer need.

\b
ilrec runs list
ilrec runs compare demo@1 demo@2
ilrec runs prune --keep 3
ilrec runs convert                  # of releases before versions""",
)
app.add_typer(runs_app, name="runs")

models_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""List models and their versions; say which version a name stands for, and take that back.

\b
ilrec models list
ilrec models show shop
ilrec models promote shop@3
ilrec models rollback shop""",
)
app.add_typer(models_app, name="models")


def _say(text: str) -> None:
    print(text, flush=True)


@app.command()
def simulate(
    out: Annotated[Path, typer.Argument(help="Directory to write the world to.")],
    overrides: Set = [],  # noqa: B006  (typer reads it, nobody changes it)
) -> None:
    """Write a simulated world with known truth: items, interactions and the oracle's metrics.

    \b
    ilrec simulate worlds/a
    ilrec simulate worlds/b --set seed=7 --set items=20000
    """
    from trainer.experiment import load_world
    from trainer.world.simulator import simulate as write_world

    write_world(load_world(overrides), out, _say)


@app.command()
def prepare(config: Config, overrides: Set = []) -> None:  # noqa: B006
    """Read, clean and split the data, spell the catalogue; print and save statistics.

    \b
    ilrec prepare configs/office.yaml
    ilrec prepare my.yaml --set data.min_user_interactions=5
    """
    from trainer.experiment import load_experiment

    experiment = load_experiment(config, overrides).located()
    from trainer.prepare import prepare as write_prepared

    prepared = write_prepared(experiment, _say)
    for part in prepared.parts:
        _say(f"prepared: {part}")


@app.command()
def train(config: Config, fresh: Fresh = False, promote: Promote = False, overrides: Set = []) -> None:  # noqa: B006
    """Prepare the data if need be, train on Ray, export the best checkpoint as a version of the model.

    Interrupted? Run the same command again: it goes on from its latest checkpoint. Another config, or new data, become
    the next version beside those that there are; nothing is overwritten.

    \b
    ilrec train configs/demo.yaml
    ilrec train configs/office.yaml --set training.epochs=3 --set cluster.workers=1
    ilrec train my.yaml --set init_from=shop          # goes on from what is promoted
    ilrec train my.yaml --set recommender.kind=sasrec --set name=my-sasrec
    """
    from trainer.experiment import load_experiment

    experiment = load_experiment(config, overrides).located()
    from recommender.bundle import read_manifest
    from trainer.data.dataset import Dataset
    from trainer.evaluation.floors import floors_of
    from trainer.evaluation.standing import standing_on_validation
    from trainer.fit import check_model
    from trainer.fit import train as fit
    from trainer.prepare import prepare as write_prepared
    from trainer.run import alone

    check_model(experiment)
    with alone(experiment):
        prepared = write_prepared(experiment, _say)
        version = fit(experiment, prepared, _say, fresh)
    dataset, manifest = Dataset.load(prepared.dataset), read_manifest(version.bundle)
    stands = standing_on_validation(manifest, dataset, experiment.evaluation, floors_of(experiment), _say)
    _say(f"bundle: {version.bundle}\nreport: {version.directory}/report.html")
    _conclude(version, promote)
    _say(f"validation: {stands}")


def _conclude(version: Version, promote: bool) -> None:
    """Promote a new version if asked to, and say what can be done with it."""
    from recommender.models import Model

    model = Model(version.storage, version.name)
    if promote:
        model.promote(version)
    serve_it = f"ilrec serve {version.name}"
    if model.promoted != version:
        serve_it = f"ilrec models promote {version} (the name stands for {model.promoted})"
    _say(f"next: ilrec evaluate {version}, or {serve_it}")


@app.command()
def tune(config: Config, fresh: Fresh = False, promote: Promote = False, overrides: Set = []) -> None:  # noqa: B006
    """Try values of some fields (the `sweep` section), stop the bad trials early, export the best one as a version.

    Each trial is a training run on Ray as `ilrec train` starts it; as many run at once as the cluster has room for.
    Interrupted? Run the same command again: finished trials are kept, the others go on.

    \b
    ilrec tune configs/sweeps/demo.yaml
    ilrec tune configs/sweeps/ilrec.yaml --set sweep.trials=8 --set name=small-sweep
    ilrec tune my.yaml --set sweep.concurrent=2 --fresh

    \b
    sweep:                     # in the experiment
      parameters:
        objective.beta: {kind: loguniform, low: 0.005, high: 0.2}     # or uniform
        training.learning_rate: {kind: choice, values: [5.0e-4, 1.0e-3]}
        objective.k: {kind: grid, values: [1, 2, 3]}                  # each value with all others
      trials: 4                # samples, for each point of the grid
      scheduler: {kind: asha, grace_period: 1, reduction_factor: 3}   # null: no trial is stopped
    """
    from trainer.experiment import load_experiment

    experiment = load_experiment(config, overrides)
    from tune.space import check_sweep

    check_sweep(experiment)
    experiment = experiment.located()
    from trainer.run import alone
    from tune.sweep import sweep

    with alone(experiment):
        version = sweep(experiment, _say, fresh)
    run = version.directory
    _say(f"bundle: {version.bundle}\nreport: {run}/tune/report.html, trials.json\nsettings: {run}/best.yaml")
    _conclude(version, promote)


@app.command()
def evaluate(
    what: Annotated[str, typer.Argument(help="An experiment (YAML file): its latest version; or a model: name@2.")],
    model: Annotated[str | None, typer.Option(help="Another model or bundle, on the experiment's data.")] = None,
    split: Annotated[Literal["test", "validation"], typer.Option(help="Which targets.")] = "test",
    against: Annotated[
        str | None,
        typer.Option(help="Another model that was evaluated, or its targets.parquet: paired bootstrap over users."),
    ] = None,
    storage: Storage = Path("runs"),
    overrides: Set = [],  # noqa: B006
) -> None:
    """Rank every held-out target against the whole catalogue: HR and NDCG with 95 % intervals, and for whom.

    Beside the model stand the floors that it has to beat: most-popular, item-to-item counts and the cosine of titles.

    \b
    ilrec evaluate demo
    ilrec evaluate demo@2 --against demo@1
    ilrec evaluate configs/demo.yaml --split validation
    ilrec evaluate configs/demo.yaml --model other --set evaluation.exclude_seen=true
    """
    from recommender.lock import in_use
    from recommender.models import find_bundle
    from trainer.experiment import load_experiment
    from trainer.run import experiment_of

    if Path(what).suffix in (".yaml", ".yml"):
        experiment = load_experiment(what, overrides)
        if model is None:
            model = str(experiment.model.version("latest").bundle)
    else:
        model = model or what
        experiment = experiment_of(find_bundle(what, storage), overrides)
    experiment = experiment.located()
    bundle = find_bundle(model, experiment.storage)
    from deploy.demo import print_audience, print_report
    from trainer.evaluation.evaluation import compare, read_per_target
    from trainer.evaluation.evaluation import evaluate as rank_all
    from trainer.evaluation.floors import floors_of
    from trainer.evaluation.saved import per_target_of
    from trainer.evaluation.standing import standing
    from trainer.prepare import prepare as write_prepared
    from trainer.reporting.report import write_report
    from trainer.run import CONFIG, SWEEP

    other = None if against is None else per_target_of(against, split, experiment.storage)
    if other is not None:
        read_per_target(other)  # before the ranking, which takes long
    with in_use(experiment.storage):
        prepared = write_prepared(experiment, _say)
        report, saved = rank_all(
            bundle,
            prepared.dataset,
            split,
            experiment.evaluation,
            experiment.cluster,
            _say,
            experiment.search,
            floors_of(experiment),
        )
    print_report(report.metrics, report.intervals)
    print_audience(report)
    _say(
        f"{report.targets} {split} targets in {report.seconds:.1f} s; exact {report.exact_rate:.1%}, "
        f"invalid {report.invalid_rate:.1%}, {report.expansions:.1f} expansions a list"
    )
    _say(f"saved: {saved.directory}")
    run = bundle.parent
    if (run / CONFIG).exists() and not (run / SWEEP).exists():  # a sweep has a report of its own
        _say(f"report: {write_report(experiment, run, prepared)}")
    if other is not None:
        found = compare(saved.per_target, other)
        low, high = found["interval"]
        _say(f"{found['metric']} minus {against}: {found['difference']:+.4f}, 95 % interval [{low:+.4f}, {high:+.4f}]")
    _say(f"{split}: {standing(report.metrics, report.differences)}")


@app.command()
def recommend(
    model: Reference,
    history: Annotated[str, typer.Option(help='Item ids or titles, oldest first, parted by ";"; or a JSON list.')],
    k: Annotated[int, typer.Option("-k", min=1, help="How many items.")] = 10,
    seen: Annotated[bool, typer.Option("--seen/--unseen", help="Whether items of the history may come back.")] = False,
    storage: Storage = Path("runs"),
) -> None:
    """Print the top-K for one history.

    \b
    ilrec recommend demo --history "i12; i7; i99"
    ilrec recommend office@2 --history "12; 431; 77" -k 5
    ilrec recommend /models/shop --history '["Tent; two persons", "Stove"]'
    """
    texts = _listed(history)
    if not texts:
        raise UserError('--history is empty; give ids or titles parted by ";"')
    from recommender.loading import load_recommender
    from recommender.models import find_bundle

    recommender = load_recommender(find_bundle(model, storage))
    items = recommender.catalogue.indices_of(texts)
    answer = recommender.recommend([items], k, None if seen else [set(items)])[0]
    for rank, (item, score) in enumerate(zip(answer.items, answer.scores, strict=True), 1):
        _say(f"{rank:>3}  {score:8.3f}  {recommender.catalogue.item_ids[item]}  {recommender.catalogue.titles[item]}")
    if answer.exact and len(answer.items) < k:
        _say(f"only {len(answer.items)} items are left to recommend")
    limit = "search.node_budget or search.width ended the search"
    _say("exact: this is the true top-K" if answer.exact else f"not exact: {limit}")


def _listed(history: str) -> list[str]:
    """What a history names: a JSON list's texts, or what semicolons part."""
    import json

    try:
        given = json.loads(history)
    except ValueError:
        given = None
    return [text for each in (given if isinstance(given, list) else history.split(";")) if (text := str(each).strip())]


@app.command()
def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL …",
            help="A model's name, name@version or the path of a bundle; name=… gives it another name for requests.",
        ),
    ],
    host: Annotated[str | None, typer.Option(help="Address to listen on; default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port; default 8000.")] = None,
    config: Annotated[Path | None, typer.Option(help="Take the `serving` section of this experiment.")] = None,
    storage: Annotated[
        Path | None, typer.Option(help="Where models are looked for by name; default: ILREC_STORAGE, or runs.")
    ] = None,
) -> None:
    """Serve models over HTTP with Ray Serve until Ctrl-C. A bare name follows what is promoted.

    \b
    ilrec serve demo
    ilrec serve shop old=shop@1
    ilrec serve /models/shop
    curl -s localhost:8000/v1/recommendations -H 'content-type: application/json' \\
         -d '{"history": ["<id or title>"], "k": 5}'
    """
    from service.config import ServingConfig

    settings = ServingConfig()
    if config is not None:
        from trainer.experiment import load_experiment

        settings = load_experiment(config).serving
    place = None if storage is None else str(storage.expanduser().absolute())
    asked = {"host": host, "port": port, "storage": place}
    given = {name: value for name, value in asked.items() if value is not None}
    from service.app import run

    run(models, settings.model_copy(update=given), blocking=True)


Out = Annotated[
    Path | None,
    typer.Argument(help="A directory for the new bundle; default: it becomes the model's next version."),
]


@app.command()
def export(
    model: Reference,
    out: Out = None,
    merge: Annotated[bool, typer.Option("--merge", help="Fold the LoRA adapter into the backbone.")] = False,
    promote: Promote = False,
    storage: Storage = Path("runs"),
) -> None:
    """Write a bundle anew, its adapter folded in, so that it needs no other files.

    \b
    ilrec export shop --merge                 # the next version of shop
    ilrec export shop@3 /models/shop --merge
    """
    if not merge:
        raise UserError("say what to do: ilrec export MODEL [OUT] --merge")
    from recommender.recommender import merge_adapter
    from trainer.derived import derived

    version = derived(model, storage, out, "export", merge_adapter)
    if version is not None:
        _conclude(version, promote)
    else:
        _say(f"merged bundle: {out}")


@app.command()
def extend(
    model: Reference,
    items: Annotated[str, typer.Argument(help="Items file: CSV, TSV, JSONL or Parquet with item_id and title.")],
    out: Out = None,
    id_column: Annotated[str, typer.Option(help="Its column of item ids.")] = "item_id",
    title_column: Annotated[str, typer.Option(help="Its column of titles.")] = "title",
    promote: Promote = False,
    storage: Storage = Path("runs"),
) -> None:
    """Add new items to a model without training: a language model can name whatever has a title.

    Items that it knows already stay as they are, and so does the version that it is made from.

    \b
    ilrec extend shop data/items_today.csv              # the next version of shop
    ilrec extend shop@3 data/items_today.csv /models/shop-today
    """
    from recommender.catalogue.catalogue import Catalogue
    from recommender.models import find_bundle
    from recommender.recommender import extend_bundle, language_model_manifest
    from trainer.data.config import ItemColumns
    from trainer.data.readers import Problems, read_items
    from trainer.derived import derived

    bundle = find_bundle(model, storage)
    language_model_manifest(bundle)
    table = read_items(items, ItemColumns(item_id=id_column, title=title_column), Problems("strict"))
    known = set(Catalogue.load(bundle).item_ids)
    new = table.filter([item not in known for item in table["item_id"].to_pylist()])
    if not len(new):
        raise UserError(f"{items}: all of its {len(table)} items are in {model} already")
    further = Catalogue(new["item_id"].to_pylist(), new["title"].to_pylist(), new)
    version = derived(
        model, storage, out, "extend", lambda source, target, **of: extend_bundle(source, further, target, **of)
    )
    _say(f"{version or out}: {len(new)} items added to {len(known)}, {len(table) - len(new)} were known")
    if version is not None:
        _conclude(version, promote)


@app.command()
def schema(
    readable: Annotated[bool, typer.Option("--readable", help="A page of Markdown to read, not JSON.")] = False,
) -> None:
    """Print the JSON schema of an experiment: every section, field, default and description.

    \b
    ilrec schema > experiment.schema.json
    ilrec schema --readable > configuration.md
    """
    import json

    from trainer.experiment import Experiment
    from trainer.reference import markdown, sections

    _say(markdown(sections()) if readable else json.dumps(Experiment.model_json_schema(), indent=2))


@app.command()
def demo(
    config: Annotated[Path, typer.Argument(help="Any experiment.")] = Path("configs/demo.yaml"),
    fresh: Fresh = False,
    overrides: Set = [],  # noqa: B006
) -> None:
    """The main job end to end: prepare, train, evaluate, serve, and one HTTP request.

    \b
    ilrec demo
    ilrec demo configs/office.yaml
    """
    from trainer.experiment import load_experiment

    experiment = load_experiment(config, overrides).located()
    from deploy.demo import run
    from trainer.run import alone

    with alone(experiment):
        run(experiment, _say, fresh)


@app.command()
def plan(
    config: Config,
    gpu_memory: Annotated[
        float | None, typer.Option(min=1, help="GB of a worker's GPU: does it fit, or what would?")
    ] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="Throughput of all workers; default: as an earlier run's.")
    ] = None,
    tflops: Annotated[float | None, typer.Option(min=0.000001, help="The same, in matrix products.")] = None,
    overrides: Set = [],  # noqa: B006
) -> None:
    """Say what a training needs: memory by ZeRO stage, steps, matrix products, time. Prepares the data if need be.

    \b
    ilrec plan configs/demo.yaml
    ilrec plan my.yaml --gpu-memory 24 --tflops 400 --set cluster.workers=8
    """
    from trainer.experiment import load_experiment

    experiment = load_experiment(config, overrides).located()
    from deploy.plan import print_plan
    from trainer.loop.requirements import requirements
    from trainer.prepare import prepare as write_prepared

    if gpu_memory is not None and not experiment.cluster.gpus_per_worker:
        raise UserError("--gpu-memory: the workers have no GPUs; add --set cluster.gpus_per_worker=1")
    if tokens_per_second is not None and tflops is not None:
        raise UserError("--tokens-per-second and --tflops say the same; give one of them")
    needs = requirements(experiment, write_prepared(experiment, _say))
    print_plan(needs, gpu_memory, tokens_per_second, tflops)


@app.command()
def submit(
    verb: Annotated[Literal["prepare", "train", "tune", "evaluate"], typer.Argument(help="What to run.")],
    config: Config,
    address: Address,
    options: Annotated[list[str] | None, typer.Argument(help="After --: further options of the verb.")] = None,
    wheel: Annotated[Path | None, typer.Option(help="Send this wheel's code, not the checkout's.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the log until the job ends.")] = True,
    overrides: Set = [],  # noqa: B006
) -> None:
    """Run a verb as a job of a Ray cluster, and follow it: its log, its exit status. Ctrl-C does not stop it.

    The config is checked here and travels with the code. Paths in it must be absolute, of files that all machines of
    the cluster see. The cluster's token is sent where RAY_AUTH_MODE=token.

    With --address ray://… it is no job, and ends with this command: Ctrl-C stops it, and what it has saved stays.

    \b
    ilrec submit train my.yaml --address http://head:8265
    ilrec submit train my.yaml --address ray://head:10001
    ilrec submit train my.yaml --address http://head:8265 --set training.epochs=3 --no-wait -- --fresh
    """
    from trainer.experiment import load_experiment, read_values

    experiment, values = load_experiment(config, overrides), read_values(config, overrides)
    if verb == "tune":
        from tune.space import check_sweep

        check_sweep(experiment)
    if {"--set", "-s"} & set(options or []):
        raise UserError("give --set before the --, so that it is checked here")
    typer.main.get_group(app).commands[verb].make_context(verb, [str(config), *(options or [])])  # refuses bad options
    if address.startswith("ray://"):
        if not wait:
            raise UserError(f"--no-wait: at {address} it would end with this command; submit it to http://<head>:8265")
        from deploy.client import run

        raise typer.Exit(run(address, verb, experiment, values, options or [], wheel, _say))
    from deploy import jobs

    client = jobs.connect(address)
    job = jobs.submit(client, verb, experiment, values, options or [], wheel, _say)
    _say(jobs.submitted(client, job))
    if wait:
        raise typer.Exit(jobs.follow(client, job, _say))


@jobs_app.command("list")
def list_jobs(address: Address) -> None:
    """All jobs that were submitted to the cluster."""
    from deploy import jobs

    jobs.show(jobs.connect(address))


@jobs_app.command()
def status(job: Job, address: Address) -> None:
    """One job: its status, and what went wrong."""
    from deploy import jobs

    jobs.show(jobs.connect(address), job)


@jobs_app.command()
def logs(
    job: Job,
    address: Address,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the job ends, with its exit status.")] = False,
) -> None:
    """What a job has printed."""
    from deploy import jobs

    client = jobs.connect(address)
    if follow:
        raise typer.Exit(jobs.follow(client, job, _say))
    _say(jobs.logs(client, job))


@jobs_app.command()
def stop(job: Job, address: Address) -> None:
    """Stop a job; its checkpoints stay, and the same experiment submitted again goes on from the latest."""
    from deploy import jobs

    jobs.stop(jobs.connect(address), job, _say)


@runs_app.command("list")
def list_runs(storage: Storage = Path("runs")) -> None:
    """All runs of a storage: what they are, how far they got, what they reached, what they take."""
    from deploy.runs import print_runs

    print_runs(storage, _say)


@runs_app.command("compare")
def compare_runs(
    names: Annotated[list[str], typer.Argument(metavar="RUN RUN …", help="name@2, or a name: its latest version.")],
    storage: Storage = Path("runs"),
) -> None:
    """The fields in which runs differ, their metrics, and the first's paired difference to each of the others."""
    from deploy.runs import print_comparison

    print_comparison(storage, names, _say)


@runs_app.command()
def prune(
    storage: Storage = Path("runs"),
    keep: Annotated[
        int | None,
        typer.Option(min=1, help="Also remove versions: all but the latest N, the promoted, and the one before it."),
    ] = None,
    parts: Annotated[bool, typer.Option("--parts", help="Also remove prepared data that no version needs.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove the checkpoints of finished runs and what interrupted writes left; shows what and how much, and asks.

    The only command that removes anything.

    \b
    ilrec runs prune
    ilrec runs prune --keep 3 --parts
    """
    from deploy.runs import prune as prune_runs

    prune_runs(storage, keep, parts, yes, typer.confirm, _say)


@runs_app.command()
def convert(
    storage: Storage = Path("runs"),
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Make runs of releases before versions version 1 of their model; shows which, and asks. Nothing is removed."""
    from deploy.convert import convert as convert_runs

    convert_runs(storage, yes, typer.confirm, _say)


@models_app.command("list")
def list_models(storage: Storage = Path("runs")) -> None:
    """All models: which version the name stands for, how many there are, validation, when it was exported."""
    from deploy.models import print_models

    print_models(storage)


@models_app.command()
def show(
    model: Annotated[str, typer.Argument(help="A model's name.")],
    storage: Storage = Path("runs"),
) -> None:
    """A model's versions, and what was promoted when."""
    from deploy.models import print_model

    print_model(storage, model, _say)


@models_app.command("promote")
def promote_version(
    version: Annotated[str, typer.Argument(help="name@2, or a name: its latest version.")],
    storage: Storage = Path("runs"),
) -> None:
    """Let a name stand for a version: `serve`, `recommend`, `init_from` take it; endpoints of that name follow."""
    from deploy.models import promote as promote_model

    promote_model(storage, version, _say)


@models_app.command()
def rollback(
    model: Annotated[str, typer.Argument(help="A model's name.")],
    storage: Storage = Path("runs"),
) -> None:
    """Let a name stand for what it stood for before. Once more goes further back."""
    from deploy.models import rollback as roll_back

    roll_back(storage, model, _say)


def _is_full(error: BaseException | None) -> bool:
    """Whether a disk without room caused it, whatever library says so."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return True
        error = error.__cause__
    return False


def main() -> NoReturn:
    """Run the command line; a user's mistake is one message and status 2, never a traceback."""
    paths = (NotADirectoryError, IsADirectoryError, FileNotFoundError, FileExistsError, PermissionError)
    quiet()
    try:
        app(standalone_mode=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if _is_full(error):
            said = "the disk is full: what was there is whole; make room, and the same command goes on"
            print(f"error: {said} ({error})", file=sys.stderr)
        elif isinstance(error, OSError) and error.filename and (isinstance(error, paths) or error.errno == errno.EROFS):
            print(f"error: {error.filename}: {error.strerror}; check the path and who may write there", file=sys.stderr)
        else:
            raise
        sys.exit(2)
    sys.exit(0)


if __name__ == "__main__":
    main()

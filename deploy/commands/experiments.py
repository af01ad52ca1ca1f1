"""Verbs of an experiment: from a world or data to a model and what it is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

import ilrec
from deploy.commands.options import Config, Fresh, Promote, Set, Storage, say
from recommender.errors import UserError


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

    write_world(load_world(overrides), out, say)


def prepare(config: Config, overrides: Set = []) -> None:  # noqa: B006
    """Read, clean and split the data, spell the catalogue; print and save statistics.

    \b
    ilrec prepare configs/office.yaml
    ilrec prepare my.yaml --set data.min_user_interactions=5
    """
    for part in ilrec.experiment(config, overrides, say).prepare().parts:
        say(f"prepared: {part}")


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
    ilrec.experiment(config, overrides, say).train(fresh, promote)


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
    ilrec.experiment(config, overrides, say).tune(fresh, promote)


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
    found = ilrec.experiment(what, overrides, say, storage).evaluate(model, split, against)
    from deploy.demo import print_audience, print_report

    report = found.report
    print_report(report.metrics, report.intervals)
    print_audience(report)
    say(
        f"{report.targets} {split} targets in {report.seconds:.1f} s; exact {report.exact_rate:.1%}, "
        f"invalid {report.invalid_rate:.1%}, {report.expansions:.1f} expansions a list"
    )
    if (difference := found.difference) is not None:
        low, high = difference["interval"]
        gap = f"{difference['difference']:+.4f}, 95 % interval [{low:+.4f}, {high:+.4f}]"
        say(f"{difference['metric']} minus {against}: {gap}")
    say(f"{split}: {found.standing}")


def blend(
    what: Annotated[str, typer.Argument(help="An experiment (YAML file): its latest version; or a model: name@2.")],
    add: Annotated[
        list[str] | None,
        typer.Option("--add", help="A further model of the same data: collaborative, itemknn or tfidf. Repeatable."),
    ] = None,
    promote: Promote = False,
    storage: Storage = Path("runs"),
    overrides: Set = [],  # noqa: B006
) -> None:
    """Add priors to a model's score, with weights found on validation; the result is the model's next version.

    Priors: item-to-item counts, the cosine of titles, popularity, newness, and what the model says without a history;
    or those that `search.priors` names. The search stays exact. A prior that gains nothing gets no weight.

    \b
    ilrec blend configs/office.yaml
    ilrec blend shop --add shop-sasrec --promote
    ilrec blend my.yaml --set 'search.priors={margin: {kind: column, column: margin}}'
    """
    ilrec.experiment(what, overrides, say, storage).blend(add=add or (), promote=promote)


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

    say(markdown(sections()) if readable else json.dumps(Experiment.model_json_schema(), indent=2))


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
        run(experiment, say, fresh)


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
    needs = requirements(experiment, write_prepared(experiment, say))
    print_plan(needs, gpu_memory, tokens_per_second, tflops)

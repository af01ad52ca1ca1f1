"""Verbs of a model: ask it, make others from it, say which version a name stands for."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import ilrec
from deploy.commands.options import Out, Promote, Reference, Storage, say
from recommender.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""List models and their versions; say which version a name stands for, and take that back.

\b
ilrec models list
ilrec models show shop
ilrec models promote shop@3
ilrec models rollback shop""",
)


def recommend(
    model: Reference,
    history: Annotated[
        str | None, typer.Option(help='Item ids or titles, oldest first, parted by ";"; or a JSON list.')
    ] = None,
    user: Annotated[str | None, typer.Option(help="Instead: a user of the data that the model was trained on.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many items.")] = 10,
    seen: Annotated[bool, typer.Option("--seen/--unseen", help="Whether items of the history may come back.")] = False,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN=VALUE",
            help="Only items with this value; several of a column: any of them. Or all as JSON: "
            '\'{"brand": ["Acme"]}\'. Repeatable.',
        ),
    ] = None,
    max_per: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN=N", help="At most N items of one value. Repeatable.")
    ] = None,
    allow: Annotated[str | None, typer.Option(help="Only these items; as --history.")] = None,
    deny: Annotated[str | None, typer.Option(help="None of these items; as --history.")] = None,
    boost: Annotated[
        list[str] | None,
        typer.Option(metavar="PRIOR=WEIGHT", help="Another weight of one of the model's priors. Repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    storage: Storage = Path("runs"),
) -> None:
    """Print the top-K for one history.

    \b
    ilrec recommend demo --history "i12; i7; i99"
    ilrec recommend office@2 --history "12; 431; 77" -k 5
    ilrec recommend /models/shop --history '["Tent; two persons", "Stove"]'
    ilrec recommend shop --user u1 --where brand=Acme --max-per category=2 --json
    ilrec recommend shop --user u1 --boost popularity=-0.5       # of a model that `ilrec blend` made
    """
    if (history is None) == (user is None):
        raise UserError("say whom to recommend for: either --history or --user")
    texts = listed(history or "")
    if user is None and not texts:
        raise UserError('--history is empty; give ids or titles parted by ";"')
    asked: dict[str, Any] = {
        "where": _conditions(where or []),
        "max_per": _caps(max_per or []),
        "allow": None if allow is None else listed(allow),
        "deny": listed(deny or ""),
        "boost": _weights(boost or []),
    }
    recommender = ilrec.load(model, storage)
    if user is not None:
        texts = ilrec.histories(model, storage).of(user)
    found = recommender.recommend(texts, k, exclude_seen=not seen, **asked)
    if as_json:
        say(json.dumps({"model": recommender.manifest.name, **asdict(found)}, ensure_ascii=False))
        return
    for item in found:
        say(f"{item.rank:>3}  {item.score:8.3f}  {item.item_id}  {item.title}")
    if found.exact and len(found) < k:
        say(f"only {len(found)} items are left to recommend")
    limit = "search.node_budget or search.width ended the search"
    say("exact: this is the true top-K" if found.exact else f"not exact: {limit}")


def listed(history: str) -> list[str]:
    """What a history names: a JSON list's texts, or what semicolons part."""
    try:
        given = json.loads(history)
    except ValueError:
        given = None
    return [text for each in (given if isinstance(given, list) else history.split(";")) if (text := str(each).strip())]


def _conditions(given: list[str]) -> dict[str, Any]:
    """Values by column. One that is given as COLUMN=VALUE is meant as text or as what it reads like: 12, true."""
    found: dict[str, list[Any]] = {}
    for text in given:
        if text.lstrip().startswith("{"):
            try:
                columns = json.loads(text)
            except ValueError as error:
                raise UserError(f"--where {text}: no JSON ({error})") from None
            for column, values in columns.items():
                found.setdefault(column, []).extend(values if isinstance(values, list) else [values])
            continue
        column, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--where {text}: write it as column=value")
        try:
            meant = json.loads(value)
        except ValueError:
            meant = value
        found.setdefault(column.strip(), []).extend([value] if meant == value else [value, meant])
    return found


def _caps(given: list[str]) -> dict[str, int]:
    found = {}
    for text in given:
        column, _, number = text.partition("=")
        if not number.strip().isdigit():
            raise UserError(f"--max-per {text}: write it as column=number")
        found[column.strip()] = int(number)
    return found


def _weights(given: list[str]) -> dict[str, float]:
    found = {}
    for text in given:
        name, _, weight = text.partition("=")
        try:
            found[name.strip()] = float(weight)
        except ValueError:
            raise UserError(f"--boost {text}: write it as prior=weight") from None
        if not math.isfinite(found[name.strip()]):
            raise UserError(f"--boost {text}: the weight must be a finite number")
    return found


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
    from deploy.models import conclude
    from recommender.recommender import merge_adapter
    from trainer.derived import derived

    version = derived(model, storage, out, "export", merge_adapter)
    if version is not None:
        conclude(version, promote, say)
    else:
        say(f"merged bundle: {out}")


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
    from deploy.models import conclude
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
    say(f"{version or out}: {len(new)} items added to {len(known)}, {len(table) - len(new)} were known")
    if version is not None:
        conclude(version, promote, say)


@app.command("list")
def list_models(storage: Storage = Path("runs")) -> None:
    """All models: which version the name stands for, how many there are, validation, when it was exported."""
    from deploy.models import print_models

    print_models(storage)


@app.command()
def show(
    model: Annotated[str, typer.Argument(help="A model's name.")],
    storage: Storage = Path("runs"),
) -> None:
    """A model's versions, and what was promoted when."""
    from deploy.models import print_model

    print_model(storage, model, say)


@app.command("promote")
def promote_version(
    version: Annotated[str, typer.Argument(help="name@2, or a name: its latest version.")],
    storage: Storage = Path("runs"),
) -> None:
    """Let a name stand for a version: `serve`, `recommend`, `init_from` take it; endpoints of that name follow."""
    from deploy.models import promote as promote_model

    promote_model(storage, version, say)


@app.command()
def rollback(
    model: Annotated[str, typer.Argument(help="A model's name.")],
    storage: Storage = Path("runs"),
) -> None:
    """Let a name stand for what it stood for before. Once more goes further back."""
    from deploy.models import rollback as roll_back

    roll_back(storage, model, say)

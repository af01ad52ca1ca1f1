"""Recommenders in Python: open a model, ask it; run an experiment. `python -m ilrec` is the command line.

    >>> import ilrec
    >>> shop = ilrec.load("shop")                                                       # doctest: +SKIP
    >>> for item in shop.recommend(["sku1", "Tent"], k=3, where={"brand": ["Acme"]}):   # doctest: +SKIP
    ...     print(item.rank, item.item_id, item.title, item.score)
    >>> run = ilrec.experiment("my.yaml", set={"training.epochs": 3})                   # doctest: +SKIP
    >>> run.train()                                                                     # doctest: +SKIP
    >>> run.evaluate().metrics["model"]["NDCG@10"]                                      # doctest: +SKIP

Importing it is cheap: what is heavy comes with the first call that needs it. What a user can mend is a `UserError`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from recommender.errors import UserError
from recommender.models import Model, Version, default_storage, find_bundle, find_models, find_version
from trainer.experiment import Experiment as Config
from trainer.experiment import load_experiment
from trainer.parts import Prepared, Say

if TYPE_CHECKING:
    import pyarrow as pa

    from recommender.bundle import Manifest
    from recommender.catalogue.catalogue import Catalogue
    from recommender.catalogue.columns import Column, Value
    from recommender.config import SearchConfig
    from recommender.recommendation import AnyRecommender
    from trainer.data.dataset import Dataset
    from trainer.evaluation.evaluation import Report

__all__ = [
    "Evaluation",
    "Experiment",
    "Explanation",
    "Histories",
    "Item",
    "Model",
    "Prepared",
    "Recommendations",
    "Recommender",
    "Sweep",
    "UserError",
    "Version",
    "experiment",
    "histories",
    "load",
    "models",
]


def load(
    model: str | Path, storage: str | Path | None = None, device: str = "cpu", dtype: str | None = None
) -> Recommender:
    """Open a model, of whatever kind.

    Args:
        model: a name (the version that is promoted), name@2, name@latest, or the path of a bundle.
        storage: where names are looked for; None: ILREC_STORAGE, or `runs` here.
        device: e.g. "cpu", "cuda".
        dtype: of a language model's weights, "float32" or "bfloat16"; None: as they were saved.

    Raises:
        UserError: there is no such model, or it is damaged.
    """
    bundle = find_bundle(model, _path(storage))
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"dtype {dtype!r}: give 'float32' or 'bfloat16'")
    import torch

    from recommender.loading import load_recommender

    return Recommender(load_recommender(bundle, device, None if dtype is None else getattr(torch, dtype)))


def models(storage: str | Path | None = None) -> dict[str, Model]:
    """The models of a storage by name; each has `versions`, `promoted`, `promote(version)` and `rollback()`.

    Raises:
        UserError: there is no such directory.
    """
    return {model.name: model for model in find_models(_path(storage) or default_storage())}


def experiment(
    what: str | Path | Mapping[str, Any],
    set: Mapping[str, Any] | Sequence[str] = (),
    say: Say = print,
    storage: str | Path | None = None,
) -> Experiment:
    """An experiment, checked, to be run.

    Args:
        what: a YAML file; what such a file holds; or a model, `name` or `name@2`: the experiment that it was trained
            as.
        set: fields in place of those, {"training.epochs": 3} or ["training.epochs=3"].
        say: takes each line of progress.
        storage: where a model is looked for by name; None: ILREC_STORAGE, or `runs` here. (What an experiment makes
            goes into its own `cluster.storage`.)

    Raises:
        UserError: names the file, the field and the remedy.
    """
    if isinstance(what, Mapping) or Path(what).suffix in (".yaml", ".yml"):
        return Experiment(load_experiment(what, set), say)
    from trainer.run import experiment_of, prepared_of

    found = find_version(what, _path(storage))
    bundle = found.bundle if isinstance(found, Version) else found
    try:
        data = None if set else prepared_of(bundle)
    except UserError:  # pruned, or of an earlier release: made again
        data = None
    return Experiment(experiment_of(bundle, set), say, str(found), data)


def histories(source: Prepared | Experiment | str | Path, storage: str | Path | None = None) -> Histories:
    """What users did, by user id: histories to recommend for.

    Args:
        source: prepared data; an experiment, whose data are prepared if need be; or a model: its training data.
        storage: where a model is looked for by name; None: ILREC_STORAGE, or `runs` here.

    Raises:
        UserError: there is no such model, or its data are not known here.
    """
    if isinstance(source, Experiment):
        source = source.prepare()
    elif not isinstance(source, Prepared):
        from trainer.run import prepared_of

        source = prepared_of(find_bundle(source, _path(storage)))
    from trainer.data.dataset import Dataset

    return Histories(Dataset.load(source.dataset))


# -- Recommending -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One item of a list: `score` is a log-probability, or what an ItemKNN or TF-IDF gives."""

    rank: int
    item_id: str
    title: str
    score: float


@dataclass(frozen=True)
class Recommendations(Sequence[Item]):
    """A list, best item first: a sequence of its items.

    Attributes:
        items: fewer than were asked for where the filters leave fewer.
        exact: whether this is proven to be the true top-K of what may be recommended.
        expansions: trie nodes that the search expanded; 0 for a model that scores every item.
    """

    items: tuple[Item, ...]
    exact: bool
    expansions: int

    @property
    def item_ids(self) -> list[str]:
        return [item.item_id for item in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: Any) -> Any:
        return self.items[place]

    def __repr__(self) -> str:
        lines = [f"{item.rank:>3}  {item.score:8.3f}  {item.item_id}  {item.title}" for item in self.items]
        return "\n".join([f"{len(self)} items, {'exact' if self.exact else 'not exact'}", *lines])


@dataclass(frozen=True)
class Explanation:
    """Why an item has its score: the log-probabilities of the tokens that spell it add up to it.

    Attributes:
        tokens: text and log-probability of each; a token that is forced (nothing else is valid there) has 0.
    """

    item_id: str
    title: str
    score: float
    tokens: tuple[tuple[str, float], ...]

    def __repr__(self) -> str:
        lines = [f"{value:8.3f}  {text!r}" for text, value in self.tokens]
        return "\n".join([f"{self.score:8.3f}  {self.item_id}  {self.title}", *lines])


class Recommender:
    """An opened model. Histories and candidates name items by id or, failing that, by title (case ignored).

    Attributes:
        manifest: name, version, metrics, how it is searched.
        catalogue: the items.
    """

    def __init__(self, opened: AnyRecommender):
        self._opened = opened
        self.manifest: Manifest = opened.manifest
        self.catalogue: Catalogue = opened.catalogue

    def __repr__(self) -> str:
        version = "" if self.manifest.version is None else f"@{self.manifest.version}"
        return f"<{self.manifest.name}{version}, {self.manifest.kind}, {len(self.catalogue):,} items>"

    def recommend(
        self,
        history: Sequence[str],
        k: int = 10,
        where: Mapping[str, Value | Sequence[Value]] | None = None,
        max_per: Mapping[str, int] | None = None,
        exclude_seen: bool = True,
        allow: Sequence[str] | None = None,
        deny: Sequence[str] = (),
        boost: Mapping[str, float] | None = None,
    ) -> Recommendations:
        """The top-K for one history.

        Args:
            history: item ids or titles, oldest first, at least one.
            k: how many items.
            where: by column of the items file, the value or values of which an item must have one.
            max_per: by column, how many items of one value may be listed.
            exclude_seen: never list items of the history.
            allow: the only items that may be listed.
            deny: items that may not be.
            boost: other weights of the model's priors, by their names.

        Raises:
            UserError: an item, a column or a prior is unknown; says what may have been meant.
        """
        return self.recommend_batch([history], k, where, max_per, exclude_seen, allow, deny, boost)[0]

    def recommend_batch(
        self,
        histories: Sequence[Sequence[str]],
        k: int = 10,
        where: Mapping[str, Value | Sequence[Value]] | None = None,
        max_per: Mapping[str, int] | None = None,
        exclude_seen: bool = True,
        allow: Sequence[str] | None = None,
        deny: Sequence[str] = (),
        boost: Mapping[str, float] | None = None,
    ) -> list[Recommendations]:
        """The top-K for each of several histories, searched together. Arguments and errors as of `recommend`."""
        from recommender.capped import fill, search_together

        if k < 1:
            raise UserError(f"k is {k}; ask for 1 item or more")
        seen = [self._indices(history, "history") for history in histories]
        values = {name: _values(given) for name, given in (where or {}).items()}
        allowed = None if allow is None else self.catalogue.indices_of(allow, "allow")
        denied = self.catalogue.indices_of(deny, "deny")
        self._check_columns("where", values)
        self._check_columns("max_per", max_per or {})
        if few := [name for name, cap in (max_per or {}).items() if cap < 1]:
            raise UserError(f"max_per.{few[0]}: give 1 or more")
        search = self.manifest.search.boosted(boost) if boost else None
        lists = [self._list(items, k, values, max_per or {}, exclude_seen, allowed, denied, search) for items in seen]
        fill(lists, lambda unfinished: search_together(self._opened, unfinished))
        answers = [each.answer() for each in lists]
        return [
            Recommendations(self._items(answer.items, answer.scores), answer.exact, answer.expansions)
            for answer in answers
        ]

    def rank(self, history: Sequence[str], candidates: Sequence[str]) -> Recommendations:
        """Candidates in the order of their scores, those that `recommend` would give them; each once.

        Raises:
            UserError: an item is unknown.
        """
        items, wanted = self._indices(history, "history"), self._indices(candidates, "candidates")
        [scores] = self._opened.rank([items], [wanted])
        best = sorted(set(zip([-score for score in scores], wanted, strict=True)))
        return Recommendations(self._items([i for _, i in best], [-s for s, _ in best]), exact=True, expansions=0)

    def explain(self, history: Sequence[str], item: str) -> Explanation:
        """The tokens that spell an item, and their log-probabilities, which add up to its score.

        Raises:
            UserError: an item is unknown, or the model does not spell items.
        """
        items, [wanted] = self._indices(history, "history"), self._indices([item], "item")
        found = self._opened.spellings(items, [wanted])
        if found is None:
            raise UserError(f"{self!r} scores items as a whole, so there are no tokens that could explain a score")
        tokens = tuple(found[0])
        score = sum(value for _, value in tokens)
        return Explanation(self.catalogue.item_ids[wanted], self.catalogue.titles[wanted], score, tokens)

    @cached_property
    def columns(self) -> Mapping[str, Column]:
        """The columns that can be filtered by."""
        from recommender.catalogue.columns import columns_of

        return columns_of(self.catalogue)

    def _list(
        self,
        items: list[int],
        k: int,
        where: Mapping[str, Sequence[Value]],
        max_per: Mapping[str, int],
        exclude_seen: bool,
        allow: list[int] | None,
        deny: list[int],
        search: SearchConfig | None,
    ) -> Any:
        import numpy as np

        from recommender.capped import CappedList
        from recommender.catalogue.columns import items_where

        columns = self.columns if where or max_per else {}
        exclude = np.array([*(items if exclude_seen else ()), *deny], np.int64)
        allowed = items_where(columns, where, allow, len(self.catalogue))
        return CappedList(items, k, exclude, allowed, max_per, columns, self.manifest.search, search)

    def _indices(self, texts: Sequence[str], field: str) -> list[int]:
        if isinstance(texts, str):
            raise UserError(f"{field}: is one text; give a list of ids or titles")
        if not texts:
            raise UserError(f"{field}: is empty; name at least 1 item of the catalogue")
        return self.catalogue.indices_of(texts, field)

    def _check_columns(self, field: str, names: Mapping[str, Any]) -> None:
        from recommender.catalogue.columns import column_named

        for name in names:
            try:
                column_named(self.columns, name)
            except UserError as error:
                raise UserError(f"{field}.{name[:80]}: {error}") from None

    def _items(self, items: Sequence[int], scores: Sequence[float]) -> tuple[Item, ...]:
        ids, titles = self.catalogue.item_ids, self.catalogue.titles
        return tuple(
            Item(rank, ids[item], titles[item], score)
            for rank, (item, score) in enumerate(zip(items, scores, strict=True), 1)
        )


class Histories(Mapping[str, list[str]]):
    """Item ids by user id, oldest first: all that the data hold of a user, held-out items included.

    Of a user with several sequences, as published windows may give, it is the longest.
    """

    def __init__(self, dataset: Dataset):
        self._dataset = dataset
        lengths = dataset.offsets[1:] - dataset.offsets[:-1]
        self._sequence: dict[str, int] = {}
        for sequence, user in enumerate(dataset.users):
            if user not in self._sequence or lengths[sequence] > lengths[self._sequence[user]]:
                self._sequence[user] = sequence

    def __getitem__(self, user: str) -> list[str]:
        sequence, dataset = self._sequence[user], self._dataset
        items = dataset.flat_items[dataset.offsets[sequence] : dataset.offsets[sequence + 1]]
        return [dataset.item_ids[item] for item in items]

    def of(self, user: str) -> list[str]:
        """As `[user]`.

        Raises:
            UserError: the user is unknown; says whom there may be instead.
        """
        if user not in self:
            close = get_close_matches(user, self._sequence, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; it holds {len(self):,} users"
            raise UserError(f"user {user!r} is not in the data{hint}")
        return self[user]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sequence)

    def __len__(self) -> int:
        return len(self._sequence)

    def __repr__(self) -> str:
        return f"<histories of {len(self):,} users>"


# -- Experiments ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: system ("model", "most_popular", "itemknn", "tfidf") → metric, "NDCG@10" → mean.
        intervals: the same, → 95 % interval.
        report: all of it, by kind of target and policy as well.
        directory: where it is kept.
        standing: where the model stands beside the floors, in words.
        difference: paired with the other model, where one was named: metric, difference, 95 % interval.
    """

    report: Report = field(repr=False)
    directory: Path
    standing: str
    difference: dict[str, Any] | None = None

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        return self.report.metrics

    @property
    def intervals(self) -> dict[str, dict[str, tuple[float, float]]]:
        return self.report.intervals

    @cached_property
    def per_target(self) -> pa.Table:
        """A row a target: user, item, rank, list, history length, popularity."""
        import pyarrow.parquet as pq

        from trainer.evaluation.saved import Saved

        return pq.read_table(Saved(self.directory).per_target)


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Attributes:
        version: of the model, the best trial's.
        trials: name, parameters, outcome and history of each, in the order in which they began.
    """

    version: Version
    trials: list[dict[str, Any]] = field(repr=False)


@dataclass(frozen=True)
class Experiment:
    """An experiment to be run. Each step makes what it needs, and finds again what was made before.

    Attributes:
        config: as the file gives it, checked.
        say: takes each line of progress.
        trained: the model that it was asked for by, if it was: name@version, or a bundle's path.
        data: what that was trained on, where nothing was set in place of its fields.
    """

    config: Config = field(repr=False)
    say: Say = field(default=print, repr=False)
    trained: str | None = None
    data: Prepared | None = field(default=None, repr=False)

    @property
    def model(self) -> Model:
        """The model that it trains, with the versions that there are."""
        return self.config.model

    def prepare(self) -> Prepared:
        """Read, clean and split the data, spell the catalogue.

        Raises:
            UserError: a mistake in the data.
        """
        experiment = self.config.located()
        from trainer.prepare import prepare

        return prepare(experiment, self.say)

    def train(self, fresh: bool = False, promote: bool = False) -> Version:
        """Prepare if need be, train on Ray, export the best checkpoint as a version of the model.

        An interrupted training goes on; a finished one of the same config and data is not repeated.

        Args:
            fresh: begin a new version, even where there is one of this config; all others are kept.
            promote: let the name stand for it; without, only the first is.

        Raises:
            UserError: a mistake in config or data, or training stopped for a reason that the user can mend.
        """
        experiment = self.config.located()
        from recommender.bundle import read_manifest
        from trainer.data.dataset import Dataset
        from trainer.evaluation.floors import floors_of
        from trainer.evaluation.standing import on_validation, standing
        from trainer.fit import check_model, train
        from trainer.prepare import prepare
        from trainer.reporting.curves import add_floors
        from trainer.run import alone

        check_model(experiment)
        with alone(experiment):
            prepared = prepare(experiment, self.say)
            version = train(experiment, prepared, self.say, fresh)
        dataset, manifest = Dataset.load(prepared.dataset), read_manifest(version.bundle)
        metrics = on_validation(manifest, dataset, experiment.evaluation, floors_of(experiment), self.say)
        add_floors(experiment, version.directory, metrics, self.say)
        self.say(f"bundle: {version.bundle}\nreport: {version.directory}/report.html")
        self._conclude(version, promote)
        self.say(f"validation: {standing(metrics, {})}")
        return version

    def tune(self, fresh: bool = False, promote: bool = False) -> Sweep:
        """Try values of the fields that the `sweep` section names, export the best trial as a version of the model.

        Args, errors: as of `train`.
        """
        from tune.space import check_sweep

        check_sweep(self.config)
        experiment = self.config.located()
        from recommender.files import read_json
        from trainer.run import SWEEP, alone
        from tune.sweep import sweep

        with alone(experiment):
            version = sweep(experiment, self.say, fresh)
        run = version.directory
        self.say(f"bundle: {version.bundle}\nreport: {run}/tune/report.html, trials.json\nsettings: {run}/best.yaml")
        self._conclude(version, promote)
        return Sweep(version, cast("list[dict[str, Any]]", read_json(run / SWEEP / "trials.json")))

    def blend(self, model: str | Path | None = None, add: Sequence[str] = (), promote: bool = False) -> Version:
        """Add priors to the score of a model: item-to-item counts, the cosine of titles, popularity and others.

        Their weights are found on validation targets; what does nothing gets none. The version that it is made from is
        kept as it is.

        Args:
            model: as of `evaluate`; a language model or a collaborative one.
            add: further models (collaborative, itemknn, tfidf) of the same data: names, name@version or paths.
            promote: let the name stand for the new version.

        Raises:
            UserError: nothing is trained yet, or a prior cannot be had.
        """
        experiment = self.config if self.data else self.config.located()
        reference = str(model or self.trained or self.model.version("latest"))
        if not isinstance(find_version(reference, experiment.storage), Version):
            raise UserError(
                f"{reference}: is the path of a bundle; a blend becomes a model's next version, so give a name"
            )
        from trainer.blended import blend, lines_of, prior_name, write_blending
        from trainer.derived import derived
        from trainer.prepare import prepare

        for each in add:  # before the data are looked at
            prior_name(each, experiment.storage)
        prepared = self.data or prepare(experiment, self.say)
        found = []

        def make(source: Path, target: Path, **of: Any) -> None:
            found.append(blend(experiment, source, prepared, add, target, self.say, **of))

        version = derived(reference, experiment.storage, None, "blend", make)
        assert version is not None  # it goes to no path of its own
        page = write_blending(found[0], version.directory, str(version))
        self.say("\n".join([*lines_of(found[0]), f"report: {page}"]))
        self._conclude(version, promote)
        return version

    def evaluate(
        self, model: str | Path | None = None, split: str = "test", against: str | Path | None = None
    ) -> Evaluation:
        """Rank every held-out target against the whole catalogue, with the floors beside it.

        Args:
            model: another model or bundle, on this experiment's data; None: the one that it was asked for by, or the
                latest version.
            split: "test" or "validation".
            against: another model that was evaluated, or its targets.parquet: paired bootstrap over users.

        Raises:
            UserError: nothing is trained yet, or the model does not fit the data.
        """
        if split not in ("test", "validation"):
            raise UserError(f"split {split!r}: give 'test' or 'validation'")
        reference = model or self.trained or self.model.version("latest").bundle
        experiment = self.config if self.data else self.config.located()
        bundle = find_bundle(reference, experiment.storage)
        from recommender.lock import in_use
        from trainer.evaluation.evaluation import compare, evaluate, read_per_target
        from trainer.evaluation.floors import floors_of
        from trainer.evaluation.saved import per_target_of
        from trainer.evaluation.standing import standing
        from trainer.prepare import prepare
        from trainer.reporting.curves import add_evaluation
        from trainer.reporting.report import write_report
        from trainer.run import CONFIG, SWEEP

        other = None if against is None else per_target_of(str(against), split, experiment.storage)
        if other is not None:
            read_per_target(other)  # before the ranking, which takes long
        with in_use(experiment.storage):
            prepared = self.data or prepare(experiment, self.say)
            report, saved = evaluate(
                bundle,
                prepared.dataset,
                split,
                experiment.evaluation,
                experiment.cluster,
                self.say,
                experiment.search.unblended(),
                floors_of(experiment),
            )
        self.say(f"saved: {saved.directory}")
        run = bundle.parent
        if (run / CONFIG).exists() and not (run / SWEEP).exists():  # a sweep has a report of its own
            self.say(f"report: {write_report(experiment, run, prepared)}")
            add_evaluation(experiment, run, report, self.say)
        difference = None if other is None else compare(saved.per_target, other)
        return Evaluation(report, saved.directory, standing(report.metrics, report.differences), difference)

    def recommender(self, version: int | str | None = None, device: str = "cpu") -> Recommender:
        """What was trained, opened.

        Args:
            version: its number, or "latest"; None: what is promoted.
        """
        return load(self.model.version("" if version is None else str(version)).bundle, device=device)

    def histories(self) -> Histories:
        """What users did, by user id; prepares the data if need be."""
        return histories(self)

    def _conclude(self, version: Version, promote: bool) -> None:
        from deploy.models import conclude

        conclude(version, promote, self.say)


def _path(place: str | Path | None) -> Path | None:
    return None if place is None else Path(place).expanduser()


def _values(given: Value | Sequence[Value]) -> Sequence[Value]:
    return [given] if isinstance(given, str | int | float) else given


def main() -> NoReturn:
    """Run the command line."""
    from deploy.commands.command_line import main as run

    run()


if __name__ == "__main__":
    main()

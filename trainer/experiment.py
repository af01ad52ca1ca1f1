"""The experiment: one YAML file that holds everything a run needs. Nothing heavy is imported here."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from objectives.config import ILRecConfig, ObjectiveConfig, needs_rewards
from recommender.collaborative.config import SASRecConfig
from recommender.config import (
    PRESETS,
    BackboneConfig,
    CustomClass,
    IdentifierConfig,
    PresetBackbone,
    PromptConfig,
    SearchConfig,
    StrictModel,
)
from recommender.errors import UserError
from recommender.models import Model, find_bundle
from service.config import ServingConfig
from trainer.config import (
    ClusterConfig,
    CollaborativeBundle,
    EvaluationConfig,
    LanguageModelConfig,
    RecommenderConfig,
    RewardConfig,
    TrackingConfig,
    TrainingConfig,
)
from trainer.data.config import DataConfig
from trainer.parts import PARTS
from trainer.sweep_config import SweepConfig
from trainer.world.config import WorldConfig

Config = TypeVar("Config", bound=BaseModel)

_TAKEN = (PARTS, "collaborative")  # directories of a storage
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


class Experiment(StrictModel):
    """One experiment: data, model, objective, training, evaluation, serving."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="Names the model that is trained; its versions lie in <storage>/<name>.",
    )
    world: WorldConfig | None = Field(None, description="Simulate this world first and use it as data.")
    data: DataConfig | None = Field(None, description="Interactions and items. Left out only where `world` is given.")
    recommender: RecommenderConfig = Field(
        LanguageModelConfig(),
        description="What is trained: a language model; or, on the same data under the same protocol, a collaborative "
        "model, an item-to-item count (itemknn) or the cosine of titles (tfidf), to which `identifier`, `prompt`, "
        "`backbone`, `init_from`, `objective`, `training`, `search` and "
        "`collaborative` do not apply.",
    )
    identifier: IdentifierConfig = IdentifierConfig()
    prompt: PromptConfig = PromptConfig()
    backbone: BackboneConfig = PresetBackbone()
    init_from: str | None = Field(
        None, description="The model whose weights training starts from: its name, name@version, or a bundle's path."
    )
    objective: ObjectiveConfig = ILRecConfig()
    collaborative: RewardConfig | None = Field(
        SASRecConfig(),
        description="The collaborative model that the objective takes rewards from, if it needs "
        "one: its config (it is trained once for the data and reused), or {kind: bundle, path: …}.",
    )
    training: TrainingConfig = TrainingConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    search: SearchConfig = SearchConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sweep: SweepConfig | None = Field(None, description="What `ilrec tune` tries; other verbs do not read it.")
    serving: ServingConfig = ServingConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> Experiment:
        if self.name in _TAKEN:
            raise ValueError(f"name: {self.name} is the name of a directory that all models share; choose another one")
        if (self.world is None) == (self.data is None):
            raise ValueError("give either `data` (your files) or `world` (a simulated one)")
        if not isinstance(self.recommender, LanguageModelConfig):
            return self
        if self.collaborative is None and needs_rewards(self.objective):
            raise ValueError(
                "objective.crr_weight > 0 takes rewards from a collaborative model, and collaborative is null: leave "
                "it out for the default SASRec, name one ({kind: sasrec}, {kind: bundle, path: …}), or set crr_weight "
                "to 0"
            )
        preset = self.backbone if isinstance(self.backbone, PresetBackbone) and self.init_from is None else None
        if preset is not None and isinstance(self.objective, ILRecConfig):
            self.objective.intermediate_layers(PRESETS[preset.size].layers)
        if isinstance(self.backbone, PresetBackbone) and self.backbone.lora is not None and self.init_from is None:
            raise ValueError(
                "backbone.lora: adapters on a preset with fresh weights need `init_from`; or leave lora out"
            )
        if self.identifier.kind == "item" and self.backbone.lora is not None and self.init_from is None:
            raise ValueError(
                "backbone.lora: identifier.kind: item adds a token for each item, whose vectors adapters do not train; "
                "leave lora out, or start from a model that has them (init_from)"
            )
        return self

    @property
    def storage(self) -> Path:
        """Where models lie (local storage)."""
        return Path(self.cluster.storage).expanduser().absolute()

    @property
    def parts(self) -> Path:
        """Where what the runs of a storage share lies."""
        return self.storage / PARTS

    @property
    def model(self) -> Model:
        """The model that is trained, with the versions that there are."""
        return Model(self.storage, self.name)

    def located(self) -> Experiment:
        """With the paths of bundles where it names models, so that workers, which run elsewhere, find them.

        Raises:
            UserError: there is no such model.
        """
        found: dict[str, Any] = {}
        if self.init_from is not None:
            found["init_from"] = str(_bundle("init_from", self.init_from, self.storage))
        if isinstance(self.collaborative, CollaborativeBundle):
            path = str(_bundle("collaborative.path", self.collaborative.path, self.storage))
            found["collaborative"] = self.collaborative.model_copy(update={"path": path})
        return self.model_copy(update=found)


def custom_classes(experiment: Experiment) -> list[tuple[str, CustomClass]]:
    """The classes of the user's that an experiment names, with their fields."""
    named = [("objective", experiment.objective), ("prompt.template", experiment.prompt.template)]
    return [(field, each) for field, each in named if isinstance(each, CustomClass)]


def _bundle(field: str, reference: str, storage: Path) -> Path:
    try:
        return find_bundle(reference, storage)
    except UserError as error:
        raise UserError(f"{field}: {error}") from None


Overrides = Mapping[str, Any] | Sequence[str]  # {"training.epochs": 3} or ["training.epochs=3"]


def load_experiment(source: str | Path | Mapping[str, Any], overrides: Overrides = ()) -> Experiment:
    """Read an experiment, from a file or from what such a file holds, and validate it.

    Raises:
        UserError: names the file, the field and the remedy.
    """
    name = "experiment" if isinstance(source, Mapping) else str(source)
    return _validated(Experiment, read_values(source, overrides), name)


def read_values(source: str | Path | Mapping[str, Any], overrides: Overrides = ()) -> dict[str, Any]:
    """An experiment as its file gives it, not validated: `${VAR}` and `${VAR:-default}` expanded, overrides applied.

    Raises:
        UserError: the file, a variable or an override cannot be read.
    """
    if isinstance(source, Mapping):
        values, source = deepcopy(dict(source)), Path("experiment")
    else:
        source = Path(source)
        values = _read(source)
    if isinstance(overrides, Mapping):
        for path, value in overrides.items():
            _put(values, path.split("."), value)
    else:
        for override in overrides:
            _override(values, override)
    return {key: _expanded(value, source) for key, value in values.items()}


def _read(source: Path) -> dict[str, Any]:
    try:
        text = source.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{source}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read: {error}") from None
    try:
        values = yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{source}: holds no experiment; it should open with `name: …`")
    return values


def with_fields(experiment: Experiment, fields: Mapping[str, Any]) -> Experiment:
    """A copy in which some fields, given by path, have other values: {"objective.beta": 0.2}.

    Raises:
        UserError: what comes out is no valid experiment; names the fields.
    """
    values = experiment.model_dump(mode="json")
    for path, value in fields.items():
        _put(values, path.split("."), value)
    return _validated(Experiment, values, ", ".join(f"{path}={value!r}" for path, value in fields.items()))


class _Loader(yaml.SafeLoader):
    """YAML as the safe loader reads it, but a key that stands there twice is refused: the first would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands here twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def load_world(overrides: Sequence[str]) -> WorldConfig:
    """The default world with `field=value` overrides."""
    values: dict[str, Any] = {}
    for override in overrides:
        _override(values, override)
    return _validated(WorldConfig, values, "world")


def _validated(model: type[Config], values: dict[str, Any], source: str) -> Config:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = "\n".join(_explain(item, model) for item in error.errors() if not _is_of_another_kind(item))
        raise UserError(f"{source}:\n{lines}") from None
    except UserError as error:  # of a validator
        raise UserError(f"{source}: {error}") from None


def _is_of_another_kind(error: Any) -> bool:
    """Where a word or a section may stand, pydantic also says why what is given is not the other one."""
    if error["type"] == "literal_error":
        return isinstance(error["input"], dict)
    return error["type"] == "model_type" and CustomClass.__name__ in error["loc"]


def _expanded(value: Any, source: Path) -> Any:
    """`value` with the variables in all its strings filled in."""
    if isinstance(value, str):
        return _VARIABLE.sub(lambda match: _variable(match, source), value)
    if isinstance(value, dict):
        return {key: _expanded(each, source) for key, each in value.items()}
    if isinstance(value, list):
        return [_expanded(each, source) for each in value]
    return value


def _variable(match: re.Match[str], source: Path) -> str:
    name, default = match.groups()
    value = os.environ.get(name, default)
    if value is None:
        raise UserError(f"{source}: the environment variable {name} is not set; set it, or write ${{{name}:-default}}")
    return value


def _override(values: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UserError(f"--set {override}: write it as section.field=value, e.g. --set training.epochs=3")
    try:
        _put(values, keys, yaml.safe_load(value))
    except yaml.YAMLError:
        raise UserError(f"--set {override}: {value!r} is not a YAML value") from None


def _put(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[keys[-1]] = value


def _explain(error: Any, model: type[BaseModel]) -> str:
    """One line for a validation error: the field, what is wrong and, for a misspelt key, what may have been meant."""
    parts = [part for part in map(str, error["loc"]) if "[" not in part and not part.startswith("constrained-")]
    path = [part for part in parts if part != CustomClass.__name__]
    field = ".".join(path)
    if error["type"] == "union_tag_not_found":
        tag = error["ctx"]["discriminator"].strip("'")
        tags = [get_args(member.model_fields[tag].annotation)[0] for member in _models_at(model, path)]
        return f"  {field}: say which {tag}: {' or '.join(tags)} (given: {_shown(error['input'])})"
    if error["type"] != "extra_forbidden":
        return (
            f"  {field or 'experiment'}: {error['msg'].removeprefix('Value error, ')} (given: {_shown(error['input'])})"
        )
    fields = [field for member in _models_at(model, path[:-1]) for field in member.model_fields.items()]
    known = [field.alias or name for name, field in fields]
    close = difflib.get_close_matches(path[-1], known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(sorted(known))}"
    return f"  {field}: unknown field; {hint}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _models_at(root: type[BaseModel], path: list[str]) -> list[type[BaseModel]]:
    """The model that `path` leads to; all members where a union stands."""
    models = [root]
    for part in path:
        found = [
            m for model in models if part in model.model_fields for m in _models(model.model_fields[part].annotation)
        ]
        tagged = [m for m in models if any(part in get_args(f.annotation) for f in m.model_fields.values())]
        models = found or tagged or models  # a union's tag is no field: it tells which member is meant
    return models


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]

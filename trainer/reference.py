"""The configuration reference: type, default and meaning of every field of an experiment, as a page of Markdown.

All of it is read from the config models, so the page says what the program does. Nothing heavy is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from trainer.experiment import Experiment

INTRODUCTION = """# Configuration reference

Every field of an experiment's YAML file. `--set training.epochs=3` overrides any of them on the command line, and a
misspelt field is refused. Where a section comes in several kinds, each kind has its own heading. The default `{}` of a
section stands for the defaults of its fields.

`ilrec schema --readable` prints this page, and `make docs` writes it anew. Do not edit it by hand: the texts are the
descriptions in the config models. `ilrec schema` prints the same as a JSON schema, for editors.
"""


@dataclass(frozen=True)
class Row:
    """One field: its path in the file, and what there is to say about it, as Markdown."""

    path: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Section:
    """A heading with a paragraph and the fields below it."""

    title: str
    level: int
    text: str
    rows: tuple[Row, ...] = ()


def sections(experiment: type[BaseModel] = Experiment) -> list[Section]:
    """The overview, then each section of the experiment, then each kind of a section that has several."""
    overview = Section("The file", 2, "The sections and the two fields that stand outside them.", _rows(experiment))
    found, shown = [overview], dict[type[BaseModel], str]()
    for name, field in experiment.model_fields.items():
        found += _sections(name, field, 2, shown)
    return found


def markdown(found: list[Section]) -> str:
    """The page."""
    return "\n".join([INTRODUCTION, *map(_section, found)]).rstrip()


def _sections(path: str, field: FieldInfo, level: int, shown: dict[type[BaseModel], str]) -> Iterator[Section]:
    """The section of a field that holds a config; `shown` has the headings of the kinds that were printed before."""
    models = list(_models(field.annotation))
    if len(models) == 1:
        default = field.default if isinstance(field.default, BaseModel) else None
        yield Section(path, level, _meaning(field), _rows(models[0], f"{path}.", default, deep=True))
        yield from _unions_within(models[0], path, level + 1, shown)
    elif models:
        yield Section(path, level, _meaning(field))
        for model in models:
            title, text = f"{path}: {_shortest(model)}", _doc(model)
            if model in shown:
                yield Section(title, level + 1, f"{text} Its fields are those of {_link(shown[model])}.")
                continue
            shown[model] = title
            each = f"{path}.<path>." if _is_by_name(field.annotation) else f"{path}."
            yield Section(title, level + 1, text, _rows(model, each, deep=True))
            yield from _unions_within(model, path, level + 2, shown)


def _unions_within(model: type[BaseModel], path: str, level: int, shown: dict[type[BaseModel], str]) -> list[Section]:
    return [
        section
        for name, field in model.model_fields.items()
        if len(list(_models(field.annotation))) > 1
        for section in _sections(f"{path}.{name}", field, level, shown)
    ]


def _rows(
    model: type[BaseModel], prefix: str = "", default: BaseModel | None = None, deep: bool = False
) -> tuple[Row, ...]:
    """The fields of `model`; with `deep`, those of the configs that they hold follow them. `default` is what the field
    above holds when nothing is given: its values are the defaults here."""
    schema = model.model_json_schema()
    rows: list[Row] = []
    for name, field in sorted(model.model_fields.items(), key=lambda item: item[0] != _tag(model)):
        value = field.get_default(call_default_factory=True) if default is None else getattr(default, name)
        written = "required" if value is PydanticUndefined and name != _tag(model) else f"`{_default(field, value)}`"
        name = field.alias or name
        kind = _type(schema["properties"][name], schema)
        if not deep and kind.startswith("section"):
            kind = kind.replace("section", f"[section](#{name})", 1)
        rows.append(Row(prefix + name, kind, written, _meaning(field)))
        inner = list(_models(field.annotation))
        if deep and len(inner) == 1:
            rows += _rows(inner[0], f"{prefix}{name}.", value if isinstance(value, BaseModel) else None, deep)
    return tuple(rows)


def _default(field: FieldInfo, value: Any) -> str:
    """One line of YAML; of a config, the fields that differ from what their own tables say, and its kind."""
    if isinstance(value, BaseModel):
        return _shortest(type(value), value.model_dump(mode="json", exclude_defaults=True))
    return _yaml(_only_value(field) if value is PydanticUndefined else value)


def _shortest(model: type[BaseModel], values: dict[str, Any] | None = None) -> str:
    tag = _tag(model)
    return _yaml(({tag: _only_value(model.model_fields[tag])} if tag else {}) | (values or {}))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The configs that an annotation names, in its order."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _is_by_name(annotation: Any) -> bool:
    """Whether the configs that an annotation names are values of a dictionary."""
    return any(get_origin(each) is dict for each in (annotation, *get_args(annotation)))


def _tag(model: type[BaseModel]) -> str | None:
    """The field whose only value tells which kind of config this is, if there is one."""
    return next((name for name, field in model.model_fields.items() if _only_value(field) is not None), None)


def _only_value(field: FieldInfo) -> Any:
    values = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    return values[0] if len(values) == 1 else None


def _meaning(field: FieldInfo) -> str:
    """The field's description; without one, what its config says of itself, or that it names the kind."""
    models = list(_models(field.annotation))
    said = field.description or (_doc(models[0]) if len(models) == 1 else "")
    if len(models) > 1:
        said += f" One of {', '.join(f'`{_shortest(model)}`' for model in models)}."
    return said.strip() or ("Names the kind." if _only_value(field) is not None else "")


def _doc(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split())


def _type(schema: dict[str, Any], root: dict[str, Any]) -> str:
    """A JSON schema in words, `integer ≥ 1 or null`; `root` holds the definitions that it refers to."""
    *others, last = _alternatives(schema, root)
    return f"{', '.join(others)} or {last}" if others else last


def _alternatives(schema: dict[str, Any], root: dict[str, Any]) -> list[str]:
    if "anyOf" in schema:
        return [name for each in schema["anyOf"] for name in _alternatives(each, root)]
    if "const" in schema or "enum" in schema:
        return [f"`{_yaml(value)}`" for value in schema.get("enum", [schema.get("const")])]
    if "$ref" in schema:
        return _alternatives(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "properties" in schema or "oneOf" in schema:
        return ["section"]
    if "prefixItems" in schema:
        return [
            f"list of {len(schema['prefixItems'])}: {', '.join(_type(each, root) for each in schema['prefixItems'])}"
        ]
    if schema.get("type") == "array":
        return [f"list of {_type(schema['items'], root)}"]
    if "additionalProperties" in schema:
        values = schema["additionalProperties"]  # True: of any kind
        return [f"map from text to {_type({} if values is True else values, root)}"]
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[bound]:.15g}" for bound, sign in signs.items() if bound in schema]
    words = {"string": "text", "boolean": "true or false", "null": "`null`"}
    kind = schema.get("type", "any value")
    return [f"{words.get(kind, kind)} {', '.join(bounds)}".strip()]


def _link(title: str) -> str:
    """To the heading `title` of this page."""
    return f"[`{title}`](#{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')})"


def _yaml(value: Any) -> str:
    """A value as one line of YAML."""
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, sort_keys=False, width=10**6)
    return text.removesuffix("...\n").strip()


def _section(section: Section) -> str:
    lines = [f"{'#' * section.level} `{section.title}`" if section.level > 2 else f"## {section.title}", ""]
    lines += [_escaped(section.text), ""] if section.text else []
    if section.rows:
        lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
        cells = ((f"`{row.path}`", row.type, row.default, _escaped(row.meaning)) for row in section.rows)
        lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells] + [""]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """`<` and `>` outside of code, which Markdown would take for HTML."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else part.replace("<", "&lt;").replace(">", "&gt;") for part in parts)

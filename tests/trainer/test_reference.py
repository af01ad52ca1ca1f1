"""The configuration reference: nothing missing, nothing wrong, and the page in docs/ is what the program prints."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import Field
from typer.testing import CliRunner

from deploy.commands.command_line import app
from recommender.config import StrictModel
from trainer.experiment import Experiment
from trainer.reference import Section, markdown, sections

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
SECTIONS = sections()

# What a kind's config needs besides its kind.
NEEDED: dict[str, dict[str, Any]] = {
    "data: {format: interactions}": {"interactions": "a.csv", "items": "b.csv"},
    "data: {format: windows}": {"train": "a.csv", "validation": "b.csv", "test": "c.csv", "items": "d.csv"},
    "backbone: {kind: pretrained}": {"path": "a"},
    "collaborative: {kind: bundle}": {"path": "a"},
    "objective: {kind: custom}": {"class": "a:A"},
}


def test_the_page_is_what_the_command_prints() -> None:
    printed = CliRunner().invoke(app, ["schema", "--readable"]).stdout
    assert printed == PAGE.read_text(encoding="utf-8"), (
        "docs/configuration.md is out of date; renew it: ilrec schema --readable > docs/configuration.md"
    )


def test_every_field_has_a_meaning() -> None:
    assert not [row.path for section in SECTIONS for row in section.rows if not row.meaning]


def test_every_field_is_shown_also_those_of_nested_kinds() -> None:
    """The same paths as the JSON schema leads to, but for collaborative models, whose fields stand under `recommender`,
    and for the priors of the endpoint's search, which stand under `search`."""
    shown = {row.path for section in SECTIONS for row in section.rows}
    schema = Experiment.model_json_schema()
    expected = set(_paths(schema, schema, ""))
    assert {"objective.crr_items", "sweep.parameters.<path>.low", "serving.search.width"} <= expected
    assert shown <= expected
    missing = expected - shown
    elsewhere = {"collaborative.": "recommender.", "serving.search.priors.": "search.priors."}
    assert all(path.startswith(tuple(elsewhere)) for path in missing)
    for here, there in elsewhere.items():
        assert {path.replace(here, there) for path in missing if path.startswith(here)} <= shown
    assert {section.title for section in SECTIONS if section.title.startswith("collaborative: ")} == {
        f"collaborative: {{kind: {kind}}}"
        for kind in ("sasrec", "esasrec", "gru4rec", "bert4rec", "caser", "bpr", "bundle")
    }


def _paths(schema: dict[str, Any], root: dict[str, Any], path: str) -> list[str]:
    """Of all fields below a JSON schema."""
    if "$ref" in schema:
        return _paths(root["$defs"][schema["$ref"].rpartition("/")[2]], root, path)
    found = [each for part in ("anyOf", "oneOf") for each in schema.get(part, [])]
    paths = [below for each in found for below in _paths(each, root, path)]
    for by_name in (schema.get("additionalProperties"), *schema.get("patternProperties", {}).values()):
        if isinstance(by_name, dict):
            paths += _paths(by_name, root, f"{path}<path>.")
    for name, field in schema.get("properties", {}).items():
        paths += [f"{path}{name}", *_paths(field, root, f"{path}{name}.")]
    return paths


@pytest.mark.parametrize(
    "section", [s for s in SECTIONS if s.rows and "<path>" not in s.rows[0].path], ids=lambda section: section.title
)
def test_defaults_are_those_of_a_config_that_names_nothing(section: Section) -> None:
    needed = NEEDED.get(section.title, {})
    kind = yaml.safe_load(section.title) if ": " in section.title else {}  # the heading of a kind is its YAML
    given = (
        {"name": "a"} | ({} if "data" in kind else {"world": {}}) | {name: tag | needed for name, tag in kind.items()}
    )
    values = Experiment.model_validate(given).model_dump(mode="json")
    for row in section.rows:
        *above, name = row.path.split(".")
        holder = reduce(lambda config, part: config and config[part], above, values)
        if not isinstance(holder, dict) or row.path == "world":
            continue  # of a section that is null, or a word, by default
        if row.default == "required":
            assert name in needed or name == "name"
            continue
        default = yaml.safe_load(row.default.strip("`"))
        if isinstance(default, dict):
            assert default.items() <= holder[name].items(), row
        else:
            assert default == holder[name], row


def test_a_section_that_overrides_its_config_shows_its_own_defaults() -> None:
    class Inner(StrictModel):
        """What holds."""

        size: int = Field(1, ge=1, description="How many | of <them>.")
        way: str | None = None

    class Outer(StrictModel):
        """An outer config."""

        inner: Inner = Inner(size=2)

    overview, inner = sections(Outer)
    assert overview.rows[0].default == "`{size: 2}`"
    assert [(row.path, row.type, row.default) for row in inner.rows] == [
        ("inner.size", "integer ≥ 1", "`2`"),
        ("inner.way", "text or `null`", "`null`"),
    ]
    assert not inner.rows[1].meaning
    assert "How many \\| of &lt;them&gt;." in markdown([inner])

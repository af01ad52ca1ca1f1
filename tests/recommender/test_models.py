"""Models by name: which version is meant, promoted, gone back to; adapters' bases wherever they were moved to."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from recommender.bundle import MANIFEST, Manifest, read_manifest, write_bundle
from recommender.errors import UserError
from recommender.files import new_directory, read_json, write_json
from recommender.models import Model, base_of, find_bundle, find_models


def export(bundle: Path, content: str = "weights", base: dict[str, str] | None = None) -> Path:
    def weights(directory: Path) -> None:
        (directory / ("adapter.safetensors" if base else "model.safetensors")).write_text(content)

    write_bundle(bundle, Manifest(name="shop", base=base or {}), weights)
    return bundle


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """Three versions, of which the second has no bundle yet."""
    model = Model(tmp_path / "runs", "shop")
    for number in (1, 2, 3):
        version = model.begin()
        if number != 2:
            export(version.bundle, f"weights {number}")
    return model


def test_a_name_means_what_is_promoted(model: Model) -> None:
    assert [version.number for version in model.complete] == [1, 3]
    assert str(model.promoted) == "shop@1"  # the first, until somebody promotes
    assert find_bundle("shop", model.storage) == model.home / "1" / "bundle"
    assert find_bundle("shop@latest", model.storage) == find_bundle("shop@3", model.storage)
    model.promote(model.version("3"))
    model.promote(model.version("3"))
    assert find_bundle("shop", model.storage) == model.home / "3" / "bundle"
    assert [(event.action, event.version) for event in model.events] == [("first", 1), ("promote", 3)]


def test_a_run_that_ends_late_does_not_take_the_name(model: Model) -> None:
    """Version 2 was begun before version 3, and goes on after somebody has come to use that."""
    for version in ("1", "3"):
        path = model.home / version / "bundle" / MANIFEST
        write_json(path, read_json(path) | {"exported_at": f"2026-01-0{version}T00:00:00+00:00"})
    shutil.rmtree(model.home / "1")
    assert str(model.promoted) == "shop@3"
    export(model.home / "2" / "bundle")
    assert str(model.promoted) == "shop@3"


def test_rollbacks_go_further_back_each_time(model: Model) -> None:
    for _ in range(3):
        export(model.begin().bundle)
    for number in ("3", "5", "4"):
        model.promote(model.version(number))
    assert [model.rollback().number for _ in range(3)] == [5, 3, 1]
    with pytest.raises(UserError, match="nothing was promoted before"):
        model.rollback()
    model.promote(model.version("6"))
    assert model.rollback().number == 1


def test_a_rollback_passes_over_what_was_pruned(model: Model) -> None:
    export(model.begin().bundle)
    model.promote(model.version("3"))
    model.promote(model.version("4"))
    assert str(model.before) == "shop@3"
    shutil.rmtree(model.home / "3")
    assert str(model.before) == str(model.rollback()) == "shop@1"


def test_what_is_damaged_is_not_promoted(model: Model) -> None:
    (model.home / "3" / "bundle" / "model.safetensors").write_text("other weights")
    with pytest.raises(UserError, match="differs from its checksum"):
        model.promote(model.version("3"))
    assert str(model.promoted) == "shop@1"
    (model.home / "model.json").write_text("{")
    with pytest.raises(UserError, match=r"model\.json: damaged"):
        model.promoted  # noqa: B018


def test_a_reference_may_be_a_path(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = model.home / "3" / "bundle"
    for path in (bundle, bundle.parent):
        assert find_bundle(path, tmp_path) == bundle
    assert find_bundle(model.home, tmp_path) == model.home / "1" / "bundle"
    assert find_bundle(f"{model.home}@3", tmp_path) == bundle
    monkeypatch.chdir(model.storage)
    assert find_bundle("./shop/3") == bundle
    monkeypatch.setenv("ILREC_STORAGE", str(model.storage))
    monkeypatch.chdir(tmp_path)
    assert find_bundle("shop@3") == bundle
    (tmp_path / "shop").mkdir()  # a name comes before a directory of that name
    assert find_bundle("shop@3") == bundle


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("shop@2", r"shop@2: there is no such version; there are shop@1, shop@3"),
        ("shpo", r"shpo: no model of this name in .*; there are: shop\. Give a name, name@version, or a path"),
        ("./nowhere", r"\./nowhere: no bundle \(no recommender\.json\), nor a model's directory"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(model: Model, reference: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        find_bundle(reference, model.storage)


def test_models_are_found_with_those_of_two_parts(model: Model) -> None:
    export(Model(model.storage, "collaborative/sasrec-1").begin().bundle)
    (model.storage / "parts" / "datasets" / "1").mkdir(parents=True)
    assert [each.name for each in find_models(model.storage)] == ["collaborative/sasrec-1", "shop"]
    assert find_bundle("collaborative/sasrec-1", model.storage).parent.name == "1"


def test_an_adapter_finds_its_base_by_what_is_in_it(model: Model, tmp_path: Path) -> None:
    base = model.home / "3" / "bundle"
    weights = read_manifest(base).weights
    adapter = export(Model(model.storage, "lora").begin().bundle, base=weights)
    assert base_of(adapter, str(base)) == str(base)
    assert base_of(adapter, str(model.home / "1" / "bundle")) == str(base)  # there now, but of other weights
    moved = Path(shutil.move(model.storage, tmp_path / "elsewhere"))
    adapter = moved / "lora" / "1" / "bundle"
    assert base_of(adapter, str(base)) == str(moved / "shop" / "3" / "bundle")
    shutil.rmtree(moved / "shop" / "3")
    with pytest.raises(UserError, match=r"the bundle under its adapter, once .*, is not there any more"):
        base_of(adapter, str(base))
    assert base_of(export(tmp_path / "plain"), "a/hub-name") == "a/hub-name"


def test_a_bundle_is_never_written_over_something(model: Model, tmp_path: Path) -> None:
    for taken in (model.home / "1" / "bundle", tmp_path):
        before = sorted(path.name for path in taken.iterdir())
        with pytest.raises(UserError, match="is there already, and is left as it is"):
            export(taken)
        assert sorted(path.name for path in taken.iterdir()) == before


def test_a_manifest_names_its_content(model: Model, tmp_path: Path) -> None:
    first, third = (read_manifest(model.home / number / "bundle") for number in "13")
    copy = read_manifest(export(tmp_path / "copy", "weights 1"))
    assert first.checksum == copy.checksum != third.checksum
    assert first.exported_at.endswith("+00:00")


def test_versions_of_two_commands_that_begin_together_differ(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "versions", property(lambda self: []))  # as if neither saw the other's
    assert [model.begin().number for _ in range(2)] == [4, 5]


def test_files_are_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        write_json(path, {"a": 2})
    monkeypatch.undo()
    assert read_json(path) == {"a": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]
    with suppress(KeyboardInterrupt), new_directory(tmp_path / "new") as aside:
        (aside / "file").write_text("x")
        raise KeyboardInterrupt
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]


def test_the_events_are_plain_json(model: Model) -> None:
    model.promote(model.version("3"))
    assert json.loads((model.home / "model.json").read_text())["events"][-1]["version"] == 3
    assert (model.home / "3" / "bundle" / MANIFEST).exists()

"""The recipes that come with the package: they parse, and explain every key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.recipe.yaml_file import read_document
from mtl_lora_cli.resources import bundled

RECIPES = sorted(bundled("recipes").glob("**/*.yaml"))


@pytest.fixture(autouse=True)
def _data_folder_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTL_LORA_DATA", "data")


def unexplained_keys(path: Path) -> list[str]:
    """Keys without a comment in the line above; each is to be explained where it stands first.

    A section (a key with keys below it) is explained by what stands in it.
    """
    lines = ["", *path.read_text(encoding="utf-8").splitlines()]
    document = read_document(path)
    seen: set[str] = set()
    missing = []
    sections = {key[:end] for key in document.lines for end in range(1, len(key))}
    for key, line in sorted(document.lines.items(), key=lambda item: item[1]):
        if not key or key in sections or key[-1].isdigit():
            continue
        name = ".".join(part for part in key if not part.isdigit())
        if name not in seen and not lines[line - 1].lstrip().startswith("#"):
            missing.append(f"{path.name}:{line}: {name}")
        seen.add(name)
    return missing


def test_there_are_recipes() -> None:
    assert "real-small" in {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_parses(path: Path) -> None:
    loaded = load_recipe(path)
    assert len({task.name for task in loaded.recipe.tasks}) == len(loaded.recipe.tasks) >= 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_explains_itself(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# "), "the first line says what the recipe is for"
    assert unexplained_keys(path) == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_names_no_place_on_anyones_disk(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w}.~])/(?:\w+/)+|/home/|~/", re.sub(r"https?://\S+", "", text))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_its_templates_are_there(path: Path) -> None:
    from mtl_lora_cli.tasks.registry import find_template

    for task in load_recipe(path).recipe.tasks:
        find_template(task.template, path.parent)


def test_the_check_of_comments_sees_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "# why\na: 1\nb: 2\nsection:\n  # why\n  c: 1\n  d: 2\n"
        "tasks:\n  # why\n  - name: x\n    # why\n    e: 1\n  - name: y\n    e: 2\n    f: 3\n",
        encoding="utf-8",
    )
    assert unexplained_keys(path) == ["r.yaml:3: b", "r.yaml:7: section.d", "r.yaml:15: tasks.f"]

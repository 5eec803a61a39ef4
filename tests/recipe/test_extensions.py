"""Python files that a recipe names: run once, before its keys are checked, or one line with file and line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.extensions import load_extensions, load_named_extensions
from mtl_lora_cli.recipe.load import dump_recipe, load_extensions_of, load_recipe
from mtl_lora_cli.recipe.schema import Recipe

TASKS = "tasks: [{name: a, template: glue/rte}]\n"
MARK = "import os\nos.environ['MARK'] = os.environ.get('MARK', '') + '{}'\n"


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARK", "")


def recipe_with(folder: Path, text: str, name: str = "own.py") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    path = folder / "recipe.yaml"
    path.write_text(f"extensions: [{name}]\n{TASKS}")
    return path


def test_a_file_runs_once_and_the_recipe_keeps_where_it_lies(tmp_path: Path) -> None:
    path = recipe_with(tmp_path / "a", MARK.format("x"))
    recipe = load_recipe(path).recipe
    assert recipe.extensions == [str((tmp_path / "a" / "own.py").resolve())]
    kept = tmp_path / "kept.yaml"
    kept.write_text(dump_recipe(recipe))
    assert load_recipe(kept).recipe == recipe
    load_extensions_of(kept)
    assert os.environ["MARK"] == "x"


def test_processes_that_are_started_know_it(tmp_path: Path) -> None:
    load_recipe(recipe_with(tmp_path, MARK.format("x")))
    code = "from mtl_lora_cli import extensions as e; e.load_named_extensions(); print(e._run)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert str(tmp_path / "own.py") in done.stdout
    load_named_extensions()
    assert os.environ["MARK"] == "x", "it ran here already"


def test_an_heir_has_those_of_its_run_and_its_own(tmp_path: Path) -> None:
    first = load_recipe(recipe_with(tmp_path / "a", MARK.format("x"))).recipe
    second = recipe_with(tmp_path / "b", MARK.format("y"))
    heir = load_recipe(second, heir_of=Recipe.model_validate(first.model_dump())).recipe
    assert heir.extensions == [str(tmp_path / one / "own.py") for one in "ab"]
    assert os.environ["MARK"] == "xy"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("import os\n\nos.nothing()\n", "own.py:3: AttributeError: module 'os' has no attribute"),
        ("def f(:\n    pass\n", "own.py:1: SyntaxError: "),
        ("def f():\n    raise ValueError('no')\n\n\nf()\n", "own.py:2: ValueError: no"),
        ("import json\njson.loads('{')\n", "own.py:2: JSONDecodeError: "),
        ("raise SystemExit('bye')\n", "own.py:1: SystemExit: bye"),
    ],
)
def test_a_file_that_fails_is_one_line(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(recipe_with(tmp_path, text))
    (said,) = caught.value.lines
    assert said.startswith(f"{tmp_path}/{line}")


def test_a_missing_file_and_one_of_another_kind(tmp_path: Path) -> None:
    path = recipe_with(tmp_path, "", "own.txt")
    with pytest.raises(UsageError, match=r"own\.txt: an extension is a Python file"):
        load_recipe(path)
    (tmp_path / "own.txt").unlink()
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    assert caught.value.lines == [f"{path}:1: extensions.0: no such file {tmp_path}/own.txt"]
    with pytest.raises(UsageError, match=r"none\.py: no such extension file"):
        load_extensions([tmp_path / "none.py"])


def test_a_run_that_was_sent_brings_no_code(tmp_path: Path) -> None:
    path = recipe_with(tmp_path, MARK.format("x"))
    (tmp_path / "tasks.json").write_text("{}")
    for read in (load_recipe, load_extensions_of):
        with pytest.raises(UsageError, match=r"own\.py lies in the run's folder, and is not run"):
            read(path)
    assert os.environ["MARK"] == ""

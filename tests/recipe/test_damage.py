"""Whatever is broken in a recipe, the answer is an error that names it, never a crash."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mtl_lora_cli.adapters.methods import every_key
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.recipe.source import SPLITS
from mtl_lora_cli.recipe.yaml_file import StrictModel

KeyPath = tuple[str | int, ...]

SWITCHES = ("clipping", "diagnose", "validation")  # keys with values of their own, or `true`
NUMBERS = ("memory_limit",)  # null here, and 3 would be of the right type
WRONG: dict[type, list[Any]] = {
    bool: ["perhaps", 3, [True]],
    int: ["three", 1.5, [1], {"a": 1}, True],
    float: ["much", [0.5], {"a": 0.5}, False],
    str: [3, 2.5, True, ["text"], {"no such key": "text"}],
    list: ["text", 3, {"a": 1}],
    dict: [3, True, ["text"]],
    type(None): ["text", 3, {"a": 1}],  # adapter.task_modules, a list where it is given
}


def _load(text: str, *overrides: str) -> list[str]:
    """The errors of a recipe; an empty list where there are none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            load_recipe(path, overrides)
        except UsageError as error:
            assert error.lines
            assert all("\n" not in line for line in error.lines)
            return [line.replace(folder, "") for line in error.lines]
        return []


def _paths(value: Any, path: KeyPath = ()) -> list[KeyPath]:
    """The path of every key below a value."""
    items: list[tuple[str | int, Any]]
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return []
    here = [(*path, key) for key, _ in items]
    return here + [deeper for key, inner in items for deeper in _paths(inner, (*path, key))]


def _parent(data: Any, path: KeyPath) -> Any:
    for part in path[:-1]:
        data = data[part]
    return data


def _spelled(path: KeyPath) -> str:
    return ".".join(map(str, path))


@settings(deadline=None)
@given(st.data())
def test_a_renamed_key_is_named(complete: str, data: st.DataObject) -> None:
    recipe = yaml.safe_load(complete)
    # Under rank_pattern stand names of layers, which only the model knows.
    keys = [p for p in _paths(recipe) if isinstance(p[-1], str) and "rank_pattern" not in p[:-1]]
    path = data.draw(st.sampled_from(keys))
    parent = _parent(recipe, path)
    wrong = data.draw(
        st.text(st.sampled_from("abcdefghijklmnopqrstuvwxyz_"), min_size=1, max_size=12)
        | st.sampled_from([f"{path[-1]}s", str(path[-1])[1:] or "x", str(path[-1]).upper()])
    )
    assume(wrong not in _known() and wrong not in ("null", "true", "false"))
    parent[wrong] = parent.pop(path[-1])
    errors = _load(yaml.safe_dump(recipe, sort_keys=False))
    named = _spelled((*path[:-1], wrong))
    assert any(f": {named}: " in line for line in errors), (named, errors)


def _known() -> set[str]:
    """Every key of the schema; one that fits elsewhere may fit here."""
    return {
        *(name for one in _below(StrictModel) for name in one.model_fields),
        *every_key(),
        *SPLITS,
    }


def _below(kind: type[StrictModel]) -> set[type[StrictModel]]:
    own = set(kind.__subclasses__())
    return own.union(*map(_below, own))


@settings(deadline=None)
@given(st.data())
def test_a_wrong_type_is_named(complete: str, data: st.DataObject) -> None:
    recipe = yaml.safe_load(complete.replace("3e-4", "0.0003"))
    path = data.draw(st.sampled_from(_paths(recipe)))
    parent = _parent(recipe, path)
    wrong = data.draw(st.sampled_from(WRONG[type(parent[path[-1]])]))
    assume(wrong is not True or path[-1] not in SWITCHES)
    assume(wrong != 3 or path[-1] not in NUMBERS)
    parent[path[-1]] = wrong
    errors = _load(yaml.safe_dump(recipe, sort_keys=False))
    named = _spelled(path)
    assert any(f": {named}: " in line or f": {named}." in line for line in errors), (named, errors)


@settings(deadline=None)
@given(st.data())
def test_a_torn_recipe_is_loaded_or_refused(complete: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(complete)))
    end = data.draw(st.integers(start, len(complete)))
    put = data.draw(st.text(max_size=8) | st.sampled_from(["[", "}", ": ", "- ", "\t", "!!int "]))
    _load(complete[:start] + put + complete[end:])


@settings(deadline=None)
@given(st.text())
@example("x: !!bool maybe")
@example("x: !!timestamp abc")
@example("x: !!int abc")
@example("? [a]\n: b")
@example("%YAML 3.0\n---\na: 1")
@example("a: &a {b: *a}")
def test_any_text_is_refused(text: str) -> None:
    assert _load(text)


@settings(deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
@example("adapter.target_modules.0.x", "1")
@example("tasks.².name", "x")
@example("tasks.first.source.path.x", "1")
@example("training.seed", "!!int abc")
@example("training", "5")
@example("tasks", "null")
def test_any_override_is_taken_or_refused(complete: str, key: str, value: str) -> None:
    _load(complete, f"{key}={value}")


@settings(deadline=None)
@given(st.data())
def test_an_override_below_any_key_is_taken_or_refused(complete: str, data: st.DataObject) -> None:
    recipe = yaml.safe_load(complete)
    path = data.draw(st.sampled_from(_paths(recipe)))
    deeper = data.draw(st.lists(st.sampled_from(["x", "0", "name", "path"]), max_size=2))
    value = data.draw(st.sampled_from(["1", "x", "[]", "{}", "null", "{a: b}", "[[1]]", "-"]))
    _load(complete, f"{_spelled((*path, *deeper))}={value}")


def test_the_undamaged_recipe_loads(complete: str) -> None:
    assert _load(complete) == []

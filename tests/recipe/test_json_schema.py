"""The JSON schema takes what a recipe may say, and refuses what it may not."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from mtl_lora_cli.errors import ProblemsError
from mtl_lora_cli.recipe.json_schema import DIALECT, json_schema
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.recipe.yaml_file import dump_yaml, parse_document
from mtl_lora_cli.resources import bundled

SCHEMA = json_schema()
RECIPES = sorted(bundled("recipes").glob("*.yaml"))
TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "integer": int,
    "number": (int, float),
}
# Every word of JSON Schema that stands in ours; another one must not be passed over here.
KNOWN = {
    "$defs", "$ref", "$schema", "additionalProperties", "anyOf", "default", "description", "enum",
    "exclusiveMaximum", "exclusiveMinimum", "const", "items", "maxItems", "maxLength", "maximum", "minItems", "minLength",
    "minimum", "oneOf", "pattern", "properties", "propertyNames", "required", "title", "type",
}  # fmt: skip


def faults(value: Any, schema: dict[str, Any], at: str = "") -> Iterator[str]:
    """Where a value breaks a schema, by the rules of draft 2020-12 for the words in KNOWN."""
    assert set(schema) <= KNOWN, set(schema) - KNOWN
    if "$ref" in schema:
        yield from faults(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], at)
    for word, least, most in (("anyOf", 1, 99), ("oneOf", 1, 1)):
        if word in schema:
            fitting = [one for one in schema[word] if not list(faults(value, one, at))]
            if not least <= len(fitting) <= most:
                yield f"{at}: {word}"
    kind = schema.get("type")
    if kind is not None:
        boolean = isinstance(value, bool)
        if not isinstance(value, TYPES[kind]) or (boolean and kind in ("integer", "number")):
            yield f"{at}: type {kind}"
            return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{at}: enum"
    if "const" in schema and value != schema["const"]:
        yield f"{at}: const"
    for word, holds in (
        ("minimum", lambda bound: value >= bound),
        ("maximum", lambda bound: value <= bound),
        ("exclusiveMinimum", lambda bound: value > bound),
        ("exclusiveMaximum", lambda bound: value < bound),
        ("maxLength", lambda bound: len(value) <= bound),
        ("minLength", lambda bound: len(value) >= bound),
        ("minItems", lambda bound: len(value) >= bound),
        ("maxItems", lambda bound: len(value) <= bound),
        ("pattern", lambda bound: re.search(bound, value)),
    ):
        if word in schema and not holds(schema[word]):
            yield f"{at}: {word}"
    if isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            yield from faults(item, schema["items"], f"{at}.{index}")
    if isinstance(value, dict):
        known = schema.get("properties", {})
        yield from (
            f"{at}: {key} is missing" for key in schema.get("required", ()) if key not in value
        )
        for key, item in value.items():
            other = schema.get("additionalProperties", True)
            if "propertyNames" in schema:
                yield from faults(str(key), schema["propertyNames"], f"{at}.{key}")
            if key in known:
                yield from faults(item, known[key], f"{at}.{key}")
            elif isinstance(other, dict):
                yield from faults(item, other, f"{at}.{key}")
            elif not other:
                yield f"{at}: unknown key {key}"


def test_it_is_plain_json_of_the_dialect() -> None:
    assert json.loads(json.dumps(SCHEMA, allow_nan=False)) == SCHEMA
    assert SCHEMA["$schema"] == DIALECT


def test_a_complete_recipe_fits(complete: str) -> None:
    assert list(faults(parse_document(complete, "").data, SCHEMA)) == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_bundled_recipes_fit(path: Path) -> None:
    assert list(faults(parse_document(path.read_text(encoding="utf-8"), "").data, SCHEMA)) == []


SHORT = {"tasks": [{"name": "a", "template": "samples/animals"}]}


def changed(key: str, value: Any) -> dict[str, Any]:
    """SHORT with one more key: `training.seed`, `tasks.0.source`."""
    recipe = deepcopy(SHORT)
    *way, last = key.split(".")
    here: Any = recipe
    for part in way:
        here = here[int(part)] if part.isdecimal() else here.setdefault(part, {})
    here[last] = value
    return recipe


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tasks.0.source", "some/path"),
        ("tasks.0.source", "sample:uses"),
        ("tasks.0.source", {"path": "x", "task_column": "t", "task_names": {"0": "a"}}),
        ("mixing", "uniform"),
        ("mixing", {"temperature": 2}),
        ("training.diagnose", True),
        ("training.validation", True),
        ("training.validation", False),
        ("training.validation", None),
        ("training.gradient_checkpointing", {"qkv": 3}),
        ("training.epochs", 3),
        ("adapter.alpha", 16),
        ("training.checkpoint_every", None),
        ("distributed.zero_stage", 3),
    ],
    ids=str,
)
def test_what_a_recipe_may_say_fits(key: str, value: Any, written: Callable[[str], Path]) -> None:
    recipe = changed(key, value)
    load_recipe(written(dump_yaml(recipe)))
    assert list(faults(recipe, SCHEMA)) == []


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("adapter.ranck", 4, ".adapter: unknown key ranck"),
        ("bass_model", "x", ": unknown key bass_model"),
        ("tasks.0.source", {"pth": "x"}, ".tasks.0.source: anyOf"),
        ("tasks.0.name", "no spaces here", ".tasks.0.name: pattern"),
        ("tasks", [], ".tasks: minItems"),
        ("mixing", "sizes", ".mixing: oneOf"),
        ("training.seed", -1, ".training.seed: minimum"),
        ("training.seed", 1.5, ".training.seed: type integer"),
        ("training.epochs", 0, ".training.epochs: exclusiveMinimum"),
        ("training.warmup", 1, ".training.warmup: exclusiveMaximum"),
        ("training.schedule", "cosin", ".training.schedule: enum"),
        ("training.validation", "yes", ".training.validation: anyOf"),
        ("adapter.rank", True, ".adapter.rank: type integer"),
        ("distributed.zero_stage", 4, ".distributed.zero_stage: maximum"),
    ],
    ids=str,
)
def test_what_a_recipe_may_not_say_does_not(
    key: str, value: Any, fault: str, written: Callable[[str], Path]
) -> None:
    recipe = changed(key, value)
    with pytest.raises(ProblemsError):
        load_recipe(written(dump_yaml(recipe)))
    assert fault in list(faults(recipe, SCHEMA))


def test_a_misspelt_key_is_refused_everywhere(complete: str) -> None:
    """One letter more in each key of the complete recipe, one after the other."""
    lines = complete.splitlines()
    count = 0
    for number, line in enumerate(lines):
        found = re.match(r"(\s*(?:- )?)([a-z_]+)(:.*)", line)
        if found is None:
            continue
        wrong = [*lines]
        wrong[number] = f"{found[1]}{found[2]}x{found[3]}"
        assert list(faults(parse_document("\n".join(wrong), "").data, SCHEMA)), line
        count += 1
    assert count > 50


def test_the_library_agrees(complete: str) -> None:
    import jsonschema

    validator = jsonschema.Draft202012Validator(SCHEMA)
    validator.check_schema(SCHEMA)
    assert validator.is_valid(parse_document(complete, "").data)
    assert not validator.is_valid(changed("adapter.ranck", 4))


def test_the_command_prints_it() -> None:
    import sys

    finished = subprocess.run(
        [sys.executable, "-m", "mtl_lora_cli.cli.main", "schema"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(finished.stdout) == SCHEMA
    assert finished.stderr == ""

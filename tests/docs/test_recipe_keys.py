"""docs/recipes.md and docs/tasks.md name every key that a recipe or a template may have, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from mtl_lora_cli.adapters.methods.base import Settings
from mtl_lora_cli.recipe.json_schema import json_schema
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.tasks.template import Each, Generation, Template

DOCS = Path(__file__).resolve().parents[2] / "docs"
# The first and third cell of a table's row whose first cell is a key: | `key` | type | `default` |
ROW = re.compile(r"^\| `([a-z0-9_.\[\]]+)` \| [^|]+ \| ([^|]+) \|", re.MULTILINE)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that a type is made of, `list[Task] | None` gives Task."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models_in(argument)]


def holds_a_list(annotation: Any) -> bool:
    return get_origin(annotation) is list or any(map(holds_a_list, get_args(annotation)))


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every key that takes a value, `training.seed`, and its default as YAML would have it."""
    if model is Settings:  # of whatever method; where they differ in a default it is null
        for name, form in json_schema()["$defs"]["Adapter"]["properties"].items():
            yield f"{prefix}{name}", spelled(form["default"])
        return
    for name, field in model.model_fields.items():
        inner = models_in(field.annotation)
        many = "[]" if holds_a_list(field.annotation) and inner else ""
        # A key that is only a heading over others, such as `training`, has no row of its own.
        heading = inner == [field.annotation] or many
        if not heading:
            yield f"{prefix}{name}", spelled(field.default)
        for one in inner:
            yield from keys_of(one, f"{prefix}{name}{many}.")


def spelled(default: Any) -> str:
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, list):
        return f"[{', '.join(default)}]"
    if isinstance(default, bool) or default is None:
        return {True: "true", False: "false", None: "null"}[default]
    return f"{default:g}" if isinstance(default, float) else str(default)


def documented(page: str, part: str | None = None) -> dict[str, str]:
    """Key to default, from the tables of a page or of one of its parts (a heading's text)."""
    text = (DOCS / page).read_text(encoding="utf-8")
    if part is not None:
        found = re.search(rf"^(#+) {re.escape(part)}\n(.*?)(?=^\1 |\Z)", text, re.M | re.S)
        assert found is not None, f"{page} has no part '{part}'"
        text = found[2]
    rows = ROW.findall(text)
    assert len(rows) == len(dict(rows)), f"a key stands twice in {page}"
    return {key: default.strip().strip("`") for key, default in rows}


def test_every_recipe_key_is_documented_with_its_default() -> None:
    assert documented("recipes.md") == dict(keys_of(Recipe))


def test_every_template_key_is_documented() -> None:
    inner = {"choices": Each, "generate": Generation}
    below = {f"{key}.{name}" for key, model in inner.items() for name in model.model_fields}
    known = {*Template.model_fields, *below}
    assert set(documented("tasks.md", "Template keys")) == known

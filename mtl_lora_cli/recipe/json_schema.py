"""The recipe's schema as JSON Schema, for editors that complete and check while one types."""

from __future__ import annotations

from typing import Any

from mtl_lora_cli.recipe.schema import Recipe

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_SWITCHES = ("diagnose", "validation")  # keys of `training` that take true and false, too


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe: keys, types, defaults, choices and bounds.

    It is pydantic's, with the short forms that validators turn into long ones before pydantic looks:
    `source: some/path`, and true or false for a switch. What depends on several keys is checked by
    `mtl-lora validate` alone.
    """
    schema = Recipe.model_json_schema()
    parts = schema["$defs"]
    long_form = dict(parts["Source"])
    parts["Source"] = {
        "anyOf": [{"type": "string"}, long_form],
        "description": long_form.pop("description"),
    }
    for name in _SWITCHES:
        parts["Training"]["properties"][name]["anyOf"].append({"type": "boolean"})
    return {"$schema": DIALECT, **schema}

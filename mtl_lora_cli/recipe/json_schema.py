"""The recipe's schema as JSON Schema, for editors that complete and check while one types."""

from __future__ import annotations

from typing import Any

from mtl_lora_cli.adapters.methods import DEFAULT, METHODS, common_keys, every_key
from mtl_lora_cli.recipe.schema import Recipe

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_SWITCHES = (
    "clipping",
    "diagnose",
    "validation",
)  # keys of `training` that take true and false, too
_BALANCED = [
    "none",
    "uncertainty",
    "gradnorm",
    "pcgrad",
]  # and what its `balance` takes in one word


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe: keys, types, defaults, choices and bounds.

    It is pydantic's, with the short forms that validators turn into long ones before pydantic looks:
    `source: some/path`, `balance: pcgrad`, and true or false for a switch. What depends on several keys is checked by
    `mtl-lora validate` alone.
    """
    schema = Recipe.model_json_schema()
    parts = schema["$defs"]
    long_form = dict(parts["Source"])
    parts["Source"] = {
        "anyOf": [{"type": "string"}, long_form],
        "description": long_form.pop("description"),
    }
    parts["Adapter"] = _adapter_schema()
    schema["properties"]["adapter"] = {"$ref": "#/$defs/Adapter"}
    for name in _SWITCHES:
        parts["Training"]["properties"][name]["anyOf"].append({"type": "boolean"})
    parts["Training"]["properties"]["balance"]["anyOf"].append({"enum": _BALANCED})
    return {"$schema": DIALECT, **schema}


def _adapter_schema() -> dict[str, Any]:
    """The keys of all methods: which of them go together, `mtl-lora validate` says."""
    forms: dict[str, list[dict[str, Any]]] = {key: [] for key in every_key()}
    for kind in METHODS.values():
        for key, form in kind.model_json_schema()["properties"].items():
            forms[key].append(form)
    properties = {key: _together(key, one) for key, one in forms.items()}
    properties["method"] = {"type": "string", "enum": list(METHODS), "default": DEFAULT}
    return {
        "description": "The method and its settings; see docs/method.md. Null is the method's default.",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _together(key: str, forms: list[dict[str, Any]]) -> dict[str, Any]:
    """What the methods that read a key take; null, too, where not all of them read it."""
    said: dict[str, Any] = {
        name: forms[0][name] for name in ("default", "description") if name in forms[0]
    }
    if any(form.get("default") != forms[0].get("default") for form in forms):
        said["default"] = None
    bare = [
        {k: v for k, v in form.items() if k not in ("default", "description")} for form in forms
    ]
    kinds = [form for place, form in enumerate(bare) if form not in bare[:place]]
    if key in common_keys():
        return {**kinds[0], **said}
    return {"anyOf": [*kinds, {"type": "null"}], **said}

"""`mtl-lora schema`."""

from __future__ import annotations

import typer

from mtl_lora_cli.cli.frame import emit_json, framed


def register(app: typer.Typer) -> None:
    app.command("schema", epilog="Example: mtl-lora schema > recipe.schema.json")(schema)


def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    with framed():
        from mtl_lora_cli.recipe.json_schema import json_schema

        emit_json(json_schema())

"""`mtl-lora validate`."""

from __future__ import annotations

from typing import Annotated

import typer

from mtl_lora_cli.cli.frame import emit, emit_json, framed, status
from mtl_lora_cli.cli.options import JsonOption
from mtl_lora_cli.cli.plan import (
    engine_lines,
    few_steps,
    findings,
    task_rows,
    tasks_table,
    tried_engine,
)


def register(app: typer.Typer) -> None:
    app.command("validate", epilog="Example: mtl-lora validate my-recipe.yaml")(validate)


def validate(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a bundled recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it: key.path=value …")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read a recipe and all its data, audit every row, try the adapter's targets, and train nothing."""
    with framed():
        from mtl_lora_cli.recipe.load import find_recipe, load_recipe

        loaded = load_recipe(find_recipe(recipe), overrides or ())
        status("loading libraries")
        from mtl_lora_cli.data.map_audit import count_maps
        from mtl_lora_cli.tasks.maps import MAPS
        from mtl_lora_cli.training.prepare import prepare
        from mtl_lora_cli.training.prepared import require_fit

        prepared = prepare(loaded)
        require_fit(prepared)
        maps = []
        if prepared.data.tasks[0].objective in MAPS:
            status("looking at every map")
            maps = count_maps(prepared.data.tasks)
        status("trying the base model")
        engine = tried_engine(prepared)
        if as_json:
            emit_json(
                {
                    "valid": True,
                    "tasks": task_rows(prepared),
                    "findings": [*findings(prepared), *few_steps(prepared)],
                    "steps": prepared.total_steps,
                    "memory": prepared.memory,
                    "engine": engine,
                }
            )
            return
        emit(tasks_table(prepared))
        for one in maps:
            for line in one.lines():
                emit(line)
        for line in few_steps(prepared):
            emit(f"note: {line}")
        for line in engine_lines(engine):
            emit(line)
        emit(f"{loaded.path} is valid")

"""`mtl-lora train`."""

from __future__ import annotations

from typing import Annotated

import typer

from mtl_lora_cli.cli.frame import emit, emit_json, framed, say, status
from mtl_lora_cli.cli.options import RUNS, JsonOption, RunOption, RunsOption
from mtl_lora_cli.cli.plan import emit_plan, tasks_table


def register(app: typer.Typer) -> None:
    app.command("train", epilog="Example: mtl-lora train quickstart training.seed=1")(train)


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe file, or the name of a bundled recipe.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it: key.path=value …")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done, and stop.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was interrupted.")
    ] = False,
    run: RunOption = None,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Train an adapter for all tasks of a recipe."""
    with framed():
        from mtl_lora_cli.errors import UsageError
        from mtl_lora_cli.recipe.load import find_recipe, load_recipe

        if resume:
            from mtl_lora_cli.runs.folder import find_run

            path = None if recipe is None else find_recipe(recipe)
            folder = find_run(run, runs)
            from mtl_lora_cli.training import run as training

            training.resume(folder, path, overrides or ())
        else:
            if recipe is None:
                raise UsageError("a recipe is missing: mtl-lora train RECIPE")
            if run is not None:
                raise UsageError("--run goes with --resume; a new run is named by run.name=NAME")
            loaded = load_recipe(find_recipe(recipe), overrides or ())
            status("loading libraries")
            from mtl_lora_cli.training import run as training

            path = training.new_run_path(loaded, runs)
            prepared = training.prepare(loaded)
            if dry_run:
                emit_plan(prepared, as_json)
                return
            folder = training.start(prepared, path, lambda: say(tasks_table(prepared)))
        if as_json:
            emit_json({"run": folder.name, "path": str(folder.path)})
        else:
            emit(f"{folder.path}")
            say(f"next: mtl-lora eval --run {folder.path} --task all")

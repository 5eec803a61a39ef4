"""`mtl-lora train`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mtl_lora_cli.cli.frame import emit, emit_json, framed, say
from mtl_lora_cli.cli.options import RUNS, JsonOption, RunOption, RunsOption

if TYPE_CHECKING:
    from mtl_lora_cli.training.run import Prepared


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
            say("loading libraries")
            from mtl_lora_cli.training import run as training

            if dry_run:
                _show_plan(training.prepare(loaded), as_json)
                return
            folder = training.start(loaded)
        if as_json:
            emit_json({"run": folder.name, "path": str(folder.path)})
        else:
            emit(f"{folder.path}")
            say(f"next: mtl-lora eval --run {folder.path} --task all")


def _show_plan(prepared: Prepared, as_json: bool) -> None:
    """The resolved recipe, its tasks, and the size of what would be trained."""
    from mtl_lora_cli.data.mixture import planned_epochs
    from mtl_lora_cli.recipe.load import dump_recipe

    _, adapter = prepared.build()
    mixture = prepared.data.mixture
    planned = mixture.planned_counts()
    epochs = planned_epochs(mixture, prepared.total_steps)
    tasks = [
        {
            "task": task.name,
            "template": task.template_name,
            "rows": split.rows,
            "examples": len(split),
            "tokens": int(split.lengths.sum()),
            "supervised": split.supervised,
            "dropped": split.dropped,
            "truncated": split.truncated,
            "share": count / sum(planned),
            "epochs": epochs[task.name],
        }
        for task, split, count in zip(
            prepared.data.tasks, prepared.data.splits, planned, strict=True
        )
    ]
    if as_json:
        emit_json(
            {
                "recipe": prepared.recipe.model_dump(mode="json"),
                "tasks": tasks,
                "steps": prepared.total_steps,
                "trainable_parameters": adapter.parameter_count(),
            }
        )
        return
    emit(dump_recipe(prepared.recipe))
    header = ("task", "rows", "examples", "tokens", "supervised", "share", "epochs")
    rows = [
        (
            str(t["task"]),
            f"{t['rows']:,}",
            f"{t['examples']:,}",
            f"{t['tokens']:,}",
            f"{t['supervised']:,}",
            f"{t['share']:.1%}",
            f"{t['epochs']:.2f}",
        )
        for t in tasks
    ]
    from mtl_lora_cli.cli.table import table

    emit(table(header, rows))
    emit(f"optimiser steps       {prepared.total_steps:,}")
    emit(f"trainable parameters  {adapter.parameter_count():,}")

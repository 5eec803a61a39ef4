"""`mtl-lora add-task`."""

from __future__ import annotations

from typing import Annotated

import typer

from mtl_lora_cli.cli.frame import framed, status
from mtl_lora_cli.cli.options import RUNS, JsonOption, RunOption, RunsOption
from mtl_lora_cli.cli.processes import ProcessesOption, launched
from mtl_lora_cli.cli.train import DryRunOption, finished, started


def register(app: typer.Typer) -> None:
    app.command("add-task", epilog="Example: mtl-lora add-task new.yaml --run mine")(add_task)


def add_task(
    recipe: Annotated[
        str, typer.Argument(help="A recipe of the new tasks; the base model and adapter are RUN's.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it: key.path=value …")
    ] = None,
    dry_run: DryRunOption = False,
    num_processes: ProcessesOption = None,
    run: RunOption = None,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Add tasks to a finished run: a new run, in which the old tasks stay bit for bit."""
    with framed():
        from mtl_lora_cli.runs.folder import find_run

        extends = find_run(run, runs)
        extends.require_adapter()
        if num_processes is not None and num_processes > 1 and not dry_run:
            raise typer.Exit(launched(num_processes))
        status("loading libraries")
        from mtl_lora_cli.machine.processes import joined

        with joined() as processes:
            folder = started(
                processes, recipe, overrides or [], runs, dry_run, as_json, extends=extends
            )
        finished(processes, folder, as_json)

"""`mtl-lora merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mtl_lora_cli.cli.frame import framed, say, status
from mtl_lora_cli.cli.options import (
    RUNS,
    CompareLimitOption,
    JsonOption,
    RunOption,
    RunsOption,
    TaskOption,
    ToleranceOption,
)
from mtl_lora_cli.cli.outputs import emit_written, outputs_of


def register(app: typer.Typer) -> None:
    app.command("merge", epilog="Example: mtl-lora merge --task piqa --output merged/piqa")(merge)


def merge(
    task: TaskOption,
    run: RunOption = None,
    runs: RunsOption = RUNS,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder to write; default: merged/RUN/TASK.")
    ] = None,
    limit: CompareLimitOption = 32,
    tolerance: ToleranceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fold a task's adapter into the base weights: an ordinary transformers model."""
    with framed():
        from mtl_lora_cli.runs.folder import find_run

        folder = find_run(run, runs)
        status("loading libraries")
        from mtl_lora_cli.evaluation.open_run import open_run
        from mtl_lora_cli.export.run_merge import merge_task

        chosen = outputs_of(folder, task, output, Path("merged"), verb="merge")
        status(f"loading run {folder.name}")
        # Merged into the full-precision weights, so compared on them, too.
        opened = open_run(folder, quantization="none")
        results = [
            merge_task(opened, one, target, limit=limit, tolerance=tolerance, say=say)
            for one, target in chosen
        ]
        emit_written(results, as_json)

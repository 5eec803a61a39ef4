"""`mtl-lora export`."""

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

FORMATS = ("peft",)


def register(app: typer.Typer) -> None:
    app.command("export", epilog="Example: mtl-lora export --task all --format peft")(export)


def export(
    task: TaskOption,
    kind: Annotated[str, typer.Option("--format", help="peft: a standard LoRA folder.")] = "peft",
    run: RunOption = None,
    runs: RunsOption = RUNS,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder to write; default: exported/RUN/TASK.")
    ] = None,
    limit: CompareLimitOption = 32,
    tolerance: ToleranceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a task's adapter for other tools; all tasks share one base model there."""
    with framed():
        from mtl_lora_cli.errors import UsageError, did_you_mean
        from mtl_lora_cli.runs.folder import find_run

        if kind not in FORMATS:
            raise UsageError(
                f"--format: expected {', '.join(FORMATS)}, received '{kind}'"
                f"{did_you_mean(kind, FORMATS)}"
            )
        folder = find_run(run, runs)
        status("loading libraries")
        from mtl_lora_cli.evaluation.open_run import open_run
        from mtl_lora_cli.export.peft_adapter import export_peft

        chosen = outputs_of(folder, task, output, Path("exported"), verb="export")
        status(f"loading run {folder.name}")
        opened = open_run(folder)
        results = [
            export_peft(opened, one, target, limit=limit, tolerance=tolerance, say=say)
            for one, target in chosen
        ]
        emit_written(results, as_json)

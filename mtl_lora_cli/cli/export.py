"""`mtl-lora export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mtl_lora_cli.cli.frame import framed, say, status
from mtl_lora_cli.cli.merge import emit_written
from mtl_lora_cli.cli.options import RUNS, JsonOption, RunOption, RunsOption, TaskOption

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
    limit: Annotated[int, typer.Option("--limit", min=1, help="Held-out rows to compare on.")] = 32,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", min=0, help="Largest difference of log-probabilities allowed."),
    ] = None,
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
        from mtl_lora_cli.evaluation.evaluate import select_tasks
        from mtl_lora_cli.evaluation.open_run import open_run, read_tasks
        from mtl_lora_cli.export.merge import require_empty
        from mtl_lora_cli.export.peft_adapter import export_peft

        chosen = select_tasks(read_tasks(folder), task)
        if output is not None and len(chosen) > 1:
            raise UsageError("--output names one folder; export one task at a time with it")
        targets = [output or Path("exported") / folder.name / one.name for one in chosen]
        for target in targets:
            require_empty(target)
        status(f"loading run {folder.name}")
        opened = open_run(folder)
        results = [
            export_peft(opened, one, target, limit=limit, tolerance=tolerance, say=say)
            for one, target in zip(chosen, targets, strict=True)
        ]
        emit_written(results, as_json)

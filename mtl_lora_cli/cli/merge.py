"""`mtl-lora merge`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mtl_lora_cli.cli.frame import emit, emit_json, framed, say, status
from mtl_lora_cli.cli.options import RUNS, JsonOption, RunOption, RunsOption, TaskOption

if TYPE_CHECKING:
    from mtl_lora_cli.export.run_merge import Merged


def register(app: typer.Typer) -> None:
    app.command("merge", epilog="Example: mtl-lora merge --task piqa --output merged/piqa")(merge)


def merge(
    task: TaskOption,
    run: RunOption = None,
    runs: RunsOption = RUNS,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder to write; default: merged/RUN/TASK.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Held-out rows to compare on.")] = 32,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", min=0, help="Largest difference of log-probabilities allowed."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fold a task's adapter into the base weights: an ordinary transformers model."""
    with framed():
        from mtl_lora_cli.errors import UsageError
        from mtl_lora_cli.runs.folder import find_run

        folder = find_run(run, runs)
        status("loading libraries")
        from mtl_lora_cli.evaluation.evaluate import select_tasks
        from mtl_lora_cli.evaluation.open_run import open_run, read_tasks
        from mtl_lora_cli.export.merge import require_empty
        from mtl_lora_cli.export.run_merge import merge_task

        chosen = select_tasks(read_tasks(folder), task)
        if output is not None and len(chosen) > 1:
            raise UsageError("--output names one folder; merge one task at a time with it")
        targets = [output or Path("merged") / folder.name / one.name for one in chosen]
        for target in targets:
            require_empty(target)
        status(f"loading run {folder.name}")
        # Merged into the full-precision weights, so compared on them, too.
        opened = open_run(folder, quantization="none")
        results = [
            merge_task(opened, one, target, limit=limit, tolerance=tolerance, say=say)
            for one, target in zip(chosen, targets, strict=True)
        ]
        emit_written(results, as_json)


def emit_written(results: Sequence[Merged], as_json: bool) -> None:
    """What was written where, and how it compared."""
    if as_json:
        emit_json(
            [
                {
                    "task": result.task,
                    "path": str(result.folder),
                    "examples": result.comparison.examples,
                    "largest_difference": result.comparison.largest,
                    "equal_answers": result.comparison.equal,
                }
                for result in results
            ]
        )
        return
    for result in results:
        emit(
            f"{result.folder}: on {result.comparison.examples} held-out rows the largest "
            f"difference of log-probabilities is {result.comparison.largest:.2e}, "
            f"equal answers {result.comparison.equal:.1%}"
        )

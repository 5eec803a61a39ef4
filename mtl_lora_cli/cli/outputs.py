"""What `merge` and `export` have in common: a folder for each task, and what they say of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_lora_cli.cli.frame import emit, emit_json

if TYPE_CHECKING:
    from mtl_lora_cli.export.run_merge import Merged
    from mtl_lora_cli.runs.folder import RunFolder
    from mtl_lora_cli.tasks.task import Task


def outputs_of(
    run: RunFolder, task: str, output: Path | None, root: Path, *, verb: str
) -> list[tuple[Task, Path]]:
    """The tasks that are asked for, each with its empty folder: `output`, or root/RUN/TASK.

    Raises:
        UsageError: an unknown task, one folder for several, or a folder that holds something.
    """
    from mtl_lora_cli.errors import UsageError
    from mtl_lora_cli.evaluation.evaluate import select_tasks
    from mtl_lora_cli.evaluation.open_run import read_tasks
    from mtl_lora_cli.export.merge import require_empty

    chosen = select_tasks(read_tasks(run), task)
    if output is not None and len(chosen) > 1:
        raise UsageError(f"--output names one folder; {verb} one task at a time with it")
    found = [(one, output or root / run.name / one.name) for one in chosen]
    for _, target in found:
        require_empty(target)
    return found


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

"""What `merge` and `export` have in common: a folder for each task, the hub, and what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtl_lora_cli.cli.frame import emit, emit_json, say

if TYPE_CHECKING:
    from mtl_lora_cli.export.order import WrittenFolder
    from mtl_lora_cli.metrics.intervals import Measured
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
    from mtl_lora_cli.export.write import require_empty
    from mtl_lora_cli.tasks.chosen import read_tasks, select_tasks

    chosen = select_tasks(read_tasks(run), task)
    if output is not None and len(chosen) > 1:
        raise UsageError(f"--output names one folder; {verb} one task at a time with it")
    found = [(one, output or root / run.name / one.name) for one in chosen]
    for _, target in found:
        require_empty(target)
    return found


def require_pushable(repository: str | None, targets: Sequence[object], checked: bool) -> None:
    """Find out before the work whether `--push` can be done; without it, touch no network.

    Raises:
        UsageError: several tasks for one repository, nothing checked, or the hub cannot be had.
    """
    from mtl_lora_cli.errors import UsageError
    from mtl_lora_cli.export.hub import require_hub

    if repository is None:
        return
    if len(targets) > 1:
        raise UsageError("--push names one repository; push one task at a time")
    if not checked:
        raise UsageError("--push does not go with --no-check: what is passed on has been compared")
    require_hub(repository)


def push_written(results: Sequence[WrittenFolder], repository: str | None) -> None:
    """Upload the one folder, if that was asked for."""
    from mtl_lora_cli.export.hub import push

    if repository is not None:
        say(f"pushed to {push(results[0].folder, repository)}")


def emit_written(
    results: Sequence[WrittenFolder],
    as_json: bool,
    engines: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """What was written where, and how it compared; by task what an engine said besides."""
    if as_json:
        more = engines or {}
        emit_json([{**written_as_json(one), **more.get(one.task, {})} for one in results])
        return
    for result in results:
        emit(written_as_line(result))


def written_as_json(result: WrittenFolder) -> dict[str, Any]:
    """One result of `--json`."""
    found: dict[str, Any] = {"task": result.task, "path": str(result.folder)}
    comparison = result.comparison
    if comparison is None:
        return {**found, "checked": False}
    scores = {"written": comparison.metrics}
    scores |= {label: other.metrics for label, other in comparison.models.items()}
    return {
        **found,
        "checked": True,
        "examples": comparison.examples,
        "largest_difference": comparison.largest,
        "equal_answers": comparison.equal,
        "largest_difference_unrounded": None
        if comparison.unrounded is None
        else comparison.unrounded.largest,
        "scores": {
            label: {name: asdict(measured) for name, measured in metrics.items()}
            for label, metrics in scores.items()
        },
    }


def written_as_line(result: WrittenFolder) -> str:
    """One result, for a person."""
    comparison = result.comparison
    if comparison is None:
        return f"{result.folder}: not checked"
    line = (
        f"{result.folder}: on {comparison.examples} held-out rows the largest difference of "
        f"log-probabilities is {comparison.largest:.2e}, equal answers {comparison.equal:.1%}"
        f"{comparison.told and f', {comparison.told}'}"
    )
    for name, measured in list(comparison.metrics.items())[:1]:
        others = [
            f"{label} {_shown(other.metrics[name])}" for label, other in comparison.models.items()
        ]
        line += f"; {comparison.title(name)} {_shown(measured)}, {', '.join(others)}"
    return line


def _shown(measured: Measured) -> str:
    if measured.value is None:
        return "undefined"
    if measured.low is None:
        return f"{measured.value:.3f}"
    return f"{measured.value:.3f} ({measured.low:.3f} – {measured.high:.3f})"

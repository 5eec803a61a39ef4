"""`mtl-lora export`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtl_lora_cli.cli.frame import emit, emit_json, framed, say, status
from mtl_lora_cli.cli.options import (
    RUNS,
    CheckOption,
    CompareLimitOption,
    JsonOption,
    PushOption,
    RunOption,
    RunsOption,
    TaskOption,
    ToleranceOption,
)
from mtl_lora_cli.cli.outputs import (
    emit_written,
    outputs_of,
    push_written,
    require_pushable,
    written_as_json,
    written_as_line,
)

if TYPE_CHECKING:
    from mtl_lora_cli.export.check import Distance
    from mtl_lora_cli.export.low_rank import Exported

# Each with what it writes and where it goes by default.
FORMATS = {
    "peft": ("a standard LoRA folder", Path("exported")),
    "gguf": ("an adapter for llama.cpp", Path("exported", "gguf")),
    "gguf-merged": ("a merged model for llama.cpp", Path("exported", "gguf-merged")),
}


def register(app: typer.Typer) -> None:
    app.command(
        "export",
        epilog="Example: mtl-lora export --task all --format peft "
        "(or --format gguf --rank 4 for llama.cpp, at a lower rank)",
    )(export)


def export(
    task: TaskOption,
    kind: Annotated[
        str,
        typer.Option("--format", help="; ".join(f"{kind}: {FORMATS[kind][0]}" for kind in FORMATS)),
    ] = "peft",
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, help="Reduce the adapter to this rank; says what is lost."),
    ] = None,
    run: RunOption = None,
    runs: RunsOption = RUNS,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help="Folder to write; default: exported/RUN/TASK, for llama.cpp exported/FORMAT/RUN/TASK.",
        ),
    ] = None,
    limit: CompareLimitOption = 32,
    tolerance: ToleranceOption = None,
    check: CheckOption = True,
    push: PushOption = None,
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
        if rank is not None and kind == "gguf-merged":
            raise UsageError("--rank is for adapters; a merged model has none")
        folder = find_run(run, runs)
        status("loading libraries")
        from mtl_lora_cli.evaluation.opened import open_run

        chosen = outputs_of(folder, task, output, FORMATS[kind][1], verb="export")
        require_pushable(push, chosen, check)
        finished = open_run(folder)
        write = _writer(kind, rank)
        results = [
            write(finished, one, target, limit=limit, tolerance=tolerance, checked=check, say=say)
            for one, target in chosen
        ]
        push_written(results, push)
        if rank is None:
            emit_written(results, as_json)
        else:
            _emit_reduced(results, as_json)


def _writer(kind: str, rank: int | None) -> Callable[..., Any]:
    """What exports one task in this format."""
    if kind == "peft":
        from mtl_lora_cli.export.peft_adapter import export_peft

        return partial(export_peft, rank=rank)
    from mtl_lora_cli.export.gguf_adapter import export_gguf, export_gguf_merged

    return export_gguf_merged if kind == "gguf-merged" else partial(export_gguf, rank=rank)


def _emit_reduced(results: list[Exported], as_json: bool) -> None:
    """What was written where, how it compared, and what the lower rank costs."""
    if as_json:
        emit_json([{**written_as_json(result), "reduced": _reduced(result)} for result in results])
        return
    for result in results:
        emit(f"{written_as_line(result)}\n{result.truncation}")
        for label, other in _others(result).items():
            emit(
                f"from {label}: largest difference of log-probabilities {other.largest:.2e}, "
                f"equal answers {other.equal:.1%}"
            )


def _reduced(result: Exported) -> dict[str, Any]:
    assert result.truncation is not None
    return {
        "rank": result.truncation.rank,
        "mean_error": result.truncation.mean,
        "largest_error": result.truncation.largest,
        "errors": dict(result.truncation.errors),
        "distances": {
            label: {"largest_difference": other.largest, "equal_answers": other.equal}
            for label, other in _others(result).items()
        },
    }


def _others(result: Exported) -> dict[str, Distance]:
    """The models that the written adapter need not equal: the run as it is."""
    comparison = result.comparison
    return {} if comparison is None else dict(list(comparison.models.items())[1:])

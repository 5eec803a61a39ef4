"""`mtl-lora export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtl_lora_cli.cli.frame import emit, emit_json, framed, say, status
from mtl_lora_cli.cli.maps_outputs import export_maps_of, of_maps
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
from mtl_lora_cli.export.formats import FORMATS, find_format

if TYPE_CHECKING:
    from mtl_lora_cli.export.comparison import Distance
    from mtl_lora_cli.export.order import WrittenFolder
    from mtl_lora_cli.runs.folder import RunFolder


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
        typer.Option(
            "--format",
            help="; ".join(f"{name}: {kind.about}" for name, kind in FORMATS.items()),
            autocompletion=lambda: list(FORMATS),
        ),
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
        from mtl_lora_cli.errors import UsageError
        from mtl_lora_cli.recipe.load import load_extensions_of
        from mtl_lora_cli.runs.folder import find_run

        folder = find_run(run, runs)
        load_extensions_of(folder.recipe)
        form = find_format(kind)
        if of_maps(folder):
            if rank is not None:
                raise UsageError("--rank is for adapters; an ONNX file has none")
            export_maps_of(
                folder, kind, task, output, limit=limit, check=check, push=push, as_json=as_json
            )
            return
        if rank is not None and not form.reducible:
            raise UsageError("--rank is for adapters; a merged model has none")
        status("loading libraries")
        from mtl_lora_cli.evaluation.opened import open_run
        from mtl_lora_cli.export.engines import vllm_command
        from mtl_lora_cli.export.order import Options
        from mtl_lora_cli.export.write import write_tasks

        chosen = outputs_of(folder, task, output, form.root, verb="export")
        require_pushable(push, chosen, check)
        options = Options(rank=rank, limit=limit, tolerance=tolerance, checked=check)
        results = write_tasks(kind, open_run(folder), chosen, options, say)
        push_written(results, push)
        if output is None:
            _with_router(folder, results)
        if rank is None:
            emit_written(results, as_json)
        else:
            _emit_reduced(results, as_json)
        if kind == "peft" and push is None:
            command = vllm_command([(one.task, one.folder) for one in results])
            if command is not None:
                say(f"vLLM serves them: {command}")


def _with_router(folder: RunFolder, results: list[WrittenFolder]) -> None:
    """The run's router beside the tasks, where it has one."""
    import shutil

    from mtl_lora_cli.evaluation.router import FOLDER

    router, target = folder.path / FOLDER, results[0].folder.parent / FOLDER
    if router.is_dir() and not any(result.folder == target for result in results):
        shutil.copytree(router, target, dirs_exist_ok=True)
        say(f"the router beside them: {target}")


def _emit_reduced(results: list[WrittenFolder], as_json: bool) -> None:
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


def _reduced(result: WrittenFolder) -> dict[str, Any]:
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


def _others(result: WrittenFolder) -> dict[str, Distance]:
    """The models that the written adapter need not equal: the run as it is."""
    comparison = result.comparison
    return {} if comparison is None else dict(list(comparison.models.items())[1:])

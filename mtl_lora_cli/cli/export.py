"""`mtl-lora export`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtl_lora_cli.cli.frame import emit, emit_json, framed, say, status
from mtl_lora_cli.cli.maps_outputs import export_maps_of, of_maps
from mtl_lora_cli.cli.options import (
    RUNS,
    CompareLimitOption,
    EngineOption,
    EnginePythonOption,
    JsonOption,
    NoCheckOption,
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
    engine: EngineOption = None,
    engine_python: EnginePythonOption = None,
    no_check: NoCheckOption = False,
    push: PushOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a task's adapter for other tools; all tasks share one base model there."""
    with framed():
        from mtl_lora_cli.errors import UsageError
        from mtl_lora_cli.recipe.load import load_extensions_of
        from mtl_lora_cli.runs.folder import find_run

        check = not no_check
        if engine is not None and no_check:
            raise UsageError(f"--check {engine} does not go with --no-check")
        folder = find_run(run, runs)
        load_extensions_of(folder.recipe)
        form = find_format(kind)
        if of_maps(folder):
            if rank is not None:
                raise UsageError("--rank is for adapters; an ONNX file has none")
            if engine is not None:
                raise UsageError(f"--check {engine} is for texts")
            export_maps_of(
                folder, kind, task, output, limit=limit, check=check, push=push, as_json=as_json
            )
            return
        if rank is not None and not form.reducible:
            raise UsageError("--rank is for adapters; a merged model has none")
        status("loading libraries")
        from mtl_lora_cli.evaluation.opened import open_run
        from mtl_lora_cli.export.engine_check import check_by_engine, require_engine
        from mtl_lora_cli.export.order import Options
        from mtl_lora_cli.export.write import write_tasks

        chosen = outputs_of(folder, task, output, form.root, verb="export")
        require_pushable(push, chosen, check)
        options = Options(rank=rank, limit=limit, tolerance=tolerance, checked=check)
        opened = open_run(folder)
        python = None if engine is None else require_engine(engine, kind, engine_python, opened)
        results = write_tasks(kind, opened, chosen, options, say)
        said = None if python is None else check_by_engine(opened, python, results, options, say)
        push_written(results, push)
        if output is None:
            _with_router(folder, results)
        engines = {} if said is None else said.to_json()
        if rank is None:
            emit_written(results, as_json, engines)
        else:
            _emit_reduced(results, as_json, engines)
        if said is not None:
            say("\n".join(said.lines()))
        if push is None:
            _tell_commands(kind, [(one.task, one.folder) for one in results])


def _tell_commands(kind: str, folders: list[tuple[str, Path]]) -> None:
    """How servers take what was written."""
    from mtl_lora_cli.export import engines

    if kind == "peft":
        command = engines.vllm_command(folders)
        if command is not None:
            say(f"vLLM serves them: {command}")
            if len({folder.parent for _, folder in folders}) == 1:
                say(f"or finds them by name: {engines.vllm_resolver(folders[0][1].parent)}")
        say(f"SGLang: {engines.sglang_command(folders)}")
    elif kind == "gguf":
        say(f"llama.cpp serves them: {engines.llama_server_command(folders)}")
    if kind in ("gguf", "gguf-merged"):
        say(f"Ollama: {engines.ollama_command(folders)}")


def _with_router(folder: RunFolder, results: list[WrittenFolder]) -> None:
    """The run's router beside the tasks, where it has one."""
    import shutil

    from mtl_lora_cli.evaluation.router import FOLDER

    router, target = folder.path / FOLDER, results[0].folder.parent / FOLDER
    if router.is_dir() and not any(result.folder == target for result in results):
        shutil.copytree(router, target, dirs_exist_ok=True)
        say(f"the router beside them: {target}")


def _emit_reduced(
    results: list[WrittenFolder], as_json: bool, engines: Mapping[str, Mapping[str, Any]]
) -> None:
    """What was written where, how it compared, and what the lower rank costs."""
    if as_json:
        emit_json(
            [
                {**written_as_json(one), **engines.get(one.task, {}), "reduced": _reduced(one)}
                for one in results
            ]
        )
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

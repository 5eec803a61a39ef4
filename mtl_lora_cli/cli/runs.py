"""`mtl-lora runs`, `runs show` and `runs rm`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtl_lora_cli.cli.completion import complete_run
from mtl_lora_cli.cli.frame import emit, emit_json, framed, say
from mtl_lora_cli.cli.options import RUNS, JsonOption, RunsOption
from mtl_lora_cli.cli.table import age, binary_size

if TYPE_CHECKING:
    from mtl_lora_cli.runs.listing import Summary


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="The runs that there are.",
        invoke_without_command=True,
        epilog="Example: mtl-lora runs --json",
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    group.callback()(list_runs)
    group.command("show", epilog="Example: mtl-lora runs show mine")(show)
    group.command("rm", epilog="Example: mtl-lora runs rm mine another")(remove)
    app.add_typer(group, name="runs")


def list_runs(context: typer.Context, runs: RunsOption = RUNS, as_json: JsonOption = False) -> None:
    """List runs, the newest first: status, step, score, size and age."""
    with framed():
        if context.invoked_subcommand is not None:
            _require_none_before(context)
            return
        from mtl_lora_cli.cli.table import table
        from mtl_lora_cli.runs.listing import newest_first, summary

        found = [summary(run) for run in newest_first(runs)]
        if as_json:
            emit_json([_as_json(one) for one in found])
            return
        if not found:
            say(f"no run yet in {runs}; start one with: mtl-lora train RECIPE")
            return
        header = ("run", "status", "step", "tasks", "mean score", "best look", "size", "age")
        emit(table(header, [_row(one) for one in found]))
        for one in found:
            if one.reason:
                emit(f"{one.name}: {one.reason}")


def _require_none_before(context: typer.Context) -> None:
    """`runs --runs OTHER rm mine` must not remove the run of another folder."""
    from mtl_lora_cli.errors import UsageError

    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            option = parameter.opts[0]
            raise UsageError(f"{option} goes behind the word '{context.invoked_subcommand}'")


def _row(one: Summary) -> tuple[str, ...]:
    return (
        one.name,
        one.status,
        _steps(one),
        str(len(one.tasks)),
        _mean(one),
        "–" if one.best is None else f"{one.best['value']:.3f} at {one.best['step']:,}",
        binary_size(one.bytes),
        age(one.changed),
    )


def _steps(one: Summary) -> str:
    """`40/100`; `40` where it is not known how many there are."""
    return f"{one.step:,}" + ("" if one.steps is None else f"/{one.steps:,}")


def _mean(one: Summary) -> str:
    """`0.905`; where not every task was evaluated, of how many: `0.905 (2 of 3)`."""
    if one.mean is None:
        return "–"
    some = len(one.scores) < len(one.tasks)
    return f"{one.mean:.3f}" + (f" ({len(one.scores)} of {len(one.tasks)})" if some else "")


def _as_json(one: Summary) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(one), "path": str(one.path), "mean": one.mean}


def show(
    run: Annotated[
        str | None,
        typer.Argument(
            help="Name or path of a run; default: the newest one.", autocompletion=complete_run
        ),
    ] = None,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Show a run: its recipe in short, its tasks and results, its checkpoints and files."""
    with framed():
        from mtl_lora_cli.runs.folder import find_run
        from mtl_lora_cli.runs.listing import files_of, summary

        folder = find_run(run, runs)
        one = summary(folder)
        recipe = _recipe_of(folder.recipe)
        files = sorted(
            (Path(file).relative_to(folder.path).as_posix(), known.st_size)
            for file, known in files_of(folder.path)
        )
        if as_json:
            emit_json({**_as_json(one), "recipe": recipe, "files": dict(files)})
        else:
            emit(_details(one, recipe, files))


def _recipe_of(path: Path) -> dict[str, Any]:
    """What a run's recipe says, unchecked: a run of another release is shown, too."""
    from mtl_lora_cli.recipe.yaml_file import read_document

    data = read_document(path).data
    return data if isinstance(data, dict) else {}


def _details(one: Summary, recipe: dict[str, Any], files: list[tuple[str, int]]) -> str:
    from mtl_lora_cli.cli.table import table

    adapter, training = recipe.get("adapter") or {}, recipe.get("training") or {}
    facts = [
        ("run", str(one.path)),
        ("status", f"{one.status}, {_steps(one)} steps done, changed {age(one.changed)} ago"),
        ("base model", str(recipe.get("base_model"))),
        ("adapter", f"{adapter.get('method')}, rank {adapter.get('rank')}"),
        (
            "training",
            f"{training.get('epochs')} epochs, learning rate {training.get('learning_rate')}, "
            f"rows of {training.get('row_length')} tokens, {training.get('rows_per_step')} a step, "
            f"seed {training.get('seed')}",
        ),
        ("checkpoints", ", ".join(f"{step:,}" for step in one.checkpoints) or "none"),
    ]
    if one.best is not None:
        look = f"step {one.best['step']:,}, {one.best['of']} {one.best['value']:.4f}"
        facts.append(("best look", look))
    if one.reason:
        facts.append(("damaged", one.reason))
    width = max(len(name) for name, _ in facts)
    lines = [f"{name.ljust(width)}  {value}" for name, value in facts]
    if one.tasks:
        lines += ["", table(("task", "metric", "score", "examples"), _task_rows(one))]
    sizes = [(name, binary_size(size)) for name, size in files]
    return "\n".join(
        [*lines, "", table(("file", "size"), [*sizes, ("all", binary_size(one.bytes))])]
    )


def _task_rows(one: Summary) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for task in one.tasks:
        score = one.scores.get(task)
        if score is None:
            rows.append((task, "–", "–", "–"))
        else:
            rows.append((task, score.metric, f"{score.value:.3f}", f"{score.examples:,}"))
    return rows


def remove(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME…", help="Runs of the folder --runs.", autocompletion=complete_run
        ),
    ],
    runs: RunsOption = RUNS,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also a run at which a process seems to be.")
    ] = False,
) -> None:
    """Remove runs, after asking."""
    with framed():
        from mtl_lora_cli.errors import MtlLoraError, UsageError
        from mtl_lora_cli.runs.listing import summary
        from mtl_lora_cli.runs.removal import find_removable, remove_run

        found = find_removable(names, runs, force=force)
        if not yes:
            if not sys.stdin.isatty():
                raise UsageError("runs rm asks, and there is no terminal; say --yes instead")
            for run in found:
                one = summary(run)
                say(f"{run.path}: {one.status}, {_steps(one)} steps, {binary_size(one.bytes)}")
            if not typer.confirm("remove for good?", err=True):
                raise MtlLoraError("nothing was removed")
        for run in found:
            remove_run(run)
            say(f"removed: {run.path}")

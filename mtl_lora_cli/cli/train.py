"""`mtl-lora train`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mtl_lora_cli.cli.completion import complete_run
from mtl_lora_cli.cli.frame import emit, emit_json, framed, say, status
from mtl_lora_cli.cli.options import RUNS, JsonOption, RunOption, RunsOption
from mtl_lora_cli.cli.plan import emit_plan, tasks_table
from mtl_lora_cli.cli.processes import ProcessesOption, alone, launched

if TYPE_CHECKING:
    from pathlib import Path

    from mtl_lora_cli.machine.processes import Processes
    from mtl_lora_cli.recipe.load import LoadedRecipe
    from mtl_lora_cli.runs.folder import RunFolder

DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and stop.")]


def register(app: typer.Typer) -> None:
    app.command("train", epilog="Example: mtl-lora train quickstart training.seed=1")(train)


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe file, or the name of a bundled recipe.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it: key.path=value …")
    ] = None,
    dry_run: DryRunOption = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was interrupted.")
    ] = False,
    begin_at: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="RUN",
            help="Begin at a finished run's adapter; a task that it does not know at the nearest one.",
            autocompletion=complete_run,
        ),
    ] = None,
    find_rate: Annotated[
        bool,
        typer.Option(
            "--find-rate",
            help="Try five learning rates in short runs, show which is best, and stop.",
        ),
    ] = False,
    blind: Annotated[
        bool,
        typer.Option(
            "--blind", help="A control: grey in the place of pictures (images.blind=true)."
        ),
    ] = False,
    num_processes: ProcessesOption = None,
    run: RunOption = None,
    runs: RunsOption = RUNS,
    as_json: JsonOption = False,
) -> None:
    """Train an adapter for all tasks of a recipe."""
    with framed():
        from mtl_lora_cli.errors import UsageError

        if resume and recipe is not None and "=" in recipe:
            overrides, recipe = [recipe, *(overrides or ())], None
        if blind:
            if resume:
                raise UsageError("--blind is for a new run; what goes on is as blind as it was")
            overrides = [*(overrides or ()), "images.blind=true"]
        if recipe is None and not resume:
            raise UsageError("a recipe is missing: mtl-lora train RECIPE")
        if run is not None and not resume:
            raise UsageError("--run goes with --resume; a new run is named by run.name=NAME")
        if begin_at is not None and (resume or find_rate):
            raise UsageError("--from goes without --resume and --find-rate")
        begins = None if begin_at is None else _finished_run(begin_at, runs)
        if find_rate:
            if resume or dry_run or (num_processes or 1) > 1:
                raise UsageError("--find-rate goes without --resume, --dry-run and --num-processes")
            assert recipe is not None
            _find_rate(recipe, overrides or [], as_json)
            return
        if resume:
            _require_idle(run, runs)
        elif recipe is not None and begins is None and alone():
            loaded = _loaded(recipe, overrides or [])
            if not dry_run and (num_processes or 1) == 1:
                from mtl_lora_cli.training.rehearsal_start import begin

                begin(loaded, overrides or [])
        if num_processes is not None and num_processes > 1 and not dry_run:
            raise typer.Exit(launched(num_processes))
        status("loading libraries")
        from mtl_lora_cli.machine.processes import joined

        with joined() as processes:
            folder: RunFolder | None
            if resume:
                folder = _resumed(processes, recipe, overrides or [], run, runs)
            else:
                assert recipe is not None
                folder = started(
                    processes, recipe, overrides or [], runs, dry_run, as_json, begins=begins
                )
        finished(processes, folder, as_json)


def _finished_run(name: str, runs: Path) -> RunFolder:
    """The run that `--from` names; that it is unfinished is said at once."""
    from mtl_lora_cli.runs.folder import find_run

    found = find_run(name, runs)
    found.require_adapter()
    return found


def _find_rate(recipe: str, overrides: list[str], as_json: bool) -> None:
    """Short runs at several rates, as a table, and how the best one is taken."""
    from pathlib import Path

    from mtl_lora_cli.recipe.load import find_recipe, load_recipe

    loaded = load_recipe(find_recipe(recipe), overrides)
    status("loading libraries")
    from mtl_lora_cli.cli.table import table
    from mtl_lora_cli.compare import rates

    study = rates.plan_search(loaded, Path("comparisons"))
    steps = study.loaded.recipe.training.max_steps
    say(f"{len(study.runs)} runs of at most {steps} steps each, scored on held-out rows")
    found = rates.find_rate(study, say)
    settings = [f"{key}={value:g}" for key, value in found.best.settings.items()]
    if as_json:
        emit_json(
            {
                "tried": [
                    {"settings": one.settings, "score": one.score, "loss": one.loss, "why": one.why}
                    for one in found.tried
                ],
                "best": found.best.settings,
                "untrained": found.untrained,
                "folder": str(found.folder),
            }
        )
        return
    header = [key.removeprefix("training.") for key in found.best.settings]
    rows = []
    for one in found.tried:
        score = one.why or "" if one.score is None else f"{one.score:.4f}"
        loss = "" if one.loss is None else f"{one.loss:.4f}"
        mark = "best" if one is found.best else ""
        rows.append([*(f"{rate:g}" for rate in one.settings.values()), score, loss, mark])
    emit(table([*header, "held-out score", "training loss", ""], rows))
    if found.untrained is not None:
        emit(f"the base model alone: {found.untrained:.4f}")
    if found.best in (found.tried[0], found.tried[-1]):
        emit("the best one is at the edge: try again from there")
    emit(f"take it: mtl-lora train {recipe} {' '.join([*overrides, *settings])}")


def _require_idle(run: str | None, runs: Path) -> None:
    """A second writer is refused at once, not when the libraries are loaded."""
    from mtl_lora_cli.runs.folder import find_run
    from mtl_lora_cli.runs.lock import require_idle

    require_idle(find_run(run, runs))


def _loaded(recipe: str, overrides: list[str]) -> LoadedRecipe:
    """A fault of the recipe is told at once, not when the libraries are loaded."""
    from mtl_lora_cli.recipe.load import find_recipe, load_recipe

    return load_recipe(find_recipe(recipe), overrides)


def _resumed(
    processes: Processes, recipe: str | None, overrides: list[str], run: str | None, runs: Path
) -> RunFolder:
    from mtl_lora_cli.recipe.load import find_recipe
    from mtl_lora_cli.runs.folder import find_run
    from mtl_lora_cli.training import run as training

    path = None if recipe is None else find_recipe(recipe)
    return training.resume(find_run(run, runs), path, overrides, processes)


def started(
    processes: Processes,
    recipe: str,
    overrides: list[str],
    runs: Path,
    dry_run: bool,
    as_json: bool,
    *,
    extends: RunFolder | None = None,
    begins: RunFolder | None = None,
) -> RunFolder | None:
    """Train a new run, one that adds tasks to another, or one that begins at another's adapter; None where
    it was only shown."""
    from mtl_lora_cli.models.read_ahead import read_ahead
    from mtl_lora_cli.recipe.load import find_recipe, load_recipe
    from mtl_lora_cli.training import run as training
    from mtl_lora_cli.training.add_task import load_addition
    from mtl_lora_cli.training.prepare import prepare
    from mtl_lora_cli.training.prepared import require_fit
    from mtl_lora_cli.training.warm_start import load_beginning

    path = find_recipe(recipe)
    if extends is not None:
        loaded = load_addition(extends, path, overrides)
    elif begins is not None:
        loaded = load_beginning(begins, path, overrides)
    else:
        loaded = load_recipe(path, overrides)
    folder = training.new_run_path(loaded, runs, processes)
    if not dry_run:
        read_ahead(loaded.recipe.base_model, loaded.base)
    prepared = prepare(loaded, processes, extends=extends, begins=begins)
    require_fit(prepared)
    if dry_run:
        if processes.main:
            emit_plan(prepared, as_json)
        return None

    def ready() -> None:
        if processes.main:
            say(tasks_table(prepared))

    return training.start(prepared, folder, ready)


def finished(processes: Processes, folder: RunFolder | None, as_json: bool) -> None:
    """Say where the run lies, and what comes next."""
    if folder is None or not processes.main:
        return
    if as_json:
        emit_json({"run": folder.name, "path": str(folder.path)})
    else:
        from mtl_lora_cli.tasks.chosen import read_tasks
        from mtl_lora_cli.tasks.maps import MAPS
        from mtl_lora_cli.tasks.template import TEXTS

        emit(f"{folder.path}")
        if all(task.objective in (*TEXTS, *MAPS) for task in read_tasks(folder)):
            say(f"next: mtl-lora eval --run {folder.path} --task all")
        else:
            say(f"next: mtl-lora inspect --run {folder.path}")

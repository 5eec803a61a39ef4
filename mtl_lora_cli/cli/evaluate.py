"""`mtl-lora eval`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtl_lora_cli.cli.completion import complete_run
from mtl_lora_cli.cli.eval_table import as_json as results_as_json
from mtl_lora_cli.cli.eval_table import as_table, delta_line
from mtl_lora_cli.cli.frame import emit, emit_json, framed, say, status
from mtl_lora_cli.cli.options import RUNS, JsonOption, RunOption, RunsOption, TaskOption
from mtl_lora_cli.cli.processes import ProcessesOption, alone, launched

if TYPE_CHECKING:
    import numpy as np

    from mtl_lora_cli.evaluation.delta import DeltaM
    from mtl_lora_cli.evaluation.protocols import Setting
    from mtl_lora_cli.machine.processes import Processes
    from mtl_lora_cli.runs.folder import RunFolder
    from mtl_lora_cli.tasks.task import Task

Result = dict[str, Any]


def register(app: typer.Typer) -> None:
    app.command("eval", epilog="Example: mtl-lora eval --task boolq --limit 200")(evaluate)


def evaluate(
    task: TaskOption,
    run: RunOption = None,
    runs: RunsOption = RUNS,
    split: Annotated[
        str | None, typer.Option("--split", help="train, validation or test; default: test.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only the first so many rows.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--source",
            metavar="FILE|FOLDER",
            help="Other rows of the one task: a file, a folder with splits, or sample:NAME.",
        ),
    ] = None,
    base_only: Annotated[
        bool, typer.Option("--base-only", help="Score the untouched base model instead.")
    ] = False,
    protocol: Annotated[
        str | None,
        typer.Option(
            "--protocol", help="choices, generate or lm-eval; default: choices if there are any."
        ),
    ] = None,
    normalisation: Annotated[
        str | None,
        typer.Option(
            "--normalisation",
            help="sum, token or character: what a choice's log-probability is divided by; "
            "default: the template's.",
        ),
    ] = None,
    harness_task: Annotated[
        str | None,
        typer.Option(
            "--harness-task",
            help="What lm-evaluation-harness calls the task, or a YAML file like its own.",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", min=0.0, help="Draw generated answers; 0: the likeliest."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what is drawn.")] = 0,
    count: Annotated[
        int,
        typer.Option(
            "--answers",
            min=1,
            help="How many are drawn for each row; scores are means over them, beside pass@k.",
        ),
    ] = 1,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            metavar="RUN",
            help="Another run to stand beside this one; of maps several with commas, one a task.",
            autocompletion=complete_run,
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="FOLDER", help="What merge or export wrote, beside it."),
    ] = None,
    blind: Annotated[
        str | None,
        typer.Option(
            "--blind",
            help="grey or swapped: a control that sees no pictures, or those of other rows.",
        ),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option("--predictions", metavar="FILE", help="Write every example as JSON lines."),
    ] = None,
    num_processes: ProcessesOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Go on although the base model has changed.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Score a run's tasks on held-out rows."""
    with framed():
        from mtl_lora_cli.errors import UsageError, did_you_mean
        from mtl_lora_cli.recipe.source import SPLITS
        from mtl_lora_cli.runs.folder import find_run

        folder = find_run(run, runs)
        if split is not None and split not in SPLITS:
            raise UsageError(f"--split: expected one of {', '.join(SPLITS)}, received '{split}'")
        if sum((baseline is not None, against is not None, base_only)) > 1:
            raise UsageError("give one of --baseline, --against and --base-only")
        if count > 1 and not temperature:
            raise UsageError("--answers: several answers are alike without --temperature above 0")
        if count > 1 and (baseline is not None or against is not None):
            raise UsageError("--answers above 1 goes without --baseline and --against")
        others = [find_run(name, runs) for name in (baseline.split(",") if baseline else ())]
        if any(one.path.resolve() == folder.path.resolve() for one in others):
            raise UsageError(f"--baseline {baseline}: is the run itself")
        if source is not None and (baseline is not None or against is not None or task == "all"):
            raise UsageError("--source goes with one --task, and without --baseline and --against")
        if blind is not None and against is not None:
            raise UsageError("--blind goes without --against")
        if num_processes is not None and num_processes > 1:
            raise typer.Exit(launched(num_processes))
        if alone() and not base_only:
            from mtl_lora_cli.evaluation.rehearsal_start import begin

            begin(folder)
        status("loading libraries")
        from mtl_lora_cli.data.prepare import untrained
        from mtl_lora_cli.evaluation import evaluate as room
        from mtl_lora_cli.evaluation.asked import Sampling
        from mtl_lora_cli.evaluation.predictions import Predictions, require_writable
        from mtl_lora_cli.evaluation.protocols import (
            BLIND,
            NORMALISATIONS,
            PROTOCOLS,
            require_generated,
        )
        from mtl_lora_cli.evaluation.results import require_storable
        from mtl_lora_cli.machine.processes import joined
        from mtl_lora_cli.tasks.chosen import EVERY, read_tasks, select_tasks
        from mtl_lora_cli.tasks.maps import MAPS

        for option, value, known in (
            ("--protocol", protocol, PROTOCOLS),
            ("--normalisation", normalisation, NORMALISATIONS),
            ("--blind", blind, BLIND),
        ):
            if value is not None and value not in known:
                raise UsageError(
                    f"{option}: expected one of {', '.join(known)}, received '{value}'"
                    f"{did_you_mean(value, known)}"
                )
        sampling = None if temperature is None else Sampling(temperature, seed, count)
        setting = room.Setting(
            split, limit, base_only, protocol, normalisation, harness_task, sampling, source, blind
        )
        with joined() as processes:
            chosen = select_tasks(read_tasks(folder), task)
            if source is not None:
                chosen = [_with_rows(one, source, split) for one in chosen]
            if sampling is not None:
                require_generated(chosen, setting)
            if any(one.objective in MAPS for one in chosen):
                for option, given in (("--predictions", predictions), ("--against", against)):
                    if given is not None:
                        raise UsageError(f"{option} is for texts; predict writes maps")
            written = None if predictions is None else Predictions(setting)
            if predictions is not None:
                require_writable(predictions, setting)
            for each in (folder, *others):
                require_storable(each)
            left_out: dict[str, str] = {}
            with processes.one_after_another():  # the first one fetches what the hub has
                every = task == EVERY
                rows = room.find_rows(chosen, setting, left_out if every else None)
                apart = untrained(chosen) if every else {}
            chosen = [one for one in chosen if one.name not in left_out]
            places = None if against is None else _places(against, chosen, setting)
            scores: dict[str, Sequence[np.ndarray] | None] = {}

            def told(one: Task, examples: Any, answers: Any) -> None:
                scores[one.name] = answers.scores
                if written is not None and processes.main:
                    written.tell(one, examples, answers)

            results = _evaluated(folder, chosen, setting, rows, told, processes, force=force)
            if written is not None and predictions is not None and processes.main:
                written.write(predictions)
                say(f"{predictions}: {len(written):,} rows")
            name: str | None = None
            beside: list[Result | None] = []
            if others:
                name = ", ".join(one.name for one in others)
                beside = _beside_runs(others, results, setting, processes, force=force)
            elif places is not None and processes.main:
                name = str(against)
                beside = _against(folder, chosen, setting, places, results, scores)
            elif processes.main:
                beside = [
                    None if base_only else room.compare_with_base(folder, one) for one in results
                ]
                if results and results[0]["protocol"] == "maps":
                    name, beside = "constant", [one["constant"] for one in results]
            if processes.main:
                shown = {**left_out, **apart}
                _print(
                    folder.name, results, beside, name, shown, base_only=base_only, as_json=as_json
                )
            processes.wait()


def _print(
    run: str,
    results: list[Result],
    beside: list[Result | None],
    name: str | None,
    left_out: dict[str, str],
    *,
    base_only: bool,
    as_json: bool,
) -> None:
    """Results, what stands beside them, their averages, and what is left out, on stdout."""
    from mtl_lora_cli.evaluation.averages import averages
    from mtl_lora_cli.evaluation.results import theirs_in

    theirs = [
        theirs_in(one, other)
        for one, other in zip(results, beside, strict=True)
        if other is not None and "outcome" in other
    ]
    complete = len(theirs) == len(results)
    means = averages(results, theirs if complete else None)
    delta = _delta(results, theirs) if complete and name not in (None, "constant") else None
    if as_json:
        more = {"left_out": left_out, **({} if delta is None else {"delta_m": asdict(delta)})}
        emit_json({**results_as_json(run, results, beside, means, name), **more})
        return
    emit(as_table(results, beside, means, name, base_only=base_only))
    if delta is not None:
        emit(delta_line(delta))
    for one, why in left_out.items():
        emit(f"{one} is left out: {why}")
    several = any(result.get("pass_at") for result in results)
    if name is None and not base_only and not several and None in beside:
        say("the untouched base model beside it: mtl-lora eval --base-only with the same options")


def _delta(results: list[Result], theirs: list[Result]) -> DeltaM | None:
    """Δm over the other run's answers, of maps."""
    from mtl_lora_cli.evaluation.delta import delta_of

    return delta_of(results, theirs) if results[0]["protocol"] == "maps" else None


def _with_rows(task: Task, text: str, split: str | None) -> Task:
    """The task with other rows; a column's other name holds for them, too."""
    from dataclasses import replace

    from mtl_lora_cli.errors import UsageError
    from mtl_lora_cli.recipe.source import Source
    from mtl_lora_cli.resources import expanded

    if text.startswith("sample:"):
        return replace(task, source=Source(sample=text.removeprefix("sample:")))
    path = expanded(text).absolute()
    if not path.exists():
        raise UsageError(f"--source: no such file or folder: {text}")
    columns = task.source.columns if isinstance(task.source.columns, dict) else None
    folder, splits = (path, None) if path.is_dir() else (path.parent, {split or "test": path.name})
    other = Source.model_validate({"path": str(folder), "splits": splits, "columns": columns})
    return replace(task, source=other)


def _evaluated(
    folder: RunFolder,
    tasks: Sequence[Task],
    setting: Setting,
    rows: Any,
    told: Callable[[Any, Any, Any], None],
    processes: Processes,
    *,
    force: bool,
) -> list[Result]:
    """Load a run and score its tasks, with a bar on a terminal."""
    from contextlib import ExitStack

    from rich.console import Console
    from rich.progress import Progress

    from mtl_lora_cli.evaluation.evaluate import asking, evaluate
    from mtl_lora_cli.evaluation.opened import open_run
    from mtl_lora_cli.machine import threads

    status(f"loading run {folder.name}")
    opened = open_run(folder, force=force)
    if opened.trained_on is not None and processes.main:
        say(f"run {folder.name}: the base model is not the one that the adapter was trained on")
    console = Console(stderr=True, quiet=not processes.main)
    with asking(opened, tasks, setting, rows) as questions, ExitStack() as shown:
        if not opened.of_maps and processes.main:
            for line in opened.packed.notes():
                say(f"note: {line}")
        progress = shown.enter_context(Progress(console=console, transient=True))
        bar = progress.add_task("scoring", total=None)
        results = evaluate(
            opened,
            tasks,
            setting,
            lambda done, total: progress.update(bar, completed=done, total=total),
            rows=rows,
            told=told,
            questions=questions,
        )
    yielded = threads.note()
    if yielded is not None and processes.main:
        say(f"note: {yielded}")
    return results


def _beside_runs(
    others: Sequence[RunFolder],
    results: list[Result],
    setting: Setting,
    processes: Processes,
    *,
    force: bool,
) -> list[Result | None]:
    """Of several runs the first that knows a task: references that learned one task each."""
    if len(others) == 1:
        return _beside_run(others[0], results, setting, processes, force=force)
    from mtl_lora_cli.errors import UsageError
    from mtl_lora_cli.tasks.chosen import read_tasks

    found: dict[str, Result | None] = {}
    for other in others:
        known = {task.name for task in read_tasks(other)}
        own = [one for one in results if one["task"] in known and one["task"] not in found]
        if not own:
            raise UsageError(
                f"--baseline: run {other.name} learned none of the tasks that are left: "
                f"{', '.join(r['task'] for r in results if r['task'] not in found) or 'none'}"
            )
        beside = _beside_run(other, own, setting, processes, force=force)
        found |= {one["task"]: b for one, b in zip(own, beside, strict=True)}
    return [found.get(one["task"]) for one in results]


def _beside_run(
    other: RunFolder,
    results: list[Result],
    setting: Setting,
    processes: Processes,
    *,
    force: bool,
) -> list[Result | None]:
    """Another run's results on the same rows; what it has not been asked yet, it is asked now."""
    from mtl_lora_cli.evaluation.evaluate import compare_with_run, find_rows
    from mtl_lora_cli.tasks.chosen import read_tasks

    beside = [compare_with_run(other, result) for result in results]
    missing = {r["task"] for r, one in zip(results, beside, strict=True) if one is None}
    missing = processes.same(missing)  # before the first process writes more results
    tasks = [task for task in read_tasks(other) if task.name in missing]
    if tasks:
        left_out: dict[str, str] = {}
        rows = find_rows(tasks, setting, left_out)
        tasks = [task for task in tasks if task.name not in left_out]
        _evaluated(other, tasks, setting, rows, lambda *_: None, processes, force=force)
        processes.wait()
        beside = [compare_with_run(other, result) for result in results]
    if not processes.main:
        return beside
    for result, one in zip(results, beside, strict=True):
        if one is None:
            known = any(task.name == result["task"] for task in tasks)
            say(
                f"task {result['task']}: run {other.name} "
                + ("evaluates it on other rows, or otherwise" if known else "does not know it")
                + "; not compared"
            )
    return beside


def _places(against: Path, tasks: Sequence[Task], setting: Setting) -> list[Path]:
    from mtl_lora_cli.export.against import find_folders

    return find_folders(against, tasks, setting)


def _against(
    folder: RunFolder,
    tasks: Sequence[Task],
    setting: Setting,
    places: Sequence[Path],
    results: Sequence[Result],
    scores: dict[str, Sequence[np.ndarray] | None],
) -> list[Result | None]:
    """What merging or exporting wrote, scored on the same rows; one model after the other."""
    from mtl_lora_cli.evaluation.opened import open_run
    from mtl_lora_cli.export.against import against

    finished = open_run(folder)
    found: list[Result | None] = []
    for task, place, result in zip(tasks, places, results, strict=True):
        status(f"scoring {place}")
        found.append(against(finished, task, setting, place, result, scores.get(task.name)))
    return found

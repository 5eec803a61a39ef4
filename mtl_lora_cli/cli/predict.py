"""`mtl-lora predict`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtl_lora_cli.cli.completion import complete_task
from mtl_lora_cli.cli.frame import as_json, emit, framed, say, status
from mtl_lora_cli.cli.options import RUNS, RunOption, RunsOption
from mtl_lora_cli.cli.predict_maps import FORMATS, predict_maps
from mtl_lora_cli.cli.predict_parts import predict_parts

if TYPE_CHECKING:
    from mtl_lora_cli.recipe.source import Source
    from mtl_lora_cli.tasks.task import Task

_FORMATS = ("jsonl", "glue")


def register(app: typer.Typer) -> None:
    app.command("predict", epilog="Example: mtl-lora predict --task boolq questions.jsonl")(predict)


def predict(
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="FILE|-",
            help="Unlabelled rows; - reads JSON lines from stdin. Of maps: a picture, a folder, or rows.",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            help="The task that the rows are of; several with commas, or all: each answers each row; "
            "auto: the run's router says which.",
            autocompletion=complete_task,
        ),
    ] = None,
    task_column: Annotated[
        str | None,
        typer.Option("--task-column", help="The field of each row that names its task."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", min=0.0, help="Draw free answers; 0: the likeliest."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what is drawn.")] = 0,
    count: Annotated[
        int, typer.Option("--answers", min=1, help="How many are drawn for each row.")
    ] = 1,
    run: RunOption = None,
    runs: RunsOption = RUNS,
    form: Annotated[
        str | None,
        typer.Option(
            "--format", help="jsonl, or glue: what GLUE's server takes. Of maps: png or npy."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="FOLDER", help="Of --input, and of maps: where answers are written."
        ),
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option(
            "--input",
            metavar="FOLDER",
            help="Parquet or JSON lines, answered in parts into --output, and gone on with.",
        ),
    ] = None,
    errors: Annotated[
        Path | None,
        typer.Option(
            "--errors",
            metavar="FILE",
            help="Of --input: rows that cannot be answered are listed there; default: the first one ends it.",
        ),
    ] = None,
    part_rows: Annotated[
        int | None,
        typer.Option("--part-rows", min=1, help="Of --input: rows of a part; default: 16384."),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(
            "--answer-column",
            metavar="NAME",
            help="Of --input: the column of the answers; default: prediction.",
        ),
    ] = None,
    lanes: Annotated[
        int | None,
        typer.Option("--lanes", min=1, help="Of --input: how many read and prepare rows at once."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="local|ADDRESS",
            help="Of --input: answer on a Ray cluster, or by several processes of this host.",
        ),
    ] = None,
    actors: Annotated[
        int | None,
        typer.Option(
            "--actors", min=1, help="Of --ray: models at work; default: one a card, or a core."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Go on although the base model has changed.")
    ] = False,
) -> None:
    """Label rows: JSON lines with label and probabilities, as soon as they are known."""
    with framed():
        from mtl_lora_cli.data.sources import layout_of_new_rows
        from mtl_lora_cli.data.streams import read_parts, stream_parts, with_names
        from mtl_lora_cli.errors import UsageError, did_you_mean, file_problem
        from mtl_lora_cli.runs.folder import find_run
        from mtl_lora_cli.tasks.chosen import AUTO, EVERY, read_tasks
        from mtl_lora_cli.tasks.maps import MAPS

        if form is not None and form not in (*_FORMATS, *FORMATS):
            raise UsageError(
                f"--format: expected one of {', '.join(_FORMATS)}, received '{form}'"
                f"{did_you_mean(form, _FORMATS)}"
            )
        own: dict[str, Any] = {
            "errors": errors,
            "part_rows": part_rows,
            "answer_column": column,
            "lanes": lanes,
            "ray": ray,
            "actors": actors,
        }
        if rows is None:
            for option, value in own.items():
                if value is not None:
                    raise UsageError(f"--{option.replace('_', '-')} goes with --input FOLDER")
            if file is None:
                raise UsageError(
                    "expected FILE, - for stdin, or --input FOLDER with --output FOLDER"
                )
        elif file is not None:
            raise UsageError(f"give {file} or --input {rows}, not both")
        if file is not None and file != "-" and not Path(file).exists():
            raise file_problem(file, "no such file")
        folder = find_run(run, runs)
        known = {task.name: task for task in read_tasks(folder)}
        of_maps = any(task.objective in MAPS for task in known.values())
        formats = FORMATS if of_maps else _FORMATS
        said, form = form, form or formats[0]
        if form not in formats:
            raise UsageError(
                f"--format: expected one of {', '.join(formats)}, received '{form}'"
                f"{did_you_mean(form, formats)}"
            )
        asked = task.split(",") if task is not None and "," in task else task
        if of_maps:
            for option, given in (
                ("--task-column", task_column),
                ("--temperature", temperature),
                ("--answers", count > 1),
            ):
                if given:
                    raise UsageError(f"{option} is for texts; this run answers with maps")
        if count > 1 and not temperature:
            raise UsageError("--answers: several answers are alike without --temperature above 0")
        if rows is not None:
            if output is None:
                raise UsageError("--input goes with --output FOLDER")
            if said is not None and not of_maps:
                raise UsageError(
                    f"--format {said} goes with FILE; --input is answered in its own form: "
                    "Parquet as Parquet, JSON lines as JSON lines"
                )
            how = {
                "task": asked,
                "task_column": task_column,
                "temperature": temperature,
                "seed": seed,
                "answers": count,
                **({"form": form} if of_maps else {}),
            }
            _, names = layout_of_new_rows(_source(_asked(known, asked)))
            predict_parts(folder, rows, output, how, names, force=force, **own)
            return
        assert file is not None
        if of_maps:
            predict_maps(folder, known, file, asked, form=form, output=output, force=force)
            return
        if output is not None:
            raise UsageError("--output is for maps and --input; these predictions go to stdout")
        alone = task_column is None and not isinstance(asked, list) and asked not in (EVERY, AUTO)
        if form == "glue" and not alone:
            raise UsageError("--format glue is a file for one task: use --task")
        if file != "-" and not Path(file).is_file():
            raise file_problem(file, "no such file")
        status("loading libraries")
        from mtl_lora_cli.evaluation import glue_submission
        from mtl_lora_cli.evaluation.asked import Sampling
        from mtl_lora_cli.evaluation.opened import Run, open_run
        from mtl_lora_cli.evaluation.predict import ROWS, Predictor
        from mtl_lora_cli.evaluation.router import load_router
        from mtl_lora_cli.tasks.chosen import by_router, require_task, several_tasks

        auto = by_router(list(known), asked, task_column)
        several = None if auto else several_tasks(list(known), asked, task_column)
        name = "" if auto or several else require_task(list(known), task, task_column)
        if auto:
            load_router(folder, Run(folder).checkpoint)  # refused before a model is loaded
        glue = glue_submission.require_glue(known[name]) if form == "glue" else None
        status(f"loading run {folder.name}")
        root = Path() if file == "-" else Path(file).parent
        predictor = Predictor(open_run(folder, force=force), root)
        written = [known[one] for one in several or ([name] if name else [])]
        layout, names = layout_of_new_rows(_source(written))
        if file == "-":
            parts = stream_parts(sys.stdin.buffer, "stdin", ROWS)
        else:
            parts = read_parts(Path(file), ROWS, layout)
        parts = with_names(parts, names)
        if glue is not None:
            emit(glue_submission.HEADER)
        number = cut = 0
        for part in parts:
            sampling = None if temperature is None else Sampling(temperature, seed, count, number)
            answers = predictor.answer(part, task=asked, task_column=task_column, sampling=sampling)
            lines = []
            for (row, _), prediction in zip(part, answers, strict=True):
                if glue is not None:
                    lines.append(glue_submission.line(glue, number, row, prediction))
                else:
                    lines.append(as_json(prediction))
                number += 1
                each = [prediction] if several is None else prediction.values()
                cut += any("truncated" in one for one in each)
            emit("\n".join(lines))
        if cut:
            say(
                f"note: {cut:,} of {number:,} rows were longer than the model's positions and lost their beginning"
            )


def _asked(known: Mapping[str, Task], asked: str | Sequence[str] | None) -> list[Task]:
    """The tasks that may answer: those that are named, or all of the run."""
    named = [asked] if isinstance(asked, str) else asked or known
    return [known[one] for one in named if one in known] or list(known.values())


def _source(tasks: Sequence[Task]) -> Source | None:
    """How the rows of a file are written: as those of the tasks, where all of theirs are written alike."""
    sources = [task.source for task in tasks]
    written = {(one.delimiter, one.quoting, repr(one.columns), one.broken_rows) for one in sources}
    return sources[0] if len(written) == 1 else None

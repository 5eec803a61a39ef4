"""`mtl-lora tasks` and `mtl-lora tasks show`; what it does with the tasks of a run is in `run_tasks.py`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mtl_lora_cli.cli import run_tasks
from mtl_lora_cli.cli.frame import emit, emit_json, framed, say
from mtl_lora_cli.cli.options import JsonOption

if TYPE_CHECKING:
    from mtl_lora_cli.tasks.task import Task


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="The tasks that templates describe, and those of a run.",
        invoke_without_command=True,
        epilog="Example: mtl-lora tasks show sst2 --source my/folder",
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    group.callback()(list_tasks)
    group.command("show", epilog="Example: mtl-lora tasks show boolq --source my/folder")(show)
    run_tasks.register(group)
    app.add_typer(group, name="tasks")


def list_tasks(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the templates that there are."""
    if context.invoked_subcommand is not None:
        return
    with framed():
        from mtl_lora_cli.cli.table import in_lines, table
        from mtl_lora_cli.tasks.registry import installed_templates, template_names
        from mtl_lora_cli.tasks.template import read_template

        found = {**installed_templates(), **template_names()}
        templates = {name: read_template(path) for name, path in found.items()}
        if as_json:
            emit_json(
                [
                    {
                        "name": name,
                        "description": template.description,
                        "version": template.version,
                        "tags": template.tags,
                        "metrics": template.metrics,
                        "labels": template.labels,
                        "source": template.source and template.source.model_dump(exclude_none=True),
                    }
                    for name, template in templates.items()
                ]
            )
            return
        rows = [
            (name, ", ".join(template.metrics), template.description)
            for name, template in templates.items()
        ]
        columns = ("template", "metrics", "description")
        emit(table(columns, in_lines(rows, {1: 27, 2: 41}), left=True))


def show(
    name: Annotated[str, typer.Argument(help="A template, such as sst2 or glue/sst2, or a file.")],
    source: Annotated[
        str | None,
        typer.Option(
            "--source",
            help="A file or folder, or a source's keys in braces; default: the template's own.",
        ),
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="How many examples.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Render a few examples of a task."""
    with framed():
        from mtl_lora_cli.data.prepare import read_examples
        from mtl_lora_cli.data.sources import resolve
        from mtl_lora_cli.errors import UsageError
        from mtl_lora_cli.recipe.source import Source
        from mtl_lora_cli.recipe.yaml_file import parse_document, validate_document
        from mtl_lora_cli.tasks.maps import MAPS
        from mtl_lora_cli.tasks.registry import find_template
        from mtl_lora_cli.tasks.task import Task

        full, path, template = find_template(name, Path())
        try:
            given = template.source
            if source is not None and source.startswith("{"):
                given = validate_document(parse_document(source, "--source"), Source)
            elif source is not None:
                given = Source.model_validate(source)
        except ValueError:
            raise UsageError(
                f"--source: expected a path or sample:NAME, received '{source}'"
            ) from None
        if given is None:
            raise UsageError(
                f"the template '{full}' has no source of its own; name one with --source"
            )
        task = Task(
            name=Path(full).stem,
            id=0,
            template_name=full,
            template_text=path.read_text(encoding="utf-8"),
            template=template,
            source=resolve(given, base=Path() if source else path.parent),
            objective=template.objective,
        )
        if task.objective in MAPS:
            _show_maps(task, count, as_json=as_json)
            return
        examples = read_examples(task, "train", at_most=count) or read_examples(
            task, "test", at_most=count
        )
        if examples is None:
            raise UsageError(f"the source of '{full}' has neither a train nor a test split")
        shown: list[dict[str, Any]] = [
            {
                "where": where,
                "prompt": example.prompt,
                "choices": list(example.choices),
                "answer": example.answer,
            }
            for where, example in zip(examples.wheres, examples.examples, strict=True)
        ]
        if as_json:
            emit_json(shown)
            return
        for note in examples.notes:
            say(f"note: {note}")
        for entry in shown:
            emit(f"--- {entry['where']}\n{entry['prompt']} [{entry['answer']}]")
            if entry["choices"]:
                emit(f"choices: {' | '.join(entry['choices'])}")


def _show_maps(task: Task, count: int, *, as_json: bool) -> None:
    """Pictures and maps of a task, as paths; `data show` draws them."""
    from mtl_lora_cli.data.picture_rows import read_map_rows
    from mtl_lora_cli.errors import UsageError
    from mtl_lora_cli.tasks.maps import spec_of

    spec = spec_of(task.template)
    found = [read_map_rows([task], [spec], split, masked=True) for split in ("train", "test")]
    sources = next(filter(None, found), None)
    if sources is None:
        raise UsageError(
            f"the source of '{task.template_name}' has neither a train nor a test split"
        )
    rows = sources[0].rows
    shown = [
        {"where": where, "image": picture, "target": target}
        for where, picture, target in zip(rows.wheres, rows.pictures, rows.targets[0], strict=True)
    ][:count]
    if as_json:
        emit_json(shown)
        return
    for one in shown:
        emit(f"--- {one['where']}\n{one['image']}: {one['target'] or 'no map'}")
    kinds = (
        f"{len(spec.classes)} classes: {', '.join(spec.classes)}"
        if spec.classes
        else "a number a pixel"
    )
    emit(f"{task.objective}, {kinds}")

"""A recipe's tasks, each with its template and its source."""

from __future__ import annotations

from pathlib import Path

from mtl_lora_cli.data.sources import (
    resolve,
    tasks_in,
)
from mtl_lora_cli.errors import ProblemsError, UsageError
from mtl_lora_cli.recipe.load import LoadedRecipe
from mtl_lora_cli.tasks.chosen import EVERY
from mtl_lora_cli.tasks.registry import find_template
from mtl_lora_cli.tasks.task import Task, measured_by, overlaid


def bind_tasks(loaded: LoadedRecipe) -> list[Task]:
    """Find each task's template and source; a source with a task column becomes several tasks.

    Raises:
        ProblemsError: an unknown template, a fault in one, a task without a source, or a name that
            stands twice or for all tasks.
    """
    tasks: list[Task] = []
    for index, entry in enumerate(loaded.recipe.tasks):
        try:
            name, path, template = find_template(entry.template, loaded.base)
        except ProblemsError:
            raise
        except UsageError as error:
            raise loaded.problem(("tasks", index, "template"), str(error)) from None
        if entry.objective not in (None, template.objective):
            raise loaded.problem(
                ("tasks", index, "objective"),
                f"the template '{name}' is for {template.objective}, received {entry.objective}",
            )
        try:
            template = measured_by(template, entry.metrics)
        except ValueError as error:
            raise loaded.problem(("tasks", index, "metrics"), str(error)) from None
        try:
            template = overlaid(template, entry.conversation)
        except ValueError as error:
            raise loaded.problem(("tasks", index, "conversation"), str(error)) from None
        given = entry.source or template.source
        if given is None:
            raise loaded.problem(
                ("tasks", index, "name"),
                f"the template '{name}' has no source of its own; give the task '{entry.name}' one",
            )
        key = ("tasks", index, "source")
        source = resolve(given, base=loaded.base_of(key) if entry.source else path.parent)
        fans_out = source.task_column is not None and source.task is None
        names = tasks_in(source, base=Path(), task=entry.name) if fans_out else (entry.name,)
        for one in names:
            if one == EVERY:
                raise loaded.problem(
                    ("tasks", index, "name"),
                    f"a task cannot be called '{EVERY}': --task {EVERY} stands for every task of a run",
                )
            if any(task.name == one for task in tasks):
                raise loaded.problem(("tasks", index), f"the task '{one}' stands twice")
            tasks.append(
                Task(
                    name=one,
                    id=len(tasks),
                    # A path is kept whole: the run folder lies elsewhere than the recipe.
                    template_name=str(path.resolve()) if name.endswith((".yaml", ".yml")) else name,
                    template_text=path.read_text(encoding="utf-8"),
                    template=template,
                    source=source.model_copy(update={"task": one}) if fans_out else source,
                    objective=template.objective,
                    conversation=entry.conversation,
                    metrics=None if entry.metrics is None else tuple(entry.metrics),
                    tags=tuple(dict.fromkeys([*template.tags, *entry.tags])),
                    loss_weight=entry.loss_weight,
                    sampling_weight=entry.sampling_weight,
                    max_examples=entry.max_examples,
                    repeat=entry.repeat,
                )
            )
    return tasks

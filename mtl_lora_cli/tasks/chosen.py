"""The tasks of a run, and those of them that a command is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from mtl_lora_cli.errors import MtlLoraError, UsageError, did_you_mean
from mtl_lora_cli.recipe.load import load_extensions_of
from mtl_lora_cli.runs.folder import RunFolder, read_json
from mtl_lora_cli.tasks.task import Task
from mtl_lora_cli.tasks.template import Template

EVERY = "all"  # in the place of a task's name
AUTO = "auto"  # likewise: the run's router says which


def read_tasks(folder: RunFolder) -> list[Task]:
    """The tasks of a run, from its tasks.json; its extensions first, for they may name metrics of them.

    Raises:
        MtlLoraError: the file is damaged.
    """
    if folder.recipe.is_file():
        load_extensions_of(folder.recipe)
    templates: dict[tuple[str, str], Template] = {}
    try:
        return [Task.from_json(entry, templates) for entry in read_json(folder.tasks)["tasks"]]
    except (KeyError, TypeError, ValidationError) as error:
        raise MtlLoraError(f"{folder.tasks}: damaged: {type(error).__name__} {error}") from None


def select_tasks(tasks: Sequence[Task], name: str) -> list[Task]:
    """The tasks that `--task NAME|all` names.

    Raises:
        UsageError: the run has no such task.
    """
    if name == EVERY:
        return list(tasks)
    found = [task for task in tasks if task.name == name]
    if not found:
        known = [task.name for task in tasks]
        raise UsageError(
            f"unknown task '{name}'{did_you_mean(name, known)}; tasks of this run: {', '.join(known)}"
        )
    return found


def by_router(
    names: Sequence[str], task: str | Sequence[str] | None, task_column: str | None
) -> bool:
    """Whether the run's router says which task a row is of: "auto", where no task is called so.

    Raises:
        UsageError: a column is given, too.
    """
    if task != AUTO or AUTO in names:
        return False
    if task_column is not None:
        raise UsageError("give --task or --task-column, not both")
    return True


def several_tasks(
    names: Sequence[str], task: str | Sequence[str] | None, task_column: str | None
) -> list[str] | None:
    """The tasks that answer each row, where several are asked for: a list, or "all"; else None.

    Args:
        names: of the run's tasks.
        task, task_column: as the user gave them.

    Raises:
        UsageError: one of them is unknown or stands twice, the list is empty, or a column is given, too.
    """
    if task is None or (isinstance(task, str) and task != EVERY):
        return None
    if task_column is not None:
        raise UsageError("give --task or --task-column, not both")
    if isinstance(task, str):
        return list(names)
    if not task:
        raise UsageError("--task: expected at least one task")
    chosen = [known_task(one, names, "") for one in task]
    for place, one in enumerate(chosen):
        if one in chosen[:place]:
            raise UsageError(f"--task: '{one}' stands twice")
    return chosen


def require_task(names: Sequence[str], task: str | None, task_column: str | None) -> str:
    """The task that all rows are of; "" where a column of theirs says.

    Args:
        names: of the run's tasks.
        task, task_column: as the user gave them.

    Raises:
        UsageError: no such task, none where there are several, or both.
    """
    if task_column is not None:
        if task is not None:
            raise UsageError("give --task or --task-column, not both")
        return ""
    if task is not None:
        return known_task(task, names, "")
    if len(names) != 1:
        raise UsageError(
            "give --task or --task-column: which task are the rows of? "
            f"The run has: {', '.join(names)}"
        )
    return names[0]


def known_task(name: str, names: Sequence[str], where: str) -> str:
    if name not in names:
        raise UsageError(
            f"{where}unknown task '{name}'{did_you_mean(name, names)}; "
            f"tasks of this run: {', '.join(names)}"
        )
    return name

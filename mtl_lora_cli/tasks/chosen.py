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

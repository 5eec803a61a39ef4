"""Runs that are made of a finished run's adapter, without any training: tasks leave it, or are joined.

The old run is only read. The new one is a finished run like any other: `eval`, `predict`, `merge`, `export` and
`inspect` take it; there is nothing in it of what was learned step by step.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mtl_lora_cli.adapters.files import CONFIG_FILE
from mtl_lora_cli.adapters.leave import save_without
from mtl_lora_cli.errors import UsageError, did_you_mean
from mtl_lora_cli.evaluation.opened import Run
from mtl_lora_cli.recipe.load import dump_recipe
from mtl_lora_cli.recipe.mixing import DynamicMixing
from mtl_lora_cli.recipe.names import NAME
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.recipe.training import Stage, Training
from mtl_lora_cli.runs.atomic import file_checksum, write_text
from mtl_lora_cli.runs.folder import RunFolder, create_run, mark_latest, save_json
from mtl_lora_cli.tasks.task import Task

_LONGEST_NAME = 80


def path_of(run: Run, name: str | None, parts: Sequence[str]) -> Path:
    """The new run's folder, beside the old one: `name`, or RUN-PARTS.

    Raises:
        UsageError: it exists, or cannot be a run's name.
    """
    chosen = name or "-".join([run.folder.name, *parts])[:_LONGEST_NAME]
    if not NAME.fullmatch(chosen):
        raise UsageError(f"--name: '{chosen}' cannot name a run")
    path = run.folder.path.parent / chosen
    if path.exists():
        raise UsageError(f"run folder {path} exists; choose another --name")
    return path


def require_tasks(run: Run, names: Sequence[str]) -> list[Task]:
    """The tasks of these names, in this order.

    Raises:
        UsageError: one is unknown or stands twice.
    """
    known = {task.name: task for task in run.tasks}
    for place, name in enumerate(names):
        if name not in known:
            raise UsageError(
                f"unknown task '{name}'{did_you_mean(name, known)}; tasks of this run: {', '.join(known)}"
            )
        if name in names[:place]:
            raise UsageError(f"the task '{name}' stands twice")
    return [known[name] for name in names]


def without_tasks(run: Run, names: Sequence[str], name: str | None = None) -> RunFolder:
    """A run without some of its tasks; what belongs to the others is the same to the last bit.

    Args:
        run: a finished run.
        names: of the tasks that leave.
        name: of the new run; None: RUN-without-TASKS.

    Raises:
        UsageError: a task is unknown, none would stay, or the new run's folder exists.
    """
    require_tasks(run, names)
    staying = [task for task in run.tasks if task.name not in names]
    if not staying:
        raise UsageError("no task would stay; remove the run with: mtl-lora runs rm")
    path = path_of(run, name, ["without", *names])
    made = write_run(
        run,
        path,
        run.recipe,
        staying,
        {"without": list(names)},
        lambda folder: save_without(run.file, names, folder, run.file.base_model),
    )
    mark_latest(made)
    return made


def write_run(
    run: Run,
    path: Path,
    recipe: Recipe,
    tasks: Sequence[Task],
    how: dict[str, Any],
    save: Callable[[Path], None],
) -> RunFolder:
    """A finished run of these tasks, whole or not at all.

    Args:
        run: that it is made of.
        path: of the new folder.
        recipe: its recipe; its tasks and its place are filled in.
        tasks: of the run; they get ids in this order.
        how: what tasks.json says of where it comes from.
        save: writes the adapter into a folder.
    """
    names = [task.name for task in tasks]
    where = recipe.run.model_copy(
        update={"name": path.name, "directory": str(path.parent.resolve())}
    )
    own = recipe.model_copy(
        update={
            "tasks": [task.entry() for task in tasks],
            "mixing": _mixing(recipe, names),
            "training": _training(recipe.training, names),
            "run": where,
        }
    )
    origin = {
        "run": run.folder.name,
        "path": str(run.folder.path.resolve()),
        "adapter": file_checksum(run.folder.adapter / CONFIG_FILE),
        **how,
    }

    def fill(folder: RunFolder) -> None:
        write_text(folder.recipe, dump_recipe(own))
        entries = [replace(task, id=number).to_json() for number, task in enumerate(tasks)]
        save_json(folder.tasks, {"tasks": entries, "made_of": origin})
        if run.folder.environment.is_file():
            shutil.copy(run.folder.environment, folder.environment)
        folder.adapter.mkdir()
        save(folder.adapter)
        write_text(folder.adapter / "README.md", _readme(run, names, how))

    return create_run(path, fill)


def _mixing(recipe: Recipe, names: Sequence[str]) -> Any:
    """Without what it says of tasks that are not there."""
    mixing = recipe.mixing
    if not isinstance(mixing, DynamicMixing):
        return mixing
    known = {name: loss for name, loss in mixing.reference.items() if name in names}
    return mixing.model_copy(update={"reference": known})


def _training(training: Training, names: Sequence[str]) -> Training:
    """Likewise."""
    stages: list[Stage] = []
    for stage in training.stages:
        staying = [task for task in stage.tasks if task in names]
        if staying:
            stages.append(stage.model_copy(update={"tasks": staying}))
    looks = training.validation
    if looks is not None and looks.best not in (None, "macro", *names):
        looks = looks.model_copy(update={"best": None, "patience": None})
    return training.model_copy(update={"stages": stages, "validation": looks})


def _readme(run: Run, names: Sequence[str], how: dict[str, Any]) -> str:
    said = "; ".join(f"{key}: {value}" for key, value in how.items())
    return (
        "---\nlibrary_name: mtl-lora\n---\n"
        f"# Made of the run {run.folder.name}\n\n"
        f"Tasks: {', '.join(names)}. {said}.\n\n"
        "Read it with `mtl-lora eval` and `mtl-lora merge`; PEFT cannot read this format.\n"
    )

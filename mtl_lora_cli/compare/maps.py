"""Comparisons of maps: what is asked of them instead of rows of text.

Metrics of maps have units and directions of their own, so no mean of them says anything. In its place stands Δm, the
mean over tasks of each metric's gain in percent, over the baseline or over runs that are named: in papers models that
learned one task each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mtl_lora_cli.compare.grid import VALIDATION
from mtl_lora_cli.compare.results import pack
from mtl_lora_cli.dense.objective import DenseObjective
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.evaluation.maps import HeldMaps, held_out_maps, measure_maps, require_maps
from mtl_lora_cli.evaluation.opened import Run, open_run
from mtl_lora_cli.evaluation.protocols import Setting
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.recipe.load import LoadedRecipe
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.tasks.chosen import read_tasks
from mtl_lora_cli.tasks.maps import MAPS
from mtl_lora_cli.tasks.task import Task

if TYPE_CHECKING:
    from mtl_lora_cli.compare.study import StudyOptions


def of_maps(tasks: Sequence[Task]) -> bool:
    """Whether answers are maps of pictures."""
    return any(task.objective in MAPS for task in tasks)


def require_possible(tasks: Sequence[Task], options: StudyOptions) -> None:
    """Refuse what comparisons of maps have not.

    Raises:
        UsageError: a task is no map, a reference learned none of them or lacks one, or an option is for texts.
    """
    for task in tasks:
        require_maps(task)
    if options.match is not None:
        raise UsageError("--match: picks ranks for texts; maps are compared with --match none")
    if options.sweeps:
        raise UsageError("--sweep: is for texts; of maps each setting is a --variant")
    if options.score == VALIDATION:
        raise UsageError("--score validation is for texts; maps are scored on their test pictures")
    if options.references:
        references_of(tasks, options.references)


def references_of(tasks: Sequence[Task], runs: Sequence[str]) -> dict[str, str]:
    """task → the first of the runs that learned it.

    Raises:
        UsageError: a run is not there, learned none of the tasks that are left, or none learned some task.
    """
    found: dict[str, str] = {}
    for run in runs:
        known = {task.name for task in read_tasks(RunFolder(Path(run)))}
        own = [task.name for task in tasks if task.name in known and task.name not in found]
        if not own:
            raise UsageError(f"--references: run {run} learned none of the tasks that are left")
        found |= dict.fromkeys(own, run)
    left = [task.name for task in tasks if task.name not in found]
    if left:
        raise UsageError(f"--references: no run learned {', '.join(left)}")
    return found


def trained_values(loaded: LoadedRecipe, recipe: Recipe, tasks: Sequence[Task]) -> int:
    """Of adapter, whole modules and decoders together; no weight is read."""
    base = find_base_model(recipe.base_model, beside=loaded.base)
    host = DenseObjective(base, recipe, tasks).host(torch.device("meta"), torch.float32)
    return sum(host.counts().values())


def held_maps(tasks: Sequence[Task], limit: int | None) -> list[HeldMaps]:
    """The pictures by which each task is tested."""
    return [held_out_maps(task, Setting(limit=limit)) for task in tasks]


def scores(opened: Run, held: Sequence[HeldMaps]) -> dict[str, Any]:
    """A run's answers to each task's pictures."""
    measured = measure_maps(opened, held)
    return {
        one.task.name: pack(one.task, one, found.outcome)
        for one, found in zip(held, measured, strict=True)
    }


def reference_scores(held: Sequence[HeldMaps], runs: Sequence[str]) -> dict[str, Any]:
    """The same of the references, of each the tasks that are its."""
    found: dict[str, Any] = {}
    of_task = references_of([one.task for one in held], runs)
    for run in dict.fromkeys(of_task.values()):
        opened = open_run(RunFolder(Path(run)))
        ids = {task.name: task.id for task in opened.tasks}
        own = [one for one in held if of_task[one.task.name] == run]
        found |= scores(
            opened, [replace(one, task=replace(one.task, id=ids[one.task.name])) for one in own]
        )
    return {one.task.name: found[one.task.name] for one in held}


def said(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Each task's first metric."""
    return ", ".join(
        f"{name} {entry['metrics'][entry['metric']]:.3f}" for name, entry in entries.items()
    )

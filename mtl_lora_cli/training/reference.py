"""What a dynamic mixture holds the tasks' losses against: numbers, or what a finished run came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean
from typing import Any

from mtl_lora_cli.recipe.load import LoadedRecipe
from mtl_lora_cli.recipe.mixing import DynamicMixing
from mtl_lora_cli.resources import expanded
from mtl_lora_cli.runs.folder import RunFolder

_KEY = ("mixing", "reference_run")


def with_reference(loaded: LoadedRecipe) -> LoadedRecipe:
    """The recipe with the losses of its `mixing.reference_run` as numbers: the run is not needed any more.

    Raises:
        ProblemsError: there is no such run, or it says nothing of a task.
    """
    mixing = loaded.recipe.mixing
    if not isinstance(mixing, DynamicMixing) or mixing.reference_run is None:
        return loaded
    path = expanded(mixing.reference_run)
    run = next(
        (RunFolder(one) for one in (path, loaded.base / path) if RunFolder(one).metrics.is_file()),
        None,
    )
    if run is None:
        raise loaded.problem(_KEY, f"'{path}' is no folder of a run with metrics.jsonl")
    losses = losses_of(run)
    for task in loaded.recipe.tasks:
        if task.name not in losses:
            why = f"the run '{run.name}' has no loss of task '{task.name}'"
            raise loaded.problem(_KEY, f"{why}; it has: {', '.join(losses) or 'none'}")
    names = [task.name for task in loaded.recipe.tasks]
    known = {name: loss for name, loss in losses.items() if name in names}
    own = mixing.model_copy(update={"reference": known, "reference_run": None})
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"mixing": own}))


def losses_of(run: RunFolder) -> dict[str, float]:
    """Loss of each task: of the run's last look at held-out examples, else the mean of its last tenth of steps; of a
    task that none of these has, its last one."""
    steps: list[Mapping[str, Any]] = []
    looks: list[Mapping[str, Any]] = []
    for event in run.events():
        if event["event"] == "validation":
            looks.append(event["loss"])
        elif event["event"] == "step":
            steps.append(event["task_loss"])
    seen: dict[str, list[float]] = {}
    for own in looks[-1:] or steps[-max(1, len(steps) // 10) :]:
        for name, value in own.items():
            if value is not None:
                seen.setdefault(name, []).append(value)
    for own in () if looks else reversed(steps):
        for name, value in own.items():
            if value is not None:
                seen.setdefault(name, [value])
    return {name: fmean(values) for name, values in seen.items()}

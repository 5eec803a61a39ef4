"""The stream of rows that a recipe says: what is drawn from which task, how often, in rows of which length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mtl_lora_cli.data.dynamic import DynamicMixture
from mtl_lora_cli.data.mixture import Mixture, all_positions
from mtl_lora_cli.data.stages import Part, StagedMixture
from mtl_lora_cli.errors import UsageError, did_you_mean
from mtl_lora_cli.recipe.mixing import DynamicMixing, TemperatureMixing
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.recipe.training import Training
from mtl_lora_cli.tasks.task import Task

_MOST_DRAWN = 2**28  # examples an epoch: each takes 8 bytes, and 25 while rows are packed


def mixture_of(recipe: Recipe, tasks: Sequence[Task], lengths: Sequence[np.ndarray]) -> Mixture:
    """The stream of rows that a recipe says.

    Args:
        recipe: its `mixing` and `training`.
        tasks: in the order of their ids.
        lengths: of each task the tokens of each of its examples.

    Raises:
        UsageError: an epoch would draw nothing, or more than a run can hold.
    """
    return mixture_over(recipe, tasks, [all_positions(tokens) for tokens in lengths])


def mixture_over(
    recipe: Recipe,
    tasks: Sequence[Task],
    lengths: Sequence[np.ndarray],
    row_length: int | None = None,
) -> Mixture:
    """The same of examples of which it is known how much of a row each takes.

    Args:
        recipe, tasks: as of `mixture_of`.
        lengths: of each task how much of a row each of its examples takes.
        row_length: what a row holds; None: what the recipe says.

    Raises:
        UsageError: likewise; or an example is longer than a row.
    """
    row_length = row_length or recipe.training.row_length
    for task, own in zip(tasks, lengths, strict=True):
        if len(own) and not 1 <= own.min() <= own.max() <= row_length:
            raise UsageError(
                f"task '{task.name}': its examples take {own.min()} to {own.max()} of a row; expected 1 to "
                f"training.row_length ({recipe.training.row_length})"
            )
    mixture = _mixture(recipe, tasks, lengths, row_length)
    drawn = mixture.examples_an_epoch
    if drawn == 0:
        raise UsageError(
            "tasks: an epoch would draw no example: 'repeat' times the examples of each task rounds to 0"
        )
    if drawn > _MOST_DRAWN:
        raise UsageError(
            f"tasks: an epoch would draw {drawn:,} examples, more than {_MOST_DRAWN:,}; lower 'repeat', "
            "and say training.epochs for more passes"
        )
    return mixture


def _mixture(
    recipe: Recipe, tasks: Sequence[Task], lengths: Sequence[np.ndarray], row_length: int
) -> Mixture:
    """Of the kind that the recipe says."""
    mixing, training = recipe.mixing, recipe.training
    strategy, temperature = (
        ("temperature", mixing.temperature)
        if isinstance(mixing, TemperatureMixing)
        else (mixing.start if isinstance(mixing, DynamicMixing) else mixing, 1.0)
    )
    settings: dict[str, Any] = {
        "names": tuple(task.name for task in tasks),
        "lengths": tuple(lengths),
        "row_length": row_length,
        "rows_per_step": training.rows_per_step,
        "strategy": strategy,
        "weights": tuple(task.sampling_weight for task in tasks),
        "temperature": temperature,
        "repeats": tuple(task.repeat for task in tasks),
        "seed": training.seed,
        "one_task": training.rows == "one_task",
    }
    if isinstance(mixing, DynamicMixing):
        return DynamicMixture(**settings, every=mixing.every)
    if training.stages:
        return StagedMixture(**settings, parts=_parts(training, tasks))
    return Mixture(**settings)


def _parts(training: Training, tasks: Sequence[Task]) -> tuple[Part, ...]:
    """The recipe's stages by the tasks' ids.

    Raises:
        UsageError: a stage names no task of the recipe, or no stage names a task.
    """
    ids = {task.name: number for number, task in enumerate(tasks)}
    for number, stage in enumerate(training.stages):
        for name in stage.tasks:
            if name not in ids:
                raise UsageError(
                    f"training.stages[{number}].tasks: unknown task '{name}'{did_you_mean(name, ids)}; "
                    f"tasks: {', '.join(ids)}"
                )
    named = {name for stage in training.stages for name in stage.tasks}
    for name in ids:
        if name not in named:
            raise UsageError(
                f"training.stages: task '{name}' is in no stage; it would not be learned"
            )
    return tuple(
        Part(tuple(sorted(ids[name] for name in stage.tasks)), stage.epochs)
        for stage in training.stages
    )

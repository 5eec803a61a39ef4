"""A run's own recipe beside the one that it is asked to go on with: what may differ, and what was picked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.load import LoadedRecipe, describe_changes
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.runs.folder import (
    RunFolder,
)

# What may be another when a run goes on: it does not change what is learned.
_FREE = ("run", "distributed")


_FREE_OF_TRAINING = (
    "checkpoint_every",
    "keep_checkpoints",
    "validation",
    "diagnose",
    "expanded_layers",
)


def with_free(own: Recipe, given: Recipe, run: RunFolder) -> Recipe:
    """The run's recipe with what may differ taken from the given one.

    Raises:
        UsageError: something else differs.
    """
    own = _with_streams(own, given)
    hidden: Any = dict.fromkeys(_FREE, True) | {"training": set(_FREE_OF_TRAINING)}
    before, after = (one.model_dump(mode="json", exclude=hidden) for one in (own, given))
    for old, new in zip(before["tasks"], after["tasks"], strict=False):
        if None in (old["objective"], new["objective"]):  # the template's, which is compared itself
            old["objective"] = new["objective"] = None
    changes = describe_changes(before, after)
    if changes:
        raise UsageError(f"the recipe differs from that of run '{run.name}': {'; '.join(changes)}")
    training = own.training.model_copy(
        update={name: getattr(given.training, name) for name in _FREE_OF_TRAINING}
    )
    return own.model_copy(update={"training": training, "distributed": given.distributed})


def _with_streams(own: Recipe, given: Recipe) -> Recipe:
    """The run's recipe; what becomes of rows of streams that cannot be learned is the given one's."""
    tasks = list(own.tasks)
    for number, (old, new) in enumerate(zip(own.tasks, given.tasks, strict=False)):
        if old.source is not None and old.source.stream and new.source is not None:
            source = old.source.model_copy(update={"broken_rows": new.source.broken_rows})
            tasks[number] = old.model_copy(update={"source": source})
    return own.model_copy(update={"tasks": tasks})


def as_picked(given: LoadedRecipe, own: Recipe) -> LoadedRecipe:
    """A recipe with what was picked when the run began: its date, and, with `memory: auto`, its rows."""
    if given.recipe.chat.date is None and given.recipe.prompt_format == "chat":
        chat = given.recipe.chat.model_copy(update={"date": own.chat.date})
        given = replace(given, recipe=given.recipe.model_copy(update={"chat": chat}))
    wanted, found = given.recipe.training, own.training
    if wanted.memory != "auto":
        return given
    picked = {
        name: getattr(found, name)
        for name in (
            "memory",
            "memory_limit",
            "rows_per_pass",
            "gradient_checkpointing",
            "expanded_layers",
        )
    }
    halves = wanted.row_length // found.row_length
    if halves > 1 and found.rows_per_step == wanted.rows_per_step * halves:
        picked |= {"row_length": found.row_length, "rows_per_step": found.rows_per_step}
    training = wanted.model_copy(update=picked)
    return replace(given, recipe=given.recipe.model_copy(update={"training": training}))

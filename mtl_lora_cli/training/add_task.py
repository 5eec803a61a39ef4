"""Adding tasks to a finished run: only what belongs to a task alone learns, beside everything else.

For MTL-LoRA those are Λ_t and w_t of each layer, or Λ_t and the embedding e_t; for moelora e_t; for
mtlora A_t and B_t. The result is a run of its own, which offers the tasks of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mtl_lora_cli.adapters.inject import DECODER
from mtl_lora_cli.data.bind import bind_tasks
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.evaluation.opened import Run, other_base
from mtl_lora_cli.models.base import find_base_model
from mtl_lora_cli.recipe.load import INHERITED, LoadedRecipe, describe_changes, load_recipe
from mtl_lora_cli.runs.folder import RunFolder

_LONGEST_NAME = 80  # of a run


def load_addition(run: RunFolder, path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """The recipe of tasks that are added to a run; what it leaves out is as in the run's.

    Args:
        run: whose adapter gets more tasks.
        path: the recipe.
        overrides: on the command line.

    Returns:
        The recipe with `run.name` filled in: RUN-TASK where it names none.

    Raises:
        UsageError: the run is unfinished, its method has nothing of a task's own, its base model is
            another one by now, or the recipe contradicts it or names one of its tasks.
    """
    opened = Run(run)
    file = opened.file
    decoders = any(name.startswith(DECODER) for name in file.checksums)
    if not decoders and not any(role.per_task for role in file.config.all_roles()):
        raise UsageError(
            f"run '{run.name}': its method, {file.config.method}, has nothing of a task's own that "
            "could learn alone; train all tasks together"
        )
    loaded = load_recipe(path, overrides, heir_of=opened.recipe)
    require_agreement(loaded, opened, "which it adds to")
    names = [task.name for task in bind_tasks(loaded)]
    for name in names:
        if name in file.tasks:
            raise loaded.problem(
                ("tasks",), f"run '{run.name}' has a task '{name}' already; choose another name"
            )
    if loaded.recipe.run.name is not None:
        return loaded
    name = "-".join([run.name, *names])[:_LONGEST_NAME]
    settings = loaded.recipe.run.model_copy(update={"name": name})
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"run": settings}))


def require_agreement(loaded: LoadedRecipe, run: Run, what: str) -> None:
    """Refuse another base model, or another adapter on it; `what` says what the run is to the recipe.

    Raises:
        UsageError: naming everything that differs.
    """
    given, own, file = loaded.recipe, run.recipe, run.file
    base = find_base_model(given.base_model, beside=loaded.base)
    changed = base.changes_since(file.base_model)
    before, after = ({name: getattr(one, name) for name in INHERITED} for one in (own, given))
    before["adapter"], after["adapter"] = file.config.model_dump(), given.adapter.model_dump()
    if given.images is not None and own.images is not None:  # that run has its projector
        start = {"projector_start": own.images.projector_start}
        after["images"] = given.images.model_copy(update=start)
    if not changed:  # two names of one model
        after["base_model"] = before["base_model"]
    changes = describe_changes(before, after)
    if changes:
        raise UsageError(
            f"the recipe differs from that of run '{run.folder.name}', {what}: {'; '.join(changes)}"
        )
    if changed:
        raise other_base(run.folder, base, changed)

"""The recipes of some runs, key by key, beside what each key is by default."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mtl_lora_cli.recipe.schema import Recipe, TaskSettings

_NO_DEFAULT = ("name", "template")  # keys of a task that every recipe must give


def settings(recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
    """Every key, such as `tasks.sst2.repeat`, in the order of the recipes.

    Returns:
        `key`, `values` of each recipe, `default`, and `changed`: whether one of them is another. None
        stands for null, for a key that a recipe does not have, and for one that has no default.
    """
    own = [dict(_flat(recipe)) for recipe in recipes]
    default: dict[str, Any] = {}
    for recipe in recipes:
        tasks = [TaskSettings(name=task.name, template=task.template) for task in recipe.tasks]
        default |= dict(_flat(Recipe(tasks=tasks)))
    found = []
    for key in dict.fromkeys(key for one in own for key in one):
        values = [one.get(key) for one in own]
        if key not in default and all(value is None for value in values):
            continue  # such as the other kinds of a task's source
        needed = key.startswith("tasks.") and key.rpartition(".")[2] in _NO_DEFAULT
        usual = None if needed else default.get(key)
        changed = any(key in one and one[key] != usual for one in own)
        found.append({"key": key, "values": values, "default": usual, "changed": changed})
    return found


def _flat(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    content = recipe.model_dump(mode="json")
    content["tasks"] = {task["name"]: task for task in content["tasks"]}
    yield from _leaves("", content)


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Keys and what stands at them; a list is one value, and what holds nothing is null."""
    if not isinstance(value, Mapping) or not value:
        yield prefix, value if value != {} else None
        return
    for key, below in value.items():
        yield from _leaves(f"{prefix}.{key}" if prefix else str(key), below)

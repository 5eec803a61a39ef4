"""Splits that are published without labels: -1, an empty field, a question mark, no column at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtl_lora_cli.data.sources import without
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.yaml_file import dump_flow
from mtl_lora_cli.tasks.rendering import LabelError, Renderer
from mtl_lora_cli.tasks.task import Task

_LOOKED_AT = 100  # rows of a split, evenly over it


def with_cure(
    error: LabelError, task: Task, split: str, renderer: Renderer, rows: Sequence[Any]
) -> UsageError:
    """The error of a row's label, and the way out where no row of a held-out split has one.

    Args:
        error: of the first row without a label.
        task, split: whose row it is.
        renderer: of that task.
        rows: of the split.
    """
    if split == "train" or any(_has_label(renderer, row) for row in _some(rows)):
        return error
    rest = without(task.source, split, base=Path(), task=task.name)
    given = rest.model_dump(exclude_none=True, mode="json")
    return LabelError(
        f"{error}; no {split} row has a right answer, as where labels are kept back: leave the split out "
        f"with source: {dump_flow(given)}"
    )


def _some(rows: Sequence[Any]) -> Sequence[Any]:
    return rows[:: math.ceil(len(rows) / _LOOKED_AT)]


def _has_label(renderer: Renderer, row: Any) -> bool:
    try:
        renderer.render(row, "")
    except LabelError:
        return False
    except UsageError:
        return True  # something else is wrong with it
    return True

"""One split of a task, rendered piece by piece."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mtl_lora_cli.data.examples import Examples
from mtl_lora_cli.data.lazy_rows import Lazy, LazyRows, Row, SelectedPlaces
from mtl_lora_cli.data.mixture import subset
from mtl_lora_cli.data.pictured import in_files, picture_root
from mtl_lora_cli.data.sources import Rows, read_split
from mtl_lora_cli.data.unlabelled import with_cure
from mtl_lora_cli.tasks.rendering import Example, LabelError, Renderer
from mtl_lora_cli.tasks.task import Task, require_text

MANY = 2**15  # rows from which on they are rendered when they are asked for


@dataclass(frozen=True)
class TaskRows:
    """The rows of a split that are kept; read, and rendered, when they are asked for.

    Attributes:
        task: whose they are.
        split: its name.
        found: all rows of the split.
        numbers: int64, those that are kept, ascending.
        labelled: False: what is right is not even looked at.
        lenient: those that cannot be learned are left out.
    """

    task: Task
    split: str
    found: Rows
    numbers: np.ndarray
    labelled: bool = True
    lenient: bool = False

    def __len__(self) -> int:
        return len(self.numbers)

    def piece(self, first: int = 0, last: int | None = None) -> Examples:
        """Some of them, rendered.

        Raises:
            UsageError: a row or a label is wrong.
        """
        numbers = self.numbers[first:last]
        rows, wheres = self.found.some(numbers), list(map(self.found.where, numbers.tolist()))
        try:
            examples = [
                self._renderer.render(row, where, labelled=self.labelled)
                for row, where in zip(rows, wheres, strict=True)
            ]
        except LabelError as error:
            if self.lenient:
                raise
            whole = self.found.rows
            raise with_cure(error, self.task, self.split, self._renderer, whole) from None
        if self.task.template.images:
            examples = list(map(in_files, examples))
        printed, notes = self.found.fingerprint, self.found.notes
        return Examples(self.split, examples, wheres, rows, printed, notes)

    def examples(self) -> Examples:
        """All of them: at once, or, where they are many, rendered whenever they are asked for.

        Raises:
            UsageError: as `piece`; of many now or later.
        """
        if len(self) <= MANY:
            return self.piece()
        return Examples(
            self.split,
            _Rendered(self),
            SelectedPlaces([self.found.places], self.numbers),
            _Own(self),
            self.found.fingerprint,
            self.found.notes,
        )

    @cached_property
    def _renderer(self) -> Renderer:
        return renderer_of(self.task)


class _Own(LazyRows):
    """The rows that are kept."""

    def __init__(self, rows: TaskRows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def between(self, first: int, last: int) -> list[Row]:
        """See `Lazy.between`."""
        return self._rows.found.some(self._rows.numbers[first:last])


class _Rendered(Lazy[Example]):
    """The same, rendered."""

    def __init__(self, rows: TaskRows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def between(self, first: int, last: int) -> list[Example]:
        """See `Lazy.between`."""
        return list(self._rows.piece(first, last).examples)


def task_rows(
    task: Task,
    split: str,
    *,
    at_most: int | None = None,
    seed: int = 0,
    labelled: bool = True,
) -> TaskRows | None:
    """One split of a task, to be rendered; None where its source has no such split.

    Args:
        task: bound to its source.
        split: `train`, `validation` or `test`.
        at_most: keep so many rows, drawn by `seed` and the task's name.
        seed: of that draw.
        labelled: False: what is right is not even looked at.

    Raises:
        UsageError: a file cannot be read.
    """
    require_text(task.name, task.objective)
    found = read_split(task.source, split, base=Path(), task=task.name)
    if found is None:
        return None
    numbers = subset(len(found.rows), at_most, seed, task.name)
    lenient = split == "train" and task.source.drops_rows
    return TaskRows(task, split, found, numbers, labelled, lenient)


def held_out_rows(task: Task, split: str | None = None) -> TaskRows | None:
    """The rows that a task is evaluated on: test, or validation where there is no test split."""
    for name in [split] if split else ["test", "validation"]:
        found = task_rows(task, name)
        if found is not None:
            return found
    return None


def renderer_of(task: Task) -> Renderer:
    """Of its rows; pictures lie beside its source."""
    return Renderer(
        task.template, task.name, picture_root(task) if task.template.images else Path()
    )

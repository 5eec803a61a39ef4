"""The rows that score a comparison: those that test, and those that validate."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from mtl_lora_cli.compare.grid import SCORED, TEST, VALIDATION
from mtl_lora_cli.data.examples import Examples
from mtl_lora_cli.data.mixture import subset
from mtl_lora_cli.data.prepare import read_examples
from mtl_lora_cli.data.sources import available_splits, read_split
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.recipe.source import Source
from mtl_lora_cli.tasks.task import Task

CUT_ROWS = 500  # validation rows cut from train where a source has none, at most a fifth of them
_DRAW = 0  # seed of the rows that score: the same for all methods and seeds


def report_split(task: Task) -> str:
    """The split by which a task is tested: test, or validation where there is no test.

    Raises:
        UsageError: it has neither.
    """
    splits = available_splits(task.source, base=Path(), task=task.name)
    for split in SCORED:
        if split in splits:
            return split
    raise UsageError(f"task '{task.name}': its source has no test or validation split")


def lacks_validation(task: Task) -> bool:
    """Whether no split is left for validation beside the one that tests; see `report_split`."""
    splits = available_splits(task.source, base=Path(), task=task.name)
    return not {VALIDATION, TEST} <= set(splits)


def cut_source(folder: Path, task: Task) -> Source:
    """Where the two parts of a task's train split go; see `write_cuts`."""
    return Source(path=str(folder.resolve() / "data" / task.name))


def write_cuts(folder: Path, tasks: Sequence[Task]) -> None:
    """Divide the train split of tasks that have no validation split of their own.

    Its validation rows, a fifth of the rows but no more than 500, are drawn by a fixed seed and the
    task's name. No run learns from them, whatever its seed.

    Raises:
        UsageError: a task has too few rows, or rows that are no JSON, or was divided otherwise before.
    """
    for task in tasks:
        found = read_split(task.source, "train", base=Path(), task=task.name)
        if found is None:
            raise UsageError(f"task '{task.name}': its source has no train split")
        total = len(found.rows)
        size = min(CUT_ROWS, total // 5)
        if size == 0:
            raise UsageError(
                f"task '{task.name}': {total} training rows are too few to cut validation rows from; "
                f"give it a validation split"
            )
        drawn = set(subset(total, size, _DRAW, f"{task.name} validation").tolist())
        own = Path(str(cut_source(folder, task).path))
        own.mkdir(parents=True, exist_ok=True)
        parts = {
            "train": [n for n in range(total) if n not in drawn],
            "validation": sorted(drawn),
        }
        for split, numbers in parts.items():
            try:
                lines = [json.dumps(dict(found.rows[n]), ensure_ascii=False) for n in numbers]
            except TypeError as error:
                raise UsageError(
                    f"task '{task.name}': its rows cannot be divided: {error}; "
                    f"give it a validation split"
                ) from None
            _write_rows(own / f"{split}.jsonl.gz", ("\n".join(lines) + "\n").encode())


def _write_rows(path: Path, content: bytes) -> None:
    """Runs have learned from what stands there: it is kept, and must be the same."""
    if not path.is_file():
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(gzip.compress(content, mtime=0))
        temporary.replace(path)
    elif gzip.decompress(path.read_bytes()) != content:
        raise UsageError(f"{path} holds other rows than would be cut now; choose another --output")


def report_rows(tasks: Sequence[Task], limit: int | None) -> list[Examples]:
    """The rows by which each task is tested, at most `limit` of them."""
    return [_rows(task, report_split(task), limit) for task in tasks]


def validation_rows(
    folder: Path, tasks: Sequence[Task], cut: Collection[str], limit: int | None
) -> list[Examples]:
    """The validation rows of each task; those in `cut` must have been divided."""
    return [
        _rows(
            replace(task, source=cut_source(folder, task)) if task.name in cut else task,
            VALIDATION,
            limit,
        )
        for task in tasks
    ]


def _rows(task: Task, split: str, limit: int | None) -> Examples:
    """A split, or so many of its rows, drawn by the task's name: its first ones may be alike."""
    found = read_examples(task, split, at_most=limit, seed=_DRAW)
    assert found is not None  # the split is there
    return found

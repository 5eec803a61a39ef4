"""Where a task's rows come from: a bundled sample, a file or folder, or the Hugging Face hub."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatch
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from mtl_lora_cli.data.delimited import BY_ENDING, Layout
from mtl_lora_cli.data.file_formats import Rows, ending, fingerprint, print_of
from mtl_lora_cli.data.folders import Splits, matching, require_one_set, split_of, splits_of
from mtl_lora_cli.data.hub import hub_builder, read_hub
from mtl_lora_cli.data.large_files import read_rows
from mtl_lora_cli.data.layouts import layout_rows
from mtl_lora_cli.data.lazy_rows import (
    JoinedRows,
    Lazy,
    SelectedPlaces,
    SelectedRows,
)
from mtl_lora_cli.data.part_stream import PartStream, local_part
from mtl_lora_cli.data.remote import copied, is_address, parts_at
from mtl_lora_cli.errors import UsageError, did_you_mean, file_problem
from mtl_lora_cli.recipe.names import NAME
from mtl_lora_cli.recipe.source import SPLITS, Source
from mtl_lora_cli.resources import bundled

__all__ = [
    "Rows",
    "available_splits",
    "read_split",
    "resolve",
    "root_of",
    "split_by_column",
    "split_fingerprint",
    "tasks_in",
    "untrained_in",
    "without_test",
]


_WHOLE = re.compile(r"(-?[0-9]+)\.0+")


def read_split(source: Source, split: str, *, base: Path, task: str) -> Rows | None:
    """All rows of one split (train, validation or test); None where the source has no such split.

    Args:
        base: the folder that relative paths start from (the recipe's).
        task: the task's name, for errors.

    Raises:
        UsageError: the source does not exist or cannot be reached, or its rows cannot be read.
    """
    if source.task_column is not None:
        return _by_task(source.model_dump_json(exclude={"task"}), split, base, task).get(
            source.task or task
        )
    if source.hub is not None:
        return read_hub(source, split)
    if source.layout is not None:
        return layout_rows(root_of(source, base, task), source.layout, split, task)
    if source.stream and split == "train":
        return stream_of(source, base=base, task=task).rows(0, source.window)
    files = _split_files(source, base, task).get(split)
    if files is None:
        return None
    layout = layout_of(source)
    parts = [read_rows(file, layout) for file in files]
    if len(parts) == 1:
        return parts[0]
    lazy = any(isinstance(part.rows, Lazy) for part in parts)
    rows, places = [part.rows for part in parts], [part.places for part in parts]
    return Rows(
        rows=JoinedRows(rows) if lazy else list(chain.from_iterable(rows)),
        file=f"{files[0]} and {len(files) - 1} more",
        fingerprint=fingerprint(" ".join(part.fingerprint for part in parts).encode()),
        places=SelectedPlaces(places) if lazy else list(chain.from_iterable(places)),
        notes=tuple(chain.from_iterable(part.notes for part in parts)),
    )


def stream_of(source: Source, *, base: Path, task: str) -> PartStream:
    """The training rows of a source with `stream: true`, window by window.

    Raises:
        UsageError: it has no such rows, or they cannot be reached.
    """
    key = f"source of task '{task}'"
    pattern = (source.splits or {}).get("train")

    def chosen(name: str) -> bool:
        return fnmatch(name, pattern) if pattern else split_of(name) == "train"

    if is_address(str(source.path)):
        parts = parts_at(str(source.path), key, chosen)
        if not pattern:
            require_one_set([part.name for part in parts], str(source.path), key)
    else:
        files = _split_files(source, base, task).get("train", [])
        parts = [local_part(file) for file in files]
    if not parts:
        raise file_problem(str(source.path), "has no train split", key=key)
    return PartStream(parts, layout_of(source), lenient=source.drops_rows)


def layout_of(source: Source) -> Layout:
    """How a source's files are written."""
    broken = "error" if source.stream else source.broken_rows or "error"
    return Layout(source.delimiter, source.quoting, source.columns, broken)


def layout_of_new_rows(source: Source | None) -> tuple[Layout, Mapping[str, str]]:
    """How rows to predict are written, and other names for their fields, by the source of their task.

    They are files like those of the task, without labels as a rule: a file may have a header where the
    task's own have none, and its fields may have the other names already.
    """
    if source is None:
        return BY_ENDING, {}
    layout = replace(layout_of(source), broken_rows="error", of_new_rows=True)
    if isinstance(layout.columns, Mapping):
        return replace(layout, columns=None), layout.columns
    return layout, {}


def split_fingerprint(source: Source, split: str, *, base: Path, task: str) -> str | None:
    """A hash of what one split's rows are read from, without reading them as rows.

    Raises:
        UsageError: the source does not exist or cannot be reached.
    """
    if source.hub is not None:
        if split not in available_splits(source, base=base, task=task):
            return None
        content = f"{hub_builder(source).hash} {source.splits} {split}"
    elif source.layout is not None:
        rows = read_split(source, split, base=base, task=task)
        return None if rows is None else rows.fingerprint
    elif source.stream and split == "train":
        content = stream_of(source, base=base, task=task).fingerprint
    else:
        files = _split_files(source, base, task).get(split)
        if files is None:
            return None
        try:
            content = " ".join(map(_file_fingerprint, files))
        except OSError as error:
            raise file_problem(files[0], f"cannot be read: {error.strerror}") from None
    chosen = f"{source.task_column} {source.task_names} {source.task}"
    if layout_of(source) != BY_ENDING:  # otherwise as before there were layouts: runs remember it
        chosen += f" {layout_of(source)}"
    return fingerprint(f"{content} {chosen}".encode())


def _file_fingerprint(file: Path) -> str:
    """Of a file's bytes, which are read again where it was written to since."""
    known = file.stat()
    return _fingerprint_of(file, known.st_mtime_ns, known.st_size, known.st_ino)


@lru_cache(maxsize=64)
def _fingerprint_of(file: Path, changed: int, size: int, number: int) -> str:
    return print_of(file)


def tasks_in(source: Source, *, base: Path, task: str) -> tuple[str, ...]:
    """The tasks that a source with a task column stands for.

    Raises:
        UsageError: it has no train split, or a row's task is not known.
    """
    if source.task_names is not None:
        return tuple(dict.fromkeys(source.task_names.values()))
    return tuple(_by_task(source.model_dump_json(exclude={"task"}), "train", base, task))


def untrained_in(source: Source, *, base: Path, task: str) -> dict[str, tuple[str, int]]:
    """Tasks of a task column that stand in validation or test alone: their split, and its rows of them.

    Raises:
        UsageError: a row's task is not known.
    """
    if source.task_column is None or source.task_names is not None:
        return {}
    whole = source.model_dump_json(exclude={"task"})
    trained = _by_task(whole, "train", base, task)
    return {
        name: (split, len(rows.rows))
        for split in ("validation", "test")
        for name, rows in _by_task(whole, split, base, task).items()
        if name not in trained
    }


_MOST_SPLITS = 4  # of files with a task column that are kept


_split_rows: dict[tuple[str, str, Path], dict[str, Rows]] = {}


def _by_task(source_json: str, split: str, base: Path, task: str) -> dict[str, Rows]:
    """Read a file with a task column once for all of its tasks; `task` is for errors alone."""
    key = (source_json, split, base)
    if key not in _split_rows:
        rows = _read_by_task(source_json, split, base, task)
        while len(_split_rows) >= _MOST_SPLITS:
            del _split_rows[next(iter(_split_rows))]
        _split_rows[key] = rows
    return _split_rows[key]


def _read_by_task(source_json: str, split: str, base: Path, task: str) -> dict[str, Rows]:
    source = Source.model_validate_json(source_json)
    column, names = str(source.task_column), source.task_names
    whole = source.model_copy(update={"task_column": None, "task_names": None, "task": None})
    rows = read_split(whole, split, base=base, task=task)
    if rows is None:
        return {}
    spelled = None if names is None else {str(value): name for value, name in names.items()}
    return split_by_column(rows, column, spelled)


def available_splits(source: Source, *, base: Path, task: str) -> tuple[str, ...]:
    """Which of train, validation and test the source has.

    Raises:
        UsageError: the source does not exist, cannot be reached, or is a folder that has none.
    """
    if source.layout is not None:
        return tuple(
            split for split in SPLITS if read_split(source, split, base=base, task=task) is not None
        )
    if source.hub is not None:
        known = source.splits or hub_builder(source).info.splits
    else:
        known = _split_files(source, base, task)
        if source.stream:
            known = {"train": [], **known}
    return tuple(split for split in SPLITS if split in known)


def resolve(source: Source, *, base: Path) -> Source:
    """The same source with an absolute path, to be read from elsewhere than beside its recipe."""
    if source.path is None or is_address(source.path):
        return source
    # Not Path.resolve(): a link stays a link, so that the data behind it may move.
    return source.model_copy(update={"path": os.path.abspath(base / source.path)})  # noqa: PTH100


def without_test(source: Source, *, base: Path, task: str) -> Source:
    """The same rows for training and validation, and no test split: nobody can open its files.

    Raises:
        UsageError: the source does not exist or cannot be reached.
    """
    return without(source, "test", base=base, task=task)


def without(source: Source, split: str, *, base: Path, task: str) -> Source:
    """The same source with all splits but one, named.

    Raises:
        UsageError: the source does not exist or cannot be reached.
    """
    if source.splits is not None:
        known: dict[Any, str] = dict(source.splits)
    elif source.hub is not None:
        known = {one: one for one in available_splits(source, base=base, task=task)}
    else:
        root = root_of(source, base, task)
        known = {
            one: _pattern([file.relative_to(root).as_posix() for file in own])
            for one, own in _split_files(source, base, task).items()
        }
    kept = {one: known[one] for one in SPLITS if one in known and one != split}
    return source.model_copy(update={"splits": kept})


def _pattern(names: list[str]) -> str:
    """What matches the parts of a split; a single file's name as it stands."""
    start = os.path.commonprefix(names)  # noqa: RUF071 - of names, not of paths
    return start if len(names) == 1 else f"{glob.escape(start)}*{Path(names[0]).suffix}"


def split_by_column(rows: Rows, column: str, names: Mapping[str, str] | None) -> dict[str, Rows]:
    """The rows of each task, where a column says which task a row belongs to.

    Args:
        column: its values are integers or strings.
        names: a value, as a string, to the task's name; None: the value is the name.

    Returns:
        The tasks in the order in which they first appear; their rows in the order of the file.

    Raises:
        UsageError: a row has no such column, or a value that is not in `names`.
    """
    members: dict[str, list[int]] = {}
    expected = "a task's id or name" if names is None else f"one of {', '.join(names)}"
    for index, row in enumerate(rows.rows):
        value = row.get(column)
        task = str(value) if type(value) in (int, str) else ""
        if names is not None:
            whole = _WHOLE.fullmatch(str(value))  # pandas writes 1.0 for 1 beside an empty cell
            task = names.get(task, names.get(whole[1], "") if whole else "")
        if not task:
            received = f"received {value!r:.60}" if column in row else "the row does not have it"
            raise UsageError(f"{rows.where(index)}: {column}: expected {expected}, {received}")
        if not NAME.fullmatch(task):  # it names folders, when it is merged
            raise UsageError(
                f"{rows.where(index)}: {column}: '{task:.60}' cannot be a task's name: letters, digits, "
                "'.', '_' and '-', the first a letter or a digit, 80 at most; give such values names in "
                "task_names"
            )
        members.setdefault(task, []).append(index)
    return {task: _selected(rows, indices, task) for task, indices in members.items()}


def _selected(rows: Rows, indices: list[int], task: str) -> Rows:
    numbers = np.asarray(indices, dtype=np.int64)
    return Rows(
        rows=(
            SelectedRows(rows.rows, numbers)
            if isinstance(rows.rows, Lazy)
            else [rows.rows[index] for index in indices]
        ),
        file=rows.file,
        fingerprint=fingerprint(f"{rows.fingerprint} {task} {indices}".encode()),
        places=(
            SelectedPlaces([rows.places], numbers)
            if isinstance(rows.rows, Lazy)
            else [rows.places[index] for index in indices]
        ),
        notes=rows.notes,
    )


def _split_files(source: Source, base: Path, task: str) -> dict[str, list[Path]]:
    """The files of each split that a sample, file or folder has; of a stream at an address those not learned."""
    key = f"source of task '{task}'"
    if source.stream and is_address(str(source.path)):
        return _held_out_files(source, base, task, key)
    root = root_of(source, base, task)
    try:
        if root.is_file() and not source.splits:
            return {"train": [root]}
        if root.is_file():
            raise file_problem(root, "'splits' goes with a folder, received a file", key=key)
        if not root.is_dir():
            raise file_problem(root, "no such file or folder", key=key)
        if source.splits:
            return {
                split: matching(root, pattern, f"{key}: splits.{split}")
                for split, pattern in source.splits.items()
            }
        return splits_of(root, key)
    except OSError as error:
        raise file_problem(root, f"cannot be read: {error.strerror}", key=key) from None


def _held_out_files(source: Source, base: Path, task: str, key: str) -> Splits:
    """Validation and test files of a stream at an address, which are copied whole."""
    learned = frozenset(part.name for part in stream_of(source, base=base, task=task).parts)
    root = copied(str(source.path), key, learned)
    others = {split: name for split, name in (source.splits or {}).items() if split != "train"}
    if others:
        return {
            split: matching(root, name, f"{key}: splits.{split}") for split, name in others.items()
        }
    there = root.is_dir() and any(ending(one) for one in root.rglob("*"))
    return splits_of(root, key) if there and not source.splits else {}


def root_of(source: Source, base: Path, task: str) -> Path:
    """The file or folder that a source's rows lie in; what lies elsewhere is copied first.

    Raises:
        UsageError: there is no such sample, or an address cannot be reached.
    """
    if source.sample is not None:
        return _sample(source.sample, task)
    if is_address(str(source.path)):
        return copied(str(source.path), f"source of task '{task}'")
    return base / str(source.path)


def _sample(name: str, task: str) -> Path:
    samples = bundled("data_templates") / "samples"
    if not (samples / name).is_dir():
        known = sorted(each.name for each in samples.glob("*") if each.is_dir())
        hint = did_you_mean(name, known) or f"; known samples: {', '.join(known) or 'none'}"
        raise UsageError(f"source of task '{task}': unknown sample '{name}'{hint}")
    return samples / name

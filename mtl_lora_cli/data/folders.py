"""The files of each split in a folder: by their names, by folders', or as `datasets` saves them.

The layouts are those in which data sets are passed on: one file a split; numbered parts, as on the
hub; a folder for each split; `save_to_disk` of a `Dataset` or a `DatasetDict`; and any of these in
the one folder below, as the hub's `data/`, or a snapshot of its cache.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtl_lora_cli.data.file_formats import KNOWN, ending
from mtl_lora_cli.errors import file_problem
from mtl_lora_cli.recipe.source import SPLITS

Splits = dict[str, list[Path]]

_NAMES = {name: name for name in SPLITS} | dict.fromkeys(("valid", "val", "dev"), "validation")
# The hub's own files are parts, such as `train-00000-of-00002.parquet`.
_SPLIT_FILE = re.compile(rf"({'|'.join(_NAMES)})(?:-\d+-of-(\d+)(?:-\w+)?)?\..+")
_DICT, _STATE = "dataset_dict.json", "state.json"  # what `save_to_disk` writes beside the rows
_DEPTH = 4  # folders below that are looked into


def splits_of(folder: Path, key: str) -> Splits:
    """The files of each split that a folder has.

    Args:
        folder: it exists.
        key: the source's, for errors.

    Raises:
        UsageError: there are none, or it is not clear which.
    """
    found = _found_in(folder, key)
    below = [] if found else _data_sets(folder, _DEPTH)
    if not found and len(below) == 1:
        found = _found_in(below[0], key)
    if found:
        return found
    names = ", ".join(sorted(file.name for file in folder.iterdir())[:5]) or "an empty folder"
    expected = f"train.*, validation.* or test.* with the ending {KNOWN}"
    message = f"expected {expected}; received {names}"
    if below:
        several = ", ".join(str(one.relative_to(folder)) for one in below[:5])
        message = f"holds several data sets: {several}; name one: path: {below[0]}"
    raise file_problem(folder, message, key=key)


def split_of(name: str) -> str | None:
    """The split that a file belongs to by its own name, or by that of the folder in which it lies."""
    path = Path(name)
    named = _SPLIT_FILE.fullmatch(path.name)
    if named and ending(path):
        return _NAMES[named[1]]
    return _NAMES.get(path.parent.name) if ending(path) else None


def require_one_set(files: Sequence[str], place: str, key: str) -> None:
    """Refuse files of one split that are of several data sets, or numbered parts of which some are missing.

    Args:
        files: their paths.
        place: where they lie, and `key` the source's, for errors.

    Raises:
        UsageError: which were found.
    """
    folders = sorted({str(Path(file).parent) for file in files})
    if len(folders) > 1:
        raise file_problem(
            place, f"holds several data sets: {', '.join(folders[:5])}; name one", key=key
        )
    named = [_SPLIT_FILE.fullmatch(Path(file).name) for file in files]
    told = {len(files) if one is None else int(one[2] or 1) for one in named}
    if told - {len(files)}:
        received = ", ".join(Path(file).name for file in files[:5])
        message = f"expected one file for train, or all its numbered parts; received {received}"
        raise file_problem(place, message, key=key)


def matching(folder: Path, pattern: str, key: str) -> list[Path]:
    """The file or folder of that name, else all files that match the pattern, in order of name.

    Raises:
        UsageError: there are none.
    """
    if (folder / pattern).is_file():
        return [folder / pattern]
    if (folder / pattern).is_dir():
        files = _rows_in(folder / pattern, key)
        if not files:
            expected = f"with the ending {KNOWN}"
            raise file_problem(folder / pattern, f"holds no files {expected}", key=key)
        return files
    absolute = str(Path(glob.escape(str(folder))) / pattern)  # a pattern may start at the root
    found = sorted(glob.glob(absolute, recursive=True))  # noqa: PTH207
    files = [Path(match) for match in found if Path(match).is_file()]
    if not files:
        raise file_problem(folder, f"no file matches '{pattern}'", key=key)
    return files


def _data_sets(folder: Path, depth: int) -> list[Path]:
    """The folders below that hold splits, none of them within another one."""
    found = []
    for below in sorted(folder.iterdir()) if depth else ():
        if below.is_dir() and not below.name.startswith("."):
            found += [below] if _found_in(below, "") else _data_sets(below, depth - 1)
    return found


def _found_in(folder: Path, key: str) -> Splits:
    """Splits by what lies in this very folder; none where nothing has their names."""
    if (folder / _DICT).is_file():
        names = _json(folder / _DICT, "splits", key)
        known = {_NAMES[name]: _saved(folder / name, key) for name in names if name in _NAMES}
        if not known:
            message = f"its splits are {', '.join(names)}; say which is which: splits: {{train: …}}"
            raise file_problem(folder, message, key=key)
        return known
    if (folder / _STATE).is_file():
        return {"train": _saved(folder, key)}
    splits: Splits = {}
    parts: dict[str, set[int]] = {}  # how many files a split has, as its files' names tell it
    for path in sorted(folder.iterdir()):
        named = _SPLIT_FILE.fullmatch(path.name)
        if named and ending(path) and path.is_file():
            splits.setdefault(_NAMES[named[1]], []).append(path)
            parts.setdefault(_NAMES[named[1]], set()).add(int(named[2] or 1))
        elif path.name in _NAMES and path.is_dir() and (files := _rows_in(path, key)):
            splits.setdefault(_NAMES[path.name], []).extend(files)
            parts.setdefault(_NAMES[path.name], set()).add(len(files))
    for split, files in splits.items():
        if parts[split] != {len(files)}:
            received = ", ".join(str(file.relative_to(folder)) for file in files[:5])
            expected = f"expected one file for {split}, or all its numbered parts"
            raise file_problem(folder, f"{expected}; received {received}", key=key)
    return splits


def _rows_in(folder: Path, key: str) -> list[Path]:
    """All files of rows in the folder of one split, of one format."""
    if (folder / _STATE).is_file():
        return _saved(folder, key)
    files = [path for path in sorted(folder.iterdir()) if ending(path) and path.is_file()]
    if len({ending(path) for path in files}) > 1:
        names = ", ".join(path.name for path in files[:5])
        raise file_problem(folder, f"expected files of one format, received {names}", key=key)
    return files


def _saved(folder: Path, key: str) -> list[Path]:
    """The Arrow files of a `Dataset`, in order."""
    state = folder / _STATE
    files = [folder / str(one["filename"]) for one in _json(state, "_data_files", key)]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise file_problem(state, f"names {missing[0]}, which is not there", key=key)
    return files


def _json(path: Path, name: str, key: str) -> list[Any]:
    """A list in a file that `datasets` wrote."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("_indices_files") or content.get("_indices_data_files"):
            message = "an order of rows is saved beside them; load it and save_to_disk it again"
            raise file_problem(path, message, key=key)
        return list(content[name])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise file_problem(path, f"is not what save_to_disk writes: no {name}", key=key) from None

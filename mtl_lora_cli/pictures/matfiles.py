"""MATLAB files: version 5 by SciPy, version 7.3 (HDF5) by h5py, where that is installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

Fault = Callable[[str], Exception]
PERSON_PARTS = "person parts"  # in the place of a variable's name: those of PASCAL-Part
_PERSON = 15  # class of people there
_PARTS = {
    **dict.fromkeys(
        ("hair", "head", "lear", "lebrow", "leye", "mouth", "nose", "rear", "rebrow", "reye"), 1
    ),
    **dict.fromkeys(("neck", "torso"), 2),
    **dict.fromkeys(("luarm", "ruarm"), 3),
    **dict.fromkeys(("llarm", "rlarm", "lhand", "rhand"), 4),
    **dict.fromkeys(("luleg", "ruleg"), 5),
    **dict.fromkeys(("llleg", "rlleg", "lfoot", "rfoot"), 6),
}


def read_mat(path: Path, inside: str, fault: Fault) -> np.ndarray:
    """One array of a file, or one part of it.

    Args:
        path: of the file.
        inside: a variable's name, `NAME/INDEX` for one of those along the last axis (MATLAB counts columns
            first, so in HDF5 that axis is the first, and its parts come transposed), or "" where the file
            has one variable.
        fault: makes an error of a message.

    Raises:
        what `fault` makes: there is no such variable or part, or h5py is missing.
    """
    if inside == PERSON_PARTS:
        return _person_parts(path, fault)
    name, _, number = inside.partition("/")
    if number and not number.isdigit():
        raise fault(f"{path.name}: '{inside}': expected NAME or NAME/INDEX")
    with path.open("rb") as file:
        new = file.read(19).startswith(b"MATLAB 7.3") or _is_hdf5(path)
    return (_hdf5 if new else _version_5)(path, name, number, fault)


def _is_hdf5(path: Path) -> bool:
    with path.open("rb") as file:
        if file.read(8) == b"\x89HDF\r\n\x1a\n":
            return True
        file.seek(512)  # MATLAB's own header stands before it
        return file.read(8) == b"\x89HDF\r\n\x1a\n"


def _version_5(path: Path, name: str, number: str, fault: Fault) -> np.ndarray:
    content = _content(path, name, path.stat().st_mtime_ns, fault)
    known = [one for one in content if not one.startswith("__")]
    array = np.asarray(content[_one_of(known, name, path, fault)])
    if not number:
        return array
    return np.asarray(array[..., _within(int(number), array.shape[-1], path, name, fault)])


@lru_cache(maxsize=2)  # one array of all pictures is read once, and not for each of them
def _loaded(path: Path, name: str, changed: int) -> dict[str, Any]:
    from scipy.io import loadmat

    found: dict[str, Any] = loadmat(path, variable_names=[name] if name else None)
    return found


def _content(path: Path, name: str, changed: int, fault: Fault) -> dict[str, Any]:
    try:
        return _loaded(path, name, changed)
    except Exception as error:  # of several kinds, by no single base class
        raise fault(f"{path.name}: broken or cut off: {error!s:.120}") from None


def _person_parts(path: Path, fault: Fault) -> np.ndarray:
    """Parts of the people in one file of PASCAL-Part, uint8 [H, W]: 0 elsewhere, 1 to 6 as in `_PARTS`.

    Its `anno` holds objects, each with a class, a mask and parts, each of those with a name and a mask.
    """
    content = _content(path, "anno", path.stat().st_mtime_ns, fault)
    try:
        objects = content["anno"][0, 0]["objects"][0]
        found = np.zeros(np.shape(objects[0]["mask"]), dtype=np.uint8)
        for one in objects:
            if int(np.squeeze(one["class_ind"])) == _PERSON and np.size(one["parts"]):
                for part in one["parts"][0]:
                    number = _PARTS.get(str(np.squeeze(part["part_name"])), 0)
                    if number:
                        found[part["mask"].astype(bool)] = number
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise fault(f"{path.name}: is no annotation of PASCAL-Part: {error!s:.80}") from None
    return found


def _hdf5(path: Path, name: str, number: str, fault: Fault) -> np.ndarray:
    try:
        import h5py
    except ImportError:
        raise fault(
            f"{path.name}: is MATLAB 7.3 (HDF5), which needs h5py: pip install 'mtl-lora[hdf5]'"
        ) from None
    try:
        with h5py.File(path, "r") as file:
            known = [one for one in file if not one.startswith("#")]
            found = file[_one_of(known, name, path, fault)]
            if not number:
                return np.asarray(found).T
            return np.asarray(found[_within(int(number), len(found), path, name, fault)]).T
    except OSError as error:
        raise fault(f"{path.name}: broken or cut off: {error!s:.120}") from None


def _one_of(known: list[str], name: str, path: Path, fault: Fault) -> str:
    if name in known:
        return name
    if not name and len(known) == 1:
        return known[0]
    wanted = f"'{name}'" if name else "one variable"
    raise fault(f"{path.name}: has {', '.join(known) or 'nothing'}, expected {wanted}")


def _within(number: int, size: int, path: Path, name: str, fault: Fault) -> int:
    if number >= size:
        raise fault(f"{path.name}: '{name}' has {size} parts, received {number}, counted from 0")
    return number

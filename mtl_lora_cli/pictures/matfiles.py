"""MATLAB files: version 5 by SciPy, version 7.3 (HDF5) by h5py, where that is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

Fault = Callable[[str], Exception]


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
    from scipy.io import loadmat

    try:
        content = loadmat(path, variable_names=[name] if name else None)
    except Exception as error:  # of several kinds, by no single base class
        raise fault(f"{path.name}: broken or cut off: {error!s:.120}") from None
    known = [one for one in content if not one.startswith("__")]
    array = np.asarray(content[_one_of(known, name, path, fault)])
    if not number:
        return array
    return np.asarray(array[..., _within(int(number), array.shape[-1], path, name, fault)])


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


def mat_length(path: Path, name: str, fault: Fault) -> int:
    """How many parts a variable of an HDF5 file has.

    Raises:
        what `fault` makes: as `read_mat`.
    """
    try:
        import h5py
    except ImportError:
        raise fault(
            f"{path.name}: is MATLAB 7.3 (HDF5), which needs h5py: pip install 'mtl-lora[hdf5]'"
        ) from None
    try:
        with h5py.File(path, "r") as file:
            return len(file[_one_of(list(file), name, path, fault)])
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

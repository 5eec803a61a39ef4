"""Arrays that are larger than memory: they grow in files without a name, and are read as maps of one file.

The file is safetensors', whose format is its documentation: the length of a header in 8 bytes, the header as
JSON, and the arrays behind each other. What is mapped costs no memory of its own, and all processes of a
host share it.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.runs.paths import ANOTHER_CACHE

_IN_MEMORY = (
    2**22
)  # bytes of an array up to which no file is made, and of a file that is read, not mapped
_BLOCK = 2**26  # bytes that are written together
_TYPES = {"U64": np.uint64, "I64": np.int64, "I32": np.int32, "BOOL": np.bool_}
_NAMES = {np.dtype(kind): name for name, kind in _TYPES.items()}


class Parts:
    """Arrays that grow part by part. A process that is killed leaves nothing of them behind.

    Args:
        folder: where their files lie; if nothing can be written there, where other temporary files do.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {}
        self._kinds: dict[str, np.dtype[Any]] = {}
        self._sizes: dict[str, int] = {}

    def add(self, name: str, values: np.ndarray) -> None:
        """The next part of an array.

        Raises:
            UsageError: there is no room for it on the disk.
        """
        if name not in self._files:
            self._kinds[name], self._sizes[name] = values.dtype, 0
            place = str(self._place() or tempfile.gettempdir())
            self._files[name] = tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=place)  # noqa: SIM115 - it stays open
        try:
            self._files[name].write(np.ascontiguousarray(values).data)
        except OSError as error:
            raise UsageError(
                f"{self._place() or tempfile.gettempdir()}: encoded data cannot be written: "
                f"{error.strerror}; {ANOTHER_CACHE}"
            ) from None
        self._sizes[name] += values.nbytes

    def array(self, name: str) -> np.ndarray:
        """All of it, mapped where it is large; it has been added to."""
        file, kind = self._files[name], self._kinds[name]
        file.flush()
        if self._sizes[name] > _IN_MEMORY:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), kind)
        file.seek(0)
        content = file.read()
        return np.frombuffer(content, kind)

    def _place(self) -> Path | None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return None
        return self._folder if os.access(self._folder, os.W_OK) else None


def write(path: Path, arrays: Mapping[str, np.ndarray], about: str) -> None:
    """Write arrays as one safetensors file, whole or not at all.

    Args:
        path: of the file.
        arrays: unsigned or signed integers of 64 bits, of 32, and bool.
        about: text that is kept with them.

    Raises:
        OSError: it cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"about": about}}
    ordered = sorted(arrays.items(), key=lambda one: -one[1].dtype.itemsize)  # all are aligned so
    end = 0
    for name, values in ordered:
        start, end = end, end + values.nbytes
        kind, shape = _NAMES[values.dtype], list(values.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, values in ordered:
                _copy(np.ascontiguousarray(values), file)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _copy(values: np.ndarray, file: IO[bytes]) -> None:
    """Write an array; what of it is mapped does not stay in this process's memory."""
    content = values.reshape(-1).data.cast("B")
    for start in range(0, len(content), _BLOCK):
        file.write(content[start : start + _BLOCK])
        let_go(values)


def let_go(values: np.ndarray) -> None:
    """Take an array out of this process's memory where it is mapped: it is read again when it is asked for."""
    base: Any = values
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    if isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)


def read(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """What `write` wrote: the text, and the arrays, which cannot be changed.

    Raises:
        OSError: there is no such file.
        ValueError: it is damaged.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError("no header")
        header = json.loads(file.read(length))
        about = str(header.pop("__metadata__")["about"])
        first = 8 + length
        if max((one["data_offsets"][1] for one in header.values()), default=0) != size - first:
            raise ValueError("not whole")
        content: bytes | mmap.mmap
        if size > _IN_MEMORY:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        else:
            file.seek(0)
            content = file.read()
    found = {}
    for name, one in header.items():
        kind = np.dtype(_TYPES[one["dtype"]])
        count, offset = int(np.prod(one["shape"])), first + one["data_offsets"][0]
        values = np.frombuffer(content, kind, count, offset) if count else np.empty(0, kind)
        found[name] = values.reshape(one["shape"])
    return about, found

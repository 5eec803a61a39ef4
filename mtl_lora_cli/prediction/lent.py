"""Memory that a lane writes and the model's process reads: what rows became is there without a copy through a pipe.

The model's thread would wait for Python's lock meanwhile, at each of the thousand kernels of a pass.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Sequence
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, NamedTuple

import numpy as np

_STEP = 2**20  # bytes, by which it grows
_ALIGNED = 64  # bytes


class Place(NamedTuple):
    """Where an array lies: its first byte, its shape and its type."""

    first: int
    shape: tuple[int, ...]
    kind: str


class New(NamedTuple):
    """To the model's process: the handle of further memory comes next."""


class Lent:
    """A lane's side.

    Args:
        end: of the pipe to the model's process, which is told of it.
        number: of this memory among the lane's.
    """

    def __init__(self, end: Any, number: int) -> None:
        self.number, self.size = number, 0
        self._handle = _anonymous()
        self._map: mmap.mmap | None = None
        end.send(New())
        send_handle(end, self._handle, None)

    def fill(self, arrays: Sequence[np.ndarray]) -> list[Place]:
        """Write arrays, in the place of those before."""
        places, first = [], 0
        for array in arrays:
            places.append(Place(first, array.shape, array.dtype.str))
            first += -(-array.nbytes // _ALIGNED) * _ALIGNED
        if first > self.size or self._map is None:
            self.size = max(1, -(-first // _STEP)) * _STEP
            os.ftruncate(self._handle, self.size)
            self._map = mmap.mmap(self._handle, self.size)
        for array, place in zip(arrays, places, strict=True):
            _view(self._map, place)[...] = array
        return places


class Borrowed:
    """The model's side.

    Args:
        end: of the pipe from the lane, which has sent `New`.

    Raises:
        EOFError, OSError: the lane has ended, or this process has too many files open.
    """

    def __init__(self, end: Any) -> None:
        try:
            self._handle = recv_handle(end)
        except RuntimeError as error:  # the handle was taken off the message
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE)) from error
        self._map: mmap.mmap | None = None

    def arrays(self, places: Sequence[Place], size: int) -> list[np.ndarray]:
        """What the lane has written there; it writes nothing else before it has its answer."""
        if self._map is None or len(self._map) != size:
            self._map = mmap.mmap(self._handle, size)
        return [_view(self._map, place) for place in places]

    def close(self) -> None:
        """Let go."""
        self._map = None  # unmapped with the last array in it
        os.close(self._handle)


def _view(memory: mmap.mmap, place: Place) -> np.ndarray:
    return np.ndarray(place.shape, place.kind, memory, place.first)


def _anonymous() -> int:
    """A file without a name: it goes with the last process that has it, however that ends."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("rows")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())

"""Weights read straight onto a card: several pieces of a tensor at a time, each through pinned memory.

transformers maps a file and lets the driver copy pages as they come, in as many threads as it loads tensors, and
in one where it quantises them. Here the system's cache is read by calls that need no lock of Python's, and the
card takes one piece while the next ones are read. What becomes of a tensor stays transformers' matter: it asks for
one after another, casts, stacks and quantises it, so that a model that is quantised never lies there whole.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_THREADS = 8
_PIECE = 2**24  # bytes; each thread has so much pinned memory
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@contextmanager
def straight_to(device: torch.device) -> Iterator[None]:
    """Inside, transformers reads safetensors onto a card in this way; for a CPU nothing is another: it maps them."""
    if device.type != "cuda":
        yield
        return
    with reading_to(device):
        yield


@contextmanager
def reading_to(device: torch.device) -> Iterator[None]:
    """The same, whatever the device."""
    from transformers import modeling_utils

    own: Any = modeling_utils.safe_open
    with _Reader(device) as reader:
        modeling_utils.safe_open = partial(_Opened, own, reader)  # type: ignore[misc,assignment]
        try:
            yield
        finally:
            modeling_utils.safe_open = own  # type: ignore[misc]


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes lie."""

    path: str
    start: int
    size: int


class _Opened:
    """safetensors' open file, whose tensors are read by `_Reader`."""

    def __init__(self, own: Any, reader: _Reader, path: str | Path, **named: Any) -> None:
        self._file, self._reader = own(path, **named), reader
        self._places = _places(str(path))

    def __enter__(self) -> _Opened:
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_slice(self, name: str) -> Any:
        """A tensor that is read when it is asked for."""
        own = self._file.get_slice(name)
        place = self._places.get(name)
        dtype = _DTYPES.get(own.get_dtype())
        if place is None or dtype is None:
            return own
        return _Slice(own, partial(self._reader.read, place, tuple(own.get_shape()), dtype))


class _Slice:
    """safetensors' own, but for all of it."""

    def __init__(self, own: Any, whole: Any) -> None:
        self._own, self._whole = own, whole

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def __getitem__(self, index: Any) -> Tensor:
        found: Tensor = self._whole() if index is Ellipsis else self._own[index]
        return found


class _Reader:
    """Reads tensors onto a card."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._own = device, threading.local()
        self._pool = ThreadPoolExecutor(_THREADS, "weights")
        self._files: dict[str, int] = {}
        self._opening = threading.Lock()

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        for file in self._files.values():
            os.close(file)

    def read(self, place: _Place, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor on the card.

        Raises:
            OSError: the file ends within it.
        """
        whole = torch.empty(shape, dtype=dtype, device=self._device)
        free = None
        if whole.is_cuda:  # its memory was somebody else's before
            free = torch.cuda.current_stream(self._device).record_event()
        target = whole.reshape(-1).view(torch.uint8)
        file = self._opened(place.path)
        pieces = range(0, place.size, _PIECE)
        work = [
            self._pool.submit(self._piece, file, place.start + at, target[at : at + _PIECE], free)
            for at in pieces
        ]
        for one in work:
            one.result()
        return whole

    def _piece(self, file: int, start: int, target: Tensor, free: torch.cuda.Event | None) -> None:
        """Some bytes of a file to their place on the device, waited for."""
        if free is None:
            _read(file, start, target)
            return
        pinned, stream = self._of_thread()
        _read(file, start, pinned[: target.numel()])
        with torch.cuda.stream(stream):
            stream.wait_event(free)
            target.copy_(pinned[: target.numel()], non_blocking=True)
        stream.synchronize()

    def _of_thread(self) -> tuple[Tensor, torch.cuda.Stream]:
        """This thread's pinned memory and stream."""
        if not hasattr(self._own, "pinned"):
            self._own.pinned = torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True)
            self._own.stream = torch.cuda.Stream(self._device)
        return self._own.pinned, self._own.stream

    def _opened(self, path: str) -> int:
        with self._opening:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY)
            return self._files[path]


def _read(file: int, start: int, target: Tensor) -> None:
    """Fill memory, uint8 [bytes], from a place in a file on.

    Raises:
        OSError: the file ends before.
    """
    left = target.numpy().data
    while left:
        count = os.preadv(file, [left], start)
        if not count:
            raise OSError(f"a weights file ends before its tensors do, at byte {start}")
        left, start = left[count:], start + count


def _places(path: str) -> dict[str, _Place]:
    """Where the tensors of a safetensors file lie; nothing of what is no such file."""
    with (
        suppress(OSError, ValueError, KeyError, TypeError, AttributeError),
        Path(path).open("rb") as file,
    ):
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {
            name: _Place(
                path,
                8 + length + one["data_offsets"][0],
                one["data_offsets"][1] - one["data_offsets"][0],
            )
            for name, one in header.items()
        }
    return {}

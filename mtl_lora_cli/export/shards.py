"""safetensors files read and written tensor by tensor, a few rows at a time.

A file is the length of its header (8 bytes, little-endian), the header (JSON: tensor → dtype, shape and
place, places counted from the header's end), and the tensors' bytes without gaps. Plain reads, not a
memory map: mapped pages of the input would count as this process's memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mtl_lora_cli.errors import UsageError

T = TypeVar("T")
# safetensors' names of the dtypes that a weight can be computed in.
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
BLOCK = (
    2**22
)  # bytes that are read, changed and written together; more would not stay in the caches
_LONGEST_HEADER = 10**8  # safetensors' own limit


@dataclass(frozen=True)
class Stored:
    """A tensor where it lies.

    Attributes:
        name, dtype, shape: from the header; the dtype under safetensors' name.
        file: which file.
        start, size: its bytes in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int

    def blocks(self, size: int | None = None) -> Iterator[np.ndarray]:
        """Its bytes in order, `size` at a time (default: a block): uint8 [bytes].

        Each block lies where the one before it lay: new memory for every one would take the system longer than
        reading does.
        """
        size = size or BLOCK
        place = np.empty(min(size, self.size), dtype=np.uint8)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            for start in range(0, self.size, size):
                yield self._read(file, place[: min(size, self.size - start)])

    @property
    def rows_in_block(self) -> int:
        """Rows of a matrix [out, in], or of a stack's below each other, that make a block in float32."""
        return max(1, BLOCK // (4 * self.shape[-1]))

    def rows(self) -> Iterator[tuple[int, Tensor]]:
        """The first row's number, and some rows [n, in] in the stored dtype; in order.

        Of a matrix, or of the matrices of a stack below each other.
        """
        dtype, width, step = FLOATS[self.dtype], self.shape[-1], self.rows_in_block
        for number, block in enumerate(self.blocks(step * width * dtype.itemsize)):
            yield number * step, torch.from_numpy(block).view(dtype).view(-1, width)

    def whole(self) -> Tensor:
        """All of it, in the stored dtype."""
        (block,) = self.blocks(self.size)
        return torch.from_numpy(block).view(FLOATS[self.dtype]).view(self.shape)

    def _read(self, file: Any, place: np.ndarray) -> np.ndarray:
        left = place.data
        while left:
            found = file.readinto(left)
            if not found:
                raise UsageError(f"{self.file}: damaged: it ends within tensor '{self.name}'")
            left = left[found:]
        return place


@dataclass(frozen=True)
class Planned:
    """A tensor to write.

    Attributes:
        name, dtype, shape, size: for the header; the size in bytes.
        blocks: gives its bytes in order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    blocks: Callable[[], Iterator[np.ndarray]]


def read_shard(path: Path) -> tuple[list[Stored], dict[str, str]]:
    """The tensors of a file in the order of their bytes, and the header's metadata.

    Raises:
        UsageError: it is no whole safetensors file.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size, _LONGEST_HEADER):
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        found = [
            Stored(
                name,
                entry["dtype"],
                tuple(entry["shape"]),
                path,
                8 + length + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UsageError(f"{path}: no safetensors file: {error}") from None
    found.sort(key=lambda stored: (stored.start, stored.size))
    end = found[-1].start + found[-1].size if found else 8 + length
    if end != size:
        raise UsageError(f"{path}: damaged: {size} bytes, its header tells of {end}")
    return found, metadata


def matrix_dtypes(files: Iterable[Path]) -> set[torch.dtype]:
    """The dtypes of the matrices in safetensors files."""
    matrices = [one for path in files for one in read_shard(path)[0] if len(one.shape) > 1]
    return {FLOATS[one.dtype] for one in matrices if one.dtype in FLOATS}


def planned_size(tensors: Sequence[Planned], metadata: Mapping[str, str]) -> int:
    """Bytes of the file that `write_shards` writes."""
    return len(_header(tensors, metadata)) + sum(tensor.size for tensor in tensors)


@dataclass(frozen=True)
class Shard:
    """A weights file to write.

    Attributes:
        name: of the file.
        tensors: in the order of their bytes.
        metadata: of the header.
    """

    name: str
    tensors: Sequence[Planned]
    metadata: Mapping[str, str]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return planned_size(self.tensors, self.metadata)


def write_shards(folder: Path, shards: Sequence[Shard], threads: int = 1) -> None:
    """Write safetensors files, all of them at once: several threads in one file wait for each other.

    Args:
        folder: where; the files must not exist.
        shards: the files.
        threads: so many tensors are made and written beside each other.
    """
    with ExitStack() as opened:
        work = []
        for shard in shards:
            file = opened.enter_context((folder / shard.name).open("xb", buffering=0))
            work.append(_tensors_of(shard, file.fileno()))
        in_turns = [one for some in zip_longest(*work) for one in some if one is not None]
        beside_each_other(in_turns, threads)


def _tensors_of(shard: Shard, file: int) -> list[Callable[[], None]]:
    """Write a file's header; what writes its tensors, one after another."""
    header = _header(shard.tensors, shard.metadata)
    _put(file, np.frombuffer(header, dtype=np.uint8), 0)
    work: list[Callable[[], None]] = []
    place = len(header)
    for tensor in shard.tensors:
        work.append(partial(_put_tensor, file, tensor, place))
        place += tensor.size
    return work


def beside_each_other(work: Sequence[Callable[[], T]], threads: int) -> list[T]:
    """What pieces of work give, in their order; as soon as one fails, no other is begun.

    Args:
        work: torch computes each in one thread.
        threads: so many at a time.
    """
    if threads <= 1:
        return [one() for one in work]
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        begun = [pool.submit(one) for one in work]
        return [one.result() for one in begun]
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # the pool's own number is that of later threads, too


def as_bytes(tensor: Tensor) -> np.ndarray:
    """A tensor's bytes in memory order, uint8 [bytes]."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def _header(tensors: Sequence[Planned], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.size],
        }
        start += tensor.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text


def _put_tensor(file: int, tensor: Planned, place: int) -> None:
    """Write a tensor at its place in an open file."""
    end = place
    for block in tensor.blocks():
        end = _put(file, block, end)
    assert end - place == tensor.size, f"{tensor.name}: {end - place} bytes of {tensor.size}"


def _put(file: int, block: np.ndarray, place: int) -> int:
    """Write bytes at a place in an open file; gives where they end."""
    left = block.data
    while left:
        done = os.pwrite(file, left, place)
        left, place = left[done:], place + done
    return place

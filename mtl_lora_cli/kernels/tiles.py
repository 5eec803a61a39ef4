"""Which tile of which segment each program of the attention kernels works on, and in what shape.

Plain numpy and torch: tables are built on the CPU, by the process that packs, where Triton need not
be installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

COLUMNS = 3
"""first position of the tile, start and end of its segment."""

LARGEST_DIM = 512
"""The largest head dimension that the kernels take."""


@dataclass(frozen=True)
class Launch:
    """The shape of one kernel's programs.

    Attributes:
        tile: positions whose result a program holds; the `block` of the kernel's tile table.
        step: positions of the other side that it takes in at a time; a divisor of `tile`, so that
            only the blocks on the diagonal need the causal mask.
        warps: warps a program.
        stages: depth of the software pipeline of loads; 1 for none.
        split: two loops, of which only the one on the diagonal masks; otherwise one loop, which
            always masks and never drains its pipeline in between.
    """

    tile: int
    step: int
    warps: int = 4
    stages: int = 2
    split: bool = True

    def __post_init__(self) -> None:
        for name, size in (("tile", self.tile), ("step", self.step)):
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name} must be a power of two from 16, received {size}")
        if self.tile % self.step:
            raise ValueError(f"step {self.step} does not divide tile {self.tile}")


# By the largest head dimension that they serve. Segments are short, so that tiles of 128 would mostly
# be mask, and registers limit how many programs a multiprocessor holds: steps of 32 and one loop need
# fewer. Chosen by time among eighteen shapes each on an H200 (heads of 64 on an H100), 8192 positions of such
# segments; in µs, and in brackets of segments of 2048, that shape and the next best of two loops:
# forward 128: 88 (363), 141 (380); 256: 72 (172), 79 (415). Backward 128: 217 (999), 235 (1092); 256: 180 (822), 187
# (1000).
# Heads of 512, of four shapes, beside an other job on the card: 0.31 ms forward and 0.90 backward (1.9 and 6.6), in
# torch 4.6 together (30).
_WIDE = Launch(32, 32, split=False)
_WIDEST = Launch(32, 32, warps=8, stages=1, split=False)
_SHARED = 200_000  # bytes a program may have for itself; an H100 has 227 KiB, an A100 163
FORWARD = {
    64: Launch(64, 64),
    128: Launch(64, 32, stages=3, split=False),
    256: Launch(64, 32, split=False),
    512: _WIDEST,
}
QUERY_BACKWARD = {
    64: Launch(64, 32),
    128: Launch(64, 32, split=False),
    256: Launch(64, 16, split=False),
    512: _WIDEST,
}
KEY_BACKWARD = {
    64: Launch(64, 32, split=False),
    128: Launch(64, 32, stages=3, split=False),
    256: _WIDE,
    512: _WIDEST,
}


@cache
def largest_dim() -> int:
    """The largest head dimension that the kernels take on this machine: 512 where a card's shared memory suffices."""
    if not torch.cuda.is_available():
        return LARGEST_DIM
    card = torch.cuda.get_device_properties(torch.cuda.current_device())
    enough = getattr(card, "shared_memory_per_block_optin", 0) >= _SHARED
    return LARGEST_DIM if enough else 256


def check_dim(dim: int) -> None:
    """Raises ValueError where no kernel takes heads of this dimension."""
    if dim < 2 or dim % 2 or dim > LARGEST_DIM:
        raise ValueError(f"head dimension must be even, at most {LARGEST_DIM}, received {dim}")


def launch_for(table: dict[int, Launch], dim: int) -> Launch:
    """The entry for head dimension `dim`; ValueError where no kernel takes it."""
    check_dim(dim)
    return table[min(size for size in table if size >= dim)]


def tile_table(
    lengths: Sequence[int],
    block: int,
    capacity: int | None = None,
    *,
    of_keys: bool = False,
) -> Tensor:
    """The tiles of segments that lie behind each other from position 0.

    Tile i of a segment holds its positions [i·block, (i + 1)·block), cut at the segment's end. Long
    segments come first, so that no long program starts when the others are done, and the tiles of
    one segment stay together, so that they find each other's keys in the cache.

    Args:
        lengths: positions of each segment, S of them.
        block: positions a tile; the `tile` of the kernel's `Launch`.
        capacity: rows of the table; those that no tile fills hold -1 as their first position. At
            most (N + S·(block - 1)) // block are needed for N positions.
        of_keys: tiles of keys, of which the first of a segment has most to do; tiles of queries
            have most to do at its end.

    Returns:
        int32 [tiles or capacity, 3], on the CPU: first position, segment start, segment end.

    Raises:
        ValueError: a length below 1, or more tiles than `capacity`.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"segments must hold at least one position, received {list(lengths)}")
    sizes = np.asarray(lengths, dtype=np.int64)
    ends = sizes.cumsum()
    starts = ends - sizes

    order = np.argsort(-sizes, kind="stable")
    counts = -(-sizes[order] // block)
    segment = order.repeat(counts)
    number = np.arange(len(segment)) - (counts.cumsum() - counts).repeat(counts)
    if not of_keys:
        number = counts.repeat(counts) - 1 - number

    rows = len(segment) if capacity is None else capacity
    if rows < len(segment):
        raise ValueError(f"{len(segment)} tiles of {block} do not fit a table of {rows}")
    table = np.zeros((rows, COLUMNS), dtype=np.int32)
    table[:, 0] = -1
    filled = table[: len(segment)]
    filled[:, 0] = starts[segment] + number * block
    filled[:, 1] = starts[segment]
    filled[:, 2] = ends[segment]
    return torch.from_numpy(table)

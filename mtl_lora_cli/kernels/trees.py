"""Which blocks of a tree meet: what the attention kernels are told of trees beside their tiles.

In a tree (`engine/segments.py`) query i sees key j of its segment where j ≤ i < reach_j. Most blocks of a long
tree hold nothing that a tile sees, so that none may be visited for nothing:

- A tile of *queries* walks up. What any of its queries sees before the tile is an ancestor of its first one.
  From an ancestor, `above` is the last one outside of its block of 16: so blocks that hold no ancestor are
  passed over, and of a block that does it takes a step or two to leave it.
- A tile of *keys* is seen by queries from its own first to the largest reach in it. Those of a trunk are
  seen by a whole tree: its queries are shared out among several programs, *parts*, of which each writes a
  sum of its own in float32; a last kernel adds a tile's sums up, always in the same order.

Plain numpy and torch, as `tiles.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PART_COLUMNS = 5
"""first position of the tile, end of its segment, first and last (excluded) query, slot or -1."""
JOIN_COLUMNS = 4
"""first position of the tile, end of its segment, its first slot, how many slots."""

BLOCK = 16
"""The smallest step of a kernel: larger ones are multiples."""

_PART = 512  # queries of a part, or as many times that as it takes
_POSITIONS = 256  # a slot; see `slots_of`


class Trees(NamedTuple):
    """What the kernels ask of each of N positions; on their device.

    Attributes:
        reach: int32 [N], the first position that no longer sees this one.
        above: int32 [N], the last position that this one sees in an earlier block of `BLOCK`, counted from the
            segment's start; -1: there is none.
        depth: int32 [N], how many it sees before itself.
    """

    reach: Tensor
    above: Tensor
    depth: Tensor


class KeyParts(NamedTuple):
    """Who adds up the gradients of which keys; on the kernels' device.

    Attributes:
        parts: int32 [P, 5], a program each.
        joins: int32 [J, 4], the tiles of several parts.
        slots: how many sums there is room for.
    """

    parts: Tensor
    joins: Tensor
    slots: int


def slots_of(positions: int) -> int:
    """Sums that parts may leave, for so many positions: as much memory as 2 bytes for each of its keys and
    values take, in tiles of 64."""
    return max(4, positions // _POSITIONS)


def parents_of(reach: np.ndarray, bounds: Sequence[tuple[int, int]]) -> np.ndarray:
    """The last position before each that it sees, int32 [N]; -1: there is none.

    Args:
        reach: [N], in depth-first order.
        bounds: start and end of each segment.
    """
    count = len(reach)
    parent = np.arange(-1, count - 1, dtype=np.int32)
    values, firsts = np.unique(reach, return_index=True)
    branch = dict(zip(values.tolist(), firsts.tolist(), strict=True))
    # Where the position before is not seen, a branch ends: its first position and this one have one parent.
    for place in (np.flatnonzero(reach[:-1] <= np.arange(1, count)) + 1).tolist():
        parent[place] = parent[branch[place]]
    starts = [start for start, _ in bounds]
    parent[starts] = -1
    return parent


def above_of(reach: np.ndarray, bounds: Sequence[tuple[int, int]]) -> np.ndarray:
    """`Trees.above`; the arguments are those of `parents_of`."""
    count, parent = len(reach), parents_of(reach, bounds)
    starts, ends = np.asarray(bounds).T
    block = np.arange(count) - (np.arange(count) - np.repeat(starts, ends - starts)) % BLOCK
    # Where a block begins, or a branch, what is above is found; the positions behind it have the same.
    heads = np.flatnonzero((block == np.arange(count)) | (parent != np.arange(-1, count - 1)))
    found = np.empty(len(heads), dtype=np.int32)
    lengths = np.diff([*heads.tolist(), count])
    runs = np.repeat(np.arange(len(heads)), lengths)
    for number, (before, first) in enumerate(
        zip(parent[heads].tolist(), block[heads].tolist(), strict=True)
    ):
        found[number] = before if before < first else found[runs[before]]
    return np.repeat(found, lengths)


def key_parts(
    bounds: Sequence[tuple[int, int]],
    reach: np.ndarray,
    block: int,
    *,
    segments: int | None = None,
) -> KeyParts:
    """The parts of trees that lie behind each other, on the CPU.

    Args:
        bounds: start and end of each segment, N positions in all.
        reach: [N].
        block: keys a tile.
        segments: as many rows as any batch of so many segments needs, those without a part beginning with
            -1; None: no more rows than parts.
    """
    count = bounds[-1][1]
    slots = slots_of(count)
    tiles = _tiles(bounds, reach, block)
    size = _PART
    while True:
        shares = -(-(tiles[:, 2] - tiles[:, 0]) // size)
        if shares[shares > 1].sum() <= slots:
            break
        size *= 2
    parts, joins = _shared_out(tiles, shares, size)
    if segments is None:
        return KeyParts(torch.from_numpy(parts), torch.from_numpy(joins), slots)
    most = (count + segments * (block - 1)) // block + slots
    return KeyParts(_filled(parts, most), _filled(joins, slots // 2), slots)


def _tiles(bounds: Sequence[tuple[int, int]], reach: np.ndarray, block: int) -> np.ndarray:
    """First position, end of the segment and largest reach of each tile, int64 [T, 3]."""
    ends = np.asarray(bounds, dtype=np.int64)
    counts = -(-(ends[:, 1] - ends[:, 0]) // block)
    segment = np.arange(len(ends)).repeat(counts)
    number = np.arange(len(segment)) - (counts.cumsum() - counts).repeat(counts)
    first = ends[segment, 0] + number * block
    until = np.maximum.reduceat(np.asarray(reach, dtype=np.int64), first)
    return np.stack([first, ends[segment, 1], until], axis=1)


def _shared_out(tiles: np.ndarray, shares: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of both tables; the parts with most to do come first."""
    first, end, until = (column.repeat(shares) for column in tiles.T)
    number = np.arange(len(first)) - (shares.cumsum() - shares).repeat(shares)
    several = shares > 1
    behind = np.where(several, shares, 0).cumsum()
    slot = np.where(several, behind - shares, -1)
    begin = first + number * size
    stop = np.minimum(begin + size, until)
    own = slot.repeat(shares)
    parts = np.stack([first, end, begin, stop, np.where(own < 0, -1, own + number)], axis=1)
    order = np.argsort(begin - stop, kind="stable")
    joins = np.stack([tiles[:, 0], tiles[:, 1], slot, shares], axis=1)[several]
    return parts[order].astype(np.int32), joins.astype(np.int32)


def _filled(rows: np.ndarray, most: int) -> Tensor:
    table = np.full((max(1, most), rows.shape[1]), -1, dtype=np.int32)
    table[: len(rows)] = rows
    return torch.from_numpy(table)

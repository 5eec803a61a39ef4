"""Runs of positions of one slot, cut into pieces: what the gradient of M is summed by.

Examples stand together, so that a slot has few runs, and most slots of many have none in most of a row. A piece is
summed by one program, and a slot's pieces by another, in their order: what that takes follows from the positions, not
from how many slots there are.

Plain numpy and torch, as `tiles.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

PIECE = 128  # most positions of one


class Runs(NamedTuple):
    """Where the positions of P slots stand; on the kernels' device.

    Attributes:
        pieces: int32 [C, 2], first position and end of each, those of a slot together, by rising position; what fills
            the table up holds zeros.
        ends: int32 [P + 1]: the pieces of slot p are those from ends[p] to ends[p + 1].
    """

    pieces: Tensor
    ends: Tensor


def most_pieces(positions: int, runs: int) -> int:
    """C that so many positions in so many runs need at most."""
    return positions // PIECE + runs


def runs_of(slot: Tensor, slots: int, capacity: int | None = None) -> Runs:
    """The runs of int32 [N] on the CPU, in [−1, slots); −1 belongs to none.

    Args:
        slot: of each position.
        slots: P.
        capacity: C; None: as many as there are.

    Raises:
        ValueError: there are more.
    """
    own = slot.numpy()
    bounds = np.flatnonzero(np.diff(own)) + 1
    starts = np.concatenate([[0], bounds])[: len(own)].astype(np.int64)
    ends = np.concatenate([bounds, [len(own)]])[: len(starts)].astype(np.int64)
    taken = own[starts] >= 0
    starts, ends = starts[taken], ends[taken]
    counts = -(-(ends - starts) // PIECE)
    number = np.arange(counts.sum()) - (counts.cumsum() - counts).repeat(counts)
    first = starts.repeat(counts) + number * PIECE
    last = np.minimum(first + PIECE, ends.repeat(counts))
    of = own[first]
    order = np.argsort(of, kind="stable")
    rows = len(first) if capacity is None else capacity
    if rows < len(first):
        raise ValueError(f"{len(first)} pieces do not fit a table of {rows}")
    pieces = np.zeros((rows, 2), dtype=np.int32)
    pieces[: len(first)] = np.stack([first, last], axis=1)[order]
    until = np.searchsorted(of[order], np.arange(slots + 1)).astype(np.int32)
    return Runs(torch.from_numpy(pieces), torch.from_numpy(until))

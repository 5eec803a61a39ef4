"""Best-fit packing of examples into rows of fixed length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """`packed`, as lists: for each row the numbers of its examples, in their original order.

    Raises:
        ValueError: a length that fits no row.
    """
    members, starts = packed(np.asarray(lengths, dtype=np.int64), row_length)
    numbers, ends = members.tolist(), starts.tolist()
    return [numbers[start:end] for start, end in pairwise(ends)]


def packed(lengths: np.ndarray, row_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing: every example goes, longest first, where it leaves the least room.

    Of rows with the same room the one that was left with it last is taken. Examples of one length are laid
    together: they fill one row of the tightest room after the other, so a few array operations a length and
    room do what would be one search an example.

    Args:
        lengths: int [E], tokens of each example, each at least 1 and at most `row_length`.
        row_length: tokens that a row holds.

    Returns:
        The numbers of the examples row by row, in their original order within a row, int64 [E]; and where
        each row begins among them, int64 [rows + 1].

    Raises:
        ValueError: a length that fits no row.
    """
    if len(lengths) == 0:
        return np.arange(0), np.zeros(1, dtype=np.int64)
    if not 1 <= lengths.min() <= lengths.max() <= row_length:
        raise ValueError(
            f"lengths must lie in [1, {row_length}], received {lengths.min()} to {lengths.max()}"
        )
    row_of = _laid(lengths, row_length)
    members = np.argsort(row_of, kind="stable")
    return members, np.concatenate([[0], np.cumsum(np.bincount(row_of))])


def _laid(lengths: np.ndarray, row_length: int) -> np.ndarray:
    """The row of each example, int32 [E]."""
    small = np.uint16 if row_length < 2**16 else np.int64  # sorted by radix
    order = np.argsort((row_length - lengths).astype(small), kind="stable").astype(np.int32)
    row_of = np.empty(len(lengths), dtype=np.int32)
    rows, at = _Rows(row_length), 0
    counts = np.bincount(lengths)
    for length in np.flatnonzero(counts)[::-1].tolist():
        for taken, each in rows.take(length, int(counts[length])):
            count = len(taken) * each
            row_of[order[at : at + count]] = np.repeat(taken, each) if each > 1 else taken
            at += count
    return row_of


class _Rows:
    """Rows by the room that is left in them.

    The rooms that some row has are the bits of one integer: the tightest one that a length fits into is a
    shift and a lowest set bit away.

    Args:
        row_length: room of a new row.
    """

    def __init__(self, row_length: int) -> None:
        self._row_length = row_length
        self._count = 0
        self._open = 0
        self._by_room: dict[
            int, list[np.ndarray]
        ] = {}  # numbers of rows; the last one is taken first

    def take(self, length: int, count: int) -> Iterator[tuple[np.ndarray, int]]:
        """Rows for so many examples of a length, as (rows, examples that each of them takes)."""
        while count:
            room, rows = self._tightest(length, count)
            each = room // length
            whole = min(len(rows), count // each)
            if whole:
                filled = rows[len(rows) - whole :][::-1]
                yield filled, each
                self._leave(room - each * length, filled)
                rows, count = rows[: len(rows) - whole], count - whole * each
            if count and len(rows):  # fewer than a row takes
                yield rows[-1:], count
                self._leave(room - count * length, rows[-1:])
                rows, count = rows[:-1], 0
            self._leave(room, rows)

    def _tightest(self, length: int, count: int) -> tuple[int, np.ndarray]:
        """A room, and rows that have it: the tightest there is, or new ones."""
        fitting = self._open >> length
        if not fitting:
            new = -(-count // (self._row_length // length))
            self._count += new
            return self._row_length, np.arange(
                self._count - 1, self._count - new - 1, -1, dtype=np.int32
            )
        room = length + (fitting & -fitting).bit_length() - 1
        rows = self._by_room[room].pop()
        if not self._by_room[room]:
            self._open &= ~(1 << room)
        return room, rows

    def _leave(self, room: int, rows: np.ndarray) -> None:
        if room and len(rows):
            self._by_room.setdefault(room, []).append(rows)
            self._open |= 1 << room

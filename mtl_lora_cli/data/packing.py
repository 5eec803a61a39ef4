"""Best-fit packing of examples into rows of fixed length."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Best-fit decreasing: every example goes, longest first, where it leaves the least room.

    The lengths of the rows' remaining room are kept as the bits of one integer, so the tightest
    row that still fits is a shift and a lowest set bit away: O(examples · row_length / 64).

    Args:
        lengths: tokens of each example, each at least 1 and at most `row_length`.
        row_length: tokens that a row holds.

    Returns:
        For each row the numbers of its examples, in their original order.

    Raises:
        ValueError: a length that fits no row.
    """
    if lengths and not 1 <= min(lengths) <= max(lengths) <= row_length:
        raise ValueError(
            f"lengths must lie in [1, {row_length}], received {min(lengths)} to {max(lengths)}"
        )
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    open_rooms = 0
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[number]
        fitting = open_rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                open_rooms &= ~(1 << room)
        else:
            room, row = row_length, len(rows)
            rows.append([])
        rows[row].append(number)
        left = room - length
        if left:
            by_room[left].append(row)
            open_rooms |= 1 << left
    for row_members in rows:
        row_members.sort()
    return rows


def padding_share(lengths: Sequence[int], rows: Sequence[Sequence[int]], row_length: int) -> float:
    """Share of the rows' places that hold no token."""
    return 1 - sum(lengths) / (len(rows) * row_length) if rows else 0.0

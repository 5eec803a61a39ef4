"""What examples begin with, counted once: rows planned by what they share.

Examples of one task that begin with the same tokens share the positions of their common beginning
(`training.share_beginnings`; laid out in `data/laid.py`). With the examples of a row in the order of their
tokens, neighbours share the most, and a row takes

    Σ_i n_i − Σ_i s(c_{i,i+1}),   s(c) = c if c ≥ LEAST else 0

positions: n_i those of an example, c those that two neighbours of one task have in common. So one more
example takes n − s(max c), the larger c of the two between which it comes to stand.

A row is filled by this from examples in drawn order, so that what is in it is as random as without. All
follows from the drawn examples: no number of processes changes it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from mtl_lora_cli.data.packing import packed

LEAST = 8
"""Positions that two examples must have in common to share any: less is not worth a branch."""

_OPEN = 16  # rows that may still be filled


def key_of(tokens: np.ndarray) -> bytes:
    """Bytes that sort as the tokens do."""
    return tokens.astype(">u4").tobytes()


def common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two examples begin with alike."""
    count = min(len(one), len(other))
    differ = one[:count] != other[:count]
    first = int(differ.argmax()) if count else 0
    return first if count and differ[first] else count


def shared(alike: int) -> int:
    """s(c): positions that are shared of so many that are alike."""
    return alike if alike >= LEAST else 0


class Beginnings:
    """How much any two examples of a task have in common.

    Args:
        inputs: of each example the tokens that take a position.

    Attributes:
        ranks: of each example its place in the order of tokens.
        most: of each what it shares at most with any other one.
    """

    def __init__(self, inputs: Sequence[np.ndarray]) -> None:
        keys = [key_of(tokens) for tokens in inputs]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        self.ranks = [0] * len(order)
        for rank, number in enumerate(order):
            self.ranks[number] = rank
        alike = [common(inputs[a], inputs[b]) for a, b in pairwise(order)]
        self._lengths = [len(inputs[number]) for number in order]
        self._levels = _smallest(np.asarray(alike, dtype=np.int32))
        beside = [0, *alike, 0]
        self.most = [shared(max(beside[rank], beside[rank + 1])) for rank in self.ranks]

    def common(self, one: int, other: int) -> int:
        """Tokens that the examples of two ranks, one ≤ other, begin with alike."""
        if one == other:
            return self._lengths[one]
        level = (other - one).bit_length() - 1
        row = self._levels[level]
        return int(min(row[one], row[other - (1 << level)]))


def _smallest(values: np.ndarray) -> list[np.ndarray]:
    """Level l holds at i the smallest of the 2^l values from i on."""
    levels, step = [values], 1
    while len(levels[-1]) > step:
        before = levels[-1]
        levels.append(np.minimum(before[:-step], before[step:]))
        step *= 2
    return levels


class _Row:
    """A row that is being filled."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.members: list[int] = []
        self.held: set[tuple[int, int]] = set()
        self.ranks: dict[int, list[int]] = {}

    def takes(self, task: int, rank: int, length: int, own: Beginnings) -> int:
        """Positions that one more example takes."""
        ranks = self.ranks.get(task)
        if not ranks:
            return length
        place = bisect_left(ranks, rank)
        alike = own.common(ranks[place - 1], rank) if place else 0
        if place < len(ranks):
            alike = max(alike, own.common(rank, ranks[place]))
        return length - shared(alike)

    def add(self, member: int, place: tuple[int, int], rank: int, taken: int) -> None:
        ranks = self.ranks.setdefault(place[0], [])
        ranks.insert(bisect_left(ranks, rank), rank)
        self.members.append(member)
        self.held.add(place)
        self.room -= taken


def packed_shared(
    tasks: np.ndarray,
    numbers: np.ndarray,
    lengths: np.ndarray,
    row_length: int,
    beginnings: Sequence[Beginnings],
) -> tuple[np.ndarray, np.ndarray]:
    """Rows in which each beginning is counted once; as `packed`, where that needs no more rows.

    Each example goes, in the given order, to the first open row that it fits. Long examples in short
    rows leave less room unused as `packed` lays them.

    Args:
        tasks, numbers, lengths: int [E], of each example.
        row_length: positions that a row holds.
        beginnings: of each task.

    Returns:
        As `packed`: the numbers of the examples row by row, and where each row begins among them.
    """
    alone = packed(lengths, row_length)
    rows: list[_Row] = []
    unfilled: list[_Row] = []
    places = zip(tasks.tolist(), numbers.tolist(), strict=True)
    for member, (place, length) in enumerate(zip(places, lengths.tolist(), strict=True)):
        task, number = place
        own = beginnings[task]
        rank, least = own.ranks[number], length - own.most[number]
        for row in unfilled:
            if row.room >= least or place in row.held:
                taken = row.takes(task, rank, length, own)
                if taken <= row.room:
                    break
        else:
            row, taken = _Row(row_length), length
            rows.append(row)
            unfilled.append(row)
            if len(unfilled) > _OPEN:
                unfilled.remove(min(unfilled[:-1], key=lambda one: one.room))
        row.add(member, place, rank, taken)
    if len(rows) >= len(alone[1]) - 1:
        return alone
    members = np.asarray([member for row in rows for member in row.members], dtype=np.int64)
    sizes = [len(row.members) for row in rows]
    return members, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

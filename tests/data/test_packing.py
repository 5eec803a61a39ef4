"""Packing: every example once, in order, in rows that hold them, and little room wasted."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_lora_cli.bench import yardstick
from mtl_lora_cli.data.packing import pack

LENGTHS = st.integers(1, 60).flatmap(
    lambda row: st.tuples(st.just(row), st.lists(st.integers(1, row), max_size=80))
)


@given(LENGTHS)
@settings(max_examples=200, deadline=None)
def test_nothing_is_lost_doubled_or_too_long(case: tuple[int, list[int]]) -> None:
    row_length, lengths = case
    rows = pack(lengths, row_length)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(rows)
    assert all(sum(lengths[number] for number in row) <= row_length for row in rows)


@given(LENGTHS)
@settings(max_examples=100, deadline=None)
def test_examples_of_a_row_stay_in_their_order(case: tuple[int, list[int]]) -> None:
    row_length, lengths = case
    assert all(row == sorted(row) for row in pack(lengths, row_length))


@given(LENGTHS)
@settings(max_examples=100, deadline=None)
def test_every_example_stands_where_it_left_the_least_room(case: tuple[int, list[int]]) -> None:
    """Against best-fit decreasing with a list of rooms that is searched from end to end."""
    row_length, lengths = case
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        room = min(fitting, default=row_length)
        if fitting:
            rooms.remove(room)
        rooms.append(room - length)
    rows = pack(lengths, row_length)
    assert sorted(row_length - sum(lengths[n] for n in row) for row in rows) == sorted(rooms)


def one_by_one(lengths: list[int], row_length: int) -> list[list[int]]:
    """The rows as the version before laid them: a search an example, over stacks of rows by their room."""
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(row_length + 1)]
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[number]
        room = next((r for r in range(length, row_length + 1) if by_room[r]), row_length)
        if by_room[room]:
            row = by_room[room].pop()
        else:
            row = len(rows)
            rows.append([])
        rows[row].append(number)
        if room - length:
            by_room[room - length].append(row)
    return [sorted(row) for row in rows]


@given(LENGTHS)
@settings(max_examples=200, deadline=None)
def test_examples_of_a_length_laid_together_stand_where_they_stood_one_by_one(
    case: tuple[int, list[int]],
) -> None:
    row_length, lengths = case
    assert pack(lengths, row_length) == one_by_one(lengths, row_length)


@given(LENGTHS)
@settings(max_examples=50, deadline=None)
def test_the_same_lengths_give_the_same_rows(case: tuple[int, list[int]]) -> None:
    assert pack(case[1], case[0]) == pack(list(case[1]), case[0])


def test_under_two_percent_is_padding_on_commonsense_lengths() -> None:
    lengths = [one.tokens for one in yardstick.lengths()]
    random.Random(0).shuffle(lengths)
    rows = pack(lengths, 4096)
    assert 0 <= 1 - sum(lengths) / (4096 * len(rows)) < 0.02


def test_no_examples_give_no_rows() -> None:
    assert pack([], 8) == []


@pytest.mark.parametrize("lengths", [[9], [3, 9], [0], [-1, 4]])
def test_a_length_that_fits_no_row_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"lengths must lie in \[1, 8\], received"):
        pack(lengths, 8)

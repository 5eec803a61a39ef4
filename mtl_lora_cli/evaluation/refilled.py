"""Requests of any tasks together on the fused engine: a row that ends makes room for the next one.

Rows that are going stand at the first places. Where one ends, the next prompt takes its place, or, where none
is left, the last row does. On a card the CPU reads a step's tokens while the next step runs; what a row that has
ended says in it is thrown away.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtl_lora_cli.engine.rows import KeptRows
from mtl_lora_cli.evaluation.asked import Ask, finite, no_numbers, pick, require_numbers
from mtl_lora_cli.evaluation.choices import Advance
from mtl_lora_cli.machine import threads

_MOST_ROWS = {"cuda": 256, "cpu": 64}
_SPREAD = 4  # within a class the longest request is so many times as long as the shortest
_FEW_STEPS = 24  # recording a step costs as much as running some
_REFILL = 4  # prompts are read when one of so many rows is free


@dataclass
class _Row:
    """An answer that is being given."""

    number: int
    ask: Ask
    tokens: list[int] = field(default_factory=list)
    going: bool = True


class _Told:
    """A step's tokens on their way to the CPU, which does not wait for them.

    Args:
        rows: whose they are.
        picked: int64 [B], on the device; −1 where the model found no numbers.
    """

    def __init__(self, rows: Sequence[_Row], picked: Tensor) -> None:
        self.rows = rows
        self._tokens = picked
        self._there: Any = None
        if picked.is_cuda:
            self._tokens = torch.empty(picked.shape, dtype=picked.dtype, pin_memory=True)
            self._tokens.copy_(picked, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def tokens(self) -> list[int]:
        """One a row."""
        if self._there is not None:
            self._there.synchronize()
        found: list[int] = self._tokens.tolist()
        return found


class Batch(NamedTuple):
    """Requests that are answered with one set of rows: their numbers, how many rows, and how long."""

    numbers: list[int]
    rows: int
    length: int


def batches(asks: Mapping[int, Ask], tokens_per_pass: int, device: torch.device) -> Iterator[Batch]:
    """Requests of similar length together, the longest first, so that the first shows whether memory suffices.

    Args:
        asks: by number.
        tokens_per_pass: rows of a batch have so many places together, or are one.
        device: the model's.
    """
    order = sorted(asks, key=lambda number: (-asks[number].cost, number))
    while order:
        longest = asks[order[0]].cost
        own = [number for number in order if asks[number].cost * _SPREAD > longest]
        order = order[len(own) :]
        most = min(_MOST_ROWS.get(device.type, 64), max(1, tokens_per_pass // longest))
        yield Batch(own, min(most, len(own)), longest)


def answer_refilled(
    kept: KeptRows,
    asks: Mapping[int, Ask],
    numbers: Sequence[int],
    *,
    ends: Collection[int],
    advance: Advance = lambda done: None,
) -> dict[int, list[int]]:
    """Tokens of each answer, by number.

    Args:
        kept: the rows, none of which is going.
        asks: by number; no request is longer than a row.
        numbers: those that are answered, the longest first.
        ends: tokens that end an answer and are not part of it.
        advance: called with the number of answers done since the last call.
    """
    return _Course(kept, asks, numbers, ends, advance).run()


class _Course:
    """See `answer_refilled`."""

    def __init__(
        self,
        kept: KeptRows,
        asks: Mapping[int, Ask],
        numbers: Sequence[int],
        ends: Collection[int],
        advance: Advance,
    ) -> None:
        self._kept, self._asks, self._ends, self._advance = kept, asks, ends, advance
        self._found: dict[int, list[int]] = {n: [] for n in numbers if not asks[n].limit}
        self._queue = deque(number for number in numbers if asks[number].limit)
        self._rows: list[_Row] = []
        steps = sum(asks[number].limit for number in numbers) / max(1, kept.rows)
        self._often = steps >= _FEW_STEPS
        self._most = max(1, min(kept.rows, len(self._queue)))
        advance(len(self._found))

    def run(self) -> dict[int, list[int]]:
        """All answers."""
        unread: _Told | None = None
        ahead = self._kept.device.type == "cuda"
        while self._queue or self._rows:
            free = self._most - len(self._rows)
            if self._queue and (not self._rows or free * _REFILL >= self._most):
                if unread is not None:
                    self._read(unread)
                    unread = None
                self._refill()
                continue
            before, unread = unread, self._step()
            if before is not None:
                self._read(before)
            if not ahead:
                self._read(unread)
                unread = None
        return self._found

    def _step(self) -> _Told:
        """Another token of each row."""
        threads.look(self._kept.device)
        asked = list(self._rows)
        logits = self._kept.step(len(asked), often=self._often)
        picked = pick(logits, [row.ask for row in asked])
        self._kept.feed(range(len(asked)), picked)
        return _Told(asked, torch.where(finite(logits), picked, -1))

    def _refill(self) -> None:
        """Read as many prompts as there are rows free, and begin their answers."""
        count = min(self._most - len(self._rows), len(self._queue))
        numbers = [self._queue.popleft() for _ in range(count)]
        new = [_Row(number, self._asks[number]) for number in numbers]
        places = range(len(self._rows), len(self._rows) + count)
        asks = [row.ask for row in new]
        logits = self._kept.begin([a.prompt for a in asks], [a.task for a in asks], places)
        require_numbers(logits)
        picked = pick(logits, asks)
        self._kept.feed(places, picked)
        self._rows += new
        self._read(_Told(new, picked))

    def _read(self, told: _Told) -> None:
        """Take a step's tokens into the answers."""
        tokens = told.tokens()
        wrong = sum(row.going and token < 0 for row, token in zip(told.rows, tokens, strict=True))
        if wrong:
            raise no_numbers(wrong, len(tokens))
        for row, token in zip(told.rows, tokens, strict=True):
            if not row.going:
                continue
            if token not in self._ends:
                row.tokens.append(token)
            ended = token in self._ends or len(row.tokens) >= row.ask.limit
            row.going = not (ended or row.ask.stopped(row.tokens))
        self._close_gaps()

    def _close_gaps(self) -> None:
        """Rows that have ended leave; the last ones take their places."""
        ended = [row for row in self._rows if not row.going]
        self._found.update((row.number, row.tokens) for row in ended)
        place = 0
        while place < len(self._rows):
            if not self._rows[-1].going:
                self._rows.pop()
                continue
            if not self._rows[place].going:
                self._rows[place] = self._rows.pop()
                self._kept.move(len(self._rows), place)
            place += 1
        if ended:
            self._advance(len(ended))

"""The yardstick's examples: real lengths, random tokens.

The lengths are those of 3,150 examples of seven commonsense tasks in the order in which they are
learned: 104 tokens on average, the longest 469, 6 or 7 of them supervised. What the tokens are does
not change the speed, so they are drawn.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mtl_lora_cli.errors import UsageError

if TYPE_CHECKING:
    from mtl_lora_cli.data.encoded import EncodedSplit
    from mtl_lora_cli.data.epoch_rows import Place
    from mtl_lora_cli.models.batch import PackedBatch
    from mtl_lora_cli.training.capacity import Fullest


_AS_IN_FILE = 8  # tasks up to which an example's is the file's


class Length(NamedTuple):
    """One example: which of the seven tasks it is of, and its tokens."""

    task: int
    prompt: int
    answer: int  # with the end token; all of them are supervised

    @property
    def tokens(self) -> int:
        return self.prompt + self.answer


@cache
def lengths() -> tuple[Length, ...]:
    """All examples in their order."""
    file = Path(__file__).with_name("commonsense_lengths.json")
    columns = json.loads(file.read_text(encoding="utf-8"))
    return tuple(
        Length(int(task), int(prompt), int(answer))
        for task, prompt, answer in zip(
            columns["tasks"], columns["prompts"].split(), columns["answers"], strict=True
        )
    )


def supervised_share() -> float:
    """Supervised tokens of all tokens."""
    return sum(one.answer for one in lengths()) / sum(one.tokens for one in lengths())


def packed(row_length: int) -> list[list[int]]:
    """The examples' numbers, packed into rows."""
    from mtl_lora_cli.data.mixture import positions_of
    from mtl_lora_cli.data.packing import pack

    return pack([positions_of(one.tokens) for one in lengths()], row_length)


def densest(row_length: int) -> int:
    """The most supervised tokens of a row."""
    return max(sum(lengths()[number].answer for number in row) for row in packed(row_length))


def require_fitting(row_length: int, option: str = "--row-length") -> None:
    """Check that every example fits a row.

    Raises:
        UsageError: the longest does not.
    """
    longest = max(one.tokens for one in lengths())
    if row_length < longest:
        raise UsageError(
            f"{option}: the longest example has {longest} tokens, received a row of {row_length}"
        )


@dataclass(frozen=True)
class Step:
    """What one optimiser step is given.

    Attributes:
        batches: its passes through the model.
        tokens: real tokens in them, whatever a batch may be padded with.
        supervised: tokens that count in the loss.
    """

    batches: tuple[PackedBatch, ...]
    tokens: int
    supervised: int


@dataclass(frozen=True)
class Yardstick:
    """The examples with tokens of one vocabulary.

    Attributes:
        places: task id and number in its task of every example, in the file's order.
        splits: the examples of each task, as training reads them; some tasks may have none.
    """

    places: tuple[Place, ...]
    splits: tuple[EncodedSplit, ...]

    @classmethod
    def build(cls, vocabulary: int, tasks: int, seed: int) -> Yardstick:
        """Draw the tokens.

        An example of the file's task f is one of task f mod `tasks`; where there are more tasks than `_AS_IN_FILE`, the
        examples are dealt out among them, so that all learn.
        """
        import numpy as np

        from mtl_lora_cli.data.encoded import EncodedSplit

        mine: list[list[Length]] = [[] for _ in range(tasks)]
        places = []
        for number, one in enumerate(lengths()):
            task = (one.task if tasks <= _AS_IN_FILE else number) % tasks
            places.append((task, len(mine[task])))
            mine[task].append(one)
        generator = np.random.default_rng(seed)
        splits = []
        for own in mine:
            starts = np.cumsum([0, *(one.tokens for one in own)]).astype(np.int64)
            splits.append(
                EncodedSplit(
                    tokens=generator.integers(0, vocabulary, int(starts[-1]), dtype=np.int32),
                    starts=starts,
                    prompt_lengths=np.array([one.prompt for one in own], dtype=np.int32),
                    dropped=0,
                    truncated=0,
                    rows=len(own),
                )
            )
        return cls(tuple(places), tuple(splits))

    def rows(self, row_length: int, seed: int) -> list[list[Place]]:
        """The examples packed into rows, the rows in a drawn order.

        Packing goes by length, so that the first rows hold the longest examples; training draws
        the rows' order, and so does the yardstick. The last row holds what was left over: one in an
        epoch, but it would be a large part of a few timed steps. Less than nine tenths full, it is
        left out, if there is another.
        """
        import numpy as np

        from mtl_lora_cli.data.mixture import positions_of

        taken = [positions_of(one.tokens) for one in lengths()]
        rows = packed(row_length)
        full = [row for row in rows if sum(taken[i] for i in row) >= 0.9 * row_length] or rows
        order = np.random.default_rng(seed).permutation(len(full))
        return [[self.places[example] for example in full[number]] for number in order]

    def fullest(self, row_length: int) -> Fullest:
        """The most that a row has."""
        import numpy as np

        from mtl_lora_cli.data.epoch_rows import EpochRows
        from mtl_lora_cli.training.capacity import Fullest

        rows = self.rows(row_length, 0)
        tasks, numbers = np.array([place for row in rows for place in row]).T
        starts = np.cumsum([0, *map(len, rows)])
        asked = [split.learned_counts() for split in self.splits]
        return Fullest.of(EpochRows(tasks, numbers, starts), asked)

    def steps(
        self, count: int, *, row_length: int, rows_per_step: int, rows_per_pass: int, seed: int
    ) -> list[Step]:
        """`count` optimiser steps; after the last row the first comes again."""
        rows = list(islice(cycle(self.rows(row_length, seed)), count * rows_per_step))
        return [
            self._step(rows[start : start + rows_per_step], rows_per_pass)
            for start in range(0, len(rows), rows_per_step)
        ]

    def _step(self, rows: list[list[Place]], rows_per_pass: int) -> Step:
        from mtl_lora_cli.data.collate import training_batch

        passes = [rows[i : i + rows_per_pass] for i in range(0, len(rows), rows_per_pass)]
        places = [place for row in rows for place in row]
        examples = [(self.splits[task], number) for task, number in places]
        tokens = sum(int(split.starts[n + 1] - split.starts[n]) for split, n in examples)
        supervised = sum(len(split.learned(n)) for split, n in examples)
        return Step(
            batches=tuple(training_batch(some, self.splits, loss_on="answer") for some in passes),
            tokens=tokens,
            supervised=supervised,
        )

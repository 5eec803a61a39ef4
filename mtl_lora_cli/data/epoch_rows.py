"""The rows of an epoch as arrays: some bytes an example, however many there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np

Place = tuple[int, int]  # task id, number of the example in its task


class EpochRows(Sequence[list[Place]]):
    """Rows of examples; a row is made a list of places when it is asked for.

    Args:
        tasks: int [E], the task id of each example, row by row.
        numbers: int [E], their numbers in their tasks.
        starts: int64 [rows + 1], where each row begins.
    """

    def __init__(self, tasks: np.ndarray, numbers: np.ndarray, starts: np.ndarray) -> None:
        self.tasks, self.numbers, self.starts = tasks, numbers, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> list[Place]: ...

    @overload
    def __getitem__(self, index: slice) -> list[list[Place]]: ...

    def __getitem__(self, index: int | slice) -> list[Place] | list[list[Place]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        own = slice(*self.starts[index % len(self) :][:2].tolist())
        return list(zip(self.tasks[own].tolist(), self.numbers[own].tolist(), strict=True))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(
            own == theirs for own, theirs in zip(self, other, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def renamed(self, ids: Sequence[int]) -> EpochRows:
        """The same rows where task t is called `ids[t]`."""
        return EpochRows(np.asarray(ids, dtype=np.int32)[self.tasks], self.numbers, self.starts)

    def ordered(self, order: np.ndarray) -> EpochRows:
        """The rows in another order."""
        sizes = np.diff(self.starts)[order]
        starts = _starts(sizes)
        places = np.arange(starts[-1])
        places += np.repeat(self.starts[:-1][order] - starts[:-1], sizes)
        return EpochRows(self.tasks[places], self.numbers[places], starts)

    def counts(self, tasks: int, first: int = 0, last: int | None = None) -> np.ndarray:
        """Examples of each of so many tasks in some of the rows, int64 [tasks]."""
        end = len(self) if last is None else min(last, len(self))
        own = self.tasks[self.starts[first] : self.starts[end]]
        return np.bincount(own, minlength=tasks)

    def sums(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Σ over the examples of each row of what `values[task][number]` says, int64 [rows]."""
        if not len(self):
            return np.arange(0)
        own = of_examples(values, self.tasks, self.numbers)
        return np.add.reduceat(own, self.starts[:-1], dtype=np.int64)


def _starts(sizes: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def of_examples(values: Sequence[np.ndarray], tasks: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """`values[task][number]` of each of these examples."""
    if len(values) == 1:
        return values[0][numbers]
    firsts = _starts([len(own) for own in values])
    return np.concatenate(values)[firsts[tasks] + numbers]


def joined(several: Sequence[EpochRows]) -> EpochRows:
    """Rows behind each other."""
    if len(several) == 1:
        return several[0]
    sizes = np.concatenate([np.diff(one.starts) for one in several])
    return EpochRows(
        np.concatenate([one.tasks for one in several]),
        np.concatenate([one.numbers for one in several]),
        _starts(sizes),
    )

"""A curriculum: stages one after another, each a mixture of some of the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from mtl_lora_cli.data.epoch_rows import EpochRows, Place, joined
from mtl_lora_cli.data.mixture import Mixture

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """A stage.

    Attributes:
        tasks: ids of those that are drawn, ascending.
        epochs: how often it goes over their examples.
    """

    tasks: tuple[int, ...]
    epochs: float


@dataclass(frozen=True)
class StagedMixture(Mixture):
    """A mixture whose tasks come stage by stage.

    Within a stage it is the mixture of the stage's tasks alone, by the same strategy and seed. Epochs are
    counted through all stages, so no two of them draw in the same order.

    Attributes:
        parts: the stages; every task is in one of them.
    """

    parts: tuple[Part, ...] = ()

    @property
    def examples_an_epoch(self) -> int:
        """Of all stages together."""
        return sum(self.planned_counts())

    def planned_counts(self) -> list[int]:
        """Examples of each task in all stages together."""
        found = [0.0] * len(self.names)
        for part, own in zip(self.parts, self._mixtures, strict=True):
            for task, count in zip(part.tasks, own.planned_counts(), strict=True):
                found[task] += part.epochs * count
        return [round(count) for count in found]

    def steps_in(self, epochs: float, at_most: int | None = None) -> int:
        """Steps of all stages; they have epochs of their own, so here `epochs` is 1."""
        steps = 0
        for part, own in zip(self.parts, self._mixtures, strict=True):
            left = None if at_most is None else at_most - steps
            steps += own.steps_in(part.epochs, left)
        return steps

    def epoch(self, number: int) -> EpochRows:
        """The rows of one epoch, counted through all stages."""
        for part, own in zip(self.parts, self._mixtures, strict=True):
            count = _whole(part.epochs)
            if number < own.epochs_before + count:
                return own.epoch(number - own.epochs_before).renamed(part.tasks)
        raise IndexError(number)

    def first_rows(self) -> EpochRows:
        """The rows of each stage's first epoch."""
        return joined([self.epoch(own.epochs_before) for own in self._mixtures])

    def drawn_in(self, steps: int) -> list[int]:
        """Examples of each task in the first so many steps."""
        found = [0] * len(self.names)
        for part, own in zip(self.parts, self._mixtures, strict=True):
            taken = min(steps, own.steps_in(part.epochs))
            for task, count in zip(part.tasks, own.drawn_in(taken), strict=True):
                found[task] += count
            steps -= taken
        return found

    def step(self, number: int) -> tuple[int, list[list[Place]]]:
        """The epoch and the rows of optimiser step `number`, counted from 0."""
        for part, own in zip(self.parts, self._mixtures, strict=True):
            steps = own.steps_in(part.epochs)
            if number < steps:
                epoch, rows = own.step(number)
                return own.epochs_before + epoch, _named(rows, part.tasks)
            number -= steps
        raise IndexError(number)

    @cached_property
    def _mixtures(self) -> list[Mixture]:
        """Of each stage's tasks alone."""
        found, before = [], 0
        for part in self.parts:
            found.append(
                Mixture(
                    names=_of(self.names, part.tasks),
                    lengths=_of(self.lengths, part.tasks),
                    row_length=self.row_length,
                    rows_per_step=self.rows_per_step,
                    strategy=self.strategy,
                    weights=_of(self.weights, part.tasks),
                    temperature=self.temperature,
                    repeats=_of(self.repeats, part.tasks),
                    seed=self.seed,
                    one_task=self.one_task,
                    epochs_before=before,
                    beginnings=_of(self.beginnings, part.tasks),
                )
            )
            before += _whole(part.epochs)
        return found


def _of(values: Sequence[T], tasks: Sequence[int]) -> tuple[T, ...]:
    return tuple(values[task] for task in tasks) if values else ()


def _named(rows: list[list[Place]], tasks: Sequence[int]) -> list[list[Place]]:
    """A stage's own task numbers → the run's."""
    return [[(tasks[task], number) for task, number in row] for row in rows]


def _whole(epochs: float) -> int:
    """Epochs that are begun."""
    return max(1, -int(-epochs // 1))

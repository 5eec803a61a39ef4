"""Which examples an epoch holds, and in which rows they stand.

Everything follows from the seed, the epoch and the tasks' names: no state is kept, so any position
of the stream can be found again, on any number of processes.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mtl_lora_cli.data.beginnings import Beginnings, packed_shared
from mtl_lora_cli.data.epoch_rows import EpochRows, Place, joined, of_examples
from mtl_lora_cli.data.packing import packed


def positions_of(tokens: int) -> int:
    """Positions that an example takes in a row: its last token is predicted and never read."""
    return max(1, tokens - 1)


def all_positions(tokens: np.ndarray) -> np.ndarray:
    """`positions_of` each."""
    return np.maximum(1, tokens - 1)


def generator_of(seed: int, *what: int | str) -> np.random.Generator:
    """A generator of its own for each purpose: adding a task changes no other task's draw."""
    words = [seed]
    for part in what:
        digest = hashlib.sha256(str(part).encode()).digest()
        words.append(int.from_bytes(digest[:8], "little"))
    return np.random.default_rng(words)


def subset(size: int, at_most: int | None, seed: int, task: str) -> np.ndarray:
    """Numbers of the examples that `max_examples` keeps, ascending: the same in every epoch."""
    if at_most is None or at_most >= size:
        return np.arange(size)
    return np.sort(generator_of(seed, "subset", task).permutation(size)[:at_most])


def shares(
    sizes: Sequence[int], strategy: str, weights: Sequence[float], temperature: float = 1.0
) -> list[float]:
    """The share of the drawn examples that each task gets.

    `proportional`: n_t / Σ n;  `uniform`: 1 / T;  `weights`: w_t / Σ w;
    `temperature`: n_t^(1/τ) / Σ n^(1/τ).
    """
    raw: list[float] = {
        "proportional": lambda: [float(n) for n in sizes],
        "uniform": lambda: [1.0] * len(sizes),
        "weights": lambda: _scaled(weights),
        "temperature": lambda: _powers(sizes, temperature),
    }[strategy]()
    total = math.fsum(raw)
    return [value / total for value in raw]


_ENDLESS = 1e15  # examples; nobody draws so many
_LARGE = 1e280  # sums of numbers below it are finite


def _scaled(weights: Sequence[float]) -> list[float]:
    """Weights, divided by the largest where their sum would not be finite: shares stay what they are."""
    largest = max(weights)
    return [weight / largest for weight in weights] if largest > _LARGE else list(weights)


def _powers(sizes: Sequence[int], temperature: float) -> list[float]:
    """n^(1/τ), of n over the largest n where the powers would not be finite."""
    largest = max(sizes)
    if math.log(max(1, largest)) / temperature > math.log(_LARGE):
        return [(n / largest) ** (1 / temperature) for n in sizes]
    return [n ** (1 / temperature) for n in sizes]


def counts(sizes: Sequence[int], wanted: Sequence[float]) -> list[int]:
    """How many examples of each task an epoch draws: as many in all as there are examples.

    Largest remainders are rounded up, so that the counts add up; proportional shares give each
    example exactly once.
    """
    total = sum(sizes)
    exact = [share * total for share in wanted]
    whole = [math.floor(value + 1e-9) for value in exact]
    order = sorted(range(len(exact)), key=lambda t: (whole[t] - exact[t], t))
    for task in order[: total - sum(whole)]:
        whole[task] += 1
    return whole


def draw(size: int, count: int, seed: int, epoch: int, task: str) -> np.ndarray:
    """`count` example numbers below `size`: whole shuffled passes, then a part of another one."""
    generator = generator_of(seed, "draw", epoch, task)
    passes = [generator.permutation(size) for _ in range(-(-count // size))] if count else []
    return np.concatenate(passes)[:count] if passes else np.arange(0)


@dataclass(frozen=True)
class Mixture:
    """The stream of packed rows of a whole run.

    Attributes:
        names: task names in the order of their ids.
        lengths: for each task how much of a row each of its examples takes.
        row_length: what a row holds.
        rows_per_step: rows of one optimiser step, over all processes.
        strategy, weights, temperature: see `shares`.
        repeats: how often an epoch goes over each task; a task's size counts so many times.
        seed: of every draw.
        one_task: a row holds examples of one task only.
        epochs_before: of stages before this one: draws are counted through all of them.
        beginnings: of each task, where examples of a row share what they begin with; empty: they share nothing.
    """

    names: tuple[str, ...]
    lengths: tuple[np.ndarray, ...]
    row_length: int
    rows_per_step: int
    strategy: str = "proportional"
    weights: tuple[float, ...] = ()
    temperature: float = 1.0
    repeats: tuple[float, ...] = ()
    seed: int = 0
    one_task: bool = False
    epochs_before: int = 0
    beginnings: tuple[Beginnings, ...] = ()

    @property
    def planned(self) -> Mixture:
        """What can be said of the stream before it is learned: itself."""
        return self

    @property
    def examples_an_epoch(self) -> int:
        """Of all tasks."""
        return sum(self._sizes())

    def _sizes(self) -> list[int]:
        repeats = self.repeats or (1.0,) * len(self.lengths)
        several = zip(self.lengths, repeats, strict=True)
        return [round(min(len(n) * times, _ENDLESS)) for n, times in several]

    def planned_counts(self) -> list[int]:
        """Examples of each task in one epoch."""
        sizes = self._sizes()
        # Of pictures that several tasks learn from, the first task has all the examples.
        drawn = [number for number, own in enumerate(self.lengths) if len(own)]
        weights = [self.weights[number] for number in drawn] if self.weights else ()
        own = [sizes[number] for number in drawn]
        found = counts(own, shares(own, self.strategy, weights, self.temperature))
        every = dict(zip(drawn, found, strict=True))
        return [every.get(number, 0) for number in range(len(sizes))]

    def epoch(self, number: int) -> EpochRows:
        """The rows of one epoch, in the order in which they are learned."""
        return _epoch(_Identity(self), number)

    def first_rows(self) -> EpochRows:
        """Rows with all tasks in them, as examples of what will be learned: those of the first epoch."""
        return self.epoch(0)

    def steps_in(self, epochs: float, at_most: int | None = None) -> int:
        """Optimiser steps of so many epochs; a part of an epoch is a part of its rows.

        Args:
            epochs: how many.
            at_most: no more steps than these, and no look at epochs behind them.
        """
        steps, whole = 0, math.floor(epochs)
        for number in range(whole):
            if at_most is not None and steps >= at_most:
                return at_most
            steps += self._epoch_steps(number)
        if epochs > whole:
            steps += max(1, round((epochs - whole) * self._epoch_steps(whole)))
        return steps if at_most is None else min(steps, at_most)

    def step(self, number: int) -> tuple[int, list[list[Place]]]:
        """The epoch and the rows of optimiser step `number`, counted from 0."""
        firsts = _first_steps(_Identity(self))
        while firsts[-1] <= number:
            firsts.append(firsts[-1] + self._epoch_steps(len(firsts) - 1))
        epoch = bisect_right(firsts, number) - 1
        start = (number - firsts[epoch]) * self.rows_per_step
        return epoch, self.epoch(epoch)[start : start + self.rows_per_step]

    def drawn_in(self, steps: int) -> list[int]:
        """Examples of each task in the first so many steps."""
        found, epoch = np.zeros(len(self.names), dtype=np.int64), 0
        while steps > 0:
            own = self._epoch_steps(epoch)
            if own <= steps:
                found += np.asarray(self.planned_counts())
            else:
                rows = self.epoch(epoch)
                found += rows.counts(len(self.names), last=steps * self.rows_per_step)
            steps, epoch = steps - own, epoch + 1
        return [int(count) for count in found]

    def _epoch_steps(self, number: int) -> int:
        # How many rows examples fill follows from their lengths alone, whatever their order.
        return _epoch_steps(_Identity(self), 0 if self._draws_all else number)

    @property
    def _draws_all(self) -> bool:
        """Whether every epoch fills as many rows: it is made of the same examples, of whole passes over each
        task, and what they share, which goes by their order, is not counted."""
        if self.beginnings:
            return False
        several = zip(self.planned_counts(), self.lengths, strict=True)
        return all(count % max(1, len(own)) == 0 for count, own in several)


class _Identity:
    """Makes a mixture a cache key by identity: its arrays cannot be hashed."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.mixture is self.mixture

    def __hash__(self) -> int:
        return id(self.mixture)


@lru_cache(maxsize=4096)
def _epoch_steps(identity: _Identity, number: int) -> int:
    return -(-len(_epoch(identity, number)) // identity.mixture.rows_per_step)


@lru_cache(maxsize=16)
def _first_steps(identity: _Identity) -> list[int]:
    """The number of each epoch's first step, as far as it was asked for."""
    return [0]


@lru_cache(maxsize=2)
def _epoch(identity: _Identity, number: int) -> EpochRows:
    mixture = identity.mixture
    number += mixture.epochs_before
    counts_ = mixture.planned_counts()
    tasks = np.repeat(np.arange(len(counts_), dtype=np.int32), counts_)
    several = zip(mixture.names, mixture.lengths, counts_, strict=True)
    numbers = np.concatenate(
        [
            draw(len(own), count, mixture.seed, number, name).astype(np.int32)
            for name, own, count in several
        ]
    )
    order = generator_of(mixture.seed, "order", number)
    mixed = order.permutation(len(tasks)).astype(np.int32)
    tasks, numbers = tasks[mixed], numbers[mixed]
    del mixed  # of ten million examples it has 40 MB
    rows = laid_in_rows(tasks, numbers, mixture)
    return rows.ordered(order.permutation(len(rows)))


def laid_in_rows(tasks: np.ndarray, numbers: np.ndarray, mixture: Mixture) -> EpochRows:
    """Examples packed into rows; with `one_task` those of each task apart from the others.

    Args:
        tasks, numbers: int [E], the task id and the number of each example.
        mixture: of which lengths they have.
    """
    lengths = of_examples(mixture.lengths, tasks, numbers)
    if not mixture.one_task:
        return _packed(tasks, numbers, lengths, mixture)
    groups = _by_task(tasks)
    return joined([_packed(tasks[own], numbers[own], lengths[own], mixture) for own in groups])


def _packed(
    tasks: np.ndarray, numbers: np.ndarray, lengths: np.ndarray, mixture: Mixture
) -> EpochRows:
    """These examples in rows."""
    members, starts = (
        packed_shared(tasks, numbers, lengths, mixture.row_length, mixture.beginnings)
        if mixture.beginnings
        else packed(lengths, mixture.row_length)
    )
    return EpochRows(tasks[members], numbers[members], starts)


def _by_task(tasks: np.ndarray) -> list[np.ndarray]:
    """The places of each task, the tasks in the order in which they come first."""
    order = np.argsort(tasks, kind="stable")
    ends = np.flatnonzero(np.diff(tasks[order])) + 1
    return sorted(np.split(order, ends), key=lambda own: int(own[0]) if len(own) else 0)


def planned_epochs(mixture: Mixture, steps: int) -> Mapping[str, float]:
    """How many times `steps` optimiser steps go over each task's examples."""
    seen = mixture.planned.drawn_in(steps)
    return {
        name: seen[task] / max(1, len(mixture.lengths[task]))
        for task, name in enumerate(mixture.names)
    }

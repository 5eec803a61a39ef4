"""A mixture whose shares follow what was learned: drawn block by block of a few steps.

A block's rows follow from its shares, from how far each task's examples have been drawn before it, and from
the seed. So a run that is stopped needs no more than these two to go on with the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from mtl_lora_cli.data.epoch_rows import EpochRows, Place
from mtl_lora_cli.data.mixture import Mixture, generator_of, laid_in_rows, shares


@dataclass(frozen=True)
class Block:
    """What some steps are drawn by.

    Attributes:
        shares: of the drawn examples, by task.
        drawn: examples of each task before the block.
    """

    shares: tuple[float, ...]
    drawn: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class DynamicMixture(Mixture):
    """A mixture of which `strategy` says the shares of the first block, and somebody those of the others.

    In each task whole shuffled passes follow one another through all blocks: no example comes twice before
    all came once. Every block has `every` steps, and every step `rows_per_step` rows.

    Attributes:
        every: steps of a block.
        blocks: by number, as far as they are decided; older ones than the last two are forgotten.
    """

    every: int = 50
    blocks: dict[int, Block] = field(default_factory=dict, init=False)
    _cache: dict[int, EpochRows] = field(default_factory=dict, init=False, repr=False)

    @property
    def planned(self) -> Mixture:
        """The mixture that it would be if the shares stayed as they begin."""
        return Mixture(**{one.name: getattr(self, one.name) for one in fields(Mixture)})

    @property
    def start(self) -> list[float]:
        """Shares of the first block."""
        return shares(self._sizes(), self.strategy, self.weights, self.temperature)

    def step(self, number: int) -> tuple[int, list[list[Place]]]:
        """The epoch, by the examples drawn before the block, and the rows of a step of a block that is decided."""
        block, place = divmod(number, self.every)
        rows = self._rows(block)
        first, last = (len(rows) * (place + n) // self.every for n in (0, 1))
        return sum(self.block(block).drawn) // self.examples_an_epoch, rows[first:last]

    def block(self, number: int) -> Block:
        """What a block is drawn by.

        Raises:
            LookupError: nobody has decided it, or it is forgotten.
        """
        if number == 0 and not self.blocks:
            self.blocks[0] = Block(tuple(self.start), (0,) * len(self.names))
        if number not in self.blocks:
            raise LookupError(f"block {number} of the mixture is not decided")
        return self.blocks[number]

    def decide(self, number: int, wanted: Sequence[float]) -> None:
        """Give a block its shares; the one before it is decided."""
        before = self.block(number - 1)
        new = self._rows(number - 1).counts(len(self.names)).tolist()
        drawn = tuple(map(sum, zip(before.drawn, new, strict=True)))
        self.blocks[number] = Block(tuple(wanted), drawn)
        for old in [one for one in self.blocks if one < number - 1]:
            del self.blocks[old]

    def state(self) -> dict[str, Any]:
        """The blocks, as JSON keeps them."""
        return {
            str(number): {"shares": list(one.shares), "drawn": list(one.drawn)}
            for number, one in self.blocks.items()
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to such a state."""
        self.blocks.clear()
        for number, one in state.items():
            self.blocks[int(number)] = Block(tuple(one["shares"]), tuple(one["drawn"]))
        self._cache.clear()

    def _rows(self, number: int) -> EpochRows:
        if number not in self._cache:
            for old in [one for one in self._cache if one < number - 1]:
                del self._cache[old]
            self._cache[number] = _draw(self, number)
        return self._cache[number]


def _draw(mixture: DynamicMixture, number: int) -> EpochRows:
    """The rows of a block: as many examples as fill `every` times `rows_per_step` rows, and no more."""
    room = mixture.every * mixture.rows_per_step
    block = mixture.block(number)
    count = _expected(mixture, block, room)
    while True:
        tasks, numbers = _places(mixture, number, count)
        rows = laid_in_rows(tasks, numbers, mixture)
        if len(rows) > room:
            break
        count += count // 4 + 1
    fits, exceeds = 0, len(tasks)
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        if len(laid_in_rows(tasks[:middle], numbers[:middle], mixture)) <= room:
            fits = middle
        else:
            exceeds = middle
    rows = laid_in_rows(tasks[:fits], numbers[:fits], mixture)
    return rows.ordered(generator_of(mixture.seed, "rows", number).permutation(len(rows)))


def _expected(mixture: DynamicMixture, block: Block, room: int) -> int:
    """Examples that a block will have, by their mean length."""
    means = [float(np.mean(own)) if len(own) else 0.0 for own in mixture.lengths]
    mean = sum(share * own for share, own in zip(block.shares, means, strict=True))
    return int(room * mixture.row_length / max(1.0, mean)) + 1


def _places(mixture: DynamicMixture, number: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Tasks and numbers of so many examples of a block: of each task what comes next in its passes, shuffled."""
    block = mixture.block(number)
    exact = np.asarray(block.shares) * count
    whole = np.floor(exact + 1e-9).astype(int)
    most = np.argsort(whole - exact, kind="stable")[: count - int(whole.sum())]
    whole[most] += 1
    tasks = np.repeat(np.arange(len(whole)), whole)
    tasks = tasks[generator_of(mixture.seed, "block", number, count).permutation(len(tasks))]
    numbers = np.empty(len(tasks), dtype=np.int64)
    numbers[np.argsort(tasks, kind="stable")] = np.concatenate(
        [_next(mixture, task, block.drawn[task], own) for task, own in enumerate(whole.tolist())]
    )
    return tasks, numbers


def _next(mixture: DynamicMixture, task: int, drawn: int, count: int) -> np.ndarray:
    """The next examples of a task, of whole shuffled passes, int64 [count]."""
    size = len(mixture.lengths[task])
    found: list[np.ndarray] = [np.arange(0)]
    while count > 0:
        order = generator_of(mixture.seed, "pass", drawn // size, mixture.names[task])
        found.append(order.permutation(size)[drawn % size :][:count])
        count -= len(found[-1])
        drawn += size - drawn % size
    return np.concatenate(found)

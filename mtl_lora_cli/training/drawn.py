"""From the mixture to what one step is made of: its rows, and this process's share of them as batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from mtl_lora_cli.data.epoch_rows import Place
from mtl_lora_cli.data.packing import pack
from mtl_lora_cli.data.prepare import TrainingData
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.machine.processes import ALONE, Processes
from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.models.host import Batch, Dataset, at_step, examples_in, row_length_of
from mtl_lora_cli.recipe.training import Training
from mtl_lora_cli.training.balance import Factors
from mtl_lora_cli.training.capacity import Fullest, PassSizes
from mtl_lora_cli.training.shuffled import ShuffledTasks
from mtl_lora_cli.training.step import StepPlan


@dataclass(frozen=True, kw_only=True)
class Drawn(StepPlan):
    """A step of a run.

    Attributes:
        number, epoch: counted from 0.
        rows: of all processes.
        places: of this process, the examples of each pass.
        examples: of all rows, by task id.
        tokens: of all rows.
        supervised: int64 [T], units of each task over all processes.
        factors: float32 [T], of each task's losses.
    """

    number: int
    epoch: int
    rows: list[list[Place]]
    places: list[list[Place]]
    examples: dict[int, int]
    tokens: int
    supervised: Tensor
    factors: Tensor


class Draw:
    """Draws a run's steps. The weight of a unit is its task's `loss_weight`, times what `balance` makes of it.

    Args:
        data: encoded tasks and their mixture.
        settings: the recipe's `training`.
        processes: this one among those of the run; each draws all rows, and takes its own.
        balance: learned factors of the tasks' losses; None without.
        apart: every pass is of one task.
    """

    def __init__(
        self,
        data: TrainingData,
        settings: Training,
        processes: Processes = ALONE,
        *,
        balance: Factors | None = None,
        apart: bool = False,
    ) -> None:
        self._data, self._settings, self._processes = data, settings, processes
        self._balance, self._apart = balance, apart
        self._dataset = data.dataset(settings.loss_on)
        self._asked = 0  # steps below this were asked for ahead
        self.weights = torch.tensor([task.loss_weight for task in data.tasks])
        self._shuffled = (
            ShuffledTasks(self._dataset.lengths, settings.seed) if settings.shuffled_tasks else None
        )

    def __call__(self, number: int) -> Drawn:
        """What step `number`, counted from 0, is made of."""
        epoch, rows = self._data.mixture.step(number)
        mine = self._processes.mine(rows)
        self._ahead(number)
        dataset = at_step(self._dataset, epoch, number)
        passes, batches = self._passes(mine, dataset)
        owners = [batch.owners for batch in batches]
        if self._data.others is not None:
            self._require_agreement(mine, owners)
        if self._shuffled is not None:
            batches = [
                self._shuffled(cast(PackedBatch, one), some)
                for one, some in zip(batches, _places(passes), strict=True)
            ]
        # Of all processes' rows, which every process knows: nothing has to be asked.
        supervised = dataset.units(rows)
        factors = self._factors(number)
        return Drawn(
            batches=batches,
            weights=[factors[owner] for owner in owners],
            owners=owners,
            count=int(supervised.sum()),
            idle=self._idle(rows, len(passes), dataset),
            number=number,
            epoch=epoch,
            rows=rows,
            places=_places(passes),
            examples=examples_in(dataset, rows),
            tokens=dataset.size(rows),
            supervised=supervised,
            factors=factors,
            tasks=list(examples_in(dataset, rows)),
        )

    def _factors(self, number: int) -> Tensor:
        """Of the tasks' losses at a step, float32 [T]."""
        return self.weights if self._balance is None else self.weights * self._balance.at(number)

    def _passes(
        self, rows: list[list[Place]], dataset: Dataset
    ) -> tuple[list[list[list[Place]]], list[Batch]]:
        """The rows of each pass, and what becomes of them."""
        if not self._apart:
            passes = self._together(rows)
            return passes, [dataset.collate(some) for some in passes]
        if not hasattr(dataset, "entries"):
            passes = self._by_task(rows, dataset)
            return passes, [dataset.collate(some) for some in passes]
        found = []  # tasks learn from the same examples: each has a pass over all of them
        for some in self._together(rows):
            whole: Any = dataset.collate(some)
            found += [(some, part) for part in whole.by_task()]
        return [some for some, _ in found], [part for _, part in found]

    def _together(self, rows: list[list[Place]]) -> list[list[list[Place]]]:
        """The rows of each pass."""
        size = self._settings.rows_per_pass
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def _by_task(self, rows: list[list[Place]], dataset: Dataset) -> list[list[list[Place]]]:
        """The same examples in rows of one task each."""
        places: dict[int, list[Place]] = {}
        for row in rows:
            for place in row:
                places.setdefault(place[0], []).append(place)
        passes = []
        for task in sorted(places):
            own = places[task]
            lengths = [int(dataset.lengths[t][number]) for t, number in own]
            packed = pack(lengths, row_length_of(dataset, self._settings.row_length))
            passes += self._together([[own[i] for i in row] for row in packed])
        return passes

    def _ahead(self, number: int) -> None:
        """Let examples be read before their steps, where the dataset can: decoding takes long."""
        for step in range(number, number + getattr(self._dataset, "steps_ahead", 0)):
            if step >= self._asked:
                try:
                    epoch, rows = self._data.mixture.step(step)
                except LookupError:  # beyond the last stage, or of shares that are not decided yet
                    return
                self._asked = step + 1
                mine: Any = at_step(self._dataset, epoch, step)
                mine.ahead(self._processes.mine(rows))

    def batch(self, rows: list[list[Place]]) -> Batch:
        """Rows as one pass of the model."""
        return self._dataset.collate(rows)

    def supervised(self, rows: list[list[Place]], epoch: int = 0) -> Tensor:
        """Units of each task, int64 [T]; rows of streams are those of an epoch."""
        return at_step(self._dataset, epoch, 0).units(rows)

    def _require_agreement(self, mine: list[list[Place]], owners: list[Tensor]) -> None:
        """Refuse units that are counted in one way and collated in another: S would be wrong.

        Raises:
            UsageError: naming the task.
        """
        collated = torch.bincount(
            torch.cat([*owners, torch.zeros(0, dtype=torch.long)]), minlength=len(self.weights)
        )
        counted = self.supervised(mine)
        for task, found, expected in zip(self._data.tasks, collated, counted, strict=True):
            if found != expected:
                raise UsageError(
                    f"task '{task.name}': the batch of these rows has {int(found)} of its units, and its "
                    f"dataset's units() counts {int(expected)}"
                )

    def _idle(self, rows: list[list[Place]], passes: int, dataset: Dataset) -> list[Batch]:
        """So many passes more has the process with the most rows."""
        most = -(-len(rows) // self._processes.count)
        missing = -(-most // self._settings.rows_per_pass) - passes
        return [dataset.collate(rows[:1])] * missing if missing > 0 else []


def sizes_of(
    data: TrainingData, settings: Training, processes: Processes, *, captured: bool
) -> PassSizes:
    """Of the passes of one process in a run's steps, as `Draw` makes them.

    Args:
        data: encoded tasks and their mixture.
        settings: the recipe's `training`.
        processes: this one among those of the run.
        captured: whether passes may be captured; only then the fullest row is looked for.
    """
    fullest = None
    if captured and data.others is None:
        asked = [split.learned_counts(settings.loss_on) for split in data.splits]
        fullest = Fullest.of(data.mixture.first_rows(), asked)
    mine = len(processes.mine(list(range(settings.rows_per_step))))
    return PassSizes.of_steps(
        settings.row_length, len(data.tasks), fullest, mine, settings.rows_per_pass
    )


def _places(passes: list[list[list[Place]]]) -> list[list[Place]]:
    """The examples of each pass."""
    return [[place for row in some for place in row] for some in passes]

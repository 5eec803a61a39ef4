"""From the mixture to what one step is made of: its rows, and this process's share of them as batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_lora_cli.data.mixture import Place
from mtl_lora_cli.data.prepare import TrainingData
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.machine.processes import ALONE, Processes
from mtl_lora_cli.models.host import Batch
from mtl_lora_cli.recipe.schema import Training
from mtl_lora_cli.training.step import StepPlan


@dataclass(frozen=True, kw_only=True)
class Drawn(StepPlan):
    """A step of a run.

    Attributes:
        number, epoch: counted from 0.
        rows: of all processes.
        places: of this process, the examples of each pass.
        tokens: of all rows.
        supervised: int64 [T], units of each task over all processes.
    """

    number: int
    epoch: int
    rows: list[list[Place]]
    places: list[list[Place]]
    tokens: int
    supervised: Tensor


class Draw:
    """Draws a run's steps. The weight of a unit is its task's `loss_weight`.

    Args:
        data: encoded tasks and their mixture.
        settings: the recipe's `training`.
        processes: this one among those of the run; each draws all rows, and takes its own.
    """

    def __init__(
        self, data: TrainingData, settings: Training, processes: Processes = ALONE
    ) -> None:
        self._data, self._settings, self._processes = data, settings, processes
        self._dataset = data.dataset(settings.loss_on)
        self.weights = torch.tensor([task.loss_weight for task in data.tasks])

    def __call__(self, number: int) -> Drawn:
        """What step `number`, counted from 0, is made of."""
        size = self._settings.rows_per_pass
        epoch, rows = self._data.mixture.step(number)
        mine = self._processes.mine(rows)
        passes = [mine[i : i + size] for i in range(0, len(mine), size)]
        batches = [self.batch(some) for some in passes]
        owners = [batch.owners for batch in batches]
        if self._data.others is not None:
            self._require_agreement(mine, owners)
        # Of all processes' rows, which every process knows: nothing has to be asked.
        supervised = self.supervised(rows)
        return Drawn(
            batches=batches,
            weights=[self.weights[owner] for owner in owners],
            owners=owners,
            count=int(supervised.sum()),
            idle=self._idle(rows, len(passes)),
            number=number,
            epoch=epoch,
            rows=rows,
            places=[[place for row in some for place in row] for some in passes],
            tokens=self._dataset.size(rows),
            supervised=supervised,
        )

    def batch(self, rows: list[list[Place]]) -> Batch:
        """Rows as one pass of the model."""
        return self._dataset.collate(rows)

    def supervised(self, rows: list[list[Place]]) -> Tensor:
        """Units of each task, int64 [T]."""
        return self._dataset.units(rows)

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

    def _idle(self, rows: list[list[Place]], passes: int) -> list[Batch]:
        """So many passes more has the process with the most rows."""
        most = -(-len(rows) // self._processes.count)
        missing = -(-most // self._settings.rows_per_pass) - passes
        return [self.batch(rows[:1])] * missing if missing else []

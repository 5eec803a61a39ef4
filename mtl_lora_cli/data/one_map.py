"""Pictures with one of their maps each: what `training.rows: one_task` makes of tasks that share pictures."""

from __future__ import annotations

from copy import copy

import numpy as np
import torch
from torch import Tensor

from mtl_lora_cli.data.map_batch import SeenBatch
from mtl_lora_cli.data.maps import MapDataset
from mtl_lora_cli.models.host import Rows


class OneMapDataset:
    """A row is a picture and one task that has a map of it, so each task has rows of its own, as texts have.

    Args:
        every: the pictures with all their maps.

    Attributes:
        lengths: of each task ones [pictures that have its map].
        row_length, steps_ahead: as of the pictures.
    """

    def __init__(self, every: MapDataset) -> None:
        self._every = every
        self._pictures = [every.pictures_of(task) for task in range(len(every.lengths))]
        self.lengths = [np.ones(len(own), dtype=np.int64) for own in self._pictures]
        self.row_length, self.steps_ahead = every.row_length, every.steps_ahead

    def _there(self, rows: Rows) -> Rows:
        """The same rows as places of the pictures."""
        entries = self._every.entries
        return [[(entries[task], self._pictures[task][n]) for task, n in row] for row in rows]

    def at(self, epoch: int, step: int) -> OneMapDataset:
        """See `MapDataset`."""
        other = copy(self)
        other._every = self._every.at(epoch, step)
        return other

    def ahead(self, rows: Rows) -> None:
        """See `MapDataset`."""
        self._every.ahead(self._there(rows))

    def where(self, task: int, number: int) -> str:
        """File and line of a picture."""
        return self._every.where(self._every.entries[task], self._pictures[task][number])

    def units(self, rows: Rows) -> Tensor:
        """Maps of each task, int64 [T]: one of each place."""
        tasks = torch.tensor([task for row in rows for task, _ in row], dtype=torch.long)
        return torch.bincount(tasks, minlength=len(self.lengths))

    def size(self, rows: Rows) -> int:
        """Pictures."""
        return self._every.size(rows)

    def collate(self, rows: Rows) -> SeenBatch:
        """Of each place its task's map alone; see `SeenBatch`."""
        tasks = torch.tensor([task for row in rows for task, _ in row])
        batch = self._every.collate(self._there(rows))
        return batch.only(tasks[:, None] == torch.arange(len(self.lengths)))

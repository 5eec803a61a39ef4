"""Sizes of captured passes: known before a run's first step, so that one graph serves any of its rows.

A graph wants every tensor at the same place and of the same size. So a pass has room for as many positions,
questions, segments and tasks as its fullest rows have, and what a batch lacks is padding: positions that belong to
no task, questions of weight 0, and slots that repeat a task which is there. None of it changes a loss, a gradient
or what an absent task remembers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mtl_lora_cli.adapters.routing import BASE_ONLY
from mtl_lora_cli.data.epoch_rows import EpochRows
from mtl_lora_cli.engine.sizes import room_for, with_slack
from mtl_lora_cli.models.batch import PackedBatch

SEGMENT = 256  # positions of a segment of padding
MOST_OF_ALL = (
    64  # so many tasks' matrices are made in every pass, whoever is present; of more, those present
)
_SLOTS = 16  # slots are whole multiples of this


@dataclass(frozen=True)
class Capacity:
    """The sizes that one graph serves.

    Attributes:
        positions, questions: of a pass.
        segments: of it, or runs of questions of one task.
        slots: tasks that may be present; 0: the matrices of all tasks are made.
        trees: whether segments are trees.
        shown: whether the graph begins behind the embeddings.
    """

    positions: int
    questions: int
    segments: int
    slots: int = 0
    trees: bool = False
    shown: bool = False


@dataclass(frozen=True)
class Fullest:
    """The most that a row of a run has.

    Attributes:
        asked: supervised tokens.
        examples: of them.
        tasks: that they are of.
    """

    asked: int
    examples: int
    tasks: int

    @classmethod
    def of(cls, rows: EpochRows, asked: Sequence[np.ndarray]) -> Fullest:
        """Of these rows.

        Args:
            rows: of an epoch.
            asked: of each task int [examples], the supervised tokens of each.
        """
        sizes = np.diff(rows.starts)
        width = int(rows.tasks.max()) + 1
        pairs = np.unique(np.repeat(np.arange(len(rows)), sizes) * width + rows.tasks)
        return cls(
            asked=int(rows.sums(asked).max()),
            examples=int(sizes.max()),
            tasks=int(np.bincount(pairs // width).max()),
        )


@dataclass(frozen=True)
class PassSizes:
    """What is known of a run's passes before its first step.

    Attributes:
        row_length: most positions of a row.
        tasks: T.
        fullest: the most that a row has; later epochs pack other rows, so that a sixteenth more is taken. None: not
            known.
        rows: of this process's passes in a full step; a pass of fewer is filled up to the next of them.
    """

    row_length: int
    tasks: int
    fullest: Fullest | None = None
    rows: tuple[int, ...] = ()

    @classmethod
    def of_steps(
        cls, row_length: int, tasks: int, fullest: Fullest | None, mine: int, rows_per_pass: int
    ) -> PassSizes:
        """Of steps in which this process has `mine` rows."""
        whole, rest = divmod(mine, rows_per_pass)
        rows = ((rows_per_pass,) if whole else ()) + ((rest,) if rest else ())
        return cls(row_length, tasks, fullest, rows)

    def capacity(self, batch: PackedBatch) -> Capacity:
        """Of the graph for a batch: the same for all that have as many rows, unless one is fuller than any was said
        to be."""
        rows = -(-batch.input_ids.numel() // self.row_length)
        rows = min((one for one in self.rows if one >= rows), default=rows)
        positions = rows * self.row_length
        segments = len(batch.segments.bounds)
        segments += -(-(positions - batch.input_ids.numel()) // SEGMENT)
        ids = batch.task_ids.view(-1)
        questions, present = len(batch.positions), len(tasks_in(ids))
        # Questions of trees need not stand as their trees do; those that are filled up are one run more.
        segments = max(segments, int((ids[batch.positions].diff() != 0).sum()) + 2)
        if self.fullest is not None:
            asked = with_slack(self.fullest.asked, at_most=self.row_length)
            questions = max(questions, rows * asked)
            behind = -(-positions // SEGMENT)
            segments = max(segments, rows * with_slack(self.fullest.examples) + behind)
            present = max(present, rows * with_slack(self.fullest.tasks))
        return Capacity(
            positions,
            room_for(questions),
            room_for(segments),
            self._slots(present),
            batch.segments.reach is not None,
            batch.pictures is not None,
        )

    def _slots(self, present: int) -> int:
        found = room_for(present, _SLOTS)
        return 0 if self.tasks <= MOST_OF_ALL or found >= self.tasks else found


def tasks_in(ids: Tensor) -> Tensor:
    """The distinct tasks of ids, int64, ascending, without `BASE_ONLY`."""
    return torch.nonzero(torch.bincount(ids - BASE_ONLY)[1:])[:, 0]


def slot_table(ids: Tensor, tasks: int, slots: int) -> tuple[Tensor, Tensor]:
    """Which task stands in which slot, and the slot of each task.

    A slot for which no task is left repeats the last one that is there: nothing reads it, so that its gradient is zero,
    and no absent task is touched.

    Args:
        ids: int64 [N], −1 for positions of no task.
        tasks: T.
        slots: P; 0: one for each task.

    Returns:
        int64 [P], and int32 [T + 1], of which the last is that of −1.

    Raises:
        ValueError: more tasks than slots.
    """
    present = tasks_in(ids) if slots else torch.arange(tasks)
    count = slots or tasks
    if len(present) > count:
        raise ValueError(f"{len(present)} tasks do not fit {count} slots")
    places = torch.full((tasks + 1,), -1, dtype=torch.int32)
    places[present] = torch.arange(len(present), dtype=torch.int32)
    last = present[-1:] if len(present) else torch.zeros(1, dtype=torch.long)
    return torch.cat([present, last.expand(count - len(present))]), places


def padded(batch: PackedBatch, capacity: Capacity) -> PackedBatch:
    """The batch on the CPU, filled up: padding belongs to no task and is asked nothing.

    Questions are filled up with position 0 and token 0; give them the weight 0.
    """
    missing = capacity.positions - batch.input_ids.numel()
    lengths = [SEGMENT] * (missing // SEGMENT)
    if missing % SEGMENT:
        lengths.append(missing % SEGMENT)
    places = torch.arange(missing) % SEGMENT
    questions = capacity.questions - len(batch.positions)
    nothing = torch.zeros(questions, dtype=torch.long)
    return replace(
        batch,
        input_ids=torch.cat([batch.input_ids, torch.zeros(1, missing, dtype=torch.long)], dim=1),
        position_ids=torch.cat([batch.position_ids, places.unsqueeze(0)], dim=1),
        task_ids=torch.cat(
            [batch.task_ids, torch.full((1, missing), BASE_ONLY, dtype=torch.long)], dim=1
        ),
        segments=batch.segments.and_more(lengths),
        positions=torch.cat([batch.positions, nothing]),
        owner=torch.arange(capacity.questions),
        targets=torch.cat([batch.targets, nothing]),
    )

"""From packed rows to one pass of the model."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from itertools import chain
from typing import Any

import numpy as np
import torch

from mtl_lora_cli.data.encoded import EncodedSplit
from mtl_lora_cli.data.epoch_rows import Place
from mtl_lora_cli.data.laid import Laid, behind_each_other, in_trees
from mtl_lora_cli.data.mixture import positions_of
from mtl_lora_cli.data.pictured import Eyes
from mtl_lora_cli.data.windows import Windows
from mtl_lora_cli.engine.segments import Segments
from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.models.host import Batch, Dataset, Rows, at_step
from mtl_lora_cli.models.sight import with_pictures
from mtl_lora_cli.pictures.shown import Picture


class TextDataset:
    """Encoded examples of each task; a unit is a supervised token.

    Args:
        splits: of each task.
        loss_on: see `training_batch`.
        eyes: what the model sees of rows' pictures; None: they show none.
        share: see `training_batch`.
        windows: the examples of later epochs, where tasks are streams.

    Attributes:
        lengths: of each task int [examples], the positions that each example takes.
    """

    def __init__(
        self,
        splits: Sequence[EncodedSplit],
        loss_on: str,
        eyes: Eyes | None = None,
        *,
        share: bool = False,
        windows: Windows | None = None,
    ) -> None:
        self._splits, self._loss_on, self._eyes = splits, loss_on, eyes
        self._share, self._windows = share, windows
        self.lengths = [split.positions for split in splits]

    def at(self, epoch: int, step: int) -> TextDataset:
        """The examples of an epoch: a window of streams."""
        if self._windows is None or epoch == 0:
            return self
        splits = self._windows.splits(epoch)
        return TextDataset(splits, self._loss_on, self._eyes, share=self._share)

    def collate(self, rows: Rows) -> PackedBatch:
        """See `training_batch`."""
        return training_batch(
            rows, self._splits, loss_on=self._loss_on, eyes=self._eyes, share=self._share
        )

    def units(self, rows: Rows) -> torch.Tensor:
        """See `supervised_tokens`."""
        return supervised_tokens(rows, self._splits, loss_on=self._loss_on)

    def size(self, rows: Rows) -> int:
        """Tokens, each example's last one, which takes no position, included."""
        return sum(self._splits[task].length(number) for row in rows for task, number in row)


class ChosenDataset:
    """Some examples of a dataset, under numbers of their own.

    Args:
        every: all of them.
        numbers: of each task those that are kept.
    """

    def __init__(self, every: Dataset, numbers: Sequence[np.ndarray]) -> None:
        self._every, self._numbers = every, numbers
        for name in ("row_length", "steps_ahead", "entries"):  # where rows are the dataset's own
            if hasattr(every, name):
                setattr(self, name, getattr(every, name))
        if hasattr(every, "where"):
            self.where = lambda task, number: every.where(task, int(numbers[task][number]))
        if hasattr(every, "examples"):
            whole = [[(task, n) for n in range(len(kept))] for task, kept in enumerate(numbers)]
            self.examples = every.units(self._there(whole)).tolist()
        self.lengths = [
            np.asarray(own)[kept] for own, kept in zip(every.lengths, numbers, strict=True)
        ]

    def _there(self, rows: Rows) -> Rows:
        return [[(task, int(self._numbers[task][number])) for task, number in row] for row in rows]

    def at(self, epoch: int, step: int) -> ChosenDataset:
        """As of the whole one."""
        other = copy(self)
        other._every = at_step(self._every, epoch, step)
        return other

    def ahead(self, rows: Rows) -> None:
        """As of the whole one."""
        every: Any = self._every  # who has `steps_ahead` has it, too
        every.ahead(self._there(rows))

    def collate(self, rows: Rows) -> Batch:
        """As of the whole one."""
        return self._every.collate(self._there(rows))

    def units(self, rows: Rows) -> torch.Tensor:
        """As of the whole one."""
        return self._every.units(self._there(rows))

    def size(self, rows: Rows) -> int:
        """As of the whole one."""
        return self._every.size(self._there(rows))


def training_batch(
    rows: Sequence[Sequence[Place]],
    splits: Sequence[EncodedSplit],
    *,
    loss_on: str,
    eyes: Eyes | None = None,
    share: bool = False,
) -> PackedBatch:
    """Lay rows behind each other and ask for every supervised token.

    The last token of an example is a target only: nothing follows that it could predict, and nobody
    attends to it. So it takes no position (`positions_of`).

    Args:
        rows: packed rows, as task id and example number.
        splits: encoded examples of each task.
        loss_on: `answer` supervises answer and end token; `all` every token but the first and those of
            pictures.
        eyes: what the model sees of rows' pictures; None: they show none.
        share: examples of a row share the positions of what they begin with (`data/laid.py`). Each asks its
            own questions, wherever they stand.
    """
    places = [place for row in rows for place in row]
    laid = laid_out(rows, splits, share=share)
    positions, targets = [], []
    for (task, number), path in zip(places, laid.paths, strict=True):
        learned = splits[task].learned(number, loss_on)
        positions.append(path[learned - 1])  # the token before
        targets.append(splits[task].example(number)[learned])
    asked = np.concatenate(positions)
    input_ids = torch.from_numpy(laid.tokens.astype(np.int64)).unsqueeze(0)
    reach = None if laid.reach is None else torch.from_numpy(laid.reach)
    batch = PackedBatch(
        input_ids=input_ids,
        position_ids=torch.from_numpy(laid.places).unsqueeze(0),
        task_ids=torch.from_numpy(laid.tasks.astype(np.int64)).unsqueeze(0),
        segments=Segments.build(laid.lengths, reach),
        positions=torch.from_numpy(asked),
        owner=torch.arange(len(asked)),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
    )
    if eyes is None:
        return batch
    prompts = [int(splits[task].prompt_lengths[number]) for task, number in places]
    return shown_in(batch, [_shown(splits[task], number) for task, number in places], eyes, prompts)


def laid_out(
    rows: Sequence[Sequence[Place]], splits: Sequence[EncodedSplit], *, share: bool
) -> Laid:
    """Where the positions of rows stand; the arguments are those of `training_batch`."""
    parts = [[splits[task].example(number) for task, number in row] for row in rows]
    inputs = [[part[: positions_of(len(part))] for part in own] for own in parts]
    tasks = [[task for task, _ in row] for row in rows]
    if share:
        return in_trees(list(zip(tasks, inputs, strict=True)))
    return behind_each_other(list(chain(*tasks)), list(chain(*inputs)))


def _shown(split: EncodedSplit, number: int) -> Sequence[Picture]:
    """The pictures of one example."""
    return () if split.pictures is None else split.pictures[number]


def shown_in(
    batch: PackedBatch,
    shown: Sequence[Sequence[Picture]],
    eyes: Eyes,
    prompts: Sequence[int],
) -> PackedBatch:
    """A pass with its pictures.

    Args:
        batch: on the CPU.
        shown: of each of its examples, in their order.
        eyes: what the model sees of them.
        prompts: tokens of each example's prompt.
    """
    pictures = [picture for some in shown for picture in some]
    seen, counts = eyes.seen(pictures), eyes.counts(pictures)
    return with_pictures(batch, eyes.vision, seen, counts, prompts)


def supervised_tokens(
    rows: Sequence[Sequence[Place]], splits: Sequence[EncodedSplit], *, loss_on: str
) -> torch.Tensor:
    """Supervised tokens of each task in these rows, int64 [T]."""
    counts = torch.zeros(len(splits), dtype=torch.long)
    for row in rows:
        for task, number in row:
            counts[task] += len(splits[task].learned(number, loss_on))
    return counts

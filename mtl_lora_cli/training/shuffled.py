"""A control: the adapter is given the task ids of other examples, so that they say nothing of the task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from mtl_lora_cli.data.epoch_rows import Place
from mtl_lora_cli.models.batch import PackedBatch

_SALT = 23  # another stream than that of the draws


class ShuffledTasks:
    """Task ids permuted over all training examples once, by the run's seed.

    Each id is as frequent as before, and each example keeps its own through all epochs. What a loss
    counts for does not change: the example is still its task's.

    Args:
        lengths: of each task int [examples], the positions that each example takes.
        seed: of the run.
    """

    def __init__(self, lengths: Sequence[np.ndarray], seed: int) -> None:
        sizes = [len(own) for own in lengths]
        ids = np.repeat(np.arange(len(sizes)), sizes)
        mixed = np.random.default_rng([seed, _SALT]).permutation(ids)
        self._ids = np.split(mixed, np.cumsum(sizes)[:-1])
        self._lengths = lengths

    def __call__(self, batch: PackedBatch, places: Sequence[Place]) -> PackedBatch:
        """The batch of these examples, routed by their permuted ids."""
        ids = [int(self._ids[task][number]) for task, number in places]
        lengths = [int(self._lengths[task][number]) for task, number in places]
        routed = torch.from_numpy(np.repeat(ids, lengths).astype(np.int64))
        return replace(batch, task_ids=routed.view_as(batch.task_ids))

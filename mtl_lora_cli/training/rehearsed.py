"""A run's kernels compiled while its rows are still read and encoded.

What a kernel is depends on a pass' sizes and not on its words. So a row as full as the run's, of words that mean nothing,
is known before any data is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch

from mtl_lora_cli.data.collate import training_batch
from mtl_lora_cli.data.encoded import EncodedSplit
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.models.rehearsal import rehearse
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.recipe.training import Training
from mtl_lora_cli.tasks.task import Task
from mtl_lora_cli.training.capacity import PassSizes, padded

_TOKENS, _ANSWER = 120, 3  # of a made-up example
_WORDS = 100  # that it is made of: any tokenizer has so many


def begin(
    recipe: Recipe, base: BaseModel, tasks: Sequence[Task], dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    """Begin to compile in a thread of its own, where there is something to compile.

    Returns:
        Waits until it is done. Call it before random numbers are drawn or a card's memory is measured.
    """
    shown = any(task.template.images for task in tasks)
    if device.type != "cuda" or shown or recipe.distributed.zero_stage == 3:
        return lambda: None
    names = [task.name for task in tasks]
    work = threading.Thread(
        target=rehearse,
        args=(base, recipe.adapter, names, lambda: made_up(recipe.training, len(names))),
        kwargs={"dtype": dtype, "device": device},
        daemon=True,
    )
    work.start()
    return work.join


def made_up(training: Training, tasks: int) -> PackedBatch:
    """A pass as full as any of a run's, on the CPU.

    Args:
        training: the run's settings.
        tasks: T, which take turns.
    """
    length = min(_TOKENS, training.row_length)
    examples = max(1, training.row_length // length)
    tokens = np.arange(tasks * length, dtype=np.int32) % _WORDS
    splits = [
        EncodedSplit(
            tokens=tokens[task * length : (task + 1) * length],
            starts=np.array([0, length]),
            prompt_lengths=np.array([max(1, length - _ANSWER)], dtype=np.int32),
            dropped=0,
            truncated=0,
            rows=1,
        )
        for task in range(tasks)
    ]
    row = [(number % tasks, 0) for number in range(examples)]
    batch = training_batch(
        [row] * training.rows_per_pass,
        splits,
        loss_on=training.loss_on,
        share=training.share_beginnings,
    )
    sizes = PassSizes(training.row_length, tasks, rows=(training.rows_per_pass,))
    return padded(batch, sizes.capacity(batch))

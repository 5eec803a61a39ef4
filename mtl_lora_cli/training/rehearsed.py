"""A run's kernels, compiled before its rows are known.

What a kernel is depends on a pass' sizes and not on its words. So a row as full as the run's, of words that mean nothing,
is known before any data is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from mtl_lora_cli.data.collate import training_batch
from mtl_lora_cli.data.encoded import EncodedSplit
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.models.batch import PackedBatch
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.models.rehearsal import rehearse
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.recipe.training import Training
from mtl_lora_cli.training.capacity import PassSizes, padded
from mtl_lora_cli.training.rehearsal_start import compiles, kept_file

_TOKENS, _ANSWER = 120, 3  # of a made-up example
_WORDS = 100  # that it is made of: any tokenizer has so many


def compile_kernels(
    recipe: Recipe, base: BaseModel, tasks: Sequence[str], dtype: torch.dtype, device: torch.device
) -> bool:
    """Compile them, unless that is done; says whether it was not.

    Args:
        recipe, base, tasks: of the run.
        dtype, device: in what and where it computes.
    """
    if device.type != "cuda" or not compiles(recipe):
        return False
    return rehearse(
        base,
        recipe.adapter,
        tasks,
        partial(_learn, made_up(recipe.training, len(tasks))),
        dtype=dtype,
        device=device,
        kept=kept_file(recipe, base.folder),
    )


def _learn(batch: PackedBatch, packed: PackedModel) -> None:
    """Forward and backward, with nothing in it."""
    moved = batch.to(next(packed.model.parameters()).device)
    with packed.train().routed(moved):
        packed.losses(moved).sum().backward()


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

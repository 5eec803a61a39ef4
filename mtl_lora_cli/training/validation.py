"""The loss of each task on held-out examples while the run learns: who gains, and who loses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.data.collate import training_batch
from mtl_lora_cli.data.encoding import EncodedSplit, Encoder, encode_split
from mtl_lora_cli.data.mixture import positions_of
from mtl_lora_cli.data.prepare import read_examples
from mtl_lora_cli.evaluation.choices import fill_passes
from mtl_lora_cli.models.packed import PackedBatch, PackedModel
from mtl_lora_cli.recipe.schema import Recipe, Training
from mtl_lora_cli.tasks.task import Task
from mtl_lora_cli.training.observers import Seen, undisturbed

SPLIT = "validation"  # never test: that one is for the end; never train: that one is learned
_DRAW = 0  # not the run's seed: runs that differ in it are measured on the same examples


def encode_validation(
    tasks: Sequence[Task], recipe: Recipe, tokenizer: Any, longest: int
) -> list[EncodedSplit]:
    """Some examples of each task's validation split, drawn once and for all runs.

    Too long ones are treated as evaluation does (a prompt loses its beginning), or dropped where the
    training drops its own.

    Args:
        tasks: bound tasks.
        recipe: its `training` says how many examples, and how long a row is.
        tokenizer: the base model's.
        longest: positions that the base model knows.

    Returns:
        The examples of each task; none of a task that has no validation split.

    Raises:
        UsageError: a file, a row or a label is wrong.
    """
    training = recipe.training
    assert training.validation is not None
    encoder = Encoder(tokenizer, recipe.prompt_format)
    splits = []
    for task in tasks:
        found = read_examples(task, SPLIT, at_most=training.validation.examples, seed=_DRAW)
        if found is None:
            splits.append(_nothing())
            continue
        splits.append(
            encode_split(
                found.examples,
                found.wheres,
                encoder,
                task=task.name,
                limit=min(training.row_length, longest),
                on_overflow="drop" if training.on_overflow == "drop" else "truncate_prompt",
            )
        )
    return splits


def _nothing() -> EncodedSplit:
    none = np.empty(0, dtype=np.int32)
    return EncodedSplit(none, np.zeros(1, dtype=np.int64), none, dropped=0, truncated=0, rows=0)


class Validation:
    """Every so many steps and at the end: the mean −log p of each task's supervised tokens.

    Without dropout, at the parameters that the step leaves. A process of many computes all of it.

    Args:
        packed: base model with the adapter injected.
        adapter: what is trained.
        tasks: names in the order of their ids.
        splits: from `encode_validation`.
        settings: the recipe's `training`, with `validation`.
        total_steps: of the whole run.
    """

    before_update = False

    def __init__(
        self,
        packed: PackedModel,
        adapter: Adapter,
        tasks: Sequence[str],
        splits: Sequence[EncodedSplit],
        settings: Training,
        total_steps: int,
    ) -> None:
        assert settings.validation is not None
        self._packed, self._adapter, self._tasks = packed, adapter, tuple(tasks)
        self._every, self._total_steps = settings.validation.every, total_steps
        self._examples = [len(split) for split in splits]
        self._batches = _batches(splits, settings)

    def due(self, step: int) -> bool:
        """See `Observer`."""
        return step % self._every == 0 or step == self._total_steps

    def look(self, step: int) -> Seen:
        """The loss of each task that has held-out examples."""
        losses = self.losses()
        event = {
            "event": "validation",
            "step": step,
            # JSON has no NaN; the next step's own loss ends such a run.
            "loss": {name: v if math.isfinite(v) else None for name, v in losses.items()},
            "examples": {
                name: count
                for name, count in zip(self._tasks, self._examples, strict=True)
                if count
            },
        }
        told = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
        return Seen(event, f"validation after step {step}/{self._total_steps}  {told}")

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """(1 / S_t) Σ_i −log p_i over the S_t supervised tokens of each task's examples."""
        device = next(iter(self._adapter.tensors().values())).device
        sums = torch.zeros(len(self._tasks), dtype=torch.float64, device=device)
        counts = torch.zeros(len(self._tasks), dtype=torch.long)
        with undisturbed(self._packed, self._adapter):
            for batch, owner in self._batches:
                moved = batch.to(device)
                with self._packed.routed(moved):
                    sums.index_add_(0, owner.to(device), -self._packed(moved).double())
                counts += torch.bincount(owner, minlength=len(counts))
        return {
            name: float(own) / int(count)
            for name, own, count in zip(self._tasks, sums, counts, strict=True)
            if count
        }


def _batches(
    splits: Sequence[EncodedSplit], settings: Training
) -> list[tuple[PackedBatch, Tensor]]:
    """Passes of one row at most, with the task of each question [S]."""
    places = [(task, number) for task, split in enumerate(splits) for number in range(len(split))]
    costs = [positions_of(int(n)) for split in splits for n in split.lengths]
    found = []
    for chosen in fill_passes(costs, settings.row_length):
        batch = training_batch([[places[i] for i in chosen]], splits, loss_on=settings.loss_on)
        found.append((batch, batch.task_ids.view(-1)[batch.positions[batch.owner]]))
    return found

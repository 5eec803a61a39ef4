"""The host of a finished run, with what it learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mtl_lora_cli.adapters.files import AdapterFile, load_tensors
from mtl_lora_cli.dense.host import DenseHost
from mtl_lora_cli.dense.objective import DenseObjective
from mtl_lora_cli.models.base import BaseModel
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.tasks.task import Task


def open_host(
    base: BaseModel,
    recipe: Recipe,
    tasks: Sequence[Task],
    file: AdapterFile,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> DenseHost:
    """The host as training left it, in evaluation mode.

    Args:
        base: the base model.
        recipe: the run's; `quantization` says how the base weights are kept in memory.
        tasks: all of the run, those of the run that it adds to among them.
        file: of the finished adapter.
        device: where it goes.
        dtype: in which the backbone computes.

    Raises:
        UsageError: the base model cannot be loaded, or the adapter does not fit.
        MtlLoraError: the adapter is damaged.
    """
    host = DenseObjective(base, recipe, tasks).host(device, dtype)
    load_tensors(host.adapter, file.tensors, file.folder)
    return host.train(False)

"""A finished run as merging and exporting read it: everything but the base model's weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from mtl_lora_cli.adapters.files import CONFIG_FILE, read_adapter_file, read_alone
from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.evaluation.open_run import other_base, tell_unrecorded
from mtl_lora_cli.machine.cards import pick_device, pick_dtype
from mtl_lora_cli.models.base import BaseModel, find_base_model
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.tasks.chosen import read_tasks
from mtl_lora_cli.tasks.task import Task


@dataclass(frozen=True)
class FinishedRun:
    """What leaves a run is made of it, whatever the base model's size.

    Attributes:
        folder, recipe, tasks: of the run.
        base: the base model's place on this disk.
        adapter: its tensors, on the CPU; its layers have sizes and no weights of the base model.
        checkpoint: hash of the adapter's configuration, as evaluations remember it.
    """

    folder: RunFolder
    recipe: Recipe
    tasks: list[Task]
    base: BaseModel
    adapter: Adapter
    checkpoint: str

    @property
    def dtype(self) -> torch.dtype:
        """In which the base model computes here."""
        return pick_dtype(self.recipe.dtype, pick_device())


def read_finished(folder: RunFolder) -> FinishedRun:
    """Read a finished run without loading its base model.

    Raises:
        UsageError: the run is unfinished, its adapter is damaged, or its base model is gone or
            another one by now.
    """
    path = folder.require_adapter()
    recipe = load_recipe(folder.recipe).recipe
    try:
        file = read_adapter_file(path)
        adapter = read_alone(path)
        tasks = read_tasks(folder)
    except MtlLoraError as error:
        raise UsageError(str(error)) from None
    base = find_base_model(recipe.base_model)
    changed = base.changes_since(file.base_model)
    if changed:
        raise other_base(folder, base, changed)
    tell_unrecorded(folder, file)
    checkpoint = hashlib.sha256((path / CONFIG_FILE).read_bytes()).hexdigest()[:16]
    return FinishedRun(folder, recipe, tasks, base, adapter, checkpoint)

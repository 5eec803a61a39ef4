"""Opening a finished run: everything comes from its folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mtl_lora_cli.adapters.files import (
    CONFIG_FILE,
    AdapterFile,
    load_adapter,
    read_adapter_file,
)
from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.errors import UsageError
from mtl_lora_cli.machine.cards import pick_device, pick_dtype
from mtl_lora_cli.models.base import BaseModel, find_base_model, is_complete
from mtl_lora_cli.models.load import adapt, load_for_float32, load_model, load_tokenizer, longest_of
from mtl_lora_cli.models.packed import PackedModel
from mtl_lora_cli.models.trusted import settled
from mtl_lora_cli.recipe.load import load_recipe
from mtl_lora_cli.recipe.schema import Recipe
from mtl_lora_cli.runs.folder import RunFolder
from mtl_lora_cli.tasks.chosen import read_tasks
from mtl_lora_cli.tasks.task import Task
from mtl_lora_cli.visible import tell


@dataclass
class OpenRun:
    """A finished run with its model loaded.

    Attributes:
        folder, recipe, tasks: of the run.
        base: the base model's place on this disk.
        tokenizer: of the base model.
        packed: the adapted model.
        adapter: handle on its adapter.
        device, dtype: of the model.
        longest: positions that the model knows.
        checkpoint: hash of the adapter's configuration, checksums of its tensors included.
        trained_on: identity of the base model that the adapter was trained on, where that is not
            this one.
    """

    folder: RunFolder
    recipe: Recipe
    tasks: list[Task]
    base: BaseModel
    tokenizer: Any
    packed: PackedModel
    adapter: Adapter
    device: torch.device
    dtype: torch.dtype
    longest: int
    checkpoint: str
    trained_on: Mapping[str, str | None] | None = None

    @property
    def tokens_per_pass(self) -> int:
        """Tokens that are scored together: enough to keep the device busy, little memory."""
        return 32768 if self.device.type == "cuda" else 2048


def open_run(
    folder: RunFolder,
    *,
    quantization: str | None = None,
    force: bool = False,
    in_float32: bool = False,
) -> OpenRun:
    """Load a run's base model and adapter.

    Args:
        folder: of a finished run.
        quantization: another one than the recipe's.
        force: go on where the base model is not the one that the adapter was trained on.
        in_float32: compute in float32, whatever the recipe says; see `load_for_float32`.

    Raises:
        UsageError: the run is unfinished, or its base model is gone or another one by now.
    """
    path = folder.require_adapter()
    recipe = load_recipe(folder.recipe).recipe
    file = read_adapter_file(path)
    base = find_base_model(recipe.base_model)
    changed = base.changes_since(file.base_model)
    if changed and not force:
        raise other_base(folder, base, changed, "; --force goes on")
    tell_unrecorded(folder, file)
    device = pick_device()
    dtype = pick_dtype(recipe.dtype, device)
    load = load_for_float32 if in_float32 else load_model
    model = load(base, dtype=dtype, device=device, quantization=quantization or recipe.quantization)
    adapter = adapt(model, file.config, file.tasks)
    load_adapter(adapter, path)
    packed = PackedModel(model, adapter).eval()
    settled(packed, base, quantization=quantization or recipe.quantization)
    return OpenRun(
        folder=folder,
        recipe=recipe,
        tasks=read_tasks(folder),
        base=base,
        tokenizer=load_tokenizer(base),
        packed=packed,
        adapter=adapter,
        device=device,
        dtype=torch.float32 if in_float32 else dtype,
        longest=longest_of(model.config),
        checkpoint=hashlib.sha256((path / CONFIG_FILE).read_bytes()).hexdigest()[:16],
        trained_on=file.base_model if changed else None,
    )


def tell_unrecorded(folder: RunFolder, file: AdapterFile) -> None:
    """Say of an early version's adapter what it did not record; of several processes the first does."""
    if not is_complete(file.base_model) and os.environ.get("RANK", "0") == "0":
        tell(
            f"note: run '{folder.name}' was trained by an early version, which did not record its tokenizer "
            "and chat template: whether they are the same is not known"
        )


def other_base(folder: RunFolder, base: BaseModel, changed: str, how: str = "") -> UsageError:
    """What is said of a run whose base model is another one by now."""
    return UsageError(
        f"run '{folder.name}': the base model at {base.folder} is not the one that the adapter was "
        f"trained on ({changed}){how}"
    )

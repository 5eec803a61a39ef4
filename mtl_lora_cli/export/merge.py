"""Folding one task's adapter into the base weights, shard by shard.

W' = W + s · B'_t A, computed in float32 and cast once to the dtype that the shard stores.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.errors import MtlLoraError, UsageError
from mtl_lora_cli.models.base import BaseModel

Update = tuple[Tensor, Tensor, float]  # A [r, in], B' [out, r], s


def task_updates(adapter: Adapter, task: int) -> dict[str, Update]:
    """The task's ordinary LoRA for every adapted weight, under the weight's name, on the CPU."""
    updates = {}
    for path, layer in adapter.layers.items():
        down, up = layer.task_update(task)
        updates[f"{path}.weight"] = (
            down.float().cpu(),
            up.float().cpu(),
            adapter.config.scale(layer.rank),
        )
    return updates


def require_empty(folder: Path) -> None:
    """Refuse an output folder that holds something.

    Raises:
        UsageError: it exists and is not an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"output folder {folder} exists and is not empty; choose another with --output"
        )


def require_space(base: BaseModel, folder: Path) -> None:
    """Refuse to start a merge that the disk cannot hold.

    Raises:
        UsageError: with the space needed and the space there is.
    """
    needed = sum(path.stat().st_size for path in base.folder.iterdir() if path.is_file())
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UsageError(
            f"{existing}: {needed / 2**30:.1f} GiB are needed, {free / 2**30:.1f} GiB are free"
        )


def write_merged(
    base: BaseModel,
    updates: Mapping[str, Update],
    folder: Path,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Write a transformers folder: the base model's files with some weights changed.

    One shard is held in memory at a time. Files that are no weights are copied.

    Args:
        base: the full-precision base model.
        updates: weight name → its update; every one must be found.
        folder: an existing empty folder.
        say: called with a line for each shard.

    Raises:
        MtlLoraError: a weight is missing from the base model, or has another shape.
    """
    left = dict(updates)
    shards = sorted(base.folder.glob("*.safetensors"))
    for number, shard in enumerate(shards, start=1):
        say(f"merging {shard.name} ({number} of {len(shards)})")
        tensors: dict[str, Tensor] = {}
        with safe_open(shard, framework="pt") as file:
            metadata = file.metadata() or {"format": "pt"}
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = file.get_tensor(name)
                update = left.pop(name, None)
                tensors[name] = tensor if update is None else _updated(name, tensor, update)
        save_file(tensors, folder / shard.name, metadata=metadata)
    if left:
        raise MtlLoraError(f"{base.folder}: no weight '{next(iter(left))}' to merge into")
    for path in base.folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name != "README.md":
            shutil.copyfile(os.path.realpath(path), folder / path.name)
    _check_index(folder)


def _updated(name: str, weight: Tensor, update: Update) -> Tensor:
    down, up, scale = update
    if weight.shape != (up.shape[0], down.shape[1]):
        raise MtlLoraError(
            f"weight '{name}' has shape {list(weight.shape)}, "
            f"the adapter fits [{up.shape[0]}, {down.shape[1]}]"
        )
    return torch.addmm(weight.float(), up, down, alpha=scale).to(weight.dtype)


def _check_index(folder: Path) -> None:
    """The index names shards that are there."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for name in sorted(named):
            if not (folder / name).is_file():
                raise MtlLoraError(f"{index}: names the shard '{name}', which is not there")

"""Checkpoints: everything a run needs to go on as if it had never stopped, and nothing frozen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtl_lora_cli.adapters.files import load_adapter, save_adapter
from mtl_lora_cli.adapters.inject import Adapter
from mtl_lora_cli.errors import MtlLoraError
from mtl_lora_cli.runs.atomic import file_checksum, new_folder, write_json, write_text
from mtl_lora_cli.runs.folder import read_json, save_json

COMPLETE = "COMPLETE"
_OPTIMIZER = "optimizer.safetensors"
_RANDOM = "random.safetensors"
_STATE = "state.json"
_CHECKSUMS = "checksums.json"


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        step: optimiser steps done.
        metrics_bytes: length of metrics.jsonl at that moment.
        seconds: spent training.
        tokens: learned from, prompts included.
    """

    step: int
    metrics_bytes: int
    seconds: float
    tokens: int


def save_checkpoint(
    folder: Path,
    position: Position,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    base_model: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write `step-000200` with checksums, `COMPLETE` last, then remove the oldest beyond `keep`."""
    path = folder / f"step-{position.step:06d}"
    for number, other in _numbered(folder):
        if number >= position.step:  # of a future that this run has left
            shutil.rmtree(other)
    with new_folder(path) as temporary:
        save_adapter(adapter, temporary, base_model)
        save_file(_optimizer_tensors(optimizer, adapter), temporary / _OPTIMIZER)
        save_file(_random_states(), temporary / _RANDOM)
        save_json(temporary / _STATE, position.__dict__)
        sums = {file.name: file_checksum(file) for file in sorted(temporary.iterdir())}
        write_json(temporary / _CHECKSUMS, sums)
        write_text(temporary / COMPLETE, f"{position.step}\n")
    for _, old in _numbered(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run with their steps, oldest first."""
    found = ((path.name.removeprefix("step-"), path) for path in folder.glob("step-*"))
    return sorted((int(number), path) for number, path in found if number.isdigit())


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint whose files are what was written."""
    for _, path in reversed(_numbered(folder)):
        if (path / COMPLETE).is_file() and not list(_damaged(path)):
            return path
    return None


def load_checkpoint(path: Path, adapter: Adapter, optimizer: torch.optim.Optimizer) -> Position:
    """Put a run back to where it stood: adapter, optimiser and random states.

    Raises:
        MtlLoraError: a file is damaged or fits another adapter.
    """
    damaged = list(_damaged(path))
    if damaged:
        raise MtlLoraError(f"{path}: damaged: {', '.join(damaged)}")
    load_adapter(adapter, path)
    _restore_optimizer(optimizer, adapter, load_file(path / _OPTIMIZER))
    random = load_file(path / _RANDOM)
    torch.set_rng_state(random["cpu"])
    if torch.cuda.is_available() and "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"])
    state = read_json(path / _STATE)
    return Position(state["step"], state["metrics_bytes"], state["seconds"], state["tokens"])


def _damaged(path: Path) -> Iterator[str]:
    try:
        sums = json.loads((path / _CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        sums = None
    if not isinstance(sums, dict):
        yield _CHECKSUMS
        return
    for name, checksum in sums.items():
        if not (path / name).is_file() or file_checksum(path / name) != checksum:
            yield name


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _optimizer_tensors(optimizer: torch.optim.Optimizer, adapter: Adapter) -> dict[str, Tensor]:
    """The optimiser's state under the names of the adapter's tensors: `{name}/{state}`."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, tensor in adapter.tensors().items()
        for key, value in inner.state[tensor].items()
    }


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, adapter: Adapter, saved: Mapping[str, Tensor]
) -> None:
    inner = getattr(optimizer, "optimizer", optimizer)
    on_card = any(group.get("fused") or group.get("capturable") for group in inner.param_groups)
    own = adapter.tensors()
    for name in own:
        if f"{name}/step" not in saved:
            raise MtlLoraError(f"{_OPTIMIZER}: the state of '{name}' is missing")
    for name, value in saved.items():
        tensor_name, _, key = name.rpartition("/")
        if tensor_name not in own:
            raise MtlLoraError(f"{_OPTIMIZER}: unexpected tensor '{name}'")
        tensor = own[tensor_name]
        # `step` is a scalar that torch's AdamW keeps on the CPU, unless it runs as one kernel.
        device = value.device if key == "step" and not on_card else tensor.device
        inner.state[tensor][key] = value.to(device)

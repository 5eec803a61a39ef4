"""New tasks beside those of a trained adapter: what tasks share stays, rows of new tasks learn.

Every tensor is shared by all tasks, or has a row for each. A forward pass reads the shared ones and
the rows of the tasks that are present. So an adapter of the new tasks alone computes for them what
the joined one will; rows of other tasks need not be there while it learns, and nothing can reach
them: they are only written behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtl_lora_cli.adapters.files import (
    CONFIG_FILE,
    TENSOR_FILE,
    decoder_frames,
    framed,
    load_tensors,
    read_adapter_file,
    read_tensors,
    save_adapter,
)
from mtl_lora_cli.adapters.inject import DECODER, Adapter
from mtl_lora_cli.adapters.methods.base import Role
from mtl_lora_cli.errors import MtlLoraError


def start_beside(adapter: Adapter, folder: Path) -> None:
    """Give a fresh adapter of new tasks what all tasks of a trained one share, and freeze that.

    What belongs to a task starts as the mean over the trained tasks, from where less loss was reached
    than from the start of a fresh adapter (docs/adding-tasks.md), where its role does not say otherwise
    (`Role.added`).

    Args:
        adapter: of the new tasks alone, with the configuration of the trained one.
        folder: of the trained adapter.

    Raises:
        MtlLoraError: the folder is damaged, or of an adapter of another configuration.
    """
    file = read_adapter_file(folder)
    if file.config != adapter.config:
        raise MtlLoraError(f"{folder / CONFIG_FILE}: its configuration is not the recipe's adapter")
    own = adapter.tensors()
    start = {name: tensor for name, tensor in file.tensors.items() if not name.startswith(DECODER)}
    start |= {name: tensor.detach() for name, tensor in own.items() if name.startswith(DECODER)}
    for name, tensor in list(start.items()):
        role = _role(adapter, name)
        if role is None or not role.per_task:
            continue
        if role.added == "start":
            start[name] = own[name].detach()
        else:
            start[name] = tensor.mean(0, keepdim=True).expand(len(adapter.tasks), *tensor.shape[1:])
    load_tensors(adapter, start, folder / TENSOR_FILE)
    for name, tensor in own.items():
        tensor.requires_grad_(adapter.role(name).per_task or name.startswith(DECODER))


def save_beside(adapter: Adapter, known: Path, folder: Path, base_model: Mapping[str, Any]) -> None:
    """Write an adapter of the trained tasks and, behind them, the new ones.

    Args:
        adapter: of the new tasks alone, from `start_beside`.
        known: folder of the trained adapter.
        folder: to write into.
        base_model: identity of the base model.

    Raises:
        MtlLoraError: something of the trained tasks is not what it was, to the last bit.
    """
    file, learned = read_adapter_file(known), adapter.tensors()
    before = file.tensors
    common = {name: tensor for name, tensor in before.items() if not name.startswith(DECODER)}
    for name, tensor in common.items():
        if not adapter.role(name).per_task:
            _require_equal(name, learned[name].detach().cpu(), tensor)
    joined = framed(file, (*file.tasks, *adapter.tasks))
    tensors = {
        name: torch.cat([tensor, learned[name].detach().cpu()])
        if adapter.role(name).per_task
        else tensor
        for name, tensor in common.items()
    }
    decoders = {**before, **learned}
    tensors |= {n: t.detach().cpu() for n, t in decoders.items() if n.startswith(DECODER)}
    joined.decoders = decoder_frames(tensors)
    load_tensors(joined, tensors, known / TENSOR_FILE)
    save_adapter(joined, folder, base_model)
    after = read_tensors(folder)
    for name, tensor in before.items():
        _require_equal(name, after[name][: len(tensor)], tensor)


def _role(adapter: Adapter, name: str) -> Role | None:
    """Of a tensor of a file; None where the adapter has no such, which `load_tensors` says."""
    return adapter.role(name) if name in adapter.tensors() else None


def _require_equal(name: str, found: Tensor, expected: Tensor) -> None:
    if not torch.equal(found, expected):
        raise MtlLoraError(f"'{name}': what other tasks had learned was changed; this is a bug")

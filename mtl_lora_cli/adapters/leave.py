"""A task leaves an adapter: its rows are taken out, and nothing else changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mtl_lora_cli.adapters.files import (
    TENSOR_FILE,
    AdapterFile,
    decoder_frames,
    framed,
    load_tensors,
    read_tensors,
    save_adapter,
)
from mtl_lora_cli.adapters.inject import DECODER
from mtl_lora_cli.errors import MtlLoraError


def save_without(
    file: AdapterFile, leaving: Sequence[str], folder: Path, base_model: Mapping[str, Any]
) -> None:
    """Write an adapter of the other tasks.

    Args:
        file: of the adapter as it is.
        leaving: names of tasks; others must stay.
        folder: to write into.
        base_model: identity of the base model.

    Raises:
        MtlLoraError: something of the others is not what it was, to the last bit.
    """
    stay = [number for number, task in enumerate(file.tasks) if task not in leaving]
    adapter = framed(file, [file.tasks[number] for number in stay])
    gone = tuple(f"{DECODER}{task}:" for task in leaving)
    tensors = {name: tensor for name, tensor in file.tensors.items() if not name.startswith(gone)}
    adapter.decoders = decoder_frames(tensors)
    tensors = {
        name: tensor[stay] if adapter.role(name).per_task else tensor
        for name, tensor in tensors.items()
    }
    load_tensors(adapter, tensors, file.folder / TENSOR_FILE)
    save_adapter(adapter, folder, base_model)
    after = read_tensors(folder)
    for name, tensor in tensors.items():
        if not torch.equal(after[name], tensor):
            raise MtlLoraError(f"'{name}': what other tasks had learned was changed; this is a bug")

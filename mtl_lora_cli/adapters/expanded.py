"""Memory for weights that are made dense for a product, in rows that begin at multiples of 128 bytes.

A product of quantised weights makes its matrix where the one before it had its own. To make the next one on a second
stream while a product runs is no faster: see docs/benchmarks.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtl_lora_cli.kernels.backend import PITCH

_buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def pitched(shape: tuple[int, int]) -> int:
    """Values of a matrix whose rows begin at multiples of 128 bytes, where they have 16 bits."""
    return shape[0] * -(-shape[1] // PITCH) * PITCH


def laid(memory: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrix in flat memory of at least `pitched` values."""
    return memory[: pitched(shape)].view(shape[0], -1)[:, : shape[1]]


def buffer(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Memory for one matrix; whoever asks next gets the same."""
    key, wanted = (device, dtype), pitched(shape)
    if key not in _buffers or _buffers[key].numel() < wanted:
        _buffers[key] = torch.empty(wanted, dtype=dtype, device=device)
    return laid(_buffers[key], shape)

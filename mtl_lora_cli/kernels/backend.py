"""Whether an operation runs as a Triton kernel or as plain torch."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

PITCH = 64  # values of 16 bit in 128 bytes, the pieces in which memory is read


@cache
def _available() -> bool:
    return find_spec("triton") is not None


def in_triton(tensor: Tensor) -> bool:
    """Kernels where the tensor is on a card and Triton is installed; plain torch elsewhere.

    `MTL_LORA_KERNELS=plain` switches them off; `MTL_LORA_KERNELS=triton` switches them on wherever
    the tensor is, for Triton's interpreter.
    """
    wish = os.environ.get("MTL_LORA_KERNELS", "auto")
    if wish == "auto":
        return tensor.is_cuda and _available()
    return wish == "triton"


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device; nobody waits for a card that is still busy with what was asked before."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def roomy(like: Tensor, rows: int, columns: int, room: int) -> Tensor:
    """Memory for [rows, columns + room], of `like`'s dtype and device.

    With room, rows start at multiples of 128 bytes: a matrix product reads memory in such pieces.
    """
    if not room:
        return like.new_empty(rows, columns)
    width = columns + room
    return like.new_empty(rows, -(-width // PITCH) * PITCH)[:, :width]


def with_room(x: Tensor, room: int) -> Tensor:
    """x [N, d] copied into the first columns of [N, d + room]; x itself without room."""
    if not room:
        return x
    wide = roomy(x, x.shape[0], x.shape[1], room)
    wide[:, : x.shape[1]].copy_(x)
    return wide

"""Whether an operation runs as a Triton kernel or as plain torch."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

from torch import Tensor


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


def with_room(x: Tensor, room: int) -> Tensor:
    """x [N, d] copied into the first columns of [N, d + room]; x itself without room."""
    if not room:
        return x
    wide = x.new_empty(x.shape[0], x.shape[1] + room)
    wide[:, : x.shape[1]].copy_(x)
    return wide

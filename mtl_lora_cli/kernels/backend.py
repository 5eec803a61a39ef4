"""Whether an operation runs as a Triton kernel or as plain torch."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

from torch import Tensor


@cache
def _available() -> bool:
    return find_spec("triton") is not None


def interpreted() -> bool:
    """Triton's interpreter runs kernels on the CPU, slowly: for tests of the kernels themselves."""
    return os.environ.get("TRITON_INTERPRET") == "1" and _available()


def in_triton(tensor: Tensor) -> bool:
    """Kernels where the tensor is on a card and Triton is installed; plain torch elsewhere.

    `MTL_LORA_KERNELS=plain` switches them off.
    """
    if os.environ.get("MTL_LORA_KERNELS") == "plain":
        return False
    return (tensor.is_cuda or interpreted()) and _available()

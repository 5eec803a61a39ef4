"""A product of low rank added to a matrix in place:  Y ← Y + U Vᵀ,  U [N, k] and V [p, k] with a small k."""

from __future__ import annotations

import torch
from torch import Tensor

from mtl_lora_cli.kernels.backend import in_triton

MOST = 128  # of k, in our kernel
_HALF = (torch.bfloat16, torch.float16)


def add_product_(y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Y ← Y + U Vᵀ; sums in float32 or better, rounded once.

    Args:
        y: [N, p]; its rows may lie apart.
        u: [N, k], and v: [p, k]: wherever their values lie.

    Returns:
        y.
    """
    if in_triton(y) and u.shape[1] <= MOST and (y.dtype in _HALF or not y.is_cuda):
        from mtl_lora_cli.kernels import triton_low_rank

        return triton_low_rank.add_product_(y, u, v)
    return y.addmm_(u, v.T)

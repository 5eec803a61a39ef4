"""SwiGLU over a fused buffer: gate and up side by side.

a = silu(g) ⊙ u,    silu(g) = g σ(g)        (arXiv 2002.05202)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_lora_cli.kernels.backend import in_triton


def swiglu(both: Tensor) -> Tensor:
    """a [N, f] from [g | u] [N, 2f]."""
    if in_triton(both):
        from mtl_lora_cli.kernels import triton_swiglu

        return triton_swiglu.swiglu(both)
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_gradient(
    da: Tensor, both: Tensor, *, again: bool = False
) -> tuple[Tensor, Tensor | None]:
    """d[g | u] from da.

    dg = da u σ(g) (1 + g (1 − σ(g))),   du = da silu(g).

    Args:
        da: [N, f].
        both: [g | u] [N, 2f].
        again: compute a once more in passing.

    Returns:
        [N, 2f], and a [N, f] or None.
    """
    if in_triton(both):
        from mtl_lora_cli.kernels import triton_swiglu

        return triton_swiglu.swiglu_gradient(da, both, again=again)
    gate, up = both.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    gradient = torch.empty_like(both)
    half = gate.shape[-1]
    torch.mul(da * up, sigmoid * (1 + gate - silu), out=gradient[:, :half])
    torch.mul(da, silu, out=gradient[:, half:])
    return gradient, silu * up if again else None

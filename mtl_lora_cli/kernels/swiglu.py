"""SwiGLU over a fused buffer: gate and up side by side.

a = silu(g) ⊙ u,    silu(g) = g σ(g)        (arXiv 2002.05202)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_lora_cli.kernels.backend import in_triton, roomy, with_room


def swiglu(both: Tensor, *, room: int = 0) -> Tensor:
    """a [N, f + room], its last columns free, from [g | u] [N, 2f]."""
    if in_triton(both):
        from mtl_lora_cli.kernels import triton_swiglu

        return triton_swiglu.swiglu(both, room)
    gate, up = both.chunk(2, dim=-1)
    return with_room(F.silu(gate) * up, room)


def swiglu_gradient(
    da: Tensor, both: Tensor, *, again: bool = False, room: int = 0
) -> tuple[Tensor, Tensor | None]:
    """d[g | u] from da.

    dg = da u σ(g) (1 + g (1 − σ(g))),   du = da silu(g).

    Args:
        da: [N, f].
        both: [g | u] [N, 2f].
        again: compute a once more in passing.
        room: columns to leave free behind those of the gradient.

    Returns:
        [N, 2f + room], and a [N, f] or None. Without room it may be written over [g | u].
    """
    if in_triton(both):
        from mtl_lora_cli.kernels import triton_swiglu

        return triton_swiglu.swiglu_gradient(da, both, again=again, room=room)
    gate, up = both.chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    half = gate.shape[-1]
    gradient = roomy(both, both.shape[0], 2 * half, room)
    torch.mul(da * up, sigmoid * (1 + gate - silu), out=gradient[:, :half])
    torch.mul(da, silu, out=gradient[:, half : 2 * half])
    return gradient, silu * up if again else None

"""The gated activation of an MLP over a fused buffer: gate and up side by side.

    a = f(g) ⊙ u        (arXiv 2002.05202)

| activation | f(g) |
| --- | --- |
| `silu` | g σ(g) |
| `gelu_tanh` | ½ g (1 + tanh t),  t = √(2/π) (g + 0.044715 g³) |
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mtl_lora_cli.kernels.backend import in_triton, roomy, with_room

Activation = Literal["silu", "gelu_tanh"]
ROOT = math.sqrt(2 / math.pi)
CUBE = 0.044715


def gated(both: Tensor, activation: Activation = "silu", *, room: int = 0) -> Tensor:
    """a [N, f + room], its last columns free, from [g | u] [N, 2f]."""
    if in_triton(both):
        from mtl_lora_cli.kernels import triton_gated

        return triton_gated.gated(both, activation, room)
    gate, up = both.chunk(2, dim=-1)
    return with_room(_active(gate, activation) * up, room)


def gated_gradient(
    da: Tensor,
    both: Tensor,
    activation: Activation = "silu",
    *,
    again: bool = False,
    room: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """d[g | u] from da.

    dg = da u f′(g),   du = da f(g), with f′(g) = σ(g) (1 + g (1 − σ(g))) for `silu` and
    ½ (1 + tanh t) + ½ g (1 − tanh² t) √(2/π) (1 + 3 · 0.044715 g²) for `gelu_tanh`.

    Args:
        da: [N, f].
        both: [g | u] [N, 2f].
        activation: f.
        again: compute a once more in passing.
        room: columns to leave free behind those of the gradient.

    Returns:
        [N, 2f + room], and a [N, f] or None. Without room it may be written over [g | u].
    """
    if in_triton(both):
        from mtl_lora_cli.kernels import triton_gated

        return triton_gated.gated_gradient(da, both, activation, again=again, room=room)
    gate, up = both.chunk(2, dim=-1)
    half = gate.shape[-1]
    if both.dtype == torch.bfloat16:
        active = _active(gate, activation)
        gradient = roomy(both, both.shape[0], 2 * half, room)
        _through(da * up, gate, activation, gradient[:, :half])
    else:
        active, slope = _silu(gate) if activation == "silu" else _gelu(gate)
        gradient = roomy(both, both.shape[0], 2 * half, room)
        torch.mul(da * up, slope, out=gradient[:, :half])
    torch.mul(da, active, out=gradient[:, half : 2 * half])
    return gradient, active * up if again else None


def _active(gate: Tensor, activation: Activation) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def _through(gradient: Tensor, gate: Tensor, activation: Activation, out: Tensor) -> None:
    """gradient ⊙ f′(g), rounded once: torch's own is float32 inside."""
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(gradient, gate, grad_input=out)
    else:
        torch.ops.aten.gelu_backward.grad_input(gradient, gate, approximate="tanh", grad_input=out)


def _silu(gate: Tensor) -> tuple[Tensor, Tensor]:
    """f and f′."""
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    return silu, sigmoid * (1 + gate - silu)


def _gelu(gate: Tensor) -> tuple[Tensor, Tensor]:
    """f and f′."""
    square = gate * gate
    tanh = torch.tanh(ROOT * gate * (1 + CUBE * square))
    slope = 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh * tanh) * ROOT * (1 + 3 * CUBE * square)
    return 0.5 * gate * (1 + tanh), slope

"""Triton kernels of `gated.py`: every value read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtl_lora_cli.kernels.backend import roomy
from mtl_lora_cli.kernels.gated import CUBE, ROOT, Activation

_BLOCK = 2048


@triton.jit
def active_of(gate, GELU: tl.constexpr, ROOT: tl.constexpr, CUBE: tl.constexpr):
    """f(g)."""
    if GELU:  # ½ (1 + tanh t) = σ(2t)
        active = gate * tl.sigmoid(2.0 * ROOT * gate * (1.0 + CUBE * gate * gate))
    else:
        active = gate * tl.sigmoid(gate)
    return active


@triton.jit
def gradients_of(gradient, gate, up, GELU: tl.constexpr, ROOT: tl.constexpr, CUBE: tl.constexpr):
    """dg and f(g)."""
    if GELU:
        square = gate * gate
        sigmoid = tl.sigmoid(2.0 * ROOT * gate * (1.0 + CUBE * square))
        active = gate * sigmoid
        slope = sigmoid + 2.0 * ROOT * active * (1.0 - sigmoid) * (1.0 + 3.0 * CUBE * square)
        dgate = gradient * up * slope
    else:
        sigmoid = tl.sigmoid(gate)
        active = gate * sigmoid
        dgate = gradient * up * sigmoid * (1.0 + gate - active)
    return dgate, active


@triton.jit
def _gated(
    both,
    out,
    half,
    stride,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
    ROOT: tl.constexpr,
    CUBE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < half
    gate = tl.load(both + row * 2 * half + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * half + half + at, mask=inside, other=0.0).to(tl.float32)
    value = active_of(gate, GELU, ROOT, CUBE) * up
    tl.store(out + row * stride + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gated_gradient(
    da, both, dboth, out, half, stride,
    GELU: tl.constexpr, AGAIN: tl.constexpr, BLOCK: tl.constexpr, ROOT: tl.constexpr,
    CUBE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < half
    gate = tl.load(both + row * 2 * half + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * half + half + at, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(da + row * half + at, mask=inside, other=0.0).to(tl.float32)
    dgate, active = gradients_of(gradient, gate, up, GELU, ROOT, CUBE)
    tl.store(dboth + row * stride + at, dgate.to(dboth.dtype.element_ty), mask=inside)
    dup = gradient * active
    tl.store(dboth + row * stride + half + at, dup.to(dboth.dtype.element_ty), mask=inside)
    if AGAIN:
        tl.store(out + row * half + at, (active * up).to(out.dtype.element_ty), mask=inside)


def _launch(activation: Activation) -> dict[str, bool | int | float]:
    return {
        "GELU": activation == "gelu_tanh",
        "BLOCK": _BLOCK,
        "ROOT": ROOT,
        "CUBE": CUBE,
        "num_warps": 8,
    }


def gated(both: Tensor, activation: Activation, room: int) -> Tensor:
    """See `gated.gated`; contiguous."""
    rows, half = both.shape[0], both.shape[1] // 2
    out = roomy(both, rows, half, room)
    if rows:
        grid = (rows, triton.cdiv(half, _BLOCK))
        _gated[grid](both, out, half, out.stride(0), **_launch(activation))
    return out


def gated_gradient(
    da: Tensor, both: Tensor, activation: Activation, *, again: bool, room: int
) -> tuple[Tensor, Tensor | None]:
    """See `gated.gated_gradient`; contiguous."""
    rows, half = da.shape
    dboth = roomy(both, rows, 2 * half, room) if room else both
    out = torch.empty_like(da) if again else None
    if rows:
        grid = (rows, triton.cdiv(half, _BLOCK))
        _gated_gradient[grid](
            da, both, dboth, out, half, dboth.stride(0), AGAIN=again, **_launch(activation)
        )
    return dboth, out

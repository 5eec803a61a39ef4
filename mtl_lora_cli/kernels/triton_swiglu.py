"""Triton kernels of `swiglu.py`: every value read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtl_lora_cli.kernels.backend import roomy

_BLOCK = 1024


@triton.jit
def _swiglu(both, out, half, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < half
    gate = tl.load(both + row * 2 * half + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * half + half + at, mask=inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(out + row * stride + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_gradient(da, both, dboth, out, half, stride, AGAIN: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < half
    gate = tl.load(both + row * 2 * half + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * half + half + at, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(da + row * half + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dgate = gradient * up * sigmoid * (1.0 + gate - silu)
    tl.store(dboth + row * stride + at, dgate.to(dboth.dtype.element_ty), mask=inside)
    dup = gradient * silu
    tl.store(dboth + row * stride + half + at, dup.to(dboth.dtype.element_ty), mask=inside)
    if AGAIN:
        tl.store(out + row * half + at, (silu * up).to(out.dtype.element_ty), mask=inside)


def swiglu(both: Tensor, room: int) -> Tensor:
    """See `swiglu.swiglu`; contiguous."""
    rows, half = both.shape[0], both.shape[1] // 2
    out = roomy(both, rows, half, room)
    if rows:
        _swiglu[(rows, triton.cdiv(half, _BLOCK))](
            both, out, half, out.stride(0), BLOCK=_BLOCK, num_warps=4
        )
    return out


def swiglu_gradient(
    da: Tensor, both: Tensor, *, again: bool, room: int
) -> tuple[Tensor, Tensor | None]:
    """See `swiglu.swiglu_gradient`; contiguous."""
    rows, half = da.shape
    dboth = roomy(both, rows, 2 * half, room) if room else both
    out = torch.empty_like(da) if again else None
    if rows:
        _swiglu_gradient[(rows, triton.cdiv(half, _BLOCK))](
            da, both, dboth, out, half, dboth.stride(0), AGAIN=again, BLOCK=_BLOCK, num_warps=4
        )
    return dboth, out

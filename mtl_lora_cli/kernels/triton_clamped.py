"""Triton kernels of `clamped.py`: every value read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtl_lora_cli.kernels.clamped import Clamped

_BLOCK = 1024


@triton.jit
def _clamped(both, out, half, alpha, limit, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < half
    place = both + row * 2 * half + 2 * at
    gate = tl.minimum(tl.load(place, mask=inside, other=0.0).to(tl.float32), limit)
    up = tl.load(place + 1, mask=inside, other=0.0).to(tl.float32)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    value = (up + 1.0) * gate * tl.sigmoid(alpha * gate)
    tl.store(out + row * half + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _clamped_gradient(da, both, out, half, alpha, limit, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < half
    place = both + row * 2 * half + 2 * at
    raw_gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    raw_up = tl.load(place + 1, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(da + row * half + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.minimum(raw_gate, limit)
    up = tl.minimum(tl.maximum(raw_up, -limit), limit)
    sigmoid = tl.sigmoid(alpha * gate)
    active = gate * sigmoid
    dgate = gradient * (up + 1.0) * sigmoid * (1.0 + alpha * (gate - active))
    dgate = tl.where(raw_gate <= limit, dgate, 0.0)
    dup = tl.where((raw_up <= limit) & (raw_up >= -limit), gradient * active, 0.0)
    tl.store(place, dgate.to(both.dtype.element_ty), mask=inside)
    tl.store(place + 1, dup.to(both.dtype.element_ty), mask=inside)
    value = (up + 1.0) * active
    tl.store(out + row * half + at, value.to(out.dtype.element_ty), mask=inside)


def clamped(both: Tensor, how: Clamped) -> Tensor:
    """See `clamped.clamped`; contiguous."""
    rows, half = both.shape[0], both.shape[1] // 2
    out = both.new_empty(rows, half)
    if rows:
        grid = (rows, triton.cdiv(half, _BLOCK))
        _clamped[grid](both, out, half, how.alpha, how.limit, BLOCK=_BLOCK, num_warps=4)
    return out


def clamped_gradient(da: Tensor, both: Tensor, how: Clamped) -> tuple[Tensor, Tensor]:
    """See `clamped.clamped_gradient`; contiguous, and written over [g₀, u₀, g₁, …]."""
    rows, half = da.shape
    out = torch.empty_like(da)
    if rows:
        grid = (rows, triton.cdiv(half, _BLOCK))
        _clamped_gradient[grid](
            da, both, out, half, how.alpha, how.limit, BLOCK=_BLOCK, num_warps=4
        )
    return both, out
